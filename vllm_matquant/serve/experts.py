"""The method of a mixture of experts: each expert's two products are layers of this plugin's own, on a CPU.

vLLM's layer holds all experts of a block. Below it stands a module for each product of each expert, with the linear
method that every other layer has: loading, widths, memory and switches are that one's. What is computed is one operator
for all experts, see :mod:`vllm_matquant.kernels.experts`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import Module, ModuleList, Parameter
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig
from vllm.model_executor.model_loader.ep_weight_filter import parse_expert_id
from vllm.model_executor.utils import set_weight_attrs

from vllm_matquant.checkpoint.errors import ConfigError
from vllm_matquant.kernels.experts import ACTIVATIONS, experts
from vllm_matquant.serve.elastic.offer import MAX_SLICES
from vllm_matquant.serve.elastic.rows import RowSlots
from vllm_matquant.serve.linear import HANDLE, SLOTS, MatquantLinearMethod

_HANDLES = "expert_handles"
_PRODUCTS = "expert_products"
_DOORS = ("w13_", "w2_")  # what vLLM's loader has the names of tensors begin with
_SHARDS = {"w1": (0, 0), "w3": (0, 1), "w2": (1, None)}  # product and partition of an expert's matrices


class ExpertProduct(Module):
    """One product of an expert: gate and up projection, or the down projection.

    Args:
        method: loads and packs its weight.
        handles: int64 [slots], where what names the weight is to be found.
    """

    def __init__(self, method: MatquantLinearMethod, handles: torch.Tensor) -> None:
        super().__init__()
        self.quant_method, self.handles = method, handles


class ExpertProductMethod(MatquantLinearMethod):
    """The linear method of an expert's product, whose handle lies among those of all experts."""

    def process_weights_after_loading(self, layer: Module) -> None:
        super().process_weights_after_loading(layer)
        assert isinstance(layer, ExpertProduct)
        layer.handles.copy_(getattr(layer, HANDLE))
        layer.register_buffer(HANDLE, layer.handles, persistent=False)  # which a switch writes to


class MatquantExpertsMethod(FusedMoEMethodBase):
    """Loads, packs and applies the experts of a block; vLLM makes one for each block.

    Attributes:
        experts: those that this rank computes, in the order in which it counts them.

    Args:
        moe: vLLM's settings of the mixture.
        parts: of each expert the names in the checkpoint of its gate and up projection, and of its down projection.
        make: makes the method of a product, given the names of its parts.
        rows: which resident slice each row is computed with; by default all are computed with the active one.
    """

    def __init__(
        self,
        moe: FusedMoEConfig,
        parts: Sequence[tuple[list[str], list[str]]],
        make: Callable[[list[str]], MatquantLinearMethod],
        rows: RowSlots | None = None,
    ) -> None:
        super().__init__(moe)
        self.parts, self.make, self.rows = parts, make, rows
        self.experts: list[int] = []

    def maybe_roundup_sizes(
        self, hidden_size: int, intermediate_size_per_partition: int, *_: Any, **__: Any
    ) -> tuple[int, int]:
        return hidden_size, intermediate_size_per_partition

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig | None:
        return None

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Allocate the tensors of each expert of this rank as they lie on disk: all of them, or its part of each.

        Raises:
            ConfigError: the experts compute what the operator does not, tensor parallelism would cut a group of
                columns or a byte of a plane, or gate and up projection disagree.
            UnsupportedError: no kernel serves a product.
        """
        self._check(layer)
        self.experts = _experts_of_rank(layer, len(self.parts))
        parallel = self.moe.moe_parallel_config
        inner, ranks = intermediate_size_per_partition, parallel.tp_size
        slots = 1 if self.rows is None else MAX_SLICES
        handles = torch.zeros(num_experts, 2, slots, dtype=torch.int64, device="cpu")
        layer.register_buffer(_HANDLES, handles, persistent=False)
        if self.rows is not None:
            layer.register_buffer(SLOTS, self.rows.tokens, persistent=False)
        pairs: list[tuple[ExpertProduct, ExpertProduct]] = []
        for expert, own in zip(self.experts, handles, strict=True):
            names = self.parts[expert]
            outer = ExpertProduct(self.make(names[0]), own[0])
            outer.quant_method.create_weights(
                outer, hidden_size, [inner] * 2, hidden_size, 2 * inner * ranks, params_dtype, weight_loader=_load
            )
            down = ExpertProduct(self.make(names[1]), own[1])
            down.quant_method.create_weights(
                down, inner, [hidden_size], inner * ranks, hidden_size, params_dtype, weight_loader=_load
            )
            # Not those of other layers, where each rank has whole experts.
            parameters: list[Any] = [*outer.parameters(), *down.parameters()]
            for parameter in parameters:
                parameter.tp_rank, parameter.tp_size = parallel.tp_rank, ranks
            pairs.append((outer, down))
        layer.add_module(_PRODUCTS, ModuleList(map(ModuleList, pairs)))
        owned = dict(zip(self.experts, pairs, strict=True))
        # vLLM's loader looks for one parameter of all experts; what comes to it goes to the expert that it is of.
        for place, door in enumerate(_DOORS):
            for name in sorted({name for own in pairs for name, _ in own[place].named_parameters()}):
                parameter = Parameter(torch.empty(0, dtype=torch.uint8), requires_grad=False)
                set_weight_attrs(parameter, {"weight_loader": partial(_pass_on, owned, name)})
                layer.register_parameter(door + name, parameter)

    def process_weights_after_loading(self, layer: Module) -> None:
        """Remove what vLLM's loader needed; products pack their weights themselves."""
        for name in [name for name, _ in layer.named_parameters(recurse=False) if name.startswith(_DOORS)]:
            delattr(layer, name)

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What the routed experts of this rank compute; vLLM adds up ranks, and computes shared experts by itself."""
        if layer.expert_map is not None:
            topk_ids = layer.expert_map[topk_ids.long()]  # as this rank counts them; -1 for another rank's
        slots = None if self.rows is None else getattr(layer, SLOTS)
        inner = layer.intermediate_size_per_partition
        return experts(x, topk_weights, topk_ids, getattr(layer, _HANDLES), inner, layer.activation.value, slots)

    def _check(self, layer: RoutedExperts) -> None:
        """Refuse what the operator does not compute."""
        activation = layer.activation.value
        unlike = {
            "activation": (activation, f"one of {list(ACTIVATIONS)}", activation in ACTIVATIONS),
            "swiglu_limit": (layer.swiglu_limit, "none", layer.swiglu_limit is None),
            "apply_router_weight_on_input": (
                layer.apply_router_weight_on_input, "weights on outputs", not layer.apply_router_weight_on_input
            ),
        }  # fmt: skip
        for field, (found, expected, fits) in unlike.items():
            if not fits:
                raise ConfigError(layer.layer_name, field, found, expected)


def reads_for(model: Module) -> Callable[[str], bool]:
    """Whether a rank reads a tensor of the checkpoint, by its name: not those of experts that others compute.

    Args:
        model: vLLM's model on this rank, before its weights are loaded.
    """
    methods = [getattr(layer, "quant_method", None) for layer in model.modules()]
    own = {expert for method in methods if isinstance(method, MatquantExpertsMethod) for expert in method.experts}

    def reads(name: str) -> bool:
        expert = parse_expert_id(name)
        return expert is None or not own or expert in own

    return reads


def _experts_of_rank(layer: RoutedExperts, experts: int) -> list[int]:
    """Which of all ``experts`` this rank computes, in the order in which it counts them."""
    counted = layer.expert_map_manager.expert_map
    if counted is None:
        return list(range(experts))
    own: list[int] = (counted >= 0).nonzero().flatten().tolist()
    return sorted(own, key=lambda expert: int(counted[expert]))


def _load(parameter: Any, loaded_weight: torch.Tensor, partition: int | None = None) -> None:
    """Copy this rank's part of a tensor: of columns, or of the rows of one of two partitions."""
    if partition is None:
        parameter.load_row_parallel_weight(loaded_weight=loaded_weight)
        return
    size = loaded_weight.shape[0] // parameter.tp_size
    parameter.load_merged_column_weight(
        loaded_weight=loaded_weight, shard_id=partition, shard_offset=partition * size, shard_size=size
    )


def _pass_on(
    owned: Mapping[int, tuple[ExpertProduct, ExpertProduct]],
    name: str,
    param: Parameter,
    loaded_weight: torch.Tensor,
    weight_name: str,
    shard_id: str,
    expert_id: int,
    return_success: bool = False,
) -> bool | None:
    """Load a tensor of an expert, as vLLM's loader calls it."""
    place, partition = _SHARDS[shard_id]
    own: Any = owned[expert_id][place].get_parameter(name)
    own.weight_loader(own, loaded_weight, *([] if partition is None else [partition]))
    return True if return_success else None
