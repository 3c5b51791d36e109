"""A linear layer in memory: what is resident, what is active, and the handle by which compiled graphs name it.

Planes and decoders have shapes that follow from the widths that are resident. A compiled graph knows none of them: it
passes a handle, an int64 tensor [1] on the CPU that names an entry of a registry, to an operator that looks up the
rest. So one graph serves every width and every mix of widths.

Partitions (q, k, v of a fused layer) with the same resident widths make a segment, with tensors of its own. All
segments of a weight are computed in one call.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from vllm_matquant.checkpoint.decoder import KINDS, Decoder, DecoderKind
from vllm_matquant.checkpoint.spec import BASE_BITS
from vllm_matquant.kernels import ops
from vllm_matquant.kernels.kernel import Kernel, Layout
from vllm_matquant.kernels.layout import ceil_div, tile_count
from vllm_matquant.kernels.plane_store import SharedPlanes


class NotResidentError(ValueError):
    """A width was asked for whose planes or decoders are not in memory."""


@dataclass(frozen=True, eq=False)
class StoredSegment:
    """Partitions that are to be kept together, as they lie on disk.

    Attributes:
        base: uint8 [sum(output_sizes), ceil(in_features/4)], the two most significant bits of each code.
        planes: for each further bit up to the resident width uint8 [sum(output_sizes), ceil(in_features/8)].
        decoders: of the widths that are to be resident, with sum(output_sizes) rows.
        output_sizes: rows of each partition.
        active_widths: what each partition is to be read at.
    """

    base: torch.Tensor
    planes: Sequence[torch.Tensor]
    decoders: Sequence[Decoder]
    output_sizes: Sequence[int]
    active_widths: Sequence[int]

    @property
    def resident_width(self) -> int:
        """Bits of each code that there are."""
        return BASE_BITS + len(self.planes)

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """The widths that have decoders."""
        return tuple(decoder.width for decoder in self.decoders)


@dataclass(frozen=True, eq=False)
class ResidentSegment:
    """The tensors of some partitions in memory, which every user of them shares.

    Attributes:
        planes: in the weight's layout, on the kernel's device.
        decoders: uint8 [bytes], in the weight's layout, on the kernel's device: those of one width after another's.
        decoder_widths: the widths that have decoders, in the order of ``decoders``.
        output_sizes: rows of each partition.
        width: bits of each code that the planes hold.
    """

    planes: torch.Tensor
    decoders: torch.Tensor
    decoder_widths: tuple[int, ...]
    output_sizes: tuple[int, ...]
    width: int

    @property
    def nbytes(self) -> int:
        """Bytes of planes and decoders."""
        return self.planes.nbytes + self.decoders.nbytes

    @property
    def usable_widths(self) -> list[int]:
        """The widths that can be active: they have decoders and all of their planes."""
        return sorted(width for width in self.decoder_widths if width <= self.width)


@dataclass(frozen=True, eq=False)
class PackedSegment:
    """Partitions as one user reads them.

    Attributes:
        resident: the tensors in memory.
        active_width: int32 [partitions] on the kernel's device: the width that each partition is read at now.
    """

    resident: ResidentSegment
    active_width: torch.Tensor


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A linear layer, or a rank's cut of one, in memory.

    It is freed when nothing refers to it: keep it as long as its handle is in use.

    Attributes:
        kernel: what reads it.
        layout: of its planes and decoders.
        decoder_kind: of its decoders.
        in_features: columns.
        group_size: columns that share a decoder.
        segments: in the order of the outputs.
        activation_bits: how far products may round activations (see :func:`vllm_matquant.kernels.ops.linear`).
        handle: int64 [1] on the CPU, what operators find the weight by. Its value is never used again.

    Raises:
        NotResidentError: an active width has no decoder or is more than the resident width.
        RuntimeError: the library refuses the dtype or shape of a tensor.
    """

    kernel: Kernel
    layout: Layout
    decoder_kind: DecoderKind
    in_features: int
    group_size: int
    segments: tuple[PackedSegment, ...]
    activation_bits: int | None = None
    handle: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._check_widths(self.active_widths)
        number = self._register() if self.kernel.in_library else next(_numbers)
        _weights[number] = self
        object.__setattr__(self, "handle", torch.tensor([number]))

    def __reduce__(self) -> str:
        raise TypeError("a packed weight cannot be copied or sent to another process: pack it there")

    def _register(self) -> int:
        number = ops.new_weight(
            self.in_features, self.group_size, self.decoder_kind.name, self.layout.name, self.activation_bits
        )
        weakref.finalize(self, ops.free_weight, number).atexit = False
        for segment in self.segments:
            resident = segment.resident
            ops.add_segment(
                number,
                resident.planes,
                resident.decoders,
                segment.active_width,
                resident.decoder_widths,
                resident.output_sizes,
            )
        return number

    def readers(
        self, widths: Sequence[Sequence[int]], decoders: Sequence[Sequence[Sequence[Decoder]] | None] = ()
    ) -> list[PackedWeight]:
        """Further readers of the same tensors, each at widths of its own.

        The active widths of all of them lie one after the other's, int32 [readers, partitions] for each segment: a GPU
        finds those of a reader by its place.

        Args:
            widths: for each reader those of each partition.
            decoders: for each reader those of each segment, to be read in the place of those in memory, for all rows of
                the segment; None, or nothing for any reader, for those in memory.

        Raises:
            NotResidentError: a width has no decoder or not all of its planes in memory.
        """
        for each in widths:
            self._check_widths(each)
        own = decoders or [None] * len(widths)
        segments: list[list[PackedSegment]] = [[] for _ in widths]
        first = 0
        for index, segment in enumerate(self.segments):
            last = first + len(segment.active_width)
            table = segment.active_width.new_tensor([each[first:last] for each in widths])
            for reader, active_width, replaced in zip(segments, table, own, strict=True):
                resident = segment.resident if replaced is None else self._decoded_by(segment, replaced[index])
                reader.append(PackedSegment(resident, active_width))
            first = last
        return [replace(self, segments=tuple(each)) for each in segments]

    def _decoded_by(self, segment: PackedSegment, decoders: Sequence[Decoder]) -> ResidentSegment:
        """The tensors of a segment with other decoders."""
        resident = segment.resident
        device = resident.decoders.device
        where = torch.device("cpu") if self.layout.packs_on_cpu else device
        packed = self.layout.pack_decoders([each.to(where) for each in decoders], resident.output_sizes)
        widths = tuple(each.width for each in decoders)
        return replace(resident, decoders=packed.to(device), decoder_widths=widths)

    def decoders_of(self, segment: PackedSegment, tile_rows: int) -> dict[int, torch.Tensor]:
        """The decoders of each resident width of a segment, views in the weight's layout.

        Args:
            segment: one of this weight's.
            tile_rows: rows of a tile of the layout.

        Returns:
            For each width uint8 [rows of tiles, bytes of a row of tiles].
        """
        count = tile_count(segment.resident.output_sizes, tile_rows)
        return {width: rows.view(count, -1) for width, (_, rows) in self._split_decoders(segment, tile_rows).items()}

    def shared_of(self, segment: PackedSegment, tile_rows: int) -> dict[int, torch.Tensor]:
        """What all rows of a partition share of their decoders, for each resident width of a segment.

        Args:
            segment: one of this weight's.
            tile_rows: rows of a tile of the layout.

        Returns:
            For each width uint8 [partitions, bytes], none where rows share nothing; views in the weight's layout.
        """
        count = len(segment.resident.output_sizes)
        return {
            width: shared.view(count, shared.numel() // count)
            for width, (shared, _) in self._split_decoders(segment, tile_rows).items()
        }

    def _split_decoders(self, segment: PackedSegment, tile_rows: int) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """The bytes of each resident width's decoders: what rows share, which is first, and what each row has."""
        resident, groups = segment.resident, ceil_div(self.in_features, self.group_size)
        count = tile_count(resident.output_sizes, tile_rows)
        forms = [self.decoder_kind.form(width) for width in resident.decoder_widths]
        sizes = [
            (form.nbytes(0, groups, len(resident.output_sizes)), count * form.nbytes(tile_rows, groups, 0))
            for form in forms
        ]
        parts = iter(resident.decoders.split([size for pair in sizes for size in pair]))
        return {width: (next(parts), next(parts)) for width in resident.decoder_widths}

    @property
    def output_sizes(self) -> list[int]:
        """Rows of each partition."""
        return [size for segment in self.segments for size in segment.resident.output_sizes]

    @property
    def out_features(self) -> int:
        """Rows of all partitions."""
        return sum(self.output_sizes)

    @property
    def resident_bytes(self) -> int:
        """Bytes of planes and decoders, whoever else shares them."""
        return sum(segment.resident.nbytes for segment in self.segments)

    @property
    def active_widths(self) -> list[int]:
        """The width that each partition is read at now (waits for the device)."""
        return [width for segment in self.segments for width in segment.active_width.tolist()]

    def set_active(self, widths: Sequence[int]) -> None:
        """Read the partitions at other widths from now on.

        Nothing is allocated and no address changes, so that captured graphs follow. If one width is refused, all stay
        as they were.

        Args:
            widths: one for each partition.

        Raises:
            NotResidentError: a width has no decoder or not all of its planes in memory.
            ValueError: there are more or fewer widths than partitions.
        """
        self._check_widths(widths)
        remaining = iter(widths)
        for segment in self.segments:
            own = list(itertools.islice(remaining, len(segment.active_width)))
            segment.active_width.copy_(torch.tensor(own, dtype=torch.int32))

    def _check_widths(self, widths: Sequence[int]) -> None:
        usable = [segment.resident.usable_widths for segment in self.segments for _ in segment.resident.output_sizes]
        if len(widths) != len(usable):
            raise ValueError(f"active widths: found {len(widths)}, expected one for each of {len(usable)} partitions")
        for partition, (width, resident) in enumerate(zip(widths, usable, strict=True)):
            if width not in resident:
                raise NotResidentError(
                    f"active width of partition {partition}: found {width}, expected one of the resident {resident}"
                )


_weights: weakref.WeakValueDictionary[int, PackedWeight] = weakref.WeakValueDictionary()
_numbers = itertools.count(-1, -1)  # of weights that the library, which counts from 1, does not know


def find_weight(handle: torch.Tensor) -> PackedWeight:
    """The weight that a handle (int64 [1], on the CPU) names.

    Raises:
        ValueError: there is none, or it has been freed.
    """
    number = int(handle.item())
    try:
        return _weights[number]
    except KeyError:
        raise ValueError(
            f"weight: found {number}, expected the handle of a packed weight that has not been freed"
        ) from None


def pack_segments(
    kernel: Kernel,
    layout: Layout,
    segments: Sequence[StoredSegment],
    in_features: int,
    group_size: int,
    device: torch.device | str,
    activation_bits: int | None = None,
    shared: SharedPlanes | None = None,
) -> PackedWeight:
    """A weight for a kernel, in a layout of its choice: what most kernels' :meth:`Kernel.pack` does.

    Args:
        kernel: what will read it.
        layout: of planes and decoders.
        segments: what is to be resident, in the order of the outputs.
        in_features: columns.
        group_size: columns that share a decoder.
        device: where the kernel runs.
        activation_bits: how far products may round activations.
        shared: where other users of the same layer find its tensors; by default they are this weight's own.

    Raises:
        NotResidentError: an active width has no decoder or is more than the resident width.
        ValueError: the decoders have forms that are not of one kind.
    """
    device = torch.device(device)
    kind = _kind_of([decoder for segment in segments for decoder in segment.decoders])

    def make(segment: StoredSegment) -> ResidentSegment:
        where = torch.device("cpu") if layout.packs_on_cpu else device
        base, planes = segment.base.to(where), [plane.to(where) for plane in segment.planes]
        decoders = [decoder.to(where) for decoder in segment.decoders]
        return ResidentSegment(
            layout.pack_planes(base, planes, segment.output_sizes).to(device),
            layout.pack_decoders(decoders, segment.output_sizes).to(device),
            segment.decoder_widths,
            tuple(segment.output_sizes),
            segment.resident_width,
        )

    packed = []
    for index, segment in enumerate(segments):
        if shared is None:
            resident = make(segment)
        else:
            key = (
                *(shared.checkpoint, shared.layer, shared.cut, index, tuple(segment.output_sizes)),
                *(layout.name, segment.resident_width, segment.decoder_widths, str(device)),
            )
            resident = shared.store.share(key, lambda segment=segment: make(segment))  # type: ignore[misc]
        active_width = torch.tensor(segment.active_widths, dtype=torch.int32).to(device)
        packed.append(PackedSegment(resident, active_width))
    return PackedWeight(kernel, layout, kind, in_features, group_size, tuple(packed), activation_bits)


def _kind_of(decoders: Sequence[Decoder]) -> DecoderKind:
    """The kind that has these decoders; where only wide ones are resident, the first of several."""
    for kind in KINDS.values():
        if all(decoder.form == kind.form(decoder.width) for decoder in decoders):
            return kind
    found = {decoder.width: decoder.form.name for decoder in decoders}
    raise ValueError(f"decoders: found the forms {found} by width, expected those of one kind: {', '.join(KINDS)}")
