"""What a mixture of experts computes: tokens are grouped by expert, and each expert that is hit is computed once.

Which experts are hit is data. One operator holds all of it, so that a compiled graph knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn.functional import gelu, silu

from vllm_matquant.kernels.weight import find_weight

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": partial(gelu, approximate="tanh"),
}


@torch.library.custom_op("matquant::experts", mutates_args=())
def experts(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    handles: torch.Tensor,
    inner: int,
    activation: str,
    slots: torch.Tensor | None = None,
) -> torch.Tensor:
    """The sum of the outputs ``down(act(gate(x)) * up(x))`` of each row's experts, each times its weight.

    ``torch.compile`` can trace it, and the same graph serves every weight of the same features.

    Args:
        x: bfloat16, float16 or float32 [rows, hidden].
        topk_weights: floating point [rows, k], what the outputs are multiplied with.
        topk_ids: integers [rows, k], the experts of each row; one below 0 is none.
        handles: int64 [experts, 2, slots] on the CPU: what names the weight of gate and up projection, whose outputs
            follow each other, and that of the down projection; of each slot, or of the only one.
        inner: outputs of the gate projection.
        activation: one of :data:`ACTIVATIONS`.
        slots: int32 [at least ``rows``], which slot each row is computed with; None where all are computed with one.

    Returns:
        [rows, hidden] of the dtype of ``x``; the sum is float32.
    """
    act, result = ACTIVATIONS[activation], torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in topk_ids.unique().tolist():
        if expert < 0:
            continue
        rows, place = torch.where(topk_ids == expert)
        own = None if slots is None else slots[rows]
        both = _product(x[rows], handles[expert, 0], 2 * inner, own)
        given = act(both[:, :inner]) * both[:, inner:]
        found = _product(given, handles[expert, 1], x.shape[1], own)
        result.index_add_(0, rows, found.float() * topk_weights[rows, place, None].float())
    return result.to(x.dtype)


@experts.register_fake
def _(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    handles: torch.Tensor,
    inner: int,
    activation: str,
    slots: torch.Tensor | None = None,
) -> torch.Tensor:
    return torch.empty_like(x)


def _product(x: torch.Tensor, handles: torch.Tensor, out_features: int, slots: torch.Tensor | None) -> torch.Tensor:
    kernel = find_weight(handles[:1]).kernel
    if slots is None:
        return kernel.linear(x, handles, out_features)
    return kernel.linear_by_row(x, handles, slots, out_features)
