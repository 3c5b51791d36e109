"""The linear method: vLLM's door to a layer, from its creation to the product."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch.nn import Module
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method

from vllm_matquant.checkpoint.errors import ConfigError
from vllm_matquant.checkpoint.names import CONFIG_FILE, WEIGHT_BASE
from vllm_matquant.checkpoint.spec import Format
from vllm_matquant.kernels.kernel import Request
from vllm_matquant.kernels.plane_store import PlaneStore, SharedPlanes
from vllm_matquant.kernels.support import select_kernel
from vllm_matquant.kernels.weight import PackedWeight
from vllm_matquant.serve.elastic.offer import MAX_SLICES
from vllm_matquant.serve.elastic.rows import RowSlots
from vllm_matquant.serve.served import Served
from vllm_matquant.serve.stored_layer import Cut, StoredLayer

_Setting = TypeVar("_Setting")

HANDLE = "qweight"  # of the weight's buffer
SLOTS = "row_slots"  # of the buffer with the slice of each row
TARGET, DRAFT = range(2)  # slots of the slices of a server that drafts with one of them
_store = PlaneStore()  # of all layers in this process


@register_weight_loader_v2_supported_method
class MatquantLinearMethod(LinearMethodBase):
    """Loads, packs and applies one linear layer; vLLM makes one for each layer.

    Attributes:
        weight: what the layer is multiplied with, once it is loaded.
        readers: where rows have slices of their own, or drafts have one, what those of each slot are multiplied with.

    Args:
        checkpoint_format: the checkpoint's format.
        served: what the server holds.
        parts: names in the checkpoint of the layers that this layer fuses, in the order of its output partitions.
        checkpoint: which one it is: layers of the same checkpoint share memory. By default they share none.
        rows: which resident slice each row is computed with; by default all are computed with the active one.
    """

    weight: PackedWeight

    def __init__(
        self,
        checkpoint_format: Format,
        served: Served,
        parts: Sequence[str],
        checkpoint: Hashable = None,
        rows: RowSlots | None = None,
    ) -> None:
        self.format = checkpoint_format
        self.served = served
        self.parts = list(parts)
        self.checkpoint = checkpoint
        self.rows = rows
        self.readers: list[PackedWeight] = []

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
        """Allocate the tensors as they lie on disk: the planes up to the resident widths, and these widths' decoders.

        Raises:
            ConfigError: tensor parallelism would cut a group of columns or a byte of a plane, or the parts of the
                layer disagree.
            UnsupportedError: no kernel serves the layer.
        """
        self._same_for_parts("layer_widths", self.format.widths_of)
        cut = self._cut(input_size, input_size_per_partition, output_partition_sizes)
        widths = self.served.of_layer(cut.names)
        self.by_slot = self.served.by_slot(cut.names)
        self.kernel = select_kernel(
            Request(
                torch.get_default_device().type,
                params_dtype,
                widths.resident_widths,
                cut.in_features,
                cut.group_size,
                self.format.decoder_kind,
            )
        )
        self.out_features, self.params_dtype = sum(cut.sizes), params_dtype
        own_decoders = self.served.own_decoders(cut.names)
        self.stored = StoredLayer(layer, self.format, cut, widths, weight_loader, own_decoders)

    def process_weights_after_loading(self, layer: Module) -> None:
        """Pack the weight for the kernel, in place of the tensors as they lie on disk.

        Raises:
            MissingTensorError: a tensor of one of the layer's parts did not come from the checkpoint.
        """
        cut, device = self.stored.cut, layer.get_parameter(WEIGHT_BASE).device
        rank = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        shared = None
        if self.checkpoint is not None:
            # Recipes may have decoders of their own for a width that other slices have too.
            decoders = tuple(each.decoders_file for each in self.served.resident)
            shared = SharedPlanes(_store, (self.checkpoint, decoders), ", ".join(self.parts), rank)
        segments, own_decoders = self.stored.take(layer)
        # vLLM asks a weight for its dtype and its device: adapters do, and attention with latent keys and values.
        empty = torch.empty(0, dtype=self.params_dtype, device=device)
        layer.register_buffer("weight", empty, persistent=False)
        self.weight = self.kernel.pack(
            segments, cut.in_features, cut.group_size, device, self.served.activation_bits, shared
        )
        # A compiled graph is handed these tensors and knows nothing else of the weight: it serves every width.
        if self.rows is None and self.served.draft is None:
            layer.register_buffer(HANDLE, self.weight.handle, persistent=False)
            return
        suffixes = [self.served.suffixes.get(each.decoders_file or "", "") for each in self.served.resident]
        self.readers = self.weight.readers(self.by_slot, [own_decoders.get(suffix) for suffix in suffixes])
        if self.rows is None:
            layer.register_buffer(HANDLE, self.readers[TARGET].handle.clone(), persistent=False)
            return
        handles = torch.zeros(MAX_SLICES, dtype=torch.int64)
        handles[: len(self.readers)] = torch.cat([reader.handle for reader in self.readers])
        layer.register_buffer(HANDLE, handles, persistent=False)
        layer.register_buffer(SLOTS, self.slots_of(self.rows), persistent=False)

    @staticmethod
    def slots_of(rows: RowSlots) -> torch.Tensor:
        """The slots of the rows that the layer's products are given."""
        return rows.tokens

    def apply(self, layer: Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        handle = getattr(layer, HANDLE)
        if self.rows is None:
            return self.kernel.linear(x, handle, self.out_features, bias)
        return self.kernel.linear_by_row(x, handle, getattr(layer, SLOTS), self.out_features, bias)

    def predicted_bytes(self) -> int:
        """Bytes of planes and decoders that the format predicts for this rank's cut of the layer."""
        return self.stored.predicted_bytes()

    def resident_bytes(self) -> int:
        """Bytes of planes and decoders of this rank's cut of the layer, whoever else shares them."""
        own = {
            segment.resident.decoders.data_ptr(): segment.resident.decoders.nbytes
            for reader in self.readers
            for segment in reader.segments
        }
        for segment in self.weight.segments:
            own.pop(segment.resident.decoders.data_ptr(), None)
        return self.weight.resident_bytes + sum(own.values())

    def bytes_alone(self) -> int:
        """What the format would predict of a server that holds the active slice alone."""
        return self.stored.predicted_bytes(self.served.alone().of_layer(self.stored.cut.names))

    def read_slot(self, layer: Module, slot: int) -> None:
        """Compute all rows with the reader of a slot from the next product on (where rows have no slots)."""
        getattr(layer, HANDLE).copy_(self.readers[slot].handle)

    def switch(self, slot: int) -> None:
        """Compute all rows with the resident slice of a slot from the next product on (where rows have none)."""
        self.weight.set_active(self.by_slot[slot])

    def set_active(self, widths: Mapping[str, int]) -> None:
        """Compute the layer at other resident widths from the next product on.

        Args:
            widths: of the layers of the checkpoint, by vLLM's names; those of the parts of this layer are read.

        Raises:
            ValueError: one of them is not resident.
        """
        if self.readers:
            raise ValueError("the widths of a server of several slices: found a call of set_active, expected none")
        self.weight.set_active([widths[name] for name in self.stored.cut.names])

    def _cut(self, input_size: int, in_features: int, sizes: Sequence[int]) -> Cut:
        """The rank's part of a layer of ``input_size`` columns, of which it has ``in_features``."""
        setting = self._same_for_parts("layer_group_sizes", self.format.group_size_setting)
        group_size = self.format.group_size_of(input_size, self.parts[0])
        per_channel = setting == "channel"
        if per_channel:
            group_size, hint = in_features, "so that it starts on a byte of every plane and parts no four of columns"
            unit = max(8, self.format.decoder_kind.group_multiple)
        else:
            unit, hint = group_size, "the group size"
        if in_features % unit:
            raise ConfigError(
                ", ".join(self.parts),
                f"tensor parallel size {input_size // in_features}",
                f"a cut of the {input_size} input features into {in_features} for each rank",
                f"a multiple of {unit}, {hint}",
            )
        # Where a layer is already fused in the checkpoint, its one part fills all partitions.
        names = self.parts if len(self.parts) == len(sizes) else self.parts[:1] * len(sizes)
        return Cut(tuple(names), tuple(sizes), in_features, group_size, per_channel)

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


def quantized_layers(model: Module) -> Iterator[tuple[Module, MatquantLinearMethod]]:
    """The layers of a vLLM model that this plugin serves, with their methods."""
    for module in model.modules():
        method = vars(module).get("quant_method")  # its own: a layer that vLLM wraps for adapters shows its method too
        if isinstance(method, MatquantLinearMethod):
            yield module, method


def resident_bytes(model: Module) -> int:
    """Bytes of codes and decoders in the quantized layers of this rank (usable with ``LLM.apply_model``)."""
    return sum(method.resident_bytes() for _, method in quantized_layers(model))


def predicted_bytes(model: Module) -> int:
    """What the format predicts for :func:`resident_bytes`; equal where rows and columns fill the kernel's tiles."""
    return sum(method.predicted_bytes() for _, method in quantized_layers(model))


def set_active(model: Module, widths: Mapping[str, int]) -> None:
    """Compute at other resident widths from the next step on, in all layers or in none (``LLM.apply_model`` calls it).

    The caches of prompts that vLLM keeps hold what earlier widths made: see ``LLM.reset_prefix_cache``.

    Args:
        model: vLLM's model, of a server with several resident widths.
        widths: of every quantized layer, by vLLM's names.

    Raises:
        ValueError: one of them is not resident.
    """
    layers = [method for _, method in quantized_layers(model)]
    before = [method.weight.active_widths for method in layers]
    try:
        for method in layers:
            method.set_active(widths)
    except Exception:
        for method, active in zip(layers, before, strict=True):
            method.weight.set_active(active)
        raise
