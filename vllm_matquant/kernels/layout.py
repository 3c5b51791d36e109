"""What the layouts of weights in memory have in common: rows of tiles, padded for each partition of a fused layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def ceil_div(value: int, divisor: int) -> int:
    """``value / divisor``, rounded up."""
    return -(-value // divisor)


def tile_count(output_sizes: Sequence[int], tile_rows: int) -> int:
    """Rows of tiles over all partitions, each padded to whole tiles."""
    return sum(ceil_div(size, tile_rows) for size in output_sizes)


def pad_to_tiles(rows: torch.Tensor, output_sizes: Sequence[int], tile_rows: int) -> torch.Tensor:
    """Cut rows into tiles, each partition into tiles of its own.

    Args:
        rows: [sum(output_sizes), ...].
        output_sizes: rows of each partition.
        tile_rows: rows of a tile.

    Returns:
        [tiles, tile_rows, ...], the padding rows zero.
    """
    padded = rows.new_zeros(tile_count(output_sizes, tile_rows), tile_rows, *rows.shape[1:])
    tile = 0
    for part in rows.split(list(output_sizes)):
        padded[tile:].flatten(0, 1)[: len(part)] = part
        tile += ceil_div(len(part), tile_rows)
    return padded
