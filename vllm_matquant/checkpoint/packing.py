"""Codes and their disk form: a 2-bit base field and 1-bit planes, packed along the input dimension."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vllm_matquant.checkpoint.slicing import SLICE_RULES, Slicing
from vllm_matquant.checkpoint.spec import BASE_BITS, PARENT_BITS

PACKED_CODES = 2**24  # at a time: while they are taken apart into bits, they take several times their bytes


def pack_field(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack small integers along the last dimension, first value in the least significant bits.

    Args:
        values: uint8 [rows, columns] on the CPU, each below ``2**bits``.
        bits: 1 or 2.

    Returns:
        uint8 [rows, ceil(columns * bits / 8)]; bits past the last column are zero.
    """
    single_bits = np.stack([values.numpy() & 2**bit for bit in range(bits)], axis=-1)
    packed = np.packbits(single_bits.reshape(len(values), -1), axis=-1, bitorder="little")
    return torch.from_numpy(packed)


def unpack_field(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Inverse of :func:`pack_field`: uint8 [rows, columns]."""
    single_bits = np.unpackbits(packed.numpy(), axis=-1, count=columns * bits, bitorder="little")
    single_bits = single_bits.reshape(len(packed), columns, bits)
    values: np.ndarray = single_bits[..., 0]
    for bit in range(1, bits):
        values = values | (single_bits[..., bit] << bit)
    return torch.from_numpy(values)


def pack_codes(codes: torch.Tensor, stored_width: int = PARENT_BITS) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Split parent codes into the base field and the planes 3..stored_width.

    Args:
        codes: uint8 [out_features, in_features] on the CPU, the 8-bit parent codes.
        stored_width: bits to keep, from the most significant.

    Returns:
        (base, planes) as in :mod:`vllm_matquant.checkpoint.spec`.
    """
    parts = codes.split(max(1, PACKED_CODES // max(1, codes.shape[1])))

    def packed(bits: int, width: int) -> torch.Tensor:
        """The last ``bits`` bits of the ``width``-bit codes."""
        fields = [pack_field((part >> (PARENT_BITS - width)) & (2**bits - 1), bits) for part in parts]
        return torch.cat(fields)

    return packed(BASE_BITS, BASE_BITS), [packed(1, width) for width in range(BASE_BITS + 1, stored_width + 1)]


def unpack_codes(base: torch.Tensor, planes: Sequence[torch.Tensor], in_features: int) -> torch.Tensor:
    """The most significant ``2 + len(planes)`` bits of each code, as integers: uint8 [out_features, in_features]."""
    codes = unpack_field(base, BASE_BITS, in_features)
    for plane in planes:
        codes = (codes << 1) | unpack_field(plane, 1, in_features)
    return codes


def slice_codes(codes: torch.Tensor, stored_width: int, width: int, slicing: Slicing = "truncate") -> torch.Tensor:
    """Cut codes of ``stored_width`` bits to ``width`` bits by the rule of this name.

    See :meth:`vllm_matquant.checkpoint.slicing.SliceRule.slice`.
    """
    return SLICE_RULES[slicing].slice(codes, stored_width, width)


def slice_planes(
    base: torch.Tensor, planes: Sequence[torch.Tensor], in_features: int, width: int, slicing: Slicing
) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """Base and planes of a slice, cut from what had to be read to make it, see :func:`pack_codes`.

    Args:
        base, planes: of parent codes, as many planes as the rule reads for ``width``; on any device, where the result
            is too.
        in_features: columns.
        width: of the slice.
        slicing: name of the rule.
    """
    stored_width = BASE_BITS + len(planes)
    if stored_width == width:
        return base, planes
    codes = unpack_codes(base.cpu(), [plane.cpu() for plane in planes], in_features)
    cut = pack_codes(slice_codes(codes, stored_width, width, slicing) << (PARENT_BITS - width), width)
    return cut[0].to(base.device), [plane.to(base.device) for plane in cut[1]]
