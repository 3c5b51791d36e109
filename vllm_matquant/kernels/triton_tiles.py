"""What Triton's kernels have in common: a product with a tile's weights, and the end of a row of tiles."""

from __future__ import annotations

import triton
import triton.language as tl

WORDS = tl.constexpr(128)  # of 32 bits in a tile's plane


@triton.jit
def multiply_tile(  # type: ignore[no-untyped-def]
    x, weights, token, column, tokens, columns, IN_FLOAT32: tl.constexpr
):  # fmt: skip
    """Tokens times a tile's weights [64, 64], rounded to the activations' type: float32 [tokens, 64]."""
    rounded = weights.to(x.dtype.element_ty)
    activations = tl.load(x + token * columns + column, mask=(token < tokens) & (column < columns), other=0.0)
    if IN_FLOAT32:
        activations, rounded = activations.to(tl.float32), rounded.to(tl.float32)
    return tl.dot(activations, tl.trans(rounded), out_dtype=tl.float32, input_precision="ieee")


@triton.jit
def store_sums(  # type: ignore[no-untyped-def]
    output, sums, bias, token, tokens, first_row, row_count, output_stride, first_byte, HAS_BIAS: tl.constexpr
):  # fmt: skip
    """Add the bias and write the outputs that there are; not a number for a width without decoders."""
    row = tl.arange(0, 64)[None, :]
    if HAS_BIAS:
        sums += tl.load(bias + first_row + row, mask=row < row_count, other=0.0).to(tl.float32)
    sums = tl.where(first_byte >= 0, sums, float("nan"))
    wanted = (token < tokens) & (row < row_count)
    tl.store(output + token * output_stride + first_row + row, sums.to(output.dtype.element_ty), mask=wanted)
