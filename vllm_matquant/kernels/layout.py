"""The layout of codes and decoders in memory, as every kernel reads them.

A tile is 16 rows (outputs) by 32 columns (inputs) of weights, taken as 8 steps of 4 columns. A byte of a tile belongs
to one row and to one column of each step: byte ``row * 4 + column % 4``. A plane of a tile is 64 bytes, whose bit
``step`` is that of step 0..7; the base field is twice 64 bytes of 2-bit fields, the first with steps 0..3, the second
with 4..7. Each part of a fused layer (q, k, v; gate, up) is padded to whole tiles of its own, so that each can have its
own active width.

=========  =======  =================================================  ==========================================
tensor     dtype    shape                                              order
=========  =======  =================================================  ==========================================
planes     uint8    [resident width, tile rows, tile columns, 64]      most significant plane first; the first two
                                                                       are one, the base field: their memory is
                                                                       [tile rows, tile columns, 2, 64]
decoders   float16  [decoder widths, tile rows, groups, 2, 16]         scale, then offset, for the 16 rows of a tile
=========  =======  =================================================  ==========================================
"""

from __future__ import annotations

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


def tile_count(output_sizes: Sequence[int]) -> int:
    """Rows of tiles over all partitions, each padded to whole tiles."""
    return sum(ceil_div(size, TILE_ROWS) for size in output_sizes)


def planes_shape(resident_width: int, output_sizes: Sequence[int], in_features: int) -> tuple[int, int, int, int]:
    """Shape of the planes tensor (uint8)."""
    return resident_width, tile_count(output_sizes), ceil_div(in_features, TILE_COLUMNS), PLANE_BYTES


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


def split_planes(planes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The base field and the further planes of a planes tensor, both views.

    Args:
        planes: uint8 [resident width, tile rows, tile columns, 64].

    Returns:
        uint8 [tile rows, tile columns, 2, 64] and uint8 [resident width - 2, tile rows, tile columns, 64].
    """
    base = planes[:BASE_BITS].view(*planes.shape[1:3], 2, PLANE_BYTES)
    return base, planes[BASE_BITS:]


def unpack_steps(base: torch.Tensor, planes: torch.Tensor) -> torch.Tensor:
    """The codes of tiles, or of some of their bytes.

    Args:
        base: uint8 [..., 2, bytes], the base field.
        planes: uint8 [width - 2, ..., bytes], the planes to read.

    Returns:
        uint8 [..., 8 steps, bytes], codes of ``width`` bits.
    """

    def shifts(step: int) -> torch.Tensor:
        return torch.arange(0, 8, step, dtype=torch.uint8, device=base.device).unsqueeze(-1)

    codes = ((base.unsqueeze(-2) >> shifts(BASE_BITS)) & 3).flatten(-3, -2)
    for plane in planes:
        codes = (codes << 1) | ((plane.unsqueeze(-2) >> shifts(1)) & 1)
    return codes


def unpack_tiles(base: torch.Tensor, planes: torch.Tensor, in_features: int) -> torch.Tensor:
    """The codes of rows of tiles.

    Args:
        base: uint8 [tile rows, tile columns, 2, 64].
        planes: uint8 [width - 2, tile rows, tile columns, 64].
        in_features: columns.

    Returns:
        uint8 [tile rows, 16, in_features].
    """
    steps = unpack_steps(base, planes).flatten(1, 2)  # [tile rows, steps, 64]
    return steps.unflatten(-1, (TILE_ROWS, STEP_COLUMNS)).transpose(1, 2).flatten(2)[..., :in_features]
