"""Codebooks by k-means with importance, many at once: the Hessian-weighted EM of GPTVQ (arXiv 2402.15319, section 3.2).

Each codebook has vectors of its own, and each place of a vector an importance: what an error there costs.
"""

from __future__ import annotations

import torch

_SCRATCH_BYTES = 32 * 2**20  # of distances from some vectors to all entries
_LEAST = 1e-30


def find_entries(vectors: torch.Tensor, importance: torch.Tensor, count: int, iterations: int) -> torch.Tensor:
    """Entries that minimise ``sum_v sum_p h_vp (x_vp - c_p)^2`` over the vectors x, c the nearest entry of each.

    An entry that loses all its vectors takes one of those that are worst off.

    Args:
        vectors: float32 [books, vectors, places].
        importance: float32 [books or 1, vectors, places], not negative; vectors of importance 0 do not count.
        count: of entries.
        iterations: at the most; ends when no vector changes its entry.

    Returns:
        float32 [books, count, places].
    """
    entries = seeds(vectors, importance, count)
    weighed = vectors * importance
    data = torch.cat([weighed, importance.expand_as(vectors)], 2)
    before = None
    for _ in range(iterations):
        nearest, gain = nearest_entries(data, entries)
        if before is not None and torch.equal(nearest, before):
            break
        before = nearest
        entries = _refill(_means(data, nearest, entries), nearest, gain, weighed, vectors)
    return entries


def seeds(vectors: torch.Tensor, importance: torch.Tensor, count: int) -> torch.Tensor:
    """Entries to start from: vectors taken evenly in the order of their Mahalanobis distances from the mean.

    A vector of one place has a distance with a sign: its order is then that of the values, and no seed stands far from
    those that it shall serve.

    Args:
        vectors, importance, count: as of :func:`find_entries`.

    Returns:
        float32 [books, count, places].
    """
    places, counts = vectors.shape[2], (importance.amax(2) > 0).float().expand(vectors.shape[:2])
    total = counts.sum(1).clamp(min=1)
    centred = vectors - ((vectors * counts.unsqueeze(2)).sum(1) / total.unsqueeze(1)).unsqueeze(1)
    if places == 1:
        distance = centred[..., 0]
    else:
        covariance = (centred * counts.unsqueeze(2)).mT.double() @ centred.double() / total[:, None, None]
        trace = covariance.diagonal(dim1=1, dim2=2).mean(1)
        covariance += (1e-9 * trace + _LEAST)[:, None, None] * torch.eye(places, dtype=torch.float64)
        distance = (centred * torch.linalg.solve(covariance, centred.mT.double()).mT.float()).sum(2)
    order = distance.masked_fill(counts == 0, torch.inf).argsort(dim=1, stable=True)
    # In the middle of each of ``count`` equal parts of the vectors that count.
    chosen = ((torch.arange(count) + 0.5) / count * total.unsqueeze(1)).long().clamp(max=vectors.shape[1] - 1)
    return _take(vectors, order.gather(1, chosen)).clone()


def nearest_entries(data: torch.Tensor, entries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest entry of each vector.

    Args:
        data: float32 [books, vectors, 2 * places], see :func:`find_entries`: the vectors times their importance, and
            the importance.
        entries: float32 [books, count, places].

    Returns:
        int64 [books, vectors], and float32 of that shape: the cost of each vector without the term ``h x^2``, which no
        entry changes.
    """
    both = torch.cat([-2 * entries, entries.square()], 2).mT
    step = max(1, _SCRATCH_BYTES // (4 * entries.shape[0] * entries.shape[1]))
    costs = [(part @ both).min(2) for part in data.split(step, 1)]
    return torch.cat([each.indices for each in costs], 1), torch.cat([each.values for each in costs], 1)


def _means(data: torch.Tensor, nearest: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
    """The mean, weighed by importance, of the vectors of each entry; entries of none stay."""
    books, count, places = entries.shape
    where = (nearest + count * torch.arange(books).unsqueeze(1)).flatten()
    sums = torch.zeros(books * count, 2 * places).index_add_(0, where, data.flatten(0, 1)).view(books, count, -1)
    weighed, total = sums.split(places, 2)
    return torch.where(total > 0, weighed / total.clamp(min=_LEAST), entries)


def _refill(
    entries: torch.Tensor, nearest: torch.Tensor, gain: torch.Tensor, weighed: torch.Tensor, vectors: torch.Tensor
) -> torch.Tensor:
    """``entries`` with those that no vector has moved to the vectors that cost most."""
    count = entries.shape[1]
    used = torch.zeros(entries.shape[:2]).scatter_(1, nearest, 1.0)
    empty = used == 0
    if not empty.any():
        return entries
    cost = gain + (weighed * vectors).sum(2)
    worst = cost.topk(min(count, cost.shape[1]), 1).indices
    turn = (empty.cumsum(1) - 1).clamp(0, worst.shape[1] - 1)
    return torch.where(empty.unsqueeze(2), _take(vectors, worst.gather(1, turn)), entries)


def _take(vectors: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The vectors [books, count, places] at ``index`` (int64 [books, count])."""
    return vectors.gather(1, index.unsqueeze(2).expand(-1, -1, vectors.shape[2]))
