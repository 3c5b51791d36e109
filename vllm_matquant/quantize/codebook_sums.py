"""What codes decode to with a codebook, and the transpose of it: by C++ on the CPU, by gathers elsewhere."""

from __future__ import annotations

import torch
from torch.nn.functional import embedding

from vllm_matquant.checkpoint.codebook import ENTRIES, by_column, by_four, collect_signs, entry_index, with_signs
from vllm_matquant.kernels import ops


def codebook_levels(codes: torch.Tensor, planes: torch.Tensor) -> torch.Tensor:
    """The level of each code.

    Args:
        codes: uint8 [out_features, in_features], each of as many bits as planes has matrices and one more; in_features
            is a multiple of 16.
        planes: float32 [width - 1, 64, 4], the levels of each entry, then what each further bit adds.

    Returns:
        float32 [out_features, in_features].
    """
    planes = with_signs(planes).contiguous()
    return ops.codebook_levels(codes.contiguous(), planes) if codes.is_cpu else gathered_levels(codes, planes)


def sums_by_entry(codes: torch.Tensor, weights: torch.Tensor, width: int) -> torch.Tensor:
    """The transpose of :func:`codebook_levels`: sums over what has each level and increment, with its signs.

    Args:
        codes: uint8 [out_features, in_features], each of ``width`` bits; in_features is a multiple of 16.
        weights: float32 of the same shape.
        width: of the codes.

    Returns:
        float32 [width - 1, 64, 4].
    """
    return collect_signs(_sums_by_index(codes, weights, width))


def squares_by_entry(codes: torch.Tensor, weights: torch.Tensor, width: int) -> torch.Tensor:
    """:func:`sums_by_entry` of what no sign changes, as squares."""
    return _sums_by_index(codes, weights, width).unflatten(1, (-1, ENTRIES)).sum(1)


def _sums_by_index(codes: torch.Tensor, weights: torch.Tensor, width: int) -> torch.Tensor:
    if codes.is_cpu:
        return ops.codebook_sums(codes.contiguous(), weights.contiguous(), width)
    return gathered_sums(codes, weights, width)


def gathered_levels(codes: torch.Tensor, planes: torch.Tensor) -> torch.Tensor:
    """What :func:`vllm_matquant.kernels.ops.codebook_levels` does, on any device."""
    width = len(planes) + 1
    index = entry_index(codes, width)
    total = embedding(index, planes[0])
    for bits, increments in zip(_further_bits(codes, width), planes[1:], strict=True):
        total.addcmul_(embedding(index, increments), bits)
    return by_column(total, codes.shape[1])


def gathered_sums(codes: torch.Tensor, weights: torch.Tensor, width: int) -> torch.Tensor:
    """What :func:`vllm_matquant.kernels.ops.codebook_sums` does, on any device."""
    fours, index = by_four(weights), entry_index(codes, width).flatten().long()
    parts = [fours, *(fours * bits for bits in _further_bits(codes, width))]

    def sums(part: torch.Tensor) -> torch.Tensor:
        # Place by place: rows of four numbers would be added one by one.
        places = part.flatten(0, -2).unbind(1)
        return torch.stack([torch.bincount(index, each.contiguous(), 4 * ENTRIES) for each in places], 1)

    return torch.stack([sums(part) for part in parts]).float()


def _further_bits(codes: torch.Tensor, width: int) -> list[torch.Tensor]:
    """For each bit past an index's float32 [out_features, fours, 4], the most significant first."""
    fours = by_four(codes)
    return [(fours >> bit & 1).float() for bit in reversed(range(width - 2))]
