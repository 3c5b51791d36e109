"""Search for the recipe of least divergence within a budget.

The way that is used by default takes three steps. Samples of the Fisher information at the source model give the loss
of each layer at each width to second order, and an integer program the best widths by these losses. Then, around the
widths found so far, the derivative of the measured divergence replaces what the layers do to each other, which the
samples leave out, and the program is solved again within a region that shrinks when the divergence did not fall: a
sequence of integer programs. All losses come from one parent in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from vllm_matquant.checkpoint.decoder import Decoder
from vllm_matquant.measure.sliced import SlicedModel
from vllm_matquant.search.budget import Costs, spent
from vllm_matquant.search.divergence import Divergence, fisher_samples
from vllm_matquant.search.journal import Journal
from vllm_matquant.search.program import Limit, cheapest_widths

_FIRST_REGION = 0.1  # bits per weight that may change at once
_SHRINK, _GROW = 0.4, 1.5
_GOOD_STEP = 0.5  # of the predicted fall: the region grows
_GRADIENT_BYTES = 4 * 2**30  # of the windows that are sampled at once, for which each slice is decoded once
_MOST_AT_ONCE = 32


@dataclass(frozen=True)
class Step:
    """Where a search stands.

    Attributes:
        widths: the best so far.
        kl: their divergence.
        passes: tokens that went through the model for it, those of a backward pass counted twice more.
        what: what has been done.
    """

    widths: dict[str, int]
    kl: float
    passes: int
    what: str


@dataclass
class Planner:
    """All measurements on one model and text, and the search that uses them.

    Attributes:
        model: whose layers take the candidates' widths.
        tokens: int64 [windows, length], what divergence is measured on.
        fisher_tokens: int64 [windows, length], what the Fisher information is sampled on.
        journal: what keeps the measurements.
        seed: of everything that is drawn.
        report: called with what is being done and how far it is.
    """

    model: SlicedModel
    tokens: torch.Tensor
    fisher_tokens: torch.Tensor
    journal: Journal
    seed: int = 0
    report: Callable[[str, int, int], None] = lambda what, done, total: None
    _samples: dict[str, dict[int, torch.Tensor]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._divergence = Divergence(self.model, self.tokens)

    def kl(self, widths: Mapping[str, int], share: float = 1.0) -> float:
        """The divergence on the first ``share`` of the text."""
        key = f"kl/{share}/{self._digits(widths)}"
        return float(self._measure(key, lambda: self._divergence.of(widths, share)))

    def kl_with(self, widths: Mapping[str, int], decoders: Mapping[str, Decoder]) -> float:
        """The divergence with decoders of these widths' own; the journal keeps one for the widths."""

        def measured() -> float:
            with self.model.other_decoders(decoders):
                return self._divergence.of(widths)

        return float(self._measure(f"own kl/{self._digits(widths)}", measured))

    def slopes(self, widths: Mapping[str, int]) -> dict[str, dict[int, float]]:
        """See :meth:`Divergence.slopes`."""
        return _integer_keys(self._measure(f"slopes/{self._digits(widths)}", lambda: self._divergence.slopes(widths)))

    def curvature(self, widths: Mapping[str, int] | None = None) -> dict[str, dict[int, float]]:
        """The divergence's second-order term if one layer changes, from ``widths`` or from the source's weights."""
        losses = {}
        for layer, own in self._sampled().items():
            here = own[widths[layer]] if widths is not None else 0.0
            losses[layer] = {width: float((there - here).square().mean()) / 2 for width, there in own.items()}
        return losses

    def start(self, costs: Costs, limit: float) -> dict[str, int]:
        """The widths of least loss by the samples alone."""
        return cheapest_widths(self.curvature(), Limit(costs, limit))

    def program(self, costs: Costs, limit: float, steps: int) -> Iterator[Step]:
        """The sequence of integer programs.

        Args:
            costs: of each layer and width.
            limit: what the widths may cost together.
            steps: programs to solve after the first.
        """
        widths = self.start(costs, limit)
        kl = self.kl(widths)
        yield Step(widths, kl, self.journal.passes, "first program")
        region, weights = _FIRST_REGION, self.model.weights
        shares = {layer: self.model.weights_of(layer) / weights for layer in costs}
        for step in range(steps):
            losses = _sum(self.slopes(widths), self.curvature(widths))
            distance = {layer: {width: shares[layer] * abs(width - widths[layer]) for width in own}
                        for layer, own in costs.items()}  # fmt: skip
            candidate = cheapest_widths(losses, Limit(costs, limit), Limit(distance, region))
            predicted = sum(losses[layer][width] for layer, width in candidate.items())
            found = self.kl(candidate)  # known already where the program keeps the widths
            if found < kl:
                if found - kl < _GOOD_STEP * predicted:
                    region *= _GROW
                widths, kl = candidate, found
            else:
                region *= _SHRINK
            yield Step(widths, kl, self.journal.passes, f"program {step + 1}/{steps}")

    def _sampled(self) -> dict[str, dict[int, torch.Tensor]]:
        """Samples of how the predictions change: for each layer and width float64 [windows]."""
        if not self._samples:
            count = len(self.fisher_tokens)
            parts = []
            bytes_each = self.model.weights * self.model.model.dtype.itemsize
            at_once = max(1, min(_MOST_AT_ONCE, _GRADIENT_BYTES // bytes_each))
            for first in range(0, count, at_once):
                self.report("sensitivities", first, count)
                windows = range(first, min(first + at_once, count))
                parts.append(_integer_keys(self._measure(f"fisher/{first}", partial(self._sample, windows))))
            self.report("sensitivities", count, count)
            self._samples = {
                layer: {width: torch.cat([torch.tensor(part[layer][width]) for part in parts]) for width in own}
                for layer, own in parts[0].items()
            }
        return self._samples

    def _sample(self, windows: range) -> dict[str, dict[int, list[float]]]:
        seeds = [self.seed * 1_000_003 + window for window in windows]
        return fisher_samples(self.model, self.fisher_tokens[windows.start : windows.stop], seeds)

    def _digits(self, widths: Mapping[str, int]) -> str:
        return "".join(str(widths[layer]) for layer in self.model.layers)

    def _measure(self, key: str, run: Callable[[], Any]) -> Any:
        def measured() -> tuple[Any, int]:
            before = self.model.passes
            return run(), self.model.passes - before

        return self.journal.measure(key, measured)


def check_within(widths: Mapping[str, int], costs: Costs, limit: float) -> None:
    """Refuse widths that cost more than the limit: no search may return such.

    Raises:
        RuntimeError: they do.
    """
    if spent(costs, widths) > limit:
        raise RuntimeError(f"the search exceeded its budget: found {spent(costs, widths)}, expected at most {limit}")


def _sum(*terms: Mapping[str, Mapping[int, float]]) -> dict[str, dict[int, float]]:
    return {
        layer: {width: sum(term[layer][width] for term in terms) for width in own} for layer, own in terms[0].items()
    }


def _integer_keys(measured: Mapping[str, Mapping[Any, Any]]) -> dict[str, dict[int, Any]]:
    """What JSON made strings of."""
    return {layer: {int(width): value for width, value in own.items()} for layer, own in measured.items()}
