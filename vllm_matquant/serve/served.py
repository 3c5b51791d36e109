"""What a server holds of a checkpoint: slices that are resident, one of them active, and the widths of each layer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from vllm_matquant.checkpoint.slice import Slice
from vllm_matquant.serve.elastic.offer import Offer


@dataclass(frozen=True)
class LayerWidths:
    """The widths of one layer of a server, for each of its output partitions (q, k and v of a fused layer).

    Attributes:
        active: the width that each partition is computed at now.
        resident: the widths, ascending, that each partition can be computed at: planes up to the last one and the
            decoders of all of them are in memory.
    """

    active: tuple[int, ...]
    resident: tuple[tuple[int, ...], ...]

    def segments(self) -> Iterator[tuple[range, LayerWidths]]:
        """The longest runs of partitions with the same resident widths, each with its widths.

        A segment keeps planes and decoders of its own in memory, so that a part of a fused layer pays for its own bits.
        """
        start = 0
        for _, run in itertools.groupby(self.resident):
            end = start + len(list(run))
            yield range(start, end), LayerWidths(self.active[start:end], self.resident[start:end])
            start = end

    @property
    def resident_widths(self) -> tuple[int, ...]:
        """The widths that some partition is resident at, ascending."""
        return tuple(sorted({width for widths in self.resident for width in widths}))


@dataclass(frozen=True)
class Served:
    """The slices of a checkpoint that a server holds.

    Attributes:
        active: what it computes with at first.
        resident: what it holds in memory, ``active`` among it.
        activation_bits: bits to which kernels round activations, None for the default of each width.
        offer: what requests and operators can choose from, the same slices as ``resident``; None of a server that
            stays as it started.
        draft: what guesses the next tokens, which ``active`` then checks; the other one of ``resident``, if there is
            one.
    """

    active: Slice
    resident: tuple[Slice, ...]
    activation_bits: int | None = None
    offer: Offer | None = None
    draft: Slice | None = None

    def of_layer(self, parts: Sequence[str]) -> LayerWidths:
        """The widths of a layer whose output partitions are the layers ``parts`` of the checkpoint."""
        resident = tuple(tuple(sorted({_width(each, part) for each in self.resident})) for part in parts)
        return LayerWidths(tuple(_width(self.active, part) for part in parts), resident)

    def by_slot(self, parts: Sequence[str]) -> list[tuple[int, ...]]:
        """The widths of these layers of the checkpoint in each resident slice."""
        return [tuple(_width(each, part) for part in parts) for each in self.resident]

    @property
    def has_readers(self) -> bool:
        """Whether each resident slice is read by a reader of its own, with its own decoders if it has such."""
        return self.offer is not None or self.draft is not None

    @property
    def suffixes(self) -> dict[str, str]:
        """Of the names of decoders that belong to one slice alone, by their files; none where all share theirs."""
        own = dict.fromkeys(each.decoders_file for each in self.resident if each.decoders_file)
        return {} if not self.has_readers else {file: f"_own{index}" for index, file in enumerate(own)}

    def own_decoders(self, parts: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """The widths of these layers of the checkpoint in each slice that has decoders of its own, by their suffix."""
        by_file = {each.decoders_file: each for each in self.resident}
        return {suffix: tuple(_width(by_file[file], part) for part in parts) for file, suffix in self.suffixes.items()}

    def alone(self) -> Served:
        """What a server would hold that has nothing but the active slice."""
        return Served(self.active, (self.active,), self.activation_bits)

    def renamed(self, rename: Callable[[dict[str, int]], Mapping[str, int]]) -> Served:
        """The same with other names of layers.

        Args:
            rename: makes of {name: width} the same by other names.
        """

        def changed(of: Slice) -> Slice:
            return replace(of, widths=rename(dict(of.widths)))

        draft = None if self.draft is None else changed(self.draft)
        return replace(self, active=changed(self.active), resident=tuple(map(changed, self.resident)), draft=draft)


def _width(of: Slice, layer: str) -> int:
    # A head that is tied to the embedding has no codes of its own, and no width: vLLM makes it, then drops it.
    return of.widths.get(layer, of.widest)
