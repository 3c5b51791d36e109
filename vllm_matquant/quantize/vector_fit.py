"""The codebook update of GPTVQ: levels that fit the layer's true error better, the entries of all vectors fixed."""

from __future__ import annotations

import torch

from vllm_matquant.checkpoint.vectors import VectorBooks

_LEAST = 1e-30


class VectorFit:
    """Conjugate gradients on ``tr((W - D) H (W - D)^T)`` over the levels that the decoded weight D consists of.

    Args:
        weight: float32 [out_features, in_features].
        hessian: float32 [in_features, in_features].
        index: int64 [out_features, vectors], the entry of each vector.
        group_size: columns that share codebooks.
    """

    def __init__(self, weight: torch.Tensor, hessian: torch.Tensor, index: torch.Tensor, group_size: int) -> None:
        self._weight, self._hessian, self._index, self._group_size = weight, hessian, index, group_size

    def __call__(self, books: VectorBooks, steps: int) -> VectorBooks:
        """Codebooks that fit better than ``books``; those of no vector stay.

        Args:
            books: where to start.
            steps: of conjugate gradients.
        """
        where = books.places_of(self._index, self._group_size).flatten()
        levels = books.levels.flatten(0, 2).clone()

        def expand(values: torch.Tensor) -> torch.Tensor:
            return values[where].view(self._weight.shape)

        def collect(weights: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(levels).index_add_(0, where, weights.reshape(-1, books.places))

        importance = self._hessian.diagonal().expand_as(self._weight)
        diagonal = collect(importance).clamp(min=_LEAST)
        residual = collect((self._weight - expand(levels)) @ self._hessian)
        conditioned = residual / diagonal
        direction, size = conditioned, _inner(residual, conditioned)
        for _ in range(steps):
            change = expand(direction)
            curved = change @ self._hessian
            curvature = _inner(change, curved)
            if not curvature > 0:
                break
            length = size / curvature
            levels += length * direction
            residual -= length * collect(curved)
            conditioned = residual / diagonal
            size, before = _inner(residual, conditioned), size
            direction = conditioned + size / before * direction
        return VectorBooks(levels.view(books.levels.shape))


def _inner(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first.double() * second).sum())
