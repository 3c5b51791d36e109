"""Hand-made recipes, as MatQuant (arXiv 2502.06786, section 4.3 and appendix) mixes widths by depth."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from vllm_matquant.checkpoint.spec import WIDTHS
from vllm_matquant.search.budget import Costs, spent

_SPREAD = 4.0  # bits between the narrowest and the widest block
_HIGHEST = WIDTHS[-1] + _SPREAD / 2  # of the middle of a shape: every layer is at its widest
_STEPS = 200
_BLOCK = re.compile(r"\.(\d+)\.")

SHAPES: dict[str, Callable[[float], float]] = {  # of the depth, 0 to 1: how wide, 0 to 1
    "pyramid": lambda depth: 1 - abs(2 * depth - 1),
    "reverse-pyramid": lambda depth: abs(2 * depth - 1),
    "increasing": lambda depth: depth,
    "decreasing": lambda depth: 1 - depth,
}


def shape_widths(name: str, costs: Costs, limit: float) -> dict[str, int]:
    """Widths that follow a shape over the depth, as wide as the budget allows.

    Args:
        name: one of ``SHAPES``.
        costs: of each layer, in the model's order, and width.
        limit: what the widths may cost together.

    Raises:
        ValueError: not even the narrowest widths are within the budget.
    """
    depths = _depths(list(costs))
    height = {layer: _SPREAD * (SHAPES[name](depth) - 0.5) for layer, depth in depths.items()}
    chosen = {layer: min(own) for layer, own in costs.items()}
    if spent(costs, chosen) > limit:
        raise ValueError(f"{name}: not even the narrowest widths are within the budget")
    for step in range(_STEPS + 1):
        middle = _HIGHEST * step / _STEPS
        # At one step many layers may move at once: those that the shape makes widest do it first.
        for layer in sorted(costs, key=lambda layer: -height[layer]):
            wanted = min(costs[layer], key=lambda width: (abs(width - middle - height[layer]), width))
            wider = chosen | {layer: max(wanted, chosen[layer])}
            if spent(costs, wider) > limit:
                return chosen
            chosen = wider
    return chosen


def _depths(layers: Sequence[str]) -> dict[str, float]:
    """How deep each layer's block lies, 0 to 1; layers outside of blocks lie with the first or the last block."""
    blocks = {layer: int(match[1]) for layer in layers if (match := _BLOCK.search(layer))}
    last = max(blocks.values(), default=0) or 1
    embedded = layers.index(next(iter(blocks))) if blocks else 0
    return {
        layer: blocks[layer] / last if layer in blocks else float(index >= embedded)
        for index, layer in enumerate(layers)
    }
