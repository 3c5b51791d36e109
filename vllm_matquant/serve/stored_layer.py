"""A layer as it comes from disk: parameters that vLLM's loaders fill and cut, until they are packed for a kernel."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch.nn import Module, Parameter
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    ModelWeightParameter,
)

from vllm_matquant.checkpoint.decoder import Decoder, part_name
from vllm_matquant.checkpoint.errors import MissingTensorError
from vllm_matquant.checkpoint.names import WEIGHT_BASE, plane_name
from vllm_matquant.checkpoint.packing import slice_planes
from vllm_matquant.checkpoint.spec import BASE_BITS, Format
from vllm_matquant.kernels.weight import StoredSegment
from vllm_matquant.serve.served import LayerWidths

_SUFFIX = re.compile(r"_own\d+$")  # see Served.suffixes


@dataclass(frozen=True)
class Cut:
    """A rank's part of a layer that vLLM computes as one.

    Attributes:
        names: in the checkpoint, of the layer that each output partition belongs to. Where a layer is already fused in
            the checkpoint, its one name stands for all partitions.
        sizes: rows of each output partition on this rank.
        in_features: columns on this rank.
        group_size: columns that share a decoder.
        per_channel: whether a row has one decoder, which tensor parallelism then never cuts.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    in_features: int
    group_size: int
    per_channel: bool

    def rows(self, partitions: Iterable[int]) -> int:
        """Rows of some partitions."""
        return sum(self.sizes[partition] for partition in partitions)


class _OfParts:
    """Makes a parameter of vLLM's hold the rows of some partitions of a fused layer only.

    Attributes:
        first_rows: where the rows of each of these partitions begin, by where they begin in the whole layer.
    """

    first_rows: dict[int, int]

    def load_merged_column_weight(self, loaded_weight: torch.Tensor, **place: Any) -> None:
        super().load_merged_column_weight(loaded_weight, **self._moved(place))  # type: ignore[misc]

    def load_qkv_weight(self, loaded_weight: torch.Tensor, **place: Any) -> None:
        super().load_qkv_weight(loaded_weight, **self._moved(place))  # type: ignore[misc]

    def _moved(self, place: dict[str, Any]) -> dict[str, Any]:
        return place | {"shard_offset": self.first_rows[place["shard_offset"]]}


class _WeightOfParts(_OfParts, ModelWeightParameter): ...


class _GroupScaleOfParts(_OfParts, GroupQuantScaleParameter): ...


class _ChannelScaleOfParts(_OfParts, ChannelQuantScaleParameter): ...


class _SharedOfParts(BasevLLMParameter):
    """What all rows of a partition share: every rank has all of it.

    vLLM's loaders do not see it, for they would cut it as rows where a layer is already fused in the checkpoint.

    Attributes:
        partitions: those that have some of it here, all as much, one after the other.
    """

    partitions: Sequence[int]

    def load_partitions(self, loaded_weight: torch.Tensor, partitions: Iterable[int]) -> None:
        """Copy what the checkpoint has to each of some partitions."""
        parts = self.data.unflatten(0, (len(self.partitions), -1))
        for partition in partitions:
            parts[self.partitions.index(partition)].copy_(loaded_weight)


class StoredLayer:
    """The tensors of a layer on their way from disk: those planes and decoders of each partition that are resident.

    They are parameters of ``layer`` between the construction and :meth:`take`.

    Args:
        layer: vLLM's layer.
        checkpoint_format: the checkpoint's format.
        cut: the rank's part of the layer.
        widths: of its partitions.
        weight_loader: vLLM's, of the layer.
        own_decoders: widths of its partitions in slices that have decoders of their own, by the suffix of these.
    """

    def __init__(
        self,
        layer: Module,
        checkpoint_format: Format,
        cut: Cut,
        widths: LayerWidths,
        weight_loader: Callable[..., None],
        own_decoders: Mapping[str, Sequence[int]] = MappingProxyType({}),
    ) -> None:
        self.cut, self.segments, self.own_decoders = cut, list(widths.segments()), own_decoders
        # The rank's cut of the layer is a layer of this format, save that its group size follows from the whole layer.
        self.format = dataclasses.replace(
            checkpoint_format, widths=checkpoint_format.widths_of(cut.names[0]), group_size=cut.group_size,
            layer_group_sizes={}, layer_widths={},
        )  # fmt: skip
        # Of tensors that all rows of a partition share, their lengths for each partition.
        self._shared = {
            part_name(part, width): len(cut.sizes) * spec.shape[:1]
            for width in self.format.widths
            for part, spec in self.format.decoder_kind.form(width).parts(1, 1).items()
            if part in self.format.decoder_kind.form(width).shared
        }
        self.owners = self._find_owners()
        self._arrived: dict[str, set[int]] = {name: set() for name in self.owners}
        for name, partitions in self.owners.items():
            stored = self.format.tensors_of_layer(cut.rows(partitions), cut.in_features, layers=len(partitions))
            plain = _SUFFIX.sub("", name)
            [spec] = [tensors[plain] for tensors in stored.values() if plain in tensors]
            data = torch.empty(spec.shape, dtype=spec.dtype)
            layer.register_parameter(name, self._parameter(name, data, self._recording(name, weight_loader)))

    def predicted_bytes(self, widths_alone: LayerWidths | None = None) -> int:
        """Bytes of planes and decoders that the format predicts for this rank's cut of the layer.

        Args:
            widths_alone: as if just these widths were resident; by default those that are.
        """
        kind, cut = self.format.decoder_kind, self.cut
        total = 0
        for partitions, widths in self.segments if widths_alone is None else widths_alone.segments():
            rows, resident = cut.rows(partitions), widths.resident_widths
            total += self.format.resident_bytes(rows, cut.in_features, resident[-1], layers=len(partitions))
            size = rows, cut.in_features // cut.group_size, len(partitions)
            total += sum(kind.form(width).nbytes(*size) for width in resident[:-1])
            for own in self.own_decoders.values() if widths_alone is None else ():
                total += sum(kind.form(width).nbytes(*size) for width in {own[each] for each in partitions})
        return total

    def take(self, layer: Module) -> tuple[list[StoredSegment], dict[str, list[list[Decoder]]]]:
        """Take the tensors from the layer, to be packed.

        Args:
            layer: vLLM's layer, whose parameters they are.

        Returns:
            The segments, and for each suffix of decoders that belong to one slice those of each segment.

        Raises:
            MissingTensorError: a tensor of one of the layer's parts did not come from the checkpoint.
        """
        self._check_arrivals()
        stored = {name: layer.get_parameter(name).data for name in self.owners}
        for name in stored:
            delattr(layer, name)
        own = {
            suffix: [self._own_decoders(stored, suffix, partitions, widths) for partitions, _ in self.segments]
            for suffix, widths in self.own_decoders.items()
        }
        return [self._segment(stored, *segment) for segment in self.segments], own

    def _own_decoders(
        self, stored: dict[str, torch.Tensor], suffix: str, partitions: range, widths: Sequence[int]
    ) -> list[Decoder]:
        """The decoders of a segment that belong to one slice; zeros for rows that it has at another width."""
        decoders = []
        for width in sorted({widths[partition] for partition in partitions}):
            form = self.format.decoder_kind.form(width)
            parts = {}
            for part in form.parts(1, 1):
                name = part_name(part, width) + suffix
                tensor = stored[name]
                rows = [
                    self._rows_of(range(each, each + 1), tensor, name)
                    if widths[each] == width
                    else tensor.new_zeros(self._lengths(name)[each], *tensor.shape[1:])
                    for each in partitions
                ]
                parts[part] = torch.cat(rows)
            decoders.append(Decoder(form, width, parts))
        return decoders

    def _segment(self, stored: dict[str, torch.Tensor], partitions: range, widths: LayerWidths) -> StoredSegment:
        own = {name: self._rows_of(partitions, tensor, name) for name, tensor in stored.items()}
        base, planes = self._sliced(own, widths.resident_widths[-1])
        kind = self.format.decoder_kind
        decoders = [kind.form(width).from_tensors(own.__getitem__, width) for width in widths.resident_widths]
        sizes = [self.cut.sizes[partition] for partition in partitions]
        return StoredSegment(base, planes, decoders, sizes, widths.active)

    def _find_owners(self) -> dict[str, list[int]]:
        """The tensors that are kept, and of which partitions each is kept."""
        owners: defaultdict[str, list[int]] = defaultdict(list)
        for partitions, widths in self.segments:
            stored_width = self.format.stored_width(widths.resident_widths[-1])
            planes = [plane_name(width) for width in range(BASE_BITS + 1, stored_width + 1)]
            decoders = [
                part_name(part, width)
                for width in widths.resident_widths
                for part in self.format.decoder_kind.form(width).parts(1, 1)
            ]
            for name in (WEIGHT_BASE, *planes, *decoders):
                owners[name] += partitions
        for suffix, widths_of in self.own_decoders.items():
            for partition, width in enumerate(widths_of):
                for part in self.format.decoder_kind.form(width).parts(1, 1):
                    owners[part_name(part, width) + suffix].append(partition)
        return dict(owners)

    def _rows_of(self, partitions: range, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """The rows of some partitions in a tensor that holds those of its owners; none if these are not among them."""
        owners, lengths = self.owners[name], self._lengths(name)
        start = sum(lengths[partition] for partition in owners if partition < partitions.start)
        return tensor.narrow(0, start, sum(lengths[partition] for partition in set(owners) & set(partitions)))

    def _lengths(self, name: str) -> Sequence[int]:
        """How long the tensor ``name`` is along its first dimension, for each partition."""
        return self._shared.get(_SUFFIX.sub("", name)) or self.cut.sizes

    def _parameter(self, name: str, data: torch.Tensor, weight_loader: Callable[..., None]) -> Parameter:
        """A parameter of vLLM's that tensor parallelism cuts as the tensor ``name`` must be cut."""
        partitions, cut, lengths = self.owners[name], self.cut, self._lengths(name)
        if lengths is not cut.sizes:
            parameter = _SharedOfParts(data=data, weight_loader=weight_loader)
            parameter.partitions = partitions
            return parameter
        if name == WEIGHT_BASE or name.startswith("weight_plane"):
            parameter = _WeightOfParts(data=data, input_dim=1, output_dim=0, weight_loader=weight_loader)
        elif cut.per_channel or name.startswith("weight_step"):
            parameter = _ChannelScaleOfParts(data=data, output_dim=0, weight_loader=weight_loader)
        else:
            parameter = _GroupScaleOfParts(data=data, input_dim=1, output_dim=0, weight_loader=weight_loader)
        parameter.first_rows = {
            cut.rows(range(partition)): cut.rows(partitions[:index]) for index, partition in enumerate(partitions)
        }
        return parameter

    def _recording(self, name: str, weight_loader: Callable[..., None]) -> Callable[..., None]:
        """``weight_loader`` that also notes which partitions of the tensor ``name`` have come."""
        arrived, every = self._arrived[name], self.owners[name]

        def load(param: Parameter, loaded_weight: torch.Tensor, shard_id: Any = None) -> None:
            if shard_id is None:  # the layer is not fused, or was already fused in the checkpoint
                came: Sequence[int] = every
            elif isinstance(shard_id, str):
                came = ["qkv".index(shard_id)]
            else:
                came = shard_id if isinstance(shard_id, tuple) else [shard_id]
            if isinstance(param, _SharedOfParts):
                param.load_partitions(loaded_weight, came)
            else:
                weight_loader(param, loaded_weight, *([] if shard_id is None else [shard_id]))
            arrived.update(came)

        return load

    def _check_arrivals(self) -> None:
        # vLLM reports no missing tensors for quantized models and would serve uninitialized memory.
        for name, arrived in self._arrived.items():
            for partition in self.owners[name]:
                if partition not in arrived:
                    part = self.cut.names[partition]
                    raise MissingTensorError(part, name, "no such tensor among those loaded", "one")

    def _sliced(self, stored: dict[str, torch.Tensor], width: int) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """Base and planes of a width, cut from what had to be read to make them."""
        stored_width = self.format.stored_width(width)
        planes = [stored[plane_name(plane)] for plane in range(BASE_BITS + 1, stored_width + 1)]
        return slice_planes(stored[WEIGHT_BASE], planes, self.cut.in_features, width, self.format.slicing)
