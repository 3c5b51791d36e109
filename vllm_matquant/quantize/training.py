"""What training by gradients consists of, on one block's outputs as on the whole model's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar

import torch

from vllm_matquant.checkpoint.decoder import Affine, middle_code
from vllm_matquant.quantize import ranks

_BETAS = 0.9, 0.99  # of Adam
_TINY = 1e-12

Allocate = Callable[[tuple[int, ...]], torch.Tensor]
"""Gives a float32 tensor of a shape, in memory or in a file."""


class TrainedDecoder:
    """The decoder of one width, while it follows Adam at a rate relative to the scales that it starts with.

    What is trained is the scale and the value at the middle of the codes: these two hardly depend on each other.

    Args:
        start: where to start from.
        width: of its codes.
        allocate: gives the memory for what is kept from step to step; by default on the device of ``start``.
    """

    VALUES: ClassVar[int] = 7  # float32 values kept for each group

    def __init__(self, start: Affine, width: int, allocate: Allocate | None = None) -> None:
        self.width, self.middle = width, middle_code(width)
        allocate = allocate or start.scale.new_empty
        self._start_scale, self._scale, self._centre = allocate((3, *start.scale.shape))
        self._moments = allocate((2, 2, *start.scale.shape)).zero_()
        self._start_scale.copy_(start.scale)
        self._scale.copy_(start.scale)
        self._centre.copy_(start.offset + self.middle * start.scale)

    @property
    def values(self) -> Affine:
        """Scale and offset as they are now."""
        return Affine(self._scale, self._centre - self.middle * self._scale)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Weights of ``codes``, both float32 [out_features, in_features]."""
        grouped = (codes - self.middle).unflatten(1, (self._scale.shape[1], -1))
        return grouped.mul_(self._scale.unsqueeze(2)).add_(self._centre.unsqueeze(2)).flatten(1)

    def slopes(self, gradient: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """The loss's derivatives by relative changes: float32 [2, out_features, groups], of the scale and the centre.

        Args:
            gradient: of the loss by the decoded weight, floating point [out_features, in_features].
            codes: float32 of the same shape.
        """
        groups = (self._scale.shape[1], -1)
        gradient = gradient.float()
        by_scale = (gradient * (codes - self.middle)).unflatten(1, groups).sum(dim=2)
        return torch.stack([by_scale, gradient.unflatten(1, groups).sum(dim=2)]) * self._start_scale

    def step(self, slopes: torch.Tensor, rate: float, step: int) -> None:
        """One step of Adam (arXiv 1412.6980, algorithm 1).

        Args:
            slopes: see :meth:`slopes`.
            rate: relative to the scale.
            step: counts from 1.
        """
        first, second = self._moments
        first.lerp_(slopes, 1 - _BETAS[0])
        second.lerp_(slopes.square(), 1 - _BETAS[1])
        change = first / (1 - _BETAS[0] ** step) / ((second / (1 - _BETAS[1] ** step)).sqrt() + _TINY)
        change *= -rate * self._start_scale
        self._scale += change[0]
        self._centre += change[1]


def batches(windows: int, steps: int, size: int, seed: int) -> Iterator[list[int]]:
    """Places of this rank's windows in each step: epochs in random order.

    Args:
        windows: that this rank has.
        steps: how many batches to give.
        size: windows in a step, over all ranks; rounded up to as many on each.
        seed: of the order.
    """
    size = -(-size // ranks.count())
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        if len(order) < min(size, windows):
            order = torch.randperm(windows, generator=generator).tolist()
        batch, order = order[:size], order[size:]
        yield batch
