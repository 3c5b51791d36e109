"""Where codebooks start from, and their fit to codes.

The decoded weight is linear in the levels and increments of a codebook while the scales are fixed, and linear in the
scales while the codebook is. Least squares of one after the other, under the full Hessian.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from vllm_matquant.checkpoint.codebook import (
    ENTRIES,
    PLACES,
    Codebook,
    by_four,
    signs,
    with_signs,
)
from vllm_matquant.checkpoint.decoder import Decoder, DecoderKind
from vllm_matquant.quantize.codebook_sums import codebook_levels, squares_by_entry, sums_by_entry

SAMPLE = 2**15  # fours that entries are found from
_ROUNDS = 20  # of k-means
_STEPS = 8  # of conjugate gradients
_ROUNDS_OF_SIGNS = 3  # after which increments that are still negative stay as they were
# How far further bits reach from the mean of an entry's fours, in standard deviations: more, and they are coarse where
# most fours are; less, and many fours are out of their reach.
_REACH = 2.5
_SCRATCH_BYTES = 64 * 2**20  # of the normal equations of some rows
_RIDGE = 1e-6  # pull of a scale towards the one before, relative to the diagonal of the normal equations


def group_scales(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """The root mean square of each group: float32 [out_features, groups]."""
    return weight.unflatten(1, (-1, group_size)).square().mean(2).sqrt()


def find_entries(fours: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """Entries by k-means, each place of a four with an importance of its own.

    The first ones are taken evenly from the fours in the order of their Mahalanobis distances (GPTVQ, arXiv
    2402.15319, section 3.2). An entry that loses all its fours takes the one that is worst off. A four has the entry
    that is nearest to it with some signs of its halves, and counts there with these signs.

    Args:
        fours: float32 [count, 4].
        importance: float32 [count, 4], not negative.

    Returns:
        float32 [64, 4].
    """
    if len(fours) > SAMPLE:  # evenly, for the order is that of rows and columns
        chosen = torch.linspace(0, len(fours) - 1, SAMPLE).round().long()
        fours, importance = fours[chosen], importance[chosen]
    covariance = (fours.T @ fours).double() / max(1, len(fours)) + 1e-9 * torch.eye(PLACES)
    distance = ((fours.double() @ torch.linalg.inv(covariance)) * fours).sum(1)
    first = torch.linspace(0, len(fours) - 1, ENTRIES).round().long()
    entries = fours[distance.argsort(stable=True)[first]].clone()
    weighed = fours * importance
    own = (weighed * fours).sum(1)
    for _ in range(_ROUNDS):
        cost, entry, sign = _nearest(fours, importance, entries)
        sums = torch.zeros(ENTRIES, 2 * PLACES).index_add_(0, entry, torch.cat([weighed * sign, importance], 1))
        total = sums[:, PLACES:]
        entries = torch.where(total > 0, sums[:, :PLACES] / total.clamp(min=1e-30), entries)
        empty = (torch.bincount(entry, minlength=ENTRIES) == 0).nonzero().squeeze(1)[: len(fours)]
        worst = (cost + own).argsort(descending=True, stable=True)[: len(empty)]
        entries[empty] = fours[worst]
    return entries


def _nearest(
    fours: torch.Tensor, importance: torch.Tensor, entries: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the entry that is nearest to each four costs, up to what is the same for all: [count]; its number: int64
    [count]; and the signs that it has there: [count, 4]."""
    indexed = with_signs(entries)
    cost, nearest = torch.addmm(-2 * (importance * fours) @ indexed.T, importance, indexed.square().T).min(1)
    return cost, nearest % ENTRIES, signs(fours)[nearest // ENTRIES]


def start_books(weight: torch.Tensor, hessian: torch.Tensor, group_size: int, widths: Sequence[int]) -> list[Codebook]:
    """The codebook of each width to start from: entries by k-means, further bits spread over the fours of each entry.

    Args:
        weight: float32 [out_features, in_features], in_features and a group's columns multiples of 16.
        hessian: float32 [in_features, in_features].
        group_size: columns that share a scale.
        widths: ascending.
    """
    scale = group_scales(weight, group_size)
    per_column = scale.repeat_interleave(group_size, 1)
    fours = by_four(torch.where(per_column > 0, weight / per_column, 0)).flatten(0, 1)
    importance = by_four(per_column.square() * hessian.diagonal()).flatten(0, 1)
    importance = importance / importance.mean().clamp(min=1e-30)
    entries = find_entries(fours, importance)
    low, high = _extents(fours, entries, importance)
    books = []
    for width in widths:
        further = width - 2
        step = (high - low) / 2**further
        levels = (low + step / 2) if further else entries
        increments = [step * 2 ** (further - bit) for bit in range(1, further + 1)]
        stacked = torch.stack(increments) if increments else torch.empty(0, ENTRIES, PLACES)
        books.append(Codebook(levels, stacked, scale))
    return books


def _extents(fours: torch.Tensor, entries: torch.Tensor, importance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """From where to where the further bits of each entry reach: float32 [64, 4] both."""
    sums = torch.zeros(3, ENTRIES, PLACES)
    for some, weight in zip(fours.split(SAMPLE), importance.split(SAMPLE), strict=True):
        _, entry, sign = _nearest(some, weight, entries)
        for total, each in zip(sums, (torch.ones_like(some), some * sign, some.square()), strict=True):
            total.index_add_(0, entry, each)
    count = sums[0].clamp(min=1)
    mean = torch.where(sums[0] > 0, sums[1] / count, entries)
    reach = _REACH * (sums[2] / count - mean.square()).clamp(min=0).sqrt()
    return mean - reach, mean + reach


class CodebookFit:
    """Least squares for the codebook and the scales of a width under the full Hessian, codes fixed.

    Minimises ``tr((W - D) H (W - D)^T)`` over the decoded weight D.

    Args:
        weight: float32 [out_features, in_features].
        hessian: float32 [in_features, in_features].
        kind: of the decoders.
    """

    def __init__(self, weight: torch.Tensor, hessian: torch.Tensor, kind: DecoderKind) -> None:
        self._weight, self._hessian, self._kind = weight, hessian, kind
        self._target = weight @ hessian

    def __call__(self, codes: torch.Tensor, book: Codebook) -> Decoder:
        """The decoder for ``codes`` (uint8 [out_features, in_features], of the book's width), from ``book`` on."""
        book = self.fit_levels(codes, book)
        return self._kind.encode(self.fit_scales(codes, book), book.width)

    def fit_levels(self, codes: torch.Tensor, book: Codebook) -> Codebook:
        """A codebook of levels and increments that fit better, the scales as they are.

        Some steps of conjugate gradients from the ones given; again without those increments that became negative.
        """
        linear = LinearCodebook(codes, book)
        start = linear.values()
        free = torch.ones_like(start, dtype=torch.bool)
        for _ in range(_ROUNDS_OF_SIGNS):
            found = self._minimize(linear, start, free)
            negative = (found < 0) & free
            negative[0] = False
            if not negative.any():
                break
            free &= ~negative
        found = torch.where(negative, start, found)
        return replace(book, levels=found[0], increments=found[1:])

    def _minimize(self, linear: LinearCodebook, start: torch.Tensor, free: torch.Tensor) -> torch.Tensor:
        """Conjugate gradients on the error, for those of the values that are free."""
        found = start.clone()
        diagonal = linear.diagonal(self._hessian).clamp(min=1e-30)
        residual = linear.collect(self._target - linear.expand(found) @ self._hessian) * free
        conditioned = residual / diagonal
        direction, size = conditioned, (residual * conditioned).sum()
        for _ in range(_STEPS):
            change = linear.expand(direction)
            curved = change @ self._hessian
            curvature = (change.double() * curved).sum()
            if not curvature > 0:
                break
            length = float(size / curvature)
            found += length * direction
            residual -= length * linear.collect(curved) * free
            conditioned = residual / diagonal
            size, before = (residual * conditioned).sum(), size
            direction = conditioned + float(size / before) * direction
        return found

    def fit_scales(self, codes: torch.Tensor, book: Codebook) -> Codebook:
        """A codebook of scales that fit better, levels and increments as they are; none of them is negative."""
        chunk = max(1, _SCRATCH_BYTES // (8 * book.groups**2 + 12 * codes.shape[1]))
        parts = [slice(start, start + chunk) for start in range(0, max(1, len(codes)), chunk)]
        return replace(book, scale=torch.cat([self._scales_of(part, codes[part], book) for part in parts]))

    def _scales_of(self, rows: slice, codes: torch.Tensor, book: Codebook) -> torch.Tensor:
        """Those of some rows: [rows, groups]."""
        levels, before = codebook_levels(codes, _planes(book)), book.scale[rows]
        groups, size = book.groups, levels.shape[1] // book.groups
        normal = torch.empty(len(levels), groups, groups, dtype=torch.float64)
        by_group = self._hessian.unflatten(0, (groups, size))
        for group, (values, hessian) in enumerate(zip(levels.split(size, 1), by_group, strict=True)):
            columns = (group + 1) * size
            products = (values @ hessian[:, :columns]).mul_(levels[:, :columns])
            normal[:, group, : group + 1] = products.unflatten(1, (-1, size)).sum(-1)
        right = (levels * self._target[rows]).unflatten(1, (groups, size)).sum(-1).double()
        diagonal = normal.diagonal(dim1=1, dim2=2)
        ridge = _RIDGE * (diagonal + diagonal.mean(1, keepdim=True)) + torch.finfo(torch.float32).tiny
        diagonal += ridge
        right += ridge * before
        factor, faulty = torch.linalg.cholesky_ex(normal)
        solved = torch.cholesky_solve(right.unsqueeze(2), factor).squeeze(2)
        good = (solved > 0) & (faulty == 0).unsqueeze(1)
        return torch.where(good, solved.float(), before)


class LinearCodebook:
    """The decoded weight as a linear function of levels and increments [width - 1, 64, 4], codes and scales fixed.

    Args:
        codes: uint8 [out_features, in_features], of the book's width.
        book: whose scales are used, and with whose levels and increments :meth:`values` begins.
    """

    def __init__(self, codes: torch.Tensor, book: Codebook) -> None:
        self._codes, self._book = codes, book
        self.scale = book.scale.float().repeat_interleave(codes.shape[1] // book.groups, 1)

    def values(self) -> torch.Tensor:
        """The book's levels and increments: float32 [width - 1, 64, 4]."""
        return _planes(self._book)

    def decode(self) -> torch.Tensor:
        """What the book's own values decode to: float32 [out_features, in_features]."""
        return self.expand(self.values())

    def expand(self, values: torch.Tensor) -> torch.Tensor:
        """What values decode to: float32 [out_features, in_features]."""
        return codebook_levels(self._codes, values).mul_(self.scale)

    def collect(self, weights: torch.Tensor) -> torch.Tensor:
        """The transpose of :meth:`expand`, of float32 [out_features, in_features]: sums over what has each level and
        increment."""
        return sums_by_entry(self._codes, weights * self.scale, self._book.width)

    def diagonal(self, hessian: torch.Tensor) -> torch.Tensor:
        """The second derivative of half the error by each level and increment, but for what a row's columns do to each
        other."""
        return squares_by_entry(self._codes, self.scale.square() * hessian.diagonal(), self._book.width)


def _planes(book: Codebook) -> torch.Tensor:
    return torch.cat([book.levels[None], book.increments]).float()
