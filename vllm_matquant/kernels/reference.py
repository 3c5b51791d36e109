"""The definition of dequantization and of the product in plain PyTorch.

Every kernel is tested against it, and it serves where no kernel does (see :mod:`vllm_matquant.kernels.support`).
"""

from __future__ import annotations

import itertools

import torch

from vllm_matquant.checkpoint.decoder import dequantize
from vllm_matquant.kernels.cpu_layout import (
    TILE_ROWS,
    CpuLayout,
    split_planes,
    strip_padding,
    unpack_decoder,
    unpack_tiles,
)
from vllm_matquant.kernels.layout import ceil_div
from vllm_matquant.kernels.operators import define_linear
from vllm_matquant.kernels.weight import PackedWeight

SPAN_COLUMNS = 128  # the most whose activations have one scale


def linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor,
    bias: torch.Tensor | None = None,
    group_size: int | None = None,
) -> torch.Tensor:
    """The product of ``x`` [..., in_features] and dequantized weights in float32, rounded once to ``x``'s dtype."""
    return _product(x, dequantize(codes, scale, offset, group_size), bias)


def round_activations(x: torch.Tensor, group_size: int, activation_bits: int) -> torch.Tensor:
    """Activations as kernels that take ``activation_bits`` of them multiply them.

    Each token's span, what is left of a group of columns when groups are cut every 128 columns, has integers with
    a scale: for 16 bits up to 32639 in magnitude with a power of two, for 8 bits up to 127, the largest activation.

    Args:
        x: [..., in_features].
        group_size: columns that share a decoder.
        activation_bits: 8 or 16.

    Returns:
        [..., in_features] of ``x``'s dtype.
    """
    cuts = sorted({*range(0, x.shape[-1], group_size), *range(0, x.shape[-1], SPAN_COLUMNS), x.shape[-1]})
    segments = x.float().split([end - begin for begin, end in itertools.pairwise(cuts)], dim=-1)

    def rounded(segment: torch.Tensor) -> torch.Tensor:
        largest = segment.abs().amax(-1, keepdim=True)
        scale = largest / 127 if activation_bits == 8 else torch.exp2(torch.ceil(torch.log2(largest / 32639)))
        scale = scale.clamp(min=2.0**-100)
        return (segment * (1 / scale)).round() * scale

    return torch.cat([rounded(segment) for segment in segments], -1).to(x.dtype)


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.nn.functional.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)


def dequantize_weight(weight: PackedWeight) -> torch.Tensor:
    """All rows of a weight in the CPU's layout, on any device, at the widths that are active now (waits for it).

    Returns:
        float32 [out_features, in_features].
    """
    layout = weight.layout
    assert isinstance(layout, CpuLayout)
    rows = []
    for segment in weight.segments:
        resident = segment.resident
        decoders = weight.decoders_of(segment, TILE_ROWS)
        tile = 0  # the first row of tiles of the partition
        for size, width in zip(resident.output_sizes, segment.active_width.tolist(), strict=True):
            tiles = slice(tile, tile + ceil_div(size, TILE_ROWS))
            fields = [field[tiles] for field in split_planes(resident.planes[:width], layout.paired)]
            form = weight.decoder_kind.form(width)
            parts = unpack_decoder(form, decoders[width][tiles])
            affine = form.affine({name: strip_padding(part, [size]) for name, part in parts.items()}, width)
            codes = strip_padding(unpack_tiles(fields, weight.in_features), [size])
            rows.append(dequantize(codes, affine.scale, affine.offset, weight.group_size))
            tile = tiles.stop
    return torch.cat(rows)


def _multiply(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    return _product(x, dequantize_weight(weight), bias)


reference_linear = define_linear("reference_linear", _multiply)
"""The product on any device, see :meth:`vllm_matquant.kernels.kernel.Kernel.linear`. It dequantizes the whole weight
and waits for the device: correct, not fast. Activations are multiplied as they are, however far they may be rounded."""
