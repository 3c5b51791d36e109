"""The steps of a training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from vllm_matquant.quantize import ranks
from vllm_matquant.quantize.training import epochs
from vllm_matquant.train.distributed import own_rows
from vllm_matquant.train.model import NestedModel
from vllm_matquant.train.objective import add_gradients, divergence
from vllm_matquant.train.optimizer import Optimizer
from vllm_matquant.train.settings import TrainingSettings


@dataclass(frozen=True)
class Progress:
    """What is known after a step.

    Attributes:
        step: counts from 1.
        losses: the value of each term, in nats per token, over the step's windows on all processes.
        rates: of each group of parameters.
        norm: of all derivatives together, before it was limited; None before the first step.
        changed: share of the codes that are others than the parent's, by width; where it was counted.
        held_out: divergence from the source on the held-out text, in nats per token, by width; where it was measured.
    """

    step: int
    losses: dict[str, float]
    rates: dict[str, float]
    norm: float | None
    changed: dict[int, float] = field(default_factory=dict)
    held_out: dict[int, float] = field(default_factory=dict)


class Training:
    """The training of one model on one text.

    Args:
        model: to train.
        optimizer: of what is trained of it.
        tokens: int64 [windows, length], the whole text.
        settings: how to train.
    """

    def __init__(
        self, model: NestedModel, optimizer: Optimizer, tokens: torch.Tensor, settings: TrainingSettings
    ) -> None:
        self._model, self._optimizer, self._tokens, self._settings = model, optimizer, tokens, settings

    def steps(self, done: int = 0) -> Iterator[Progress]:
        """Take the steps that are left.

        Args:
            done: how many were taken before.

        Raises:
            ValueError: the loss is no longer finite.
        """
        settings = self._settings
        order = epochs(len(self._tokens), settings.steps, settings.windows, settings.seed)
        with tqdm(
            total=settings.steps,
            initial=done,
            desc="training",
            unit="step",
            smoothing=0,
            disable=not ranks.is_first(),
        ) as progress:
            for step, windows in enumerate(order):
                if step < done:
                    continue
                found = self._step(step, windows)
                progress.update()
                progress.set_postfix_str(", ".join(f"{term} {value:.4g}" for term, value in found.losses.items()))
                yield found

    def changed(self) -> dict[int, float]:
        """Share of the trained layers' codes that are others than the parent's, at each trained width."""
        counts = [
            sum(nested.changed_codes(width, own_rows(nested)) for nested in self._model.layers.values())
            for width in self._model.trained
        ]
        if self._model.sharded:
            counts = [int(total) for total in ranks.totals(counts)]
        return {width: count / self._model.weights for width, count in zip(self._model.trained, counts, strict=True)}

    def measure(self, tokens: torch.Tensor, widths: Sequence[int]) -> dict[int, float]:
        """Divergence from the source's predictions at each width, in nats per token.

        Args:
            tokens: int64 [windows, length], a text that is not trained on.
            widths: of the model.
        """
        total = dict.fromkeys(widths, 0.0)
        for start in range(0, len(tokens), ranks.count()):
            # All processes run the model equally often, for they share its weights.
            place = start + ranks.own_rank()
            window = tokens[min(place, len(tokens) - 1)][None].to(self._model.device)
            for width, value in divergence(self._model, widths, window).items():
                total[width] += float(value) if place < len(tokens) else 0.0
        return dict(zip(widths, (value / len(tokens) for value in ranks.totals(list(total.values()))), strict=True))

    def _step(self, step: int, windows: Sequence[int]) -> Progress:
        settings = self._settings
        assert settings.weights is not None
        totals = dict.fromkeys(settings.terms, 0.0)
        batches = [windows[start : start + settings.batch] for start in range(0, len(windows), settings.batch)]
        for batch in batches:
            tokens = self._tokens[ranks.spread(torch.tensor(batch))].to(self._model.device)
            found = add_gradients(self._model, settings.terms, settings.weights, tokens, 1 / len(batches))
            for term, loss in found.items():
                totals[term] += float(loss) / len(batches)
        values = [total / ranks.count() for total in ranks.totals(list(totals.values()))]
        losses = {str(term): value for term, value in zip(totals, values, strict=True)}
        for name, value in losses.items():
            if not math.isfinite(value):
                raise ValueError(
                    f"training: the term {name} is {value} in step {step + 1}, expected a finite loss; a smaller "
                    f"--code-rate than {settings.code_rate} or --decoder-rate than {settings.decoder_rate} may help"
                )
        rates, norm = self._optimizer.rates(step), float(self._optimizer.step(step))
        for nested in self._model.layers.values():
            nested.project(own_rows(nested))
        return Progress(step + 1, losses, rates, norm)
