"""The layout of codes and decoders in memory, as every kernel reads them.

A tile is 16 rows (outputs) by 32 columns (inputs) of weights, taken as 8 steps of 4 columns. A byte of a tile belongs
to one row and to one column of each step: byte ``row * 4 + column % 4``. A plane of a tile is 64 bytes, whose bit
``step`` is that of step 0..7; the base field is twice 64 bytes of 2-bit fields, the first with steps 0..3, the second
with 4..7. Each part of a fused layer (q, k, v; gate, up) is padded to whole tiles of its own, so that each can have its
own active width.

Two planes in a pair are stored as the base field is, for a core reads few streams faster than many. Planes lie in pairs
(but the last of an odd number) unless a width of :func:`are_paired` parts them.

=========  =======  =================================================  ==========================================
tensor     dtype    shape                                              order
=========  =======  =================================================  ==========================================
planes     uint8    [resident width, tile rows, tile columns, 64]      most significant plane first; the memory of
                                                                       two in a pair, as the first two always are,
                                                                       is [tile rows, tile columns, 2, 64]
decoders   float16  [decoder widths, tile rows, groups, 2, 16]         scale, then offset, for the 16 rows of a tile
=========  =======  =================================================  ==========================================
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from vllm_matquant.checkpoint.spec import BASE_BITS

TILE_ROWS = 16
TILE_COLUMNS = 32
STEP_COLUMNS = 4
TILE_STEPS = TILE_COLUMNS // STEP_COLUMNS
SEGMENT_COLUMNS = 128  # the most whose activations have one scale
PLANE_BYTES = TILE_ROWS * STEP_COLUMNS  # of a tile


def ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)


def tile_count(output_sizes: Sequence[int], tile_rows: int = TILE_ROWS) -> int:
    """Rows of tiles over all partitions, each padded to whole tiles."""
    return sum(ceil_div(size, tile_rows) for size in output_sizes)


def planes_shape(resident_width: int, output_sizes: Sequence[int], in_features: int) -> tuple[int, int, int, int]:
    """Shape of the planes tensor (uint8)."""
    return resident_width, tile_count(output_sizes), ceil_div(in_features, TILE_COLUMNS), PLANE_BYTES


def decoders_shape(
    decoder_widths: Sequence[int], output_sizes: Sequence[int], in_features: int, group_size: int
) -> tuple[int, int, int, int, int]:
    """Shape of the decoders tensor (float16)."""
    return len(decoder_widths), tile_count(output_sizes), ceil_div(in_features, group_size), 2, TILE_ROWS


def pad_to_tiles(rows: torch.Tensor, output_sizes: Sequence[int], tile_rows: int = TILE_ROWS) -> torch.Tensor:
    """[sum(output_sizes), ...] -> [tiles, tile_rows, ...], the padding rows zero."""
    padded = rows.new_zeros(tile_count(output_sizes, tile_rows), tile_rows, *rows.shape[1:])
    tile = 0
    for part in rows.split(list(output_sizes)):
        padded[tile:].flatten(0, 1)[: len(part)] = part
        tile += ceil_div(len(part), tile_rows)
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


def are_paired(decoder_widths: Sequence[int], resident_width: int) -> bool:
    """Whether all planes lie in pairs (but the last of an odd number): no width that has a decoder parts one."""
    return not any(width < resident_width and width % 2 for width in decoder_widths)


def split_planes(planes: torch.Tensor, paired: bool) -> list[torch.Tensor]:
    """The fields of a planes tensor or of its first planes, most significant first.

    Args:
        planes: uint8 [width, tile rows, tile columns, 64], contiguous.
        paired: see :func:`are_paired`, for the whole tensor.

    Returns:
        For each pair uint8 [tile rows, tile columns, 2, 64], for each single plane [tile rows, tile columns, 1, 64];
        all views.
    """
    width = len(planes)
    pairs = 2 * (width // 2) if paired else BASE_BITS
    starts = [*range(0, pairs, 2), *range(pairs, width), width]
    return [planes[begin:end].view(*planes.shape[1:3], -1, PLANE_BYTES) for begin, end in itertools.pairwise(starts)]


def unpack_steps(fields: Sequence[torch.Tensor]) -> torch.Tensor:
    """The codes of tiles, or of some of their bytes.

    Args:
        fields: for each pair of planes uint8 [..., 2, bytes], for each single plane [..., 1, bytes].

    Returns:
        uint8 [..., 8 steps, bytes].
    """
    codes = torch.zeros((), dtype=torch.uint8, device=fields[0].device)
    for field in fields:
        bits = field.shape[-2]
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=field.device).unsqueeze(-1)
        values = (field.unsqueeze(-2) >> shifts) & (2**bits - 1)  # [..., bits, 8 / bits, bytes]
        codes = (codes << bits) | values.flatten(-3, -2)
    return codes


def unpack_tiles(fields: Sequence[torch.Tensor], in_features: int) -> torch.Tensor:
    """The codes of rows of tiles.

    Args:
        fields: as :func:`split_planes` returns them, or those of some rows of tiles.
        in_features: columns.

    Returns:
        uint8 [tile rows, 16, in_features].
    """
    steps = unpack_steps(fields).flatten(1, 2)  # [tile rows, steps, 64]
    return steps.unflatten(-1, (TILE_ROWS, STEP_COLUMNS)).transpose(1, 2).flatten(2)[..., :in_features]
