"""The linear method: from the tensors on disk to resident planes, and the product with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch.nn import Module, Parameter
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.parameter import ChannelQuantScaleParameter, GroupQuantScaleParameter, ModelWeightParameter

from vllm_matquant.checkpoint.errors import ConfigError, MissingTensorError
from vllm_matquant.checkpoint.packing import pack_codes, slice_codes, unpack_codes
from vllm_matquant.checkpoint.spec import (
    BASE_BITS,
    CONFIG_FILE,
    DECODER_DTYPE,
    PARENT_BITS,
    WEIGHT_BASE,
    Format,
    offset_name,
    plane_name,
    scale_name,
)
from vllm_matquant.kernels.memory import WeightMemory
from vllm_matquant.kernels.support import select_kernel
from vllm_matquant.serve.precision import Precision

_Setting = TypeVar("_Setting")

_memory = WeightMemory()  # of all layers, on the CPU


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
        self.precision = self.model_precision.of_layer([widths] * len(self.output_sizes))
        self.group_size = self._group_size(input_size)
        self.kernel = select_kernel(
            torch.get_default_device(),
            params_dtype,
            self.precision.decoder_widths,
            self.in_features,
            self.group_size,
        )
        # Where a layer is already fused in the checkpoint, its one part fills all partitions.
        partitions = len(self.output_sizes)
        self.partition_names = self.parts if len(self.parts) == partitions else self.parts[:1] * partitions
        self.arrived: dict[str, set[int]] = {}

        # The rank's cut of the layer is a layer of this format, save that its group size follows from the whole layer.
        self.shard_format = dataclasses.replace(
            self.format, widths=widths, group_size=self.group_size, layer_group_sizes={}, layer_widths={}
        )
        stored = self.shard_format.tensors_of_layer(sum(self.output_sizes), self.in_features, self.parts[0])
        specs = {name: spec for tensors in stored.values() for name, spec in tensors.items()}
        for name in self._tensor_names():
            data = torch.empty(specs[name].shape, dtype=specs[name].dtype)
            loader = self._recording(name, weight_loader)
            layer.register_parameter(name, self._parameter(data, loader))
        active_widths = torch.tensor(self.precision.active_widths, dtype=torch.int32)
        layer.register_buffer("active_width", active_widths, persistent=False)

    def process_weights_after_loading(self, layer: Module) -> None:
        """Replace the disk form by the kernel's: ``planes`` uint8 and ``decoders`` float16 (see kernels.layout).

        Raises:
            MissingTensorError: a tensor of one of the layer's parts did not come from the checkpoint.
        """
        self._check_arrivals()
        device, layout = getattr(layer, WEIGHT_BASE).device, self.kernel.layout
        where = "cpu" if layout.repacks_on_cpu else device
        disk = {name: getattr(layer, name).data.to(where) for name in self._tensor_names()}
        for name in disk:
            delattr(layer, name)

        base, planes = self._slice(disk)
        widths = self.precision.decoder_widths
        scales = [disk[scale_name(width)] for width in widths]
        offsets = [disk[offset_name(width)] for width in widths]
        decoders = layout.repack_decoders(scales, offsets, self.output_sizes)
        codes = layout.repack_codes(base, planes, self.output_sizes, widths, _memory)
        layer.planes = Parameter(codes.to(device), requires_grad=False)
        if layout.repacks_on_cpu:
            decoders = _memory.copy(decoders)
        layer.decoders = Parameter(decoders.to(device), requires_grad=False)

    def apply(self, layer: Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self.kernel.linear(
            x,
            layer.planes,
            layer.decoders,
            layer.active_width,
            self.precision.decoder_widths,
            self.output_sizes,
            self.group_size,
            bias,
            self.model_precision.activation_bits,
        )

    def predicted_bytes(self) -> int:
        """Bytes that the format predicts for this rank's cut of the layer."""
        width = self.precision.resident_width
        return self.shard_format.resident_bytes(sum(self.output_sizes), self.in_features, width)

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

    def _tensor_names(self) -> list[str]:
        """The tensors that the layer keeps of each of its parts."""
        stored_width = self.format.stored_width(self.precision.resident_width)
        planes = [plane_name(width) for width in range(BASE_BITS + 1, stored_width + 1)]
        decoders = [name(width) for width in self.precision.decoder_widths for name in (scale_name, offset_name)]
        return [WEIGHT_BASE, *planes, *decoders]

    def _parameter(self, data: torch.Tensor, weight_loader: Callable[..., None]) -> Parameter:
        """A parameter of vLLM's that cuts ``data``'s tensor for tensor parallelism."""
        if data.dtype != DECODER_DTYPE:
            return ModelWeightParameter(data=data, input_dim=1, output_dim=0, weight_loader=weight_loader)
        if self._is_per_channel():
            return ChannelQuantScaleParameter(data=data, output_dim=0, weight_loader=weight_loader)
        return GroupQuantScaleParameter(data=data, input_dim=1, output_dim=0, weight_loader=weight_loader)

    def _recording(self, name: str, weight_loader: Callable[..., None]) -> Callable[..., None]:
        """``weight_loader`` that also notes which partitions of the tensor ``name`` have come."""
        arrived = self.arrived.setdefault(name, set())
        every = range(len(self.output_sizes))

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
            for partition, part in enumerate(self.partition_names):
                if partition not in arrived:
                    raise MissingTensorError(part, name, "no such tensor among those loaded", "one")

    def _slice(self, disk: dict[str, torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Base and planes of the resident width, cut from what had to be read to make them."""
        width = self.precision.resident_width
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
        layer.get_parameter(name).nbytes for layer, _ in quantized_layers(model) for name in ("planes", "decoders")
    )


def predicted_bytes(model: Module) -> int:
    """What the format predicts for :func:`resident_bytes`; equal where rows and columns fill the kernel's tiles."""
    return sum(method.predicted_bytes() for _, method in quantized_layers(model))
