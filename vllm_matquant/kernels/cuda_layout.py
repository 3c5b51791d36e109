"""The layout of codes and decoders in a GPU's memory; csrc/cuda/tile.cuh and dequantize.cuh say why it is so.

A tile is 64 rows by 64 columns, held by the 32 lanes of a warp: lane ``4 g + t`` has rows ``16 i + 8 h + g`` (row tile
i, half h) and columns ``8 t .. 8 t + 7`` and ``32 + 8 t .. 32 + 8 t + 7``, its k = 0..15. Each part of a fused layer is
padded to whole tiles of its own, columns to whole tiles.

=========  =======  ============================================  ==================================================
tensor     dtype    shape                                         order
=========  =======  ============================================  ==================================================
planes     uint8    [tile rows, tile columns, resident width,     most significant plane first; the first two are one,
                    512]                                          the base field: [2 (i / 2), 32 lanes, 2 (i % 2),
                                                                  2 (h)] words of 32 bits; a plane is [32 lanes, 4 (i)]
                                                                  words
decoders   float16  [decoder widths, tile rows, groups, 8, 2, 8]  row g; scale, offset; 2 i + h
=========  =======  ============================================  ==================================================

A word of the base field has a row's 16 columns as 2-bit fields. With f = (1, 3, 5, 7, 2, 4, 6, 0)[k / 2], column k's is
in the half k % 2 of the word (the other one for f = 0), at its bits 2 f and 2 f + 1. Planes 2 and 3, 4 and 5, 6 and 7
make two words like it, h = 0, 1, with the bits of the first of the two planes in the upper bits: of the word h = 0 the
upper bits are those of the first plane's word, the lower bits those of the second one's. The word h = 1 is turned
right by one bit first, so that its bits fill the places left. Planes 2, 3, 6 and 7, which follow other planes in a code
of four bits, are turned right by two more.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from vllm_matquant.checkpoint.spec import BASE_BITS
from vllm_matquant.kernels.layout import ceil_div

TILE_ROWS = 64
TILE_COLUMNS = 64
PLANE_BYTES = TILE_ROWS * TILE_COLUMNS // 8  # of a tile
FIELDS = (1, 3, 5, 7, 2, 4, 6, 0)  # of the pairs of a lane's columns


def tile_count(output_sizes: Sequence[int]) -> int:
    """Rows of tiles over all partitions, each padded to whole tiles."""
    return sum(ceil_div(size, TILE_ROWS) for size in output_sizes)


def planes_shape(resident_width: int, output_sizes: Sequence[int], in_features: int) -> tuple[int, int, int, int]:
    """Shape of the planes tensor (uint8)."""
    return tile_count(output_sizes), ceil_div(in_features, TILE_COLUMNS), resident_width, PLANE_BYTES


def pad_rows(rows: torch.Tensor, output_sizes: Sequence[int]) -> torch.Tensor:
    """[sum(output_sizes), ...] -> [tile rows, 64, ...], the padding rows zero."""
    padded = rows.new_zeros(tile_count(output_sizes), TILE_ROWS, *rows.shape[1:])
    tile = 0
    for part in rows.split(list(output_sizes)):
        padded[tile:].flatten(0, 1)[: len(part)] = part
        tile += ceil_div(len(part), TILE_ROWS)
    return padded


def pack_codes(codes: torch.Tensor, width: int, output_sizes: Sequence[int]) -> torch.Tensor:
    """Codes to the planes that kernels read.

    Args:
        codes: uint8 [sum(output_sizes), in_features], of ``width`` bits.
        width: the resident width.
        output_sizes: rows of each partition.

    Returns:
        uint8 [tile rows, tile columns, width, 512], on the device of ``codes``.
    """
    tile_columns = ceil_div(codes.shape[1], TILE_COLUMNS)
    padded = torch.nn.functional.pad(codes, (0, tile_columns * TILE_COLUMNS - codes.shape[1]))
    tiles = pad_rows(padded, output_sizes)
    # [tile rows, i, h, g, tile columns, 2 (upper half of k), t, 8] -> [tile rows, tile columns, g, t, i, h, k]
    tiles = tiles.view(len(tiles), 4, 2, 8, tile_columns, 2, 4, 8).permute(0, 4, 3, 6, 1, 2, 5, 7).flatten(-2)

    def words(bit: int) -> torch.Tensor:
        """Of one bit of each code: int64 [tile rows, tile columns, g, t, i, h], at the lower bits of the fields."""
        result = torch.zeros(tiles.shape[:-1], dtype=torch.int64, device=codes.device)
        for k in range(16):
            field = FIELDS[k // 2]
            half = k % 2 if field else 1 - k % 2
            result |= (tiles[..., k] >> bit & 1).long() << (16 * half + 2 * field)
        return result

    def turn_right(word: torch.Tensor, bits: int) -> torch.Tensor:
        return (word >> bits | word << (32 - bits)) & 0xFFFFFFFF

    def to_bytes(word: torch.Tensor) -> torch.Tensor:
        """[tile rows, tile columns, ...] to [tile rows, tile columns, bytes], little end first."""
        parts = [(word >> shift & 0xFF).to(torch.uint8) for shift in (0, 8, 16, 24)]
        return torch.stack(parts, -1).flatten(2)

    base = words(width - 1) << 1 | words(width - 2)
    base = base.flatten(2, 3).unflatten(3, (2, 2)).transpose(2, 3)  # [..., i / 2, lane, i % 2, h]
    result = [to_bytes(base)]
    for plane in range(BASE_BITS, width):
        word = words(width - 1 - plane) << (1 if plane % 2 == 0 else 0)
        if plane % 4 >= 2:
            word = turn_right(word, 2)
        result.append(to_bytes(word[..., 0] | turn_right(word[..., 1], 1)))
    return torch.cat(result, -1).view(planes_shape(width, output_sizes, codes.shape[1]))


def pack_decoders(
    scales: Sequence[torch.Tensor], offsets: Sequence[torch.Tensor], output_sizes: Sequence[int]
) -> torch.Tensor:
    """Decoders as on disk to the decoders that kernels read.

    Args:
        scales: for each decoder width float16 [sum(output_sizes), groups].
        offsets: likewise.
        output_sizes: rows of each partition.

    Returns:
        float16 [len(scales), tile rows, groups, 8, 2, 8].
    """
    pairs = torch.stack([torch.stack(list(scales)), torch.stack(list(offsets))])  # [2, widths, rows, groups]
    tiles = pad_rows(pairs.permute(2, 1, 3, 0), output_sizes)  # [tile rows, 64, widths, groups, 2]
    return tiles.unflatten(1, (8, 8)).permute(3, 0, 4, 2, 5, 1).contiguous()


def partition_starts(output_sizes: Sequence[int]) -> tuple[list[int], list[int]]:
    """Where each partition begins, in rows of tiles and in outputs."""
    tiles = [ceil_div(size, TILE_ROWS) for size in output_sizes]
    return [0, *itertools.accumulate(tiles)][:-1], [0, *itertools.accumulate(output_sizes)][:-1]
