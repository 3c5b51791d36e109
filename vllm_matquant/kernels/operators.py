"""Custom operators over products and look-ups in Python, which find their weights by handles."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch._library.custom_ops import CustomOpDef

from vllm_matquant.kernels import ops
from vllm_matquant.kernels.weight import PackedWeight, find_weight

Linear = Callable[[torch.Tensor, torch.Tensor, int, "torch.Tensor | None"], torch.Tensor]
Embedding = Callable[[torch.Tensor, torch.Tensor, int, torch.dtype], torch.Tensor]
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


def define_linear_by_row(name: str, linear: Linear) -> CustomOpDef:
    """An operator ``matquant::name`` with the arguments of :func:`ops.linear_by_row` over a kernel's product.

    Args:
        name: of the operator.
        linear: as of :meth:`Kernel.linear`; called once for each slot that some row has.
    """

    def operator(
        x: torch.Tensor,
        weights: torch.Tensor,
        slots: torch.Tensor,
        out_features: int,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        result = x.new_empty(len(rows), out_features)
        for handle, where in _by_slot(weights, slots, len(rows)):
            result[where] = linear(rows[where], handle, out_features, bias)
        return result.view(*x.shape[:-1], out_features)

    defined = torch.library.custom_op(f"matquant::{name}", operator, mutates_args=())
    defined.register_fake(ops.linear_by_row_fake)
    return defined


def define_embedding_by_row(name: str, embedding: Embedding) -> CustomOpDef:
    """An operator ``matquant::name`` with the arguments of :func:`ops.embedding_by_row` over a kernel's look-up.

    Args:
        name: of the operator.
        embedding: as of :meth:`Kernel.embedding`; called once for each slot that some row has.
    """

    def operator(
        rows: torch.Tensor, weights: torch.Tensor, slots: torch.Tensor, columns: int, dtype: torch.dtype
    ) -> torch.Tensor:
        wanted = rows.flatten()
        result = rows.new_empty(len(wanted), columns, dtype=dtype)
        for handle, where in _by_slot(weights, slots, len(wanted)):
            result[where] = embedding(wanted[where], handle, columns, dtype)
        return result.view(*rows.shape, columns)

    defined = torch.library.custom_op(f"matquant::{name}", operator, mutates_args=())
    defined.register_fake(ops.embedding_by_row_fake)
    return defined


def define_embedding_on_device(name: str, embedding: Embedding) -> CustomOpDef:
    """An operator ``matquant::name`` with the arguments of :func:`ops.embedding_by_row`, for a device that the host
    does not wait for: a captured graph follows what the slots are then.

    Rows whose slot has no weight are NaN.

    Args:
        name: of the operator.
        embedding: as of :meth:`Kernel.embedding`; called with all rows for each weight that there is.
    """

    def operator(
        rows: torch.Tensor, weights: torch.Tensor, slots: torch.Tensor, columns: int, dtype: torch.dtype
    ) -> torch.Tensor:
        wanted = rows.flatten()
        own = _slots_of(slots, len(wanted))[:, None]
        result = rows.new_full((len(wanted), columns), float("nan"), dtype=dtype)
        for slot in torch.nonzero(weights).flatten().tolist():
            found = embedding(wanted, weights[slot : slot + 1], columns, dtype)
            result = torch.where(own == slot, found, result)
        return result.view(*rows.shape, columns)

    defined = torch.library.custom_op(f"matquant::{name}", operator, mutates_args=())
    defined.register_fake(ops.embedding_by_row_fake)
    return defined


def _by_slot(weights: torch.Tensor, slots: torch.Tensor, rows: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The handle of each slot that some of the rows have, and where these rows stand."""
    own = _slots_of(slots, rows)
    for slot in own.unique().tolist():
        yield weights[slot : slot + 1], torch.nonzero(own == slot).flatten()


def _slots_of(slots: torch.Tensor, rows: int) -> torch.Tensor:
    if len(slots) < rows:
        raise ValueError(f"slots: found {len(slots)}, expected one for each of {rows} rows")
    return slots[:rows]
