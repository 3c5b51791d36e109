"""The product in Triton, over the planes that the CUDA kernels read: where there is Triton but not our library.

Weights are rounded to the activations' type before they are multiplied; sums are float32. Right and portable, not
tuned.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from vllm_matquant.checkpoint.spec import BASE_BITS, PARENT_BITS
from vllm_matquant.kernels.cuda_layout import TILE_ROWS, partition_starts
from vllm_matquant.kernels.layout import ceil_div
from vllm_matquant.kernels.reference import linear_shape

WORDS = tl.constexpr(128)  # of 32 bits in a tile's plane


@triton.jit
def _linear_kernel(  # type: ignore[no-untyped-def]
    x, planes, decoders, active_width, rows_of_tiles, decoder_of_width, bias, output,
    tokens, columns, rows, tile_rows, tile_columns, resident_width, groups, group_size,
    HAS_BIAS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, IN_FLOAT32: tl.constexpr,
):  # fmt: skip
    """One row of tiles and BLOCK_TOKENS tokens; cuda_layout.py says where bits lie."""
    tile_row = tl.program_id(0)
    partition = tl.load(rows_of_tiles + 3 * tile_row)
    first_row = tl.load(rows_of_tiles + 3 * tile_row + 1)
    row_count = tl.load(rows_of_tiles + 3 * tile_row + 2)
    width = tl.load(active_width + partition)
    slot = tl.load(decoder_of_width + tl.minimum(tl.maximum(width, 0), 9))

    r = tl.arange(0, 64)[:, None]
    i, h, g = r // 16, r % 16 // 8, r % 8
    c = tl.arange(0, 64)[None, :]
    t, k = c % 32 // 8, c % 8 + c // 32 * 8
    pair = k // 2
    field = tl.where(pair < 4, 2 * pair + 1, tl.where(pair < 7, 2 * (pair - 3), 0))
    half = tl.where(field == 0, 1 - k % 2, k % 2)
    place = 16 * half + 2 * field
    base_word = ((i // 2 * 32 + 4 * g + t) * 2 + i % 2) * 2 + h
    plane_word = (4 * g + t) * 4 + i

    token = tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)[:, None]
    sums = tl.zeros((BLOCK_TOKENS, 64), dtype=tl.float32)
    for tile_column in range(tile_columns):
        tile = planes + (tile_row * tile_columns + tile_column).to(tl.int64) * resident_width * WORDS
        codes = (tl.load(tile + base_word) >> place) & 3
        for plane in tl.static_range(2, 8):
            if plane < width:
                word = tl.load(tile + plane * WORDS + plane_word)
                shift = (place + (1 - plane % 2) - (2 if plane % 4 >= 2 else 0) - h + 32) % 32
                codes = codes * 2 + ((word >> shift) & 1)
        column = tile_column * 64 + c
        group = tl.minimum(column // group_size, groups - 1)
        index = (tl.maximum(slot, 0) * tile_rows + tile_row) * groups + group
        decoder = decoders + (index.to(tl.int64) * 8 + g) * 16 + 2 * i + h
        scale, offset = tl.load(decoder).to(tl.float32), tl.load(decoder + 8).to(tl.float32)
        weights = (scale * codes + offset).to(x.dtype.element_ty)
        activations = tl.load(x + token * columns + column, mask=(token < tokens) & (column < columns), other=0.0)
        if IN_FLOAT32:
            activations, weights = activations.to(tl.float32), weights.to(tl.float32)
        sums += tl.dot(activations, tl.trans(weights), out_dtype=tl.float32, input_precision="ieee")

    row = tl.arange(0, 64)[None, :]
    wanted = (token < tokens) & (row < row_count)
    if HAS_BIAS:
        sums += tl.load(bias + first_row + row, mask=row < row_count, other=0.0).to(tl.float32)
    # A width without decoders gives nothing that could be mistaken for a result.
    sums = tl.where(slot >= 0, sums, float("nan"))
    tl.store(output + token * rows + first_row + row, sums.to(output.dtype.element_ty), mask=wanted)


@functools.lru_cache(maxsize=1024)
def _tables(
    output_sizes: tuple[int, ...], decoder_widths: tuple[int, ...], resident_width: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each row of tiles its partition, first output and number of outputs; for each width its decoders, or -1."""
    tiles = []
    starts = zip(*partition_starts(output_sizes), output_sizes, strict=True)
    for partition, (_, first, size) in enumerate(starts):
        for begin in range(0, size, TILE_ROWS):
            tiles.append((partition, first + begin, min(TILE_ROWS, size - begin)))
    slots = [-1] * (PARENT_BITS + 2)  # a width of 9 stands for greater ones
    for slot, width in enumerate(decoder_widths):
        if BASE_BITS <= width <= resident_width:
            slots[width] = slot
    return torch.tensor(tiles, dtype=torch.int32, device=device), torch.tensor(slots, dtype=torch.int32, device=device)


@torch.library.custom_op("matquant::triton_linear", mutates_args=())
def linear(
    x: torch.Tensor,
    planes: torch.Tensor,
    decoders: torch.Tensor,
    active_width: torch.Tensor,
    decoder_widths: Sequence[int],
    output_sizes: Sequence[int],
    group_size: int,
    bias: torch.Tensor | None = None,
    activation_bits: int | None = None,
) -> torch.Tensor:
    """The same as :func:`vllm_matquant.kernels.ops.linear` in the layout of the CUDA kernels, for any group size."""
    columns, rows = x.shape[-1], sum(output_sizes)
    tokens = x.numel() // columns
    output = x.new_empty(tokens, rows)
    if tokens == 0:
        return output.view(*x.shape[:-1], rows)
    tile_rows, tile_columns, resident_width, _ = planes.shape
    tables = _tables(tuple(output_sizes), tuple(decoder_widths), resident_width, x.device)
    block_tokens = 16 if tokens <= 16 else 32 if tokens <= 32 else 64
    _linear_kernel[(tile_rows, ceil_div(tokens, block_tokens))](
        x.reshape(tokens, columns).contiguous(), planes.view(torch.int32), decoders, active_width, *tables,
        x if bias is None else bias, output,
        tokens, columns, rows, tile_rows, tile_columns, resident_width, decoders.shape[2], min(group_size, columns),
        HAS_BIAS=bias is not None, BLOCK_TOKENS=block_tokens,
        # Triton's interpreter takes bfloat16 for integers in a product.
        IN_FLOAT32=os.environ.get("TRITON_INTERPRET") == "1",
    )  # fmt: skip
    return output.view(*x.shape[:-1], rows)


linear.register_fake(linear_shape)
