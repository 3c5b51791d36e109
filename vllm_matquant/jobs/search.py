"""The job that puts recipes, a width for each layer, into a checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

import torch

from vllm_matquant.bench.layers import layer_milliseconds
from vllm_matquant.checkpoint.files import publish_json
from vllm_matquant.checkpoint.language_model import load_language_model
from vllm_matquant.checkpoint.recipe_store import add_recipes
from vllm_matquant.jobs.arguments import names_of, output_file, positive
from vllm_matquant.jobs.job import PlannedJob, Say, argument, running, show, silent
from vllm_matquant.jobs.search_inputs import (
    DECODER_SAMPLES,
    SENSITIVITY_LENGTH,
    SearchInputs,
    TextSettings,
    open_inputs,
)
from vllm_matquant.jobs.search_run import METHODS, Bar, Effort, SearchRun
from vllm_matquant.measure.sliced import SlicedModel
from vllm_matquant.quantize.device import check_device
from vllm_matquant.research.law import Law, read_law
from vllm_matquant.research.shapes import SHAPES
from vllm_matquant.search.budget import Budget, BudgetError, Costs, check_feasible, parse_budget
from vllm_matquant.search.journal import Journal
from vllm_matquant.search.planner import Planner

STATE_FOLDER = ".matquant-search"

Limits = dict[Budget, tuple[Costs, float]]
"""For each budget what each layer takes of it at each width, and what the layers may take together."""


def budget_list(text: str) -> tuple[Budget, ...]:
    """Parse ``2.25,2.5,90MiB``."""
    try:
        budgets = tuple(parse_budget(part) for part in text.split(","))
    except BudgetError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if len({budget.name for budget in budgets}) < len(budgets):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected each budget once")
    return budgets


def _show_budgets(budgets: Any) -> str:
    each = budgets if isinstance(budgets, (list, tuple)) else [budgets]
    return show([budget.name if isinstance(budget, Budget) else budget for budget in each])


@dataclass(frozen=True)
class SearchPlan:
    """How far each budget reaches: the shares of it that all layers take at their narrowest and at their widest."""

    shares: dict[str, tuple[float, float]]

    def __str__(self) -> str:
        return "\n".join(
            f"{name}: the layers take {least:.0%} of it at their narrowest, {most:.0%} at their widest"
            for name, (least, most) in self.shares.items()
        )


@dataclass(frozen=True)
class Search(PlannedJob[list[dict[str, Any]]]):
    """Search the recipe, a width for each layer, of least divergence within a budget, and put it into the checkpoint.

    Gives a row of figures for each step: name, what, average_bits, resident_bytes, kl, passes, evaluations, seconds.
    """

    epilog = """
A budget is an average width (2.5), a size of all weights (90MiB), or the time of all quantized layers for one token
on this machine (6ms). For each the recipe lies in DIR/recipes afterwards, beside recipes of the plain widths that say
what those lose on the same text: `vllm serve DIR --bits 2.5` and `--memory 90MiB` choose among them.

With --reference, decoders are then trained for each recipe alone (--decoder-samples).

A search that was cut off goes on with --resume, to the same recipes. The default way needs about as long as 100 runs
of the model over the text for the sensitivities, once, 4 runs for each step of each budget, and 8 for its decoders.
"""

    folder: Path | str = field(
        metadata=argument("folder of the nested checkpoint", parse=Path, positional=True, metavar="DIR")
    )
    budget: Sequence[Budget | float | str] | float | str = field(
        metadata=argument(
            "such as 2.5,3 (bits per weight), 90MiB (all weights) or 6ms (all quantized layers, one token)",
            parse=budget_list,
            show=_show_budgets,
            metavar="LIST",
        )
    )
    _: KW_ONLY
    reference: Path | str | None = field(
        default=None,
        metadata=argument("measure divergence from this source model; default: from the widest slice", metavar="MODEL"),
    )
    calibration: Path | str | None = field(
        default=None,
        metadata=argument(
            "text to measure on, as varied as what the model shall do; default: that of matquant quantize",
            metavar="hf:NAME|FILE",
        ),
    )
    text_column: str = field(default="text", metadata=argument("its field in a record"))
    samples: int = field(default=64, metadata=argument("windows of it (default: %(default)s)", parse=positive))
    sequence_length: int = field(
        default=256, metadata=argument("tokens of each (default: %(default)s)", parse=positive)
    )
    sensitivity_samples: int = field(
        default=256,
        metadata=argument(
            f"windows of {SENSITIVITY_LENGTH} tokens from which each layer's sensitivity is estimated "
            "(default: %(default)s)",
            parse=positive,
        ),
    )
    decoder_samples: int | None = field(
        default=None,
        metadata=argument(
            "as many more windows, to train decoders on for each recipe alone; 0: it keeps those of the plain widths "
            f"(default: {DECODER_SAMPLES} with --reference, which training needs; else 0)",
            parse=int,
            metavar="N",
        ),
    )
    method: str = field(
        default=METHODS[0],
        metadata=argument(
            "program: integer programs on measured sensitivities; evolution: EvoPress; both: evolution from the "
            "programs' result (default: %(default)s)",
            choices=METHODS,
        ),
    )
    steps: int = field(default=8, metadata=argument("programs after the first one (default: %(default)s)", parse=int))
    generations: int = field(default=25, metadata=argument("of evolution (default: %(default)s)", parse=positive))
    offspring: int = field(default=16, metadata=argument("of each generation (default: %(default)s)", parse=positive))
    shapes: Sequence[str] = field(
        default=(),
        metadata=argument(
            f"also measure MatQuant's hand-made recipes: some of {', '.join(SHAPES)}, or all",
            parse=names_of(tuple(SHAPES), "all"),
            metavar="LIST",
        ),
    )
    seed: int = field(default=0, metadata=argument("of everything that is drawn (default: %(default)s)", parse=int))
    device: str = field(default="cpu", metadata=argument("where the model runs, such as cuda (default: %(default)s)"))
    law: Path | str | None = field(
        default=None,
        metadata=argument("print what this scaling law predicts beside it", parse=Path, metavar="LAW.json"),
    )
    resume: bool = field(
        default=False, metadata=argument("go on with a search of these settings that was cut off", recorded=False)
    )
    json: Path | str | None = field(
        default=None, metadata=argument("write every step there (JSON)", parse=output_file, metavar="OUT")
    )

    def plan(self) -> SearchPlan:
        self._law()
        inputs = self._open()
        costs = self._limits(inputs, layer_milliseconds(inputs.checkpoint) if self._timed else None)
        return SearchPlan(
            {
                budget.name: (_share(min, table, limit), _share(max, table, limit))
                for budget, (table, limit) in costs.items()
            }
        )

    def run(self, say: Say = silent) -> list[dict[str, Any]]:
        law = self._law()
        inputs = self._open()
        checkpoint = inputs.checkpoint
        if not self._timed:
            self._limits(inputs, None)  # before anything is written
        path = Path(self.folder) / STATE_FOLDER / "journal.jsonl"
        journal = Journal(path, inputs.fingerprint(self.seed, self.device), resume=self.resume)
        try:
            milliseconds = None
            if self._timed:
                # In the journal: a resumed search must use the times of the first run, and they differ from run to run.
                measured = journal.measure("milliseconds", lambda: (layer_milliseconds(checkpoint), 0))
                milliseconds = {layer: {int(w): ms for w, ms in own.items()} for layer, own in measured.items()}
            limits = self._limits(inputs, milliseconds)
            reference = inputs.reference
            source = load_language_model(reference, dtype=torch.bfloat16) if reference else None
            planner = Planner(
                SlicedModel(checkpoint, source, device=self.device),
                inputs.calibration.tokens,
                inputs.sensitivity.tokens,
                journal,
                self.seed,
                Bar(),
            )
            effort = Effort(self.method, self.steps, self.generations, self.offspring, self.seed, self.device)
            search = SearchRun(inputs, effort, planner, say, law)
            search.begin()
            for budget, (costs, limit) in limits.items():
                search.spend(budget, costs, limit, self.shapes)
            add_recipes(checkpoint, search.recipes, search.decoders)
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(f"what was measured is kept in {path.parent}, for --resume") from stop
        journal.remove()
        if self.json:
            publish_json(Path(self.json), search.rows)
        return search.rows

    @property
    def _budgets(self) -> Sequence[Budget]:
        return budget_list(_show_budgets(self.budget))

    @property
    def _timed(self) -> bool:
        """Whether some budget is one of time."""
        return any(budget.kind == "ms" for budget in self._budgets)

    def _law(self) -> Law | None:
        return read_law(Path(self.law)) if self.law else None

    def _open(self) -> SearchInputs:
        check_device("device", self.device)
        text = TextSettings(
            None if self.calibration is None else str(self.calibration),
            self.text_column,
            self.samples,
            self.sequence_length,
            self.sensitivity_samples,
            self.decoder_samples,
            self.seed,
        )
        return open_inputs(Path(self.folder), None if self.reference is None else str(self.reference), text)

    def _limits(self, inputs: SearchInputs, milliseconds: Costs | None) -> Limits:
        """What layers cost and may cost, for each budget.

        Raises:
            BudgetError: a budget is less than the narrowest widths cost.
        """
        limits = {budget: budget.costs(inputs.checkpoint, milliseconds) for budget in self._budgets}
        for budget, (table, limit) in limits.items():
            check_feasible(budget, table, limit)
        return limits


def _share(pick: Any, costs: Costs, limit: float) -> float:
    """Which part of the limit all layers take at their cheapest (``min``) or dearest (``max``) widths."""
    return float(sum(pick(own.values()) for own in costs.values())) / limit


search = running(Search)
