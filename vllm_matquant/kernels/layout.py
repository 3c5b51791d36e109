"""The layout of codes and decoders in memory, as every kernel reads them.

A tile is 16 rows (outputs) by 4 columns (inputs) of weights; one plane of a tile is a 64-bit mask with bit
``row * 4 + column``. Each part of a fused layer (q, k, v; gate, up) is padded to whole tiles of its own, so that each
can have its own active width.

=========  =======  ============================================  ===========================================
tensor     dtype    shape                                         order
=========  =======  ============================================  ===========================================
planes     int64    [resident width, tiles, ceil(in_features/4)]  most significant plane first
decoders   float16  [decoder widths, tiles, groups, 2, 16]        scale, then offset, for the 16 rows of a tile
=========  =======  ============================================  ===========================================
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

TILE_ROWS = 16
TILE_COLUMNS = 4


def ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)


def tile_count(output_sizes: Sequence[int]) -> int:
    """Tiles over all partitions, each padded to whole tiles."""
    return sum(ceil_div(size, TILE_ROWS) for size in output_sizes)


def planes_shape(resident_width: int, output_sizes: Sequence[int], in_features: int) -> tuple[int, int, int]:
    """Shape of the planes tensor (int64)."""
    return resident_width, tile_count(output_sizes), ceil_div(in_features, TILE_COLUMNS)


def decoders_shape(
    decoder_widths: Sequence[int], output_sizes: Sequence[int], in_features: int, group_size: int
) -> tuple[int, int, int, int, int]:
    """Shape of the decoders tensor (float16)."""
    return len(decoder_widths), tile_count(output_sizes), ceil_div(in_features, group_size), 2, TILE_ROWS


def pad_to_tiles(rows: torch.Tensor, output_sizes: Sequence[int]) -> torch.Tensor:
    """[sum(output_sizes), ...] -> [tiles, 16, ...], the padding rows zero."""
    padded = rows.new_zeros(tile_count(output_sizes), TILE_ROWS, *rows.shape[1:])
    tile = 0
    for part in rows.split(list(output_sizes)):
        padded[tile:].flatten(0, 1)[: len(part)] = part
        tile += ceil_div(len(part), TILE_ROWS)
    return padded


def strip_padding(tiles: torch.Tensor, output_sizes: Sequence[int]) -> torch.Tensor:
    """Inverse of :func:`pad_to_tiles`."""
    parts = tiles.split([ceil_div(size, TILE_ROWS) for size in output_sizes])
    return torch.cat([part.flatten(0, 1)[:size] for part, size in zip(parts, output_sizes, strict=True)])


def repack_decoders(
    scales: Sequence[torch.Tensor], offsets: Sequence[torch.Tensor], output_sizes: Sequence[int]
) -> torch.Tensor:
    """Decoders as on disk to the decoders that kernels read.

    Args:
        scales: for each decoder width float16 [sum(output_sizes), groups].
        offsets: likewise.
        output_sizes: rows of each partition.

    Returns:
        float16 [len(scales), tiles, groups, 2, 16].
    """
    pairs = torch.stack([torch.stack(list(scales)), torch.stack(list(offsets))])
    tiles = pad_to_tiles(pairs.permute(2, 1, 3, 0), output_sizes)  # [tiles, 16, widths, groups, 2]
    return tiles.permute(2, 0, 3, 4, 1).contiguous()


def unpack_planes(planes: torch.Tensor, width: int, in_features: int) -> torch.Tensor:
    """The ``width``-bit codes of tiles; planes past ``width`` are not read.

    Args:
        planes: int64 [resident width, tiles, ceil(in_features/4)].
        width: bits of each code to read.
        in_features: columns.

    Returns:
        uint8 [tiles, 16, in_features].
    """
    shifts = torch.arange(8, dtype=torch.uint8, device=planes.device)
    codes = planes.new_zeros(*planes.shape[1:], TILE_ROWS, TILE_COLUMNS, dtype=torch.uint8)
    for plane in planes[:width]:
        # As on every machine that torch supports, the bytes of a mask lie from the least significant on.
        lanes = (plane.view(torch.uint8).unsqueeze(-1) >> shifts) & 1
        codes = (codes << 1) | lanes.view(codes.shape)
    return codes.transpose(1, 2).flatten(2)[..., :in_features]
