"""From a layer as another tool has stored it to parent codes and a decoder for each width."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_matquant.checkpoint.decoder import Affine, DecoderKind
from vllm_matquant.checkpoint.packing import slice_codes
from vllm_matquant.checkpoint.spec import PARENT_BITS
from vllm_matquant.quantize.baselines import nearest_parents
from vllm_matquant.quantize.decoders import cell_centres, fit_groups, parent_grid
from vllm_matquant.quantize.imports.layer import GivenLayer
from vllm_matquant.quantize.layer import QuantizedLayer


def largest_group_size(group_of: torch.Tensor, unit: int) -> int | None:
    """The most columns, a multiple of ``unit`` that divides all, of which each span lies in one group; None if none.

    Args:
        group_of: int64 [in_features], the group of each column.
        unit: what a group size must be a multiple of.
    """
    columns = len(group_of)
    for size in range(columns // unit * unit, 0, -unit):
        if columns % size == 0:
            spans = group_of.view(-1, size)
            if bool((spans == spans[:, :1]).all()):
                return size
    return None


def keep_codes(given: GivenLayer, widths: Sequence[int], group_size: int, kind: DecoderKind) -> QuantizedLayer:
    """The codes as the parent's most significant bits: the slice of their width is the layer itself.

    Its decoder has the layer's scales, and offsets that differ from ``-scale * zero`` by their rounding to what is
    stored. Narrower widths are fitted to the weight.

    Args:
        given: the layer.
        widths: ascending, up to the layer's bits.
        group_size: columns that share a decoder, all of one group of the layer.
        kind: how decoders are stored.
    """
    groups = given.group_of[::group_size]
    scale, zero = given.scale[:, groups], given.zero[:, groups]
    # No decoder has a negative scale: from above, the codes count the other way.
    last, negative = 2**given.bits - 1, scale < 0
    codes = torch.where(negative.repeat_interleave(group_size, dim=1), last - given.codes, given.codes)
    scale, zero = scale.abs(), torch.where(negative, last - zero, zero)
    parents = codes << (PARENT_BITS - given.bits)
    grid = Affine(scale / 2 ** (PARENT_BITS - given.bits), -scale * zero)  # of parents: those without further bits
    weight, decoders = given.weight(), {}
    for width in widths:
        if width == given.bits:
            decoders[width] = kind.encode(Affine(scale, -scale * zero), width)
        else:
            sliced = slice_codes(parents, PARENT_BITS, width)
            decoders[width] = fit_groups(weight, sliced, cell_centres(grid, width), width, kind)
    return QuantizedLayer(parents, decoders)


def nearest_codes(weight: torch.Tensor, widths: Sequence[int], group_size: int, kind: DecoderKind) -> QuantizedLayer:
    """Parents of 8 bits on the min-max grid, nearest to the weight; the decoders of all widths are fitted to it.

    Args:
        weight: float32 [out_features, in_features].
        widths: ascending.
        group_size: columns that share a decoder.
        kind: how decoders are stored.
    """
    grid = parent_grid(weight, group_size)
    parents = nearest_parents(weight, grid, group_size)
    decoders = {
        width: fit_groups(weight, slice_codes(parents, PARENT_BITS, width), cell_centres(grid, width), width, kind)
        for width in widths
    }
    return QuantizedLayer(parents, decoders)


def weight_errors(weight: torch.Tensor, layer: QuantizedLayer) -> dict[int, float]:
    """The error of each width, ``|E|^2 / |W|^2`` with E the error of the decoded weight: 0 of a weight that is 0."""
    whole = float(weight.double().square().sum()) or 1.0
    return {
        width: float((layer.decode(width, "truncate") - weight).double().square().sum()) / whole
        for width in layer.decoders
    }
