"""The kernel of :mod:`vllm_matquant.kernels.triton_linear` for weights with codebooks."""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_matquant.checkpoint import codebook
from vllm_matquant.checkpoint.codebook import CodebookForm
from vllm_matquant.kernels import cuda_layout
from vllm_matquant.kernels.triton_tiles import WORDS, multiply_tile, store_sums

STEP_BYTES = tl.constexpr(cuda_layout.STEP_BYTES // 2)  # of a row of tiles: one step for each row
PLANE_BYTES = tl.constexpr(codebook.ENTRIES * codebook.PLACES)  # of a codebook
MIDDLE = tl.constexpr(CodebookForm.MIDDLE)
WIDEST_WHOLE = tl.constexpr(codebook.WIDEST_WHOLE)
COARSE_BITS = tl.constexpr(codebook.COARSE_BITS)
FINE = tl.constexpr(codebook.FINE)


@triton.jit
def codebook_kernel(  # type: ignore[no-untyped-def]
    x, planes, decoders, steps, active_width, rows_of_tiles, decoders_of_width, bias, output,
    tokens, columns, output_stride, tile_columns, resident_width, groups, group_size, partitions,
    HAS_BIAS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, IN_FLOAT32: tl.constexpr,
):  # fmt: skip
    """One row of tiles and BLOCK_TOKENS tokens; cuda_layout.py says where bits lie, codebook.py what they mean."""
    tile_row = tl.program_id(0)
    partition = tl.load(rows_of_tiles + 3 * tile_row)
    first_row = tl.load(rows_of_tiles + 3 * tile_row + 1)
    row_count = tl.load(rows_of_tiles + 3 * tile_row + 2)
    width = tl.load(active_width + partition)
    first_byte = tl.load(decoders_of_width + tl.minimum(tl.maximum(width, 0), 9))
    # A width without decoders is computed as some that has any, and its result thrown away.
    width = tl.minimum(tl.maximum(width, 2), 8)
    whole_planes = tl.minimum(width, COARSE_BITS) - 1
    book_bytes = PLANE_BYTES * tl.where(width > WIDEST_WHOLE, whole_planes + width - 1, width - 1)
    whole = decoders + tl.maximum(first_byte, 0) + partition * book_bytes
    fine = whole + PLANE_BYTES * whole_planes
    row_bytes = STEP_BYTES + 64 * groups
    row = tl.maximum(first_byte, 0) + partitions * book_bytes + tile_row.to(tl.int64) * row_bytes

    r = tl.arange(0, 64)[:, None]
    i, h, g = r // 16, r % 16 // 8, r % 8
    c = tl.arange(0, 64)[None, :]
    t, place, four = c // 16, c % 16 // 4, c % 4
    bit_place = 8 * four + 2 * (place // 2 + 2 * (place % 2))
    base_word = ((i // 2 * 32 + 4 * g + t) * 2 + i % 2) * 2 + h
    plane_word = (4 * g + t) * 4 + i
    of_row = g * 8 + 2 * i + h
    step = tl.load(steps + row // 2 + of_row).to(tl.float32)
    sign_bit = tl.where(place < 2, 128, 64)

    token = tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)[:, None]
    sums = tl.zeros((BLOCK_TOKENS, 64), dtype=tl.float32)
    for tile_column in range(tile_columns):
        tile = planes + (tile_row * tile_columns + tile_column).to(tl.int64) * resident_width * WORDS
        index = (tl.load(tile + base_word) >> (8 * four)) & 255
        at = index % 64 * 4 + place
        level = tl.load(whole + at).to(tl.float32) - MIDDLE
        rest = tl.zeros_like(level)  # in sixteenths
        if width > WIDEST_WHOLE:
            rest = tl.load(fine + at).to(tl.float32) - MIDDLE
        for plane in tl.static_range(2, 8):
            if plane < width:
                word = tl.load(tile + plane * WORDS + plane_word)
                bit = ((word >> ((bit_place + (1 - plane % 2) - h + 32) % 32)) & 1).to(tl.float32)
                if plane < COARSE_BITS:
                    level += bit * tl.load(whole + (plane - 1) * PLANE_BYTES + at).to(tl.float32)
                if width > WIDEST_WHOLE:
                    rest += bit * tl.load(fine + (plane - 1) * PLANE_BYTES + at).to(tl.float32)
        level = level + rest / FINE
        level = tl.where((index & sign_bit) != 0, -level, level)
        column = tile_column * 64 + c
        group = tl.minimum(column // group_size, groups - 1)
        scale = tl.load(decoders + row + STEP_BYTES + group * 64 + of_row).to(tl.float32) * step
        sums += multiply_tile(x, scale * level, token, column, tokens, columns, IN_FLOAT32)

    store_sums(output, sums, bias, token, tokens, first_row, row_count, output_stride, first_byte, HAS_BIAS)
