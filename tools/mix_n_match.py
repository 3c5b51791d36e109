"""MatQuant's Mix'n'Match (arXiv 2502.06786, section 4.3): a width for each block of one parent."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from vllm_matquant.checkpoint.reader import Checkpoint
from vllm_matquant.checkpoint.slice import Slice
from vllm_matquant.research.shapes import SHAPES, shape_widths

MIXED = (2, 4, 8)  # widths that the paper trains and mixes
UNIFORM, SEARCHED = "uniform", "searched"


def mixes(checkpoint: Checkpoint, most_bits: Sequence[float]) -> Iterator[tuple[str, Slice]]:
    """What is compared of a parent, each with what its line is called.

    Args:
        checkpoint: the parent, which offers the widths of :data:`MIXED`.
        most_bits: that the average width of a shape may be; each gives a mix of each shape.

    Yields:
        One width for all blocks, of all that it offers; the mixes of each of the paper's shapes, each once; and the
        recipes that ``matquant search`` has found for a budget.
    """
    for width in checkpoint.format.widths:
        yield UNIFORM, checkpoint.slice(width)
    for shape in SHAPES:
        found = [block_widths(shape, checkpoint.layers, most) for most in sorted(most_bits)]
        yield from ((shape, checkpoint.slice(widths=each)) for at, each in enumerate(found) if each not in found[:at])
    for recipe in checkpoint.recipes:
        if "budget" in recipe.origin:
            yield SEARCHED, checkpoint.slice(recipe)


def block_widths(shape: str, layers: Mapping[str, tuple[int, int]], most_bits: float) -> dict[str, int]:
    """A width for each layer, the same in all layers of a block, that follows a shape over the depth.

    Args:
        shape: one of :data:`vllm_matquant.research.shapes.SHAPES`.
        layers: shapes of the layers, in the model's order; their names hold the number of their block.
        most_bits: that the average width may be.

    Returns:
        One of :data:`MIXED` for each layer, as wide as ``most_bits`` allows.

    Raises:
        ValueError: not even the narrowest widths are within ``most_bits``.
    """
    blocks: dict[str, list[str]] = {}
    for layer in layers:
        blocks.setdefault(_block_of(layer), []).append(layer)
    weights = {block: sum(math.prod(layers[layer]) for layer in own) for block, own in blocks.items()}
    costs = {block: {width: float(count * width) for width in MIXED} for block, count in weights.items()}
    chosen = shape_widths(shape, costs, most_bits * sum(weights.values()))
    return {layer: chosen[block] for block, own in blocks.items() for layer in own}


def _block_of(layer: str) -> str:
    """A layer's name up to the number of its block, with the point behind it."""
    parts = layer.split(".")
    return ".".join([*parts[: next(place for place, part in enumerate(parts) if part.isdigit()) + 1], ""])
