"""The definition of dequantization and of the product in plain PyTorch.

Every kernel is tested against it, and it serves where no kernel does (see :mod:`vllm_matquant.kernels.support`).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

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
from vllm_matquant.kernels.layout import ceil_div, unpack_shared
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


@dataclass(frozen=True)
class Rounding:
    """How kernels of the CPU round activations.

    Attributes:
        bits: of an activation, 8 or 16.
        outlier: with 8 bits, a token's span has 16 if its largest activation is more than so many times the average of
            the largest of all the token's spans.
    """

    bits: int
    outlier: float = math.inf


def default_rounding(width: int) -> Rounding:
    """How kernels of the CPU round activations in bfloat16 and float16 if nobody says how.

    Args:
        width: the widest that is active of what is multiplied at once, all of a fused layer.
    """
    return {2: Rounding(8), 3: Rounding(8, 3.0), 4: Rounding(8, 1.5)}.get(width, Rounding(16))


def round_activations(x: torch.Tensor, group_size: int, rounding: Rounding) -> torch.Tensor:
    """Activations as kernels of the CPU multiply them.

    Each token's span, what is left of a group of columns when groups are cut every 128 columns, has integers with
    a scale: for 16 bits up to 32639 in magnitude with a power of two, for 8 bits up to 127, the largest activation.

    Args:
        x: [..., in_features].
        group_size: columns that share a decoder.
        rounding: to how many bits.

    Returns:
        [..., in_features] of ``x``'s dtype.
    """
    cuts = sorted({*range(0, x.shape[-1], group_size), *range(0, x.shape[-1], SPAN_COLUMNS), x.shape[-1]})
    spans = x.float().split([end - begin for begin, end in itertools.pairwise(cuts)], dim=-1)
    largest = [span.abs().amax(-1, keepdim=True) for span in spans]
    most = rounding.outlier * torch.cat(largest, -1).mean(-1, keepdim=True) if rounding.bits == 8 else -math.inf

    def rounded(span: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
        of_16_bits = torch.exp2(torch.ceil(torch.log2(largest / 32639)))
        scale = torch.where(largest > most, of_16_bits, largest / 127).clamp(min=2.0**-100)
        return (span * (1 / scale)).round() * scale

    return torch.cat([rounded(*each) for each in zip(spans, largest, strict=True)], -1).to(x.dtype)


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
        decoders, shared = weight.decoders_of(segment, TILE_ROWS), weight.shared_of(segment, TILE_ROWS)
        tile = 0  # the first row of tiles of the partition
        for index, (size, width) in enumerate(zip(resident.output_sizes, segment.active_width.tolist(), strict=True)):
            tiles = slice(tile, tile + ceil_div(size, TILE_ROWS))
            fields = [field[tiles] for field in split_planes(resident.planes[:width], layout.paired)]
            form = weight.decoder_kind.form(width)
            parts = unpack_decoder(form, decoders[width][tiles])
            parts = {name: strip_padding(part, [size]) for name, part in parts.items()}
            values = form.values(parts | unpack_shared(form, shared[width][index]), width)
            codes = strip_padding(unpack_tiles(fields, weight.in_features), [size])
            rows.append(values.decode(codes, weight.group_size))
            tile = tiles.stop
    return torch.cat(rows)


def _multiply(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    return _product(x, dequantize_weight(weight), bias)


reference_linear = define_linear("reference_linear", _multiply)
"""The product on any device, see :meth:`vllm_matquant.kernels.kernel.Kernel.linear`. It dequantizes the whole weight
and waits for the device: correct, not fast. Activations are multiplied as they are, however far they may be rounded."""
