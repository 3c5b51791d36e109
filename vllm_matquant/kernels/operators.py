"""Custom operators over products and look-ups in Python, which find their weights by handles."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch._library.custom_ops import CustomOpDef

from vllm_matquant.kernels import ops
from vllm_matquant.kernels.weight import PackedWeight, find_weight

Multiply = Callable[[torch.Tensor, PackedWeight, torch.Tensor | None], torch.Tensor]
LookUp = Callable[[torch.Tensor, PackedWeight, torch.dtype], torch.Tensor]


def define_linear(name: str, multiply: Multiply) -> CustomOpDef:
    """An operator ``matquant::name`` with the arguments of :meth:`Kernel.linear` over a product in Python.

    Args:
        name: of the operator.
        multiply: computes the product of activations [..., in_features] and a weight, with a bias or None.
    """

    def operator(
        x: torch.Tensor, weight: torch.Tensor, out_features: int, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        packed = find_weight(weight)
        if (x.shape[-1], out_features) != (packed.in_features, packed.out_features):
            raise ValueError(
                f"features: found {x.shape[-1]} of x and {out_features} of the result, expected the weight's "
                f"{packed.in_features} and {packed.out_features}"
            )
        return multiply(x, packed, bias)

    defined = torch.library.custom_op(f"matquant::{name}", operator, mutates_args=())
    defined.register_fake(ops.linear_fake)
    return defined


def define_embedding(name: str, look_up: LookUp) -> CustomOpDef:
    """An operator ``matquant::name`` with the arguments of :meth:`Kernel.embedding` over a look-up in Python.

    Args:
        name: of the operator.
        look_up: gives the rows asked for (int64 [...]) of a weight with one partition, in a dtype.
    """

    def operator(rows: torch.Tensor, weight: torch.Tensor, columns: int, dtype: torch.dtype) -> torch.Tensor:
        packed = find_weight(weight)
        if columns != packed.in_features:
            raise ValueError(f"columns: found {columns}, expected the weight's {packed.in_features}")
        if len(packed.output_sizes) != 1:
            raise ValueError(f"weight: found {len(packed.output_sizes)} partitions, expected one")
        return look_up(rows, packed, dtype)

    defined = torch.library.custom_op(f"matquant::{name}", operator, mutates_args=())
    defined.register_fake(ops.embedding_fake)
    return defined
