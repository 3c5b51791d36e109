"""What a mixture of experts computes: tokens are sorted by expert, and all experts that are hit are multiplied at once.

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
    rows, count = topk_ids.shape
    ids = topk_ids.flatten().long()
    if slots is None:
        keys = ids
    else:
        # Rows of one expert and slot stand together, so that each expert's planes are read once.
        own_slots = slots[:rows].repeat_interleave(count)
        keys = ids * handles.shape[2] + own_slots
    order = keys.argsort(stable=True)[int((ids < 0).sum()) :]
    outputs = torch.zeros(rows * count, x.shape[1], dtype=torch.float32, device=x.device)
    if len(order):
        groups = ids.index_select(0, order).int()
        own = None if slots is None else own_slots.index_select(0, order)
        # All experts of a mixture have the same shapes, and so the same kernels.
        outer, down = (find_weight(handles[int(groups[0]), place, :1]).kernel for place in range(2))
        of_outer, of_down = handles.unbind(1)
        both = outer.grouped_linear(x.index_select(0, order // count), of_outer.contiguous(), groups, own, 2 * inner)
        given = ACTIVATIONS[activation](both[:, :inner]) * both[:, inner:]
        found = down.grouped_linear(given, of_down.contiguous(), groups, own, x.shape[1])
        shares = topk_weights.flatten().index_select(0, order).float()
        outputs.index_copy_(0, order, found.float() * shares[:, None])
    return outputs.view(rows, count, -1).sum(1).to(x.dtype)


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
