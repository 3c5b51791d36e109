"""Decoders: one scale and offset per row, group of columns and width, ``w ~ scale_r * t + offset_r``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_matquant.checkpoint.packing import slice_codes
from vllm_matquant.checkpoint.spec import DECODER_DTYPE, PARENT_BITS, Slicing
from vllm_matquant.kernels.reference import dequantize

_SCRATCH_BYTES = 8 * 2**20  # of products for a chunk of rows: what a cache holds
# Pull towards the previous decoder, relative to the diagonal of the normal equations: decides only what the data leaves
# open, such as the scale of a group whose weights share one code.
_RIDGE = 1e-6


@dataclass(frozen=True)
class Decoder:
    """The decoder of one width.

    Attributes:
        scale: float32 [out_features, groups].
        offset: float32 [out_features, groups].
    """

    scale: torch.Tensor
    offset: torch.Tensor

    def __getitem__(self, rows: slice) -> Decoder:
        return Decoder(self.scale[rows], self.offset[rows])

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Weights of the r-bit ``codes`` (uint8 [out_features, in_features]), float32 of the same shape."""
        return dequantize(codes, self.scale, self.offset)

    def stored(self) -> Decoder:
        """The decoder as the checkpoint keeps it: rounded to float16, in float32."""
        return Decoder(self.scale.to(DECODER_DTYPE).float(), self.offset.to(DECODER_DTYPE).float())


def parent_grid(weight: torch.Tensor, group_size: int) -> Decoder:
    """Min-max grid of the 8-bit parent: code 0 is a group's minimum, code 255 its maximum.

    Args:
        weight: float32 [out_features, in_features].
    """
    grouped = weight.unflatten(1, (-1, group_size))
    low, high = grouped.amin(dim=2), grouped.amax(dim=2)
    return Decoder((high - low) / (2**PARENT_BITS - 1), low)


def cell_centres(grid: Decoder, width: int) -> Decoder:
    """Decoder of a truncated ``width``-bit slice that puts each code at the mean of the parents that share it."""
    cell = 2 ** (PARENT_BITS - width)
    return Decoder(grid.scale * cell, grid.offset + grid.scale * (cell - 1) / 2)


def rounded_levels(grid: Decoder, width: int) -> Decoder:
    """Decoder of MatQuant's rounded slice, S(q, r) * 2^(8 - r) on the parent's grid (arXiv 2502.06786, eq. 6)."""
    return Decoder(grid.scale * 2 ** (PARENT_BITS - width), grid.offset)


def slice_table(widths: Sequence[int], slicing: Slicing) -> torch.Tensor:
    """The slice of every parent at every width: uint8 [len(widths), 256]."""
    parents = torch.arange(2**PARENT_BITS, dtype=torch.uint8)
    return torch.stack([slice_codes(parents, PARENT_BITS, width, slicing) for width in widths])


def refit(weight: torch.Tensor, codes: torch.Tensor, hessian: torch.Tensor, previous: Decoder, width: int) -> Decoder:
    """Least squares for all scales and offsets of each row under the full Hessian, codes fixed.

    Minimises ``(w - d) H (w - d)^T`` for each row w over the decoded row d, which is linear in the row's 2 * groups
    parameters; then rounds the scales to float16 and solves for the offsets once more, so that they make up for the
    rounding.

    Args:
        weight: float32 [out_features, in_features].
        codes: uint8 [out_features, in_features], the ``width``-bit codes.
        hessian: float32 [in_features, in_features].
        previous: kept where the data does not determine a parameter, or where a scale would become negative.

    Returns:
        Decoder with values that float16 holds exactly.
    """
    rows, columns = weight.shape
    groups = previous.scale.shape[1]
    chunk = max(1, _SCRATCH_BYTES // (columns * groups * 4))
    parts = [
        _refit_rows(weight[part], codes[part], hessian, previous[part], width, groups)
        for part in (slice(start, start + chunk) for start in range(0, rows, chunk))
    ]
    return Decoder(torch.cat([part.scale for part in parts]), torch.cat([part.offset for part in parts]))


def _refit_rows(
    weight: torch.Tensor, codes: torch.Tensor, hessian: torch.Tensor, previous: Decoder, width: int, groups: int
) -> Decoder:
    rows, columns = weight.shape
    group_size = columns // groups
    # Centred codes decorrelate scale from offset; the offset is moved back at the end.
    centre = (2**width - 1) / 2
    centred = codes.float() - centre

    def per_group(values: torch.Tensor) -> torch.Tensor:
        return values.unflatten(-1, (groups, group_size)).sum(-1)

    # The normal equations of (scales, offsets); a Cholesky decomposition reads their lower triangle only.
    column_sums = per_group(hessian)  # H 1_g: [columns, groups]
    offsets_normal = per_group(column_sums.T).double()
    target = weight @ hessian
    normal = torch.empty(rows, 2 * groups, 2 * groups, dtype=torch.float64)
    grouped = centred.unflatten(1, (groups, group_size)).transpose(0, 1)  # [groups, rows, group_size]
    by_group = hessian.unflatten(0, (groups, group_size))
    normal[:, :groups, :groups] = per_group((grouped @ by_group).mul_(centred)).permute(1, 2, 0)
    normal[:, groups:, :groups] = (grouped @ column_sums.unflatten(0, (groups, group_size))).permute(1, 2, 0)
    normal[:, groups:, groups:] = offsets_normal
    right_scales, right_offsets = per_group(centred * target).double(), per_group(target).double()

    guess = previous.scale.double(), (previous.offset + centre * previous.scale).double()
    diagonal = normal.diagonal(dim1=1, dim2=2)
    ridge_scales, ridge_offsets = (
        _RIDGE * (part + part.mean(dim=-1, keepdim=True)) + torch.finfo(torch.float32).tiny
        for part in (diagonal[:, :groups], offsets_normal.diagonal())
    )
    diagonal += torch.cat([ridge_scales, ridge_offsets.expand(rows, -1)], dim=1)
    right_scales += ridge_scales * guess[0]
    right_offsets += ridge_offsets * guess[1]
    right = torch.cat([right_scales, right_offsets], dim=1)
    # With few tokens for many columns, float32's rounding can leave a row's equations indefinite.
    factor, faulty = torch.linalg.cholesky_ex(normal)
    scale = torch.cholesky_solve(right.unsqueeze(2), factor).squeeze(2)[:, :groups]
    solved = (scale > 0) & (faulty == 0).unsqueeze(1)
    scale = torch.where(solved, scale, guess[0]).to(DECODER_DTYPE).double()
    residual = right_offsets - (normal[:, groups:, :groups] @ scale.unsqueeze(2)).squeeze(2)
    factor, faulty = torch.linalg.cholesky_ex(offsets_normal + ridge_offsets.diag())
    offset = torch.cholesky_solve(residual.T, factor).T
    offset = torch.where(faulty == 0, offset, guess[1])
    return Decoder(scale.float(), (offset - centre * scale).float()).stored()
