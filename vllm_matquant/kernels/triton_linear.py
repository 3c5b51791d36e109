"""The product in Triton, over the planes that the CUDA kernels read: where there is Triton but not our library.

Weights are rounded to the activations' type before they are multiplied; sums are float32. Right and portable, not
tuned.
"""

from __future__ import annotations

import functools
import os

import torch
import triton
import triton.language as tl

from vllm_matquant.checkpoint.decoder import INT8
from vllm_matquant.checkpoint.spec import BASE_BITS, PARENT_BITS, WIDTHS
from vllm_matquant.kernels import cuda_layout
from vllm_matquant.kernels.cuda_layout import TILE_ROWS, partition_starts
from vllm_matquant.kernels.layout import ceil_div
from vllm_matquant.kernels.operators import define_linear
from vllm_matquant.kernels.triton_codebook import codebook_kernel
from vllm_matquant.kernels.triton_tiles import WORDS, multiply_tile, store_sums
from vllm_matquant.kernels.weight import PackedWeight

STEP_BYTES = tl.constexpr(cuda_layout.STEP_BYTES)
CENTRE_BIAS = tl.constexpr(cuda_layout.CENTRE_BIAS)


@triton.jit
def _affine_kernel(  # type: ignore[no-untyped-def]
    x, planes, decoders, steps, active_width, rows_of_tiles, decoders_of_width, bias, output,
    tokens, columns, output_stride, tile_columns, resident_width, groups, group_size, halves,
    HAS_BIAS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, IN_FLOAT32: tl.constexpr, WIDEST_INT8: tl.constexpr,
):  # fmt: skip
    """One row of tiles and BLOCK_TOKENS tokens; cuda_layout.py says where bits lie."""
    tile_row = tl.program_id(0)
    partition = tl.load(rows_of_tiles + 3 * tile_row)
    first_row = tl.load(rows_of_tiles + 3 * tile_row + 1)
    row_count = tl.load(rows_of_tiles + 3 * tile_row + 2)
    width = tl.load(active_width + partition)
    first_byte = tl.load(decoders_of_width + tl.minimum(tl.maximum(width, 0), 9))

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
    of_row = g * 16 + 2 * i + h
    in_int8 = width <= WIDEST_INT8
    row_bytes = tl.where(in_int8, STEP_BYTES + 128 * groups, 256 * groups)
    row = tl.maximum(first_byte, 0) + tile_row.to(tl.int64) * row_bytes
    # Of decoders in int8; of others they are read for nothing.
    step = steps + row // 2 + tl.where(in_int8, (g * 8 + 2 * i + h) * 2, 0)
    scale_step, centre_step = tl.load(step).to(tl.float32), tl.load(step + 1).to(tl.float32)
    middle = ((1 << tl.minimum(tl.maximum(width, 0), 8)) - 1) / 2

    token = tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)[:, None]
    sums = tl.zeros((BLOCK_TOKENS, 64), dtype=tl.float32)
    for tile_column in range(tile_columns):
        tile = planes + (tile_row * tile_columns + tile_column).to(tl.int64) * resident_width * WORDS
        codes = (tl.load(tile + base_word) >> place) & 3
        for plane in tl.static_range(2, 8):
            if plane < width:
                word = tl.load(tile + plane * WORDS + plane_word)
                shift = (place + (1 - plane % 2) - plane // 2 * 2 - h + 32) % 32
                codes = codes * 2 + ((word >> shift) & 1)
        column = tile_column * 64 + c
        group = tl.minimum(column // group_size, groups - 1)
        if in_int8:
            decoder = decoders + row + STEP_BYTES + group * 128 + of_row
            scale = tl.load(decoder).to(tl.float32) * scale_step
            centre = (tl.load(decoder + 8).to(tl.float32) - CENTRE_BIAS) * centre_step
            offset = tl.fma(-middle + tl.zeros_like(scale), scale, centre)
        else:
            values = halves + row // 2 + group * 128 + of_row
            scale, offset = tl.load(values).to(tl.float32), tl.load(values + 8).to(tl.float32)
        weights = scale * codes + offset
        sums += multiply_tile(x, weights, token, column, tokens, columns, IN_FLOAT32)

    store_sums(output, sums, bias, token, tokens, first_row, row_count, output_stride, first_byte, HAS_BIAS)


@functools.lru_cache(maxsize=1024)
def _tables(
    output_sizes: tuple[int, ...], decoder_bytes: tuple[tuple[int, int], ...], resident_width: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each row of tiles its partition, first output and number of outputs; for each width its decoders' first byte.

    Args:
        output_sizes: rows of each partition.
        decoder_bytes: widths that have decoders, and their bytes.
        resident_width: bits of each code that the planes hold.
        device: of the result.

    Returns:
        int32 [rows of tiles, 3], and int64 [10], -1 for widths that cannot be active; a width of 9 stands for greater
        ones.
    """
    tiles = []
    starts = zip(*partition_starts(output_sizes), output_sizes, strict=True)
    for partition, (_, first, size) in enumerate(starts):
        for begin in range(0, size, TILE_ROWS):
            tiles.append((partition, first + begin, min(TILE_ROWS, size - begin)))
    first_bytes, first = [-1] * (PARENT_BITS + 2), 0
    for width, size in decoder_bytes:
        if BASE_BITS <= width <= resident_width:
            first_bytes[width] = first
        first += size
    return (
        torch.tensor(tiles, dtype=torch.int32, device=device),
        torch.tensor(first_bytes, dtype=torch.int64, device=device),
    )


def _multiply(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    columns, groups = weight.in_features, ceil_div(weight.in_features, weight.group_size)
    tokens = x.numel() // columns
    output = x.new_empty(tokens, weight.out_features)
    widest_int8 = max((width for width in WIDTHS if weight.decoder_kind.form(width) == INT8), default=0)
    block_tokens = 16 if tokens <= 16 else 32 if tokens <= 32 else 64
    settings = {
        "HAS_BIAS": bias is not None,
        "BLOCK_TOKENS": block_tokens,
        # Triton's interpreter takes bfloat16 for integers in a product.
        "IN_FLOAT32": os.environ.get("TRITON_INTERPRET") == "1",
    }
    first = 0
    for segment in weight.segments if tokens else ():
        resident = segment.resident
        tile_rows, tile_columns, resident_width, _ = resident.planes.shape
        rows = weight.decoders_of(segment, TILE_ROWS).items()
        shared = weight.shared_of(segment, TILE_ROWS)
        sizes = tuple((width, shared[width].numel() + part.numel()) for width, part in rows)
        arguments = (
            x.reshape(tokens, columns).contiguous(), resident.planes.view(torch.int32), resident.decoders,
            resident.decoders.view(torch.bfloat16), segment.active_width,
            *_tables(resident.output_sizes, sizes, resident_width, x.device), x if bias is None else bias[first:],
            output[:, first:], tokens, columns, weight.out_features, tile_columns, resident_width, groups,
            min(weight.group_size, columns),
        )  # fmt: skip
        grid = (tile_rows, ceil_div(tokens, block_tokens))
        if weight.decoder_kind.affine:
            halves = resident.decoders.view(torch.float16)
            _affine_kernel[grid](*arguments, halves, **settings, WIDEST_INT8=widest_int8)
        else:
            codebook_kernel[grid](*arguments, len(resident.output_sizes), **settings)
        first += sum(resident.output_sizes)
    return output.view(*x.shape[:-1], weight.out_features)


linear = define_linear("triton_linear", _multiply)
"""The product for any group size, see :meth:`vllm_matquant.kernels.kernel.Kernel.linear`."""
