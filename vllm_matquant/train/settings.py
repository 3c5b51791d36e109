"""How to train: what the steps are, and how far each goes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vllm_matquant.checkpoint.spec import Slicing
from vllm_matquant.quantize.device import products_dtype
from vllm_matquant.quantize.terms import Term, check_weights

PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}


_WARM_UP = 20  # steps, where there are enough
NATIVE, ROUNDED, ROUNDED_EXTRA = "native", "rounded", "rounded-extra"
AT_RANDOM, AT_SOURCE, IN_THE_MIDDLE = STARTS = "random", "source", "middle"
SLICINGS: dict[str, Slicing] = {NATIVE: "truncate", ROUNDED: "round", ROUNDED_EXTRA: "round-extra"}
"""How the slices of a checkpoint are cut, by the form of its training."""


def _cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2


SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": _cosine,
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}
"""What rates are multiplied by, for how much of the training after the warm-up is done, from 0 to 1."""


@dataclass(frozen=True)
class TrainingSettings:
    """How to train.

    Attributes:
        terms: of the loss.
        weights: of the terms; 1 for each if None.
        steps: of the optimizer.
        batch: windows that go through the model at once, on all processes together.
        accumulate: such batches in a step.
        sequence_length: tokens of a window.
        code_rate: of AdamW for positions, in units of the parent's code.
        decoder_rate: of AdamW for decoders of 2 bits, relative to each scale; smaller by the square root of 2 with
            every bit more.
        schedule: of both rates after the warm-up, one of :data:`SCHEDULES`.
        warmup: steps in which the rates rise; None for 20, or a fifth of fewer than 100 steps.
        weight_decay: of AdamW; what it decays is the distance to the parent.
        clip_norm: the largest norm of all derivatives together.
        seed: of the windows' order, and of where positions start.
        precision: of weights and activations in products, one of :data:`PRECISIONS`; None for what is faster on the
            device. What is trained is float32 in any case.
        gradient_checkpointing: keep each block's inputs alone and run it once more for its derivatives.
        device: torch device.
        form: NATIVE for slices that are prefixes, each width with decoders of its own; ROUNDED for MatQuant's own, to
            compare with the paper, see :mod:`vllm_matquant.train.rounded`; ROUNDED_EXTRA for its extra precision.
        start: AT_RANDOM for positions that start anywhere in their code's cell; AT_SOURCE where the source's weight
            lies in it; IN_THE_MIDDLE for all of them in its middle. Rounded forms start at the source in any case.

    Raises:
        ValueError: a number is out of its range, or there are not as many weights as terms.
    """

    terms: tuple[Term, ...]
    weights: tuple[float, ...] | None = None
    steps: int = 500
    batch: int = 4
    accumulate: int = 1
    sequence_length: int = 512
    code_rate: float = 0.02
    decoder_rate: float = 1e-3
    schedule: str = "cosine"
    warmup: int | None = None
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    seed: int = 0
    precision: str | None = None
    gradient_checkpointing: bool = False
    device: str = "cpu"
    form: str = NATIVE
    start: str = AT_RANDOM

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", check_weights(self.terms, self.weights))
        for name in ("code_rate", "decoder_rate", "weight_decay"):
            if not 0 <= (found := getattr(self, name)) < math.inf:
                raise ValueError(f"{name}: found {found}, expected a number from 0 up")
        if not 0 < self.clip_norm < math.inf:
            raise ValueError(f"clip_norm: found {self.clip_norm}, expected a positive number")
        if self.warmup is None:
            object.__setattr__(self, "warmup", min(_WARM_UP, self.steps // 5))
        assert self.warmup is not None
        if not 0 <= self.warmup <= self.steps:
            raise ValueError(f"warmup: found {self.warmup}, expected 0 to {self.steps}, the number of steps")

    @property
    def windows(self) -> int:
        """Windows in a step."""
        return self.batch * self.accumulate

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations in products."""
        return PRECISIONS[self.precision] if self.precision else products_dtype(self.device)

    def factor(self, step: int) -> float:
        """What the rates are multiplied by in a step, which counts from 0."""
        assert self.warmup is not None
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        done = max(0, step - self.warmup) / max(1, self.steps - self.warmup)
        return rise * SCHEDULES[self.schedule](done)

    def describe(self) -> dict[str, Any]:
        """All of it as JSON values: what a training's results depend on besides its models and texts."""
        assert self.weights is not None
        return {
            "terms": {str(term): weight for term, weight in zip(self.terms, self.weights, strict=True)},
            **{name: value for name, value in vars(self).items() if name not in ("terms", "weights", "precision")},
            "precision": str(self.dtype).removeprefix("torch."),
        }
