"""Numbers as whole multiples of steps that are stored in bfloat16."""

from __future__ import annotations

import math

import torch


def least_steps(reach: torch.Tensor) -> torch.Tensor:
    """The smallest steps that are not below ``reach`` (floating point, any shape): bfloat16 of the same shape."""
    step = reach.to(torch.bfloat16)
    return torch.where(step < reach, torch.nextafter(step, step.new_full((), math.inf)), step)


def multiples(values: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """How many steps the values are, rounded to whole numbers, float64; 0 where the step is none.

    Args:
        values: floating point.
        step: of a shape that broadcasts to that of ``values``.
    """
    step = step.double()
    return (values.double() / torch.where(step > 0, step, 1.0)).nan_to_num_().round()
