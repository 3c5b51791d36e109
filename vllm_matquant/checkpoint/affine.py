"""Affine decoders as numbers: the weight of code t in a row and group of columns is ``scale * t + offset``."""

from __future__ import annotations

from dataclasses import dataclass

import torch


def dequantize(
    codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, group_size: int | None = None
) -> torch.Tensor:
    """``scale * code + offset`` in float32.

    Args:
        codes: uint8 [out_features, in_features], each of the decoder's width.
        scale: floating point [out_features, groups].
        offset: floating point [out_features, groups].
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
    elif -(-in_features // group_size) != groups:
        raise ValueError(f"groups: found {groups}, expected {in_features} columns / {group_size}, rounded up")

    def per_column(values: torch.Tensor) -> torch.Tensor:
        return values.float().repeat_interleave(group_size, dim=-1)[..., :in_features]

    return per_column(scale) * codes + per_column(offset)


def middle_code(width: int) -> float:
    """The middle of the codes of ``width`` bits, halfway between 0 and ``2^width - 1``."""
    return (2**width - 1) / 2


@dataclass(frozen=True, eq=False)
class Affine:
    """Scales and offsets of a layer at one width, as numbers: what solvers and trainers work with.

    Attributes:
        scale: floating point [out_features, groups].
        offset: floating point [out_features, groups], the weight of code 0.
    """

    scale: torch.Tensor
    offset: torch.Tensor

    @property
    def groups(self) -> int:
        """Groups of columns."""
        return self.scale.shape[1]

    def __getitem__(self, rows: slice | torch.Tensor) -> Affine:
        """Those of some rows."""
        return Affine(self.scale[rows], self.offset[rows])

    def to(self, device: torch.device | str) -> Affine:
        """Copies on another device."""
        return Affine(self.scale.to(device), self.offset.to(device))

    def centre(self, width: int) -> torch.Tensor:
        """The weight in the middle of the codes of ``width`` bits: [out_features, groups]."""
        return self.offset + middle_code(width) * self.scale

    def decode(self, codes: torch.Tensor, group_size: int | None = None) -> torch.Tensor:
        """Weights of ``codes``, see :func:`dequantize`: float32 [out_features, in_features]."""
        return dequantize(codes, self.scale, self.offset, group_size)
