"""The linear method: from the tensors on disk to resident planes, and the product with them."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.nn import Module, Parameter
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.parameter import ChannelQuantScaleParameter, GroupQuantScaleParameter, ModelWeightParameter

from vllm_matquant.checkpoint.decoder import part_name
from vllm_matquant.checkpoint.errors import ConfigError, MissingTensorError
from vllm_matquant.checkpoint.names import CONFIG_FILE, WEIGHT_BASE, plane_name
from vllm_matquant.checkpoint.packing import pack_codes, slice_codes, unpack_codes
from vllm_matquant.checkpoint.spec import BASE_BITS, PARENT_BITS, Format
from vllm_matquant.kernels.memory import WeightMemory
from vllm_matquant.kernels.support import select_kernel
from vllm_matquant.serve.precision import LayerPrecision, Precision

_Setting = TypeVar("_Setting")

_memory = WeightMemory()  # of all layers, on the CPU


@dataclass(frozen=True)
class _Segment:
    """Output partitions that are kept and computed together, see :meth:`LayerPrecision.segments`.

    Attributes:
        partitions: which.
        precision: their widths.
        index: of the segment in its layer.
    """

    partitions: range
    precision: LayerPrecision
    index: int

    @property
    def planes(self) -> str:
        return self._name("planes")

    @property
    def decoders(self) -> str:
        return self._name("decoders")

    @property
    def active_width(self) -> str:
        return self._name("active_width")

    def _name(self, tensor: str) -> str:
        """The attribute of the layer: the first segment of a layer, mostly its only one, needs no number."""
        return f"{tensor}_{self.index}" if self.index else tensor


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


@register_weight_loader_v2_supported_method
class MatquantLinearMethod(LinearMethodBase):
    """Loads, repacks and applies one linear layer; vLLM makes one for each layer.

    Args:
        checkpoint_format: the checkpoint's format.
        precision: the widths of the model.
        parts: names in the checkpoint of the layers that this layer fuses, in the order of its output partitions.
    """

    def __init__(self, checkpoint_format: Format, precision: Precision, parts: Sequence[str]) -> None:
        self.format = checkpoint_format
        self.model_precision = precision
        self.parts = list(parts)

    def create_weights(
        self,
        layer: Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        *,
        weight_loader: Callable[..., None],
    ) -> None:
        """Allocate the tensors as they lie on disk: the planes up to the resident width and the active decoders.

        Raises:
            ConfigError: tensor parallelism would cut a group of columns or a byte of a plane.
            UnsupportedError: no kernel serves the layer.
        """
        self.in_features = input_size_per_partition
        self.output_sizes = list(output_partition_sizes)
        widths = self._same_for_parts("layer_widths", self.format.widths_of)
        # Where a layer is already fused in the checkpoint, its one part fills all partitions.
        partitions = len(self.output_sizes)
        self.partition_names = self.parts if len(self.parts) == partitions else self.parts[:1] * partitions
        self.precision = self.model_precision.of_layer(self.partition_names, [widths] * partitions)
        self.segments = [_Segment(*segment, index) for index, segment in enumerate(self.precision.segments())]
        self.group_size = self._group_size(input_size)
        self.kernel = select_kernel(
            torch.get_default_device(),
            params_dtype,
            self.precision.decoder_widths,
            self.in_features,
            self.group_size,
        )
        self.arrived: dict[str, set[int]] = {}

        # The rank's cut of the layer is a layer of this format, save that its group size follows from the whole layer.
        self.shard_format = dataclasses.replace(
            self.format, widths=widths, group_size=self.group_size, layer_group_sizes={}, layer_widths={}
        )
        self.owners = self._tensor_owners()
        for name, partitions_of in self.owners.items():
            rows = self._rows(partitions_of)
            stored = self.shard_format.tensors_of_layer(rows, self.in_features, self.parts[0])
            [spec] = [tensors[name] for tensors in stored.values() if name in tensors]
            data = torch.empty(spec.shape, dtype=spec.dtype)
            loader = self._recording(name, weight_loader)
            layer.register_parameter(name, self._parameter(name, data, partitions_of, loader))
        self._products = [
            (
                segment.planes,
                segment.decoders,
                segment.active_width,
                segment.precision.decoder_widths,
                self._sizes(segment.partitions),
            )
            for segment in self.segments
        ]
        for segment in self.segments:
            active_widths = torch.tensor(segment.precision.active_widths, dtype=torch.int32)
            layer.register_buffer(segment.active_width, active_widths, persistent=False)

    def process_weights_after_loading(self, layer: Module) -> None:
        """Replace the disk form by the kernel's: ``planes`` uint8 and ``decoders`` float16 (see kernels.layout).

        Each segment gets its own, the second one ``planes_1`` and ``decoders_1``.

        Raises:
            MissingTensorError: a tensor of one of the layer's parts did not come from the checkpoint.
        """
        self._check_arrivals()
        device, layout = getattr(layer, WEIGHT_BASE).device, self.kernel.layout
        where = "cpu" if layout.repacks_on_cpu else device
        disk = {name: getattr(layer, name).data.to(where) for name in self.owners}
        for name in disk:
            delattr(layer, name)

        for segment in self.segments:
            own = {name: self._rows_of(segment, tensor, name) for name, tensor in disk.items()}
            base, planes = self._slice(own, segment.precision.resident_width)
            widths = segment.precision.decoder_widths
            kind = self.format.decoder_kind
            plain = [kind.from_tensors(own.__getitem__, width).affine for width in widths]
            scales, offsets = [each.scale.half() for each in plain], [each.offset.half() for each in plain]
            sizes = self._sizes(segment.partitions)
            decoders = layout.repack_decoders(scales, offsets, sizes)
            codes = layout.repack_codes(base, planes, sizes, widths, _memory)
            setattr(layer, segment.planes, Parameter(codes.to(device), requires_grad=False))
            if layout.repacks_on_cpu:
                decoders = _memory.copy(decoders)
            setattr(layer, segment.decoders, Parameter(decoders.to(device), requires_grad=False))

    def apply(self, layer: Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        outputs = []
        first = 0
        # Plain values alone: torch.compile cannot trace a dataclass with properties.
        for planes, decoders, active_width, widths, sizes in self._products:
            last = first + sum(sizes)
            output = self.kernel.linear(
                x,
                getattr(layer, planes),
                getattr(layer, decoders),
                getattr(layer, active_width),
                widths,
                sizes,
                self.group_size,
                None if bias is None else bias[first:last],
                self.model_precision.activation_bits,
            )
            outputs.append(output)
            first = last
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def predicted_bytes(self) -> int:
        """Bytes that the format predicts for this rank's cut of the layer."""
        return sum(
            self.shard_format.resident_bytes(
                self._rows(segment.partitions), self.in_features, segment.precision.resident_width
            )
            for segment in self.segments
        )

    def _group_size(self, input_size: int) -> int:
        """Columns per group in the rank's cut of a layer of ``input_size`` columns."""
        self._same_for_parts("layer_group_sizes", self.format.group_size_setting)
        group_size = self.format.group_size_of(input_size, self.parts[0])
        if self._is_per_channel():
            group_size, unit, hint = self.in_features, 8, "so that it starts on a byte of every plane"
        else:
            unit, hint = group_size, "the group size"
        if self.in_features % unit:
            raise ConfigError(
                ", ".join(self.parts),
                f"tensor parallel size {input_size // self.in_features}",
                f"a cut of the {input_size} input features into {self.in_features} for each rank",
                f"a multiple of {unit}, {hint}",
            )
        return group_size

    def _same_for_parts(self, field: str, setting_of: Callable[[str], _Setting]) -> _Setting:
        """What the format's ``field`` says of the parts of the layer."""
        settings = {part: setting_of(part) for part in self.parts}
        if len(set(settings.values())) > 1:
            raise ConfigError(
                CONFIG_FILE,
                f"quantization_config.{field}",
                settings,
                "the same for layers that vLLM computes as one",
            )
        return settings[self.parts[0]]

    def _is_per_channel(self) -> bool:
        return self.format.group_size_setting(self.parts[0]) == "channel"

    def _tensor_owners(self) -> dict[str, list[int]]:
        """The tensors that the layer keeps of its parts, and of which partitions it keeps each."""
        owners: defaultdict[str, list[int]] = defaultdict(list)
        for segment in self.segments:
            stored_width = self.format.stored_width(segment.precision.resident_width)
            planes = [plane_name(width) for width in range(BASE_BITS + 1, stored_width + 1)]
            widths = segment.precision.decoder_widths
            decoders = [part_name(part, width) for width in widths for part in self.format.decoder_kind.parts(1, 1)]
            for name in (WEIGHT_BASE, *planes, *decoders):
                owners[name] += segment.partitions
        return dict(owners)

    def _sizes(self, partitions: Iterable[int]) -> list[int]:
        return [self.output_sizes[partition] for partition in partitions]

    def _rows(self, partitions: Iterable[int]) -> int:
        return sum(self._sizes(partitions))

    def _rows_of(self, segment: _Segment, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """The segment's rows of a tensor that holds those of some partitions; none if these are not the segment's."""
        owners = self.owners[name]
        start = self._rows(partition for partition in owners if partition < segment.partitions.start)
        return tensor.narrow(0, start, self._rows(set(owners) & set(segment.partitions)))

    def _parameter(
        self, name: str, data: torch.Tensor, partitions: Sequence[int], weight_loader: Callable[..., None]
    ) -> Parameter:
        """A parameter of vLLM's that cuts ``data``'s tensor for tensor parallelism.

        Args:
            data: the rows of some partitions.
            partitions: which these are.
            weight_loader: vLLM's, of the layer.
        """
        if name.startswith(("weight_base", "weight_plane")):
            parameter = _WeightOfParts(data=data, input_dim=1, output_dim=0, weight_loader=weight_loader)
        elif self._is_per_channel() or name.startswith("weight_step"):
            parameter = _ChannelScaleOfParts(data=data, output_dim=0, weight_loader=weight_loader)
        else:
            parameter = _GroupScaleOfParts(data=data, input_dim=1, output_dim=0, weight_loader=weight_loader)
        parameter.first_rows = {
            self._rows(range(partition)): self._rows(partitions[:index]) for index, partition in enumerate(partitions)
        }
        return parameter

    def _recording(self, name: str, weight_loader: Callable[..., None]) -> Callable[..., None]:
        """``weight_loader`` that also notes which partitions of the tensor ``name`` have come."""
        arrived = self.arrived.setdefault(name, set())
        every = self.owners[name]

        def load(param: Parameter, loaded_weight: torch.Tensor, shard_id: Any = None) -> None:
            if shard_id is None:  # the layer is not fused, or was already fused in the checkpoint
                weight_loader(param, loaded_weight)
                arrived.update(every)
                return
            weight_loader(param, loaded_weight, shard_id)
            if isinstance(shard_id, str):
                arrived.add("qkv".index(shard_id))
            else:
                arrived.update(shard_id if isinstance(shard_id, tuple) else (shard_id,))

        return load

    def _check_arrivals(self) -> None:
        # vLLM reports no missing tensors for quantized models and would serve uninitialized memory.
        for name, arrived in self.arrived.items():
            for partition in self.owners[name]:
                if partition not in arrived:
                    part = self.partition_names[partition]
                    raise MissingTensorError(part, name, "no such tensor among those loaded", "one")

    def _slice(self, disk: dict[str, torch.Tensor], width: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Base and planes of a width, cut from what had to be read to make them."""
        stored_width = self.format.stored_width(width)
        base = disk[WEIGHT_BASE]
        planes = [disk[plane_name(plane)] for plane in range(BASE_BITS + 1, stored_width + 1)]
        if stored_width == width:
            return base, planes
        device = base.device
        codes = unpack_codes(base.cpu(), [plane.cpu() for plane in planes], self.in_features)
        codes = slice_codes(codes, stored_width, width, self.format.slicing)
        base, planes = pack_codes(codes << (PARENT_BITS - width), width)
        return base.to(device), [plane.to(device) for plane in planes]


def quantized_layers(model: Module) -> Iterator[tuple[Module, MatquantLinearMethod]]:
    """The layers of a vLLM model that this plugin serves, with their methods."""
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, MatquantLinearMethod):
            yield module, method


def resident_bytes(model: Module) -> int:
    """Bytes of codes and decoders in the quantized layers of this rank (usable with ``LLM.apply_model``)."""
    return sum(
        layer.get_parameter(name).nbytes
        for layer, method in quantized_layers(model)
        for segment in method.segments
        for name in (segment.planes, segment.decoders)
    )


def predicted_bytes(model: Module) -> int:
    """What the format predicts for :func:`resident_bytes`; equal where rows and columns fill the kernel's tiles."""
    return sum(method.predicted_bytes() for _, method in quantized_layers(model))
