"""Lookup of rows in an embedding, from the planes and decoders that the product reads too (see kernels.layout).

In plain PyTorch, which serves any device and which ``torch.compile`` can fuse: a token needs one row of each plane.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_matquant.kernels.layout import TILE_COLUMNS, TILE_ROWS
from vllm_matquant.kernels.reference import dequantize


def embedding(
    rows: torch.Tensor,
    planes: torch.Tensor,
    decoders: torch.Tensor,
    active_width: torch.Tensor,
    decoder_widths: Sequence[int],
    in_features: int,
    group_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The rows asked for of a layer with one partition, decoded at the active width.

    Only the bytes that hold these rows are read; planes past the active width do not matter to the result.
    ``active_width`` is data: a compiled graph serves every width.

    Args:
        rows: int64 [...], each below the layer's rows.
        planes: int64 [resident width, tiles, ceil(in_features/4)].
        decoders: float16 [len(decoder_widths), tiles, groups, 2, 16].
        active_width: int32 [1].
        decoder_widths: the widths whose decoders are resident, in the order of ``decoders``.
        in_features: columns.
        group_size: columns that share a decoder.
        dtype: of the result.

    Returns:
        [..., in_features] of ``dtype``, rounded once from float32.

    Raises:
        RuntimeError: the active width has no decoder (on a GPU: when the host next waits for it).
    """
    resident_width, tiles, column_tiles = planes.shape
    tile, lane = rows // TILE_ROWS, rows % TILE_ROWS

    # A byte of a mask holds two rows of its tile, the even one in the low half; see layout.unpack_planes.
    masks = planes.view(torch.uint8).view(resident_width, tiles, column_tiles, TILE_ROWS // 2)
    pairs = masks[:, tile, :, lane // 2]  # [..., resident width, column tiles]
    shifts = (lane % 2)[..., None] * TILE_COLUMNS + torch.arange(TILE_COLUMNS, device=rows.device)
    bits = (pairs[..., None] >> shifts.to(torch.uint8)[..., None, None, :]) & 1
    codes = bits.new_zeros(*rows.shape, column_tiles, TILE_COLUMNS)
    for plane in bits.unbind(-3):
        codes = (codes << 1) | plane
    codes = codes.flatten(-2)[..., :in_features] >> (resident_width - active_width).to(torch.uint8)

    matches = torch.stack([active_width == width for width in decoder_widths])
    torch._assert_async(matches.any(), f"active_width: expected one of {list(decoder_widths)}")
    decoder = decoders[matches.int().argmax(0), tile, :, :, lane]  # [..., groups, 2]
    scale, offset = decoder.unbind(-1)
    return dequantize(codes, scale, offset, group_size).to(dtype)
