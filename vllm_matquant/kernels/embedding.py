"""Lookup of rows in an embedding, from the planes and decoders that the product reads too (see kernels.layout).

In plain PyTorch, which serves any device and which ``torch.compile`` can fuse: a token needs one row of each plane.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_matquant.kernels.layout import STEP_COLUMNS, TILE_ROWS, are_paired, split_planes, unpack_steps
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
        planes: uint8 [resident width, tile rows, tile columns, 64].
        decoders: float16 [len(decoder_widths), tile rows, groups, 2, 16].
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
    tile, lane = rows // TILE_ROWS, rows % TILE_ROWS

    # The four bytes of the row in each tile: [..., tile columns, 2 or 1, 4].
    fields = [
        field.unflatten(-1, (TILE_ROWS, STEP_COLUMNS))[tile, :, :, lane]
        for field in split_planes(planes, are_paired(decoder_widths, len(planes)))
    ]
    codes = unpack_steps(fields).flatten(-3)[..., :in_features]
    codes = codes >> (len(planes) - active_width).to(torch.uint8)

    decoder = decoders[active_slot(active_width, decoder_widths), tile, :, :, lane]  # [..., groups, 2]
    scale, offset = decoder.unbind(-1)
    return dequantize(codes, scale, offset, group_size).to(dtype)


def active_slot(active_width: torch.Tensor, decoder_widths: Sequence[int]) -> torch.Tensor:
    """Where in ``decoder_widths`` the active width [1] is, int64 [1].

    Raises:
        RuntimeError: nowhere (on a GPU: when the host next waits for it).
    """
    matches = torch.stack([active_width == width for width in decoder_widths])
    torch._assert_async(matches.any(), f"active_width: expected one of {list(decoder_widths)}")
    return matches.int().argmax(0)
