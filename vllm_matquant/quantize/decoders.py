"""Where decoders start from, and their fit to codes: ``w ~ scale_r * t + offset_r`` for each row, group and width r."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_matquant.checkpoint.decoder import Affine, Decoder, DecoderKind, join_rows, middle_code
from vllm_matquant.checkpoint.packing import slice_codes
from vllm_matquant.checkpoint.spec import PARENT_BITS, Slicing

_SCRATCH_BYTES = 8 * 2**20  # of products for a chunk of rows: what a cache holds
# Pull towards the previous decoder, relative to the diagonal of the normal equations: decides only what the data leaves
# open.
_RIDGE = 1e-6


def parent_grid(weight: torch.Tensor, group_size: int) -> Affine:
    """Min-max grid of the 8-bit parent: code 0 is a group's minimum, code 255 its maximum.

    Args:
        weight: float32 [out_features, in_features].
    """
    grouped = weight.unflatten(1, (-1, group_size))
    low, high = grouped.amin(dim=2), grouped.amax(dim=2)
    return Affine((high - low) / (2**PARENT_BITS - 1), low)


def cell_centres(grid: Affine, width: int) -> Affine:
    """Decoder of a truncated ``width``-bit slice that puts each code at the mean of the parents that share it."""
    cell = 2 ** (PARENT_BITS - width)
    return Affine(grid.scale * cell, grid.offset + grid.scale * (cell - 1) / 2)


def rounded_levels(grid: Affine, width: int, code_bits: int = PARENT_BITS) -> Affine:
    """Decoder of MatQuant's rounded slice, S(q, r) * 2^(8 - r) on the parent's grid (arXiv 2502.06786, eq. 6).

    Args:
        grid: of the codes that slices are made of.
        width: of the slice.
        code_bits: of the codes.
    """
    return Affine(grid.scale * 2 ** (code_bits - width), grid.offset)


def slice_table(widths: Sequence[int], slicing: Slicing) -> torch.Tensor:
    """The slice of every parent at every width: uint8 [len(widths), 256]."""
    parents = torch.arange(2**PARENT_BITS, dtype=torch.uint8)
    return torch.stack([slice_codes(parents, PARENT_BITS, width, slicing) for width in widths])


def fit_groups(weight: torch.Tensor, codes: torch.Tensor, previous: Affine, width: int, kind: DecoderKind) -> Decoder:
    """Least squares for the scale and offset of each group by itself: what :class:`DecoderFit` does without a Hessian.

    Args:
        weight: float32 [out_features, in_features].
        codes: uint8 of the same shape, the ``width``-bit codes.
        previous: whose scale is kept in groups whose weights share one code.
        width: bits of the codes.
        kind: of the decoder.
    """
    values, weights = (part.unflatten(1, (previous.groups, -1)).double() for part in (codes, weight))
    middle, mean = values.mean(2), weights.mean(2)
    values = values - middle.unsqueeze(2)
    spread = values.square().sum(2)
    slope = (values * weights).sum(2) / torch.where(spread > 0, spread, 1.0)
    scale = torch.where((spread > 0) & (slope > 0), slope, previous.scale.double())

    def offsets_for(stored: torch.Tensor) -> torch.Tensor:
        return (mean - middle * stored.double()).float()

    return kind.encode(Affine(scale, offsets_for(scale)), width, offsets_for)


class DecoderFit:
    """Least squares for all scales and offsets of each row of a weight under the full Hessian, codes fixed.

    Minimises ``(w - d) H (w - d)^T`` for each row w over the decoded row d, which is linear in the row's 2 * groups
    parameters; then rounds the scales to what is stored and solves for the offsets once more, so that they make up for
    the rounding. What depends on neither codes nor width is computed once.

    Args:
        weight: float32 [out_features, in_features].
        hessian: float32 [in_features, in_features].
        group_size: columns that share a decoder; divides in_features.
        kind: of the decoders.
    """

    def __init__(self, weight: torch.Tensor, hessian: torch.Tensor, group_size: int, kind: DecoderKind) -> None:
        self._kind = kind
        self._rows, columns = weight.shape
        self._groups, self._group_size = columns // group_size, group_size
        self._by_group = hessian.unflatten(0, (self._groups, group_size))
        column_sums = self._per_group(hessian)  # H 1_g: [columns, groups]
        self._column_sums = column_sums.unflatten(0, (self._groups, group_size))
        self._target = weight @ hessian
        self._offsets_normal = self._per_group(column_sums.T).double()
        self._ridge = _ridge(self._offsets_normal.diagonal())
        factor, faulty = torch.linalg.cholesky_ex(self._offsets_normal + self._ridge.diag())
        self._offsets_factor = factor if faulty == 0 else None

    def __call__(self, codes: torch.Tensor, previous: Affine, width: int) -> Decoder:
        """The best decoder of ``codes``.

        Args:
            codes: uint8 [out_features, in_features], the ``width``-bit codes.
            previous: kept where the data does not determine a parameter, or where a scale would become negative.
            width: bits of the codes.
        """
        chunk = max(1, _SCRATCH_BYTES // (self._target.shape[1] * 4))
        parts = [
            self._fit(self._target[part], codes[part], previous[part], width)
            for part in (slice(start, start + chunk) for start in range(0, max(1, self._rows), chunk))
        ]
        return join_rows(parts)

    def _fit(self, target: torch.Tensor, codes: torch.Tensor, previous: Affine, width: int) -> Decoder:
        rows, groups = len(codes), self._groups
        # Centred codes decorrelate scale from offset; the offset is moved back at the end.
        middle = middle_code(width)
        centred = codes.float() - middle

        # The normal equations of (scales, offsets); a Cholesky decomposition reads their lower triangle only.
        normal = torch.empty(rows, 2 * groups, 2 * groups, dtype=torch.float64)
        grouped = centred.unflatten(1, (groups, self._group_size)).transpose(0, 1)  # [groups, rows, group_size]
        for group, (values, hessian) in enumerate(zip(grouped, self._by_group, strict=True)):
            columns = (group + 1) * self._group_size
            products = (values @ hessian[:, :columns]).mul_(centred[:, :columns])
            normal[:, group, : group + 1] = products.unflatten(1, (-1, self._group_size)).sum(-1)
        normal[:, groups:, :groups] = (grouped @ self._column_sums).permute(1, 2, 0)
        normal[:, groups:, groups:] = self._offsets_normal
        right_scales, right_offsets = self._per_group(centred * target).double(), self._per_group(target).double()

        guess = previous.scale.double(), (previous.offset + middle * previous.scale).double()
        diagonal = normal.diagonal(dim1=1, dim2=2)
        ridge_scales = _ridge(diagonal[:, :groups])
        diagonal += torch.cat([ridge_scales, self._ridge.expand(rows, -1)], dim=1)
        right_scales += ridge_scales * guess[0]
        right_offsets += self._ridge * guess[1]
        right = torch.cat([right_scales, right_offsets], dim=1)
        # With few tokens for many columns, float32's rounding can leave a row's equations indefinite.
        factor, faulty = torch.linalg.cholesky_ex(normal)
        scale = torch.cholesky_solve(right.unsqueeze(2), factor).squeeze(2)[:, :groups]
        # The scale of a group whose weights share one code would be what rounding leaves, on each processor another.
        determined = (grouped.amax(-1) > grouped.amin(-1)).T
        solved = (scale > 0) & determined & (faulty == 0).unsqueeze(1)
        scale = torch.where(solved, scale, guess[0])

        def offsets_for(stored: torch.Tensor) -> torch.Tensor:
            scale, centre = stored.double(), guess[1]
            if self._offsets_factor is not None:
                residual = right_offsets - (normal[:, groups:, :groups] @ scale.unsqueeze(2)).squeeze(2)
                centre = torch.cholesky_solve(residual.T, self._offsets_factor).T
            return (centre - middle * scale).float()

        return self._kind.encode(Affine(scale, guess[1] - middle * scale), width, offsets_for)

    def _per_group(self, values: torch.Tensor) -> torch.Tensor:
        return values.unflatten(-1, (self._groups, self._group_size)).sum(-1)


def _ridge(diagonal: torch.Tensor) -> torch.Tensor:
    return _RIDGE * (diagonal + diagonal.mean(dim=-1, keepdim=True)) + torch.finfo(torch.float32).tiny
