"""One run of a search: from budgets to recipes, each measured, and given decoders of its own where that helps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from vllm_matquant.checkpoint.decoder import Decoder
from vllm_matquant.checkpoint.reader import Checkpoint
from vllm_matquant.checkpoint.recipe import Recipe, average_bits, resident_bytes
from vllm_matquant.checkpoint.slice import UNIFORM
from vllm_matquant.jobs.search_inputs import SearchInputs
from vllm_matquant.jobs.table import figures, headings
from vllm_matquant.quantize.end_to_end import EndToEndSettings
from vllm_matquant.quantize.recipe_decoders import train_recipe
from vllm_matquant.quantize.source import SourceModel
from vllm_matquant.research.evolution import evolution
from vllm_matquant.research.law import Law, LawError
from vllm_matquant.research.shapes import shape_widths
from vllm_matquant.search.budget import Budget, Costs
from vllm_matquant.search.planner import Planner, Step, check_within

COLUMNS = ("average_bits", "resident_bytes", "kl", "passes", "seconds")
METHODS = ("program", "evolution", "both")
_NAME_COLUMNS = 24
_EPOCHS = 2  # of the training of decoders
_STEP_TOKENS = 512  # that each step of the training of decoders sees
_TRAINING_PASSES = 4  # through the model: forwards, forwards again for the backward pass, which counts twice


@dataclass(frozen=True)
class Effort:
    """How hard to search.

    Attributes:
        method: one of :data:`METHODS`.
        steps: integer programs after the first one.
        generations: of evolution.
        offspring: of each generation.
        seed: of everything that is drawn.
        device: where the model runs.
    """

    method: str
    steps: int
    generations: int
    offspring: int
    seed: int
    device: str


@dataclass
class SearchRun:
    """The recipes that come of a search, one after the other.

    Attributes:
        inputs: what it works on.
        effort: how hard to search.
        planner: measurements and searches.
        say: given a line for each step.
        law: a scaling law whose prediction stands beside what is measured.
        rows: a row of figures for each step so far.
        recipes: those found so far.
        decoders: for each recipe with decoders of its own those of all layers.
    """

    inputs: SearchInputs
    effort: Effort
    planner: Planner
    say: Callable[[str], None]
    law: Law | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    recipes: list[Recipe] = field(default_factory=list)
    decoders: dict[str, dict[str, Decoder]] = field(default_factory=dict)
    _start: float = field(default_factory=time.monotonic)

    @property
    def checkpoint(self) -> Checkpoint:
        return self.inputs.checkpoint

    def begin(self) -> None:
        """Say what the columns are, and measure the plain widths."""
        self.say(" " * _NAME_COLUMNS + headings(COLUMNS))
        for width in self.checkpoint.format.widths:
            self._compare(UNIFORM.format(width), "uniform", dict(self.checkpoint.slice(width).widths))

    def spend(self, budget: Budget, costs: Costs, limit: float, shapes: Sequence[str]) -> None:
        """Find the recipe of a budget.

        Args:
            budget: whose recipe to find.
            costs: what each layer takes of it at each width.
            limit: what the layers may take of it together.
            shapes: names of hand-made recipes to measure beside it.
        """
        name = f"{budget.name}-bits" if budget.kind == "bits" else budget.name
        for shape in shapes:
            self._compare(f"{shape}-{name}", "shape", shape_widths(shape, costs, limit))
        best: Step | None = None
        for step in self._steps(costs, limit):
            check_within(step.widths, costs, limit)
            if best is None or step.kl <= best.kl:
                best = step
            self._show(name, step)
        assert best is not None  # every method takes a step
        best = self._train(name, best)
        self.recipes.append(self._recipe(name, best.widths, best.kl, budget))
        self._foretell(budget, best)

    def _compare(self, name: str, what: str, widths: dict[str, int]) -> None:
        """Measure widths that nobody searched."""
        kl = self.planner.kl(widths)
        self.recipes.append(self._recipe(name, widths, kl))
        self._show(name, Step(widths, kl, self.planner.journal.passes, what))

    def _steps(self, costs: Costs, limit: float) -> Iterator[Step]:
        effort = self.effort
        last = None
        if effort.method in ("program", "both"):
            for last in self.planner.program(costs, limit, effort.steps):
                yield last
        if effort.method in ("evolution", "both"):
            start = last.widths if last else None
            yield from evolution(self.planner, costs, limit, effort.generations, effort.offspring, start)

    def _train(self, name: str, best: Step) -> Step:
        """Train decoders for the best widths, if asked for: they are kept where they lose less than the plain ones."""
        tokens, reference = self.inputs.training.tokens, self.inputs.reference
        if not len(tokens) or reference is None:
            return best

        def run() -> tuple[dict[str, torch.Tensor], int]:
            settings = EndToEndSettings(
                epochs=_EPOCHS,
                sequences=max(1, _STEP_TOKENS // tokens.shape[1]),
                device=self.effort.device,
                seed=self.effort.seed,
            )
            trained = train_recipe(SourceModel(reference), self.checkpoint, best.widths, tokens, settings)
            parts = {name: part for layer, each in trained.items() for name, part in each.named(layer).items()}
            return parts, _EPOCHS * _TRAINING_PASSES * tokens.numel()

        parts = self.planner.journal.tensors(f"{name}-decoders", run)
        kind = self.checkpoint.format.decoder_kind

        def decoder(layer: str, width: int) -> Decoder:
            return kind.form(width).from_tensors(lambda name: parts[f"{layer}.{name}"], width)

        decoders = {layer: decoder(layer, width) for layer, width in best.widths.items()}
        kl = self.planner.kl_with(best.widths, decoders)
        step = Step(best.widths, kl, self.planner.journal.passes, "own decoders")
        self._show(name, step)
        if step.kl >= best.kl:
            return best
        self.decoders[name] = decoders
        return step

    def _recipe(self, name: str, widths: dict[str, int], kl: float, budget: Budget | None = None) -> Recipe:
        reference = self.inputs.reference
        origin: dict[str, Any] = {
            "reference": reference.name if reference else "widest slice",
            "calibration": self.inputs.calibration.source,
        }
        if budget is not None:
            origin |= {"budget": budget.name, "method": self.effort.method, "seed": self.effort.seed}
        if name in self.decoders:
            origin["training"] = self.inputs.training.source
        return Recipe(name, widths, kl, origin, own_decoders=name in self.decoders)

    def _show(self, name: str, step: Step) -> None:
        """Say a step and keep its row."""
        layers = self.checkpoint.layers
        row = {
            "name": name,
            "what": step.what,
            "average_bits": average_bits(step.widths, layers),
            "resident_bytes": resident_bytes(step.widths, self.checkpoint.format, layers),
            "kl": step.kl,
            "passes": step.passes,
            "evaluations": step.passes / self.inputs.calibration.tokens.numel(),
            "seconds": round(time.monotonic() - self._start, 1),
        }
        self.rows.append(row)
        what = name if step.what in ("uniform", "shape") else f"{name} {step.what}"
        self.say(f"{what:<{_NAME_COLUMNS}}" + figures(row, COLUMNS))

    def _foretell(self, budget: Budget, best: Step) -> None:
        """Say what the scaling law expects, where one is given."""
        if self.law is None:
            return
        layers = self.checkpoint.layers
        average = average_bits(best.widths, layers)
        sizes = {self.checkpoint.format.group_size_of(columns, layer) for layer, (_, columns) in layers.items()}
        try:
            weights = sum(map(math.prod, layers.values()))
            predicted = self.law.predict_for_budget(average, weights, sum(sizes) / len(sizes))
            said = f"predicts {predicted:.3g} nats per token for a random mix of {average:.4g} bits"
        except LawError as error:
            said = f"does not reach it ({error})"
        self.say(f"{budget.name}: the scaling law {said}; measured {best.kl:.3g}")


class Bar:
    """A progress bar with the time that is left."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._bar is None:
            self._bar = tqdm(total=total, desc=what, unit="window")
        self._bar.update(done - self._bar.n)
        if done == total:
            self._bar.close()
            self._bar = None
