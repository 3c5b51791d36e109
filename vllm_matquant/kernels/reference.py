"""The definition of dequantization and of the product in plain PyTorch.

Every kernel is tested against it, and it serves where no kernel does (see :mod:`vllm_matquant.kernels.support`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from vllm_matquant.kernels.layout import (
    SEGMENT_COLUMNS,
    are_paired,
    ceil_div,
    split_planes,
    strip_padding,
    tile_count,
    unpack_tiles,
)


def dequantize(
    codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, group_size: int | None = None
) -> torch.Tensor:
    """``scale * code + offset`` in float32.

    Args:
        codes: uint8 [out_features, in_features], each of the decoder's width.
        scale: [out_features, groups].
        offset: [out_features, groups].
        group_size: columns that share a decoder, the last group may have fewer; by default in_features / groups.

    Returns:
        float32 [out_features, in_features].

    Raises:
        ValueError: the groups do not cover the columns.
    """
    in_features, groups = codes.shape[-1], scale.shape[-1]
    if group_size is None:
        if in_features % groups:
            raise ValueError(f"groups: found {groups}, expected a divisor of {in_features} columns or a group_size")
        group_size = in_features // groups
    elif ceil_div(in_features, group_size) != groups:
        raise ValueError(f"groups: found {groups}, expected {in_features} columns / {group_size}, rounded up")

    def per_column(values: torch.Tensor) -> torch.Tensor:
        return values.float().repeat_interleave(group_size, dim=-1)[..., :in_features]

    return per_column(scale) * codes + per_column(offset)


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

    Each token's segment, what is left of a group of columns when groups are cut every 128 columns, has integers with
    a scale: for 16 bits up to 32639 in magnitude with a power of two, for 8 bits up to 127, the largest activation.

    Args:
        x: [..., in_features].
        group_size: columns that share a decoder.
        activation_bits: 8 or 16.

    Returns:
        [..., in_features] of ``x``'s dtype.
    """
    cuts = sorted({*range(0, x.shape[-1], group_size), *range(0, x.shape[-1], SEGMENT_COLUMNS), x.shape[-1]})
    segments = x.float().split([end - begin for begin, end in itertools.pairwise(cuts)], dim=-1)

    def rounded(segment: torch.Tensor) -> torch.Tensor:
        largest = segment.abs().amax(-1, keepdim=True)
        scale = largest / 127 if activation_bits == 8 else torch.exp2(torch.ceil(torch.log2(largest / 32639)))
        scale = scale.clamp(min=2.0**-100)
        return (segment * (1 / scale)).round() * scale

    return torch.cat([rounded(segment) for segment in segments], -1).to(x.dtype)


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.nn.functional.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)


def linear_shape(
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
    """An empty result of the product: what ``torch.compile`` is to know of every operator that computes it."""
    return x.new_empty(*x.shape[:-1], sum(output_sizes))


@torch.library.custom_op("matquant::reference_linear", mutates_args=())
def reference_linear(
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
    """The same as :func:`vllm_matquant.kernels.ops.linear`, on any device.

    It dequantizes the whole weight and waits for the device to read ``active_width``: correct, not fast. Activations
    are multiplied as they are: ``activation_bits``, which says how far a kernel may round them, changes nothing.

    Raises:
        ValueError: an active width has no decoder or is more than the resident width.
    """
    in_features = x.shape[-1]
    paired = are_paired(decoder_widths, len(planes))
    weights = []
    tile = 0  # the first row of tiles of the partition
    for size, width in zip(output_sizes, active_width.tolist(), strict=True):
        if width not in decoder_widths or width > len(planes):
            raise ValueError(f"active_width: found {width}, expected one of {decoder_widths}, at most {len(planes)}")
        tiles = slice(tile, tile + tile_count([size]))
        codes = unpack_tiles([field[tiles] for field in split_planes(planes[:width], paired)], in_features)
        decoder = decoders[list(decoder_widths).index(width), tiles].permute(2, 0, 3, 1)  # [2, tiles, 16, groups]
        scale, offset = (strip_padding(values, [size]) for values in decoder)
        weights.append(dequantize(strip_padding(codes, [size]), scale, offset, group_size))
        tile = tiles.stop
    return _product(x, torch.cat(weights), bias)


reference_linear.register_fake(linear_shape)
