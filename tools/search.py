"""Search the recipe, a width for each layer, of least divergence within a budget, and put it into the checkpoint."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from arguments import figures, headings, output_file, positive
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from vllm_matquant.checkpoint.decoder import Affine
from vllm_matquant.checkpoint.files import publish_json
from vllm_matquant.checkpoint.manifest import read_manifest
from vllm_matquant.checkpoint.names import INDEX_FILE, MANIFEST_FILE, shard_width
from vllm_matquant.checkpoint.quantization_config import format_to_config
from vllm_matquant.checkpoint.reader import Checkpoint, open_checkpoint
from vllm_matquant.checkpoint.recipe import Recipe, average_bits, resident_bytes
from vllm_matquant.checkpoint.recipe_store import add_recipes
from vllm_matquant.checkpoint.slice import UNIFORM
from vllm_matquant.measure.windows import draw_windows, load_tokenizer, split_windows
from vllm_matquant.quantize.end_to_end import EndToEndSettings
from vllm_matquant.quantize.recipe_decoders import train_recipe
from vllm_matquant.quantize.source import SourceModel, locate
from vllm_matquant.search.budget import Budget, BudgetError, Costs, check_feasible, parse_budget
from vllm_matquant.search.journal import Journal
from vllm_matquant.search.law import Law, LawError, read_law
from vllm_matquant.search.planner import METHODS, Planner, Step, check_within
from vllm_matquant.search.shapes import SHAPES, shape_widths
from vllm_matquant.search.sliced import SlicedModel

STATE_FOLDER = ".matquant-search"
COLUMNS = ("average_bits", "resident_bytes", "kl", "passes", "seconds")
_NAME_COLUMNS = 24
DECODER_SAMPLES = 64
_EPOCHS = 2  # of the training of decoders
_STEP_TOKENS = 512  # that each step of the training of decoders sees
_TRAINING_PASSES = 4  # through the model: forwards, forwards again for the backward pass, which counts twice
_EPILOG = """
A budget is an average width (2.5), a size of all weights (90MiB), or the time of all quantized layers for one token
on this machine (6ms). For each the recipe lies in DIR/recipes afterwards, beside recipes of the plain widths that say
what those lose on the same text: `vllm serve DIR --bits 2.5` and `--memory 90MiB` choose among them.

With --reference, decoders are then trained for each recipe alone (--decoder-samples).

A search that was cut off goes on with --resume, to the same recipes. The default way needs about as long as 100 runs
of the model over the text for the sensitivities, once, 4 runs for each step of each budget, and 8 for its decoders.
"""


def budget_list(text: str) -> tuple[Budget, ...]:
    """Parse ``2.25,2.5,90MiB``."""
    try:
        budgets = tuple(parse_budget(part) for part in text.split(","))
    except BudgetError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if len({budget.name for budget in budgets}) < len(budgets):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected each budget once")
    return budgets


def shape_list(text: str) -> tuple[str, ...]:
    """Parse ``pyramid,increasing`` or ``all``."""
    names = tuple(SHAPES) if text == "all" else tuple(text.split(","))
    if not set(names) <= set(SHAPES):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected some of {', '.join(SHAPES)}, or all")
    return names


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder of the nested checkpoint")
    parser.add_argument(
        "--budget",
        type=budget_list,
        required=True,
        metavar="LIST",
        help="such as 2.5,3 (bits per weight), 90MiB (all weights) or 6ms (all quantized layers, one token)",
    )
    parser.add_argument(
        "--reference", metavar="MODEL", help="measure divergence from this source model; default: from the widest slice"
    )
    parser.add_argument(
        "--calibration",
        metavar="hf:NAME|FILE.txt|FILE.jsonl",
        help="text to measure on, as varied as what the model shall do; default: that of quantize.py",
    )
    parser.add_argument("--text-column", default="text", help="its field in JSON lines or a data set")
    parser.add_argument("--samples", type=positive, default=64, help="windows of it (default: %(default)s)")
    parser.add_argument("--sequence-length", type=positive, default=256, help="tokens of each (default: %(default)s)")
    parser.add_argument(
        "--sensitivity-samples",
        type=positive,
        default=256,
        help="windows of 128 tokens from which each layer's sensitivity is estimated (default: %(default)s)",
    )
    parser.add_argument(
        "--decoder-samples",
        type=int,
        metavar="N",
        help="as many more windows, to train decoders on for each recipe alone; 0: it keeps those of the plain widths "
        f"(default: {DECODER_SAMPLES} with --reference, which training needs; else 0)",
    )
    parser.add_argument(
        "--method",
        choices=METHODS,
        default=METHODS[0],
        help="program: integer programs on measured sensitivities; evolution: EvoPress; both: evolution from the "
        "programs' result (default: %(default)s)",
    )
    parser.add_argument("--steps", type=int, default=8, help="programs after the first one (default: %(default)s)")
    parser.add_argument("--generations", type=positive, default=25, help="of evolution (default: %(default)s)")
    parser.add_argument("--offspring", type=positive, default=16, help="of each generation (default: %(default)s)")
    parser.add_argument(
        "--shapes",
        type=shape_list,
        default=(),
        metavar="LIST",
        help=f"also measure MatQuant's hand-made recipes: some of {', '.join(SHAPES)}, or all",
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="where the model runs, such as cuda (default: %(default)s)")
    parser.add_argument("--law", type=Path, metavar="LAW.json", help="print what this scaling law predicts beside it")
    parser.add_argument("--resume", action="store_true", help="go on with a search of these settings that was cut off")
    parser.add_argument("--dry-run", action="store_true", help="check everything and say what would be done")
    parser.add_argument("--json", type=output_file, metavar="OUT", help="write every step there (JSON)")
    return parser


def layer_milliseconds(checkpoint: Checkpoint) -> Costs:
    """Measured time of each layer at each width for one token on this machine; equal layers share a measurement."""
    from bench_kernel import Settings, bench_kernel

    format = checkpoint.format
    shapes = {layer: (shape, format.group_size_of(shape[1], layer)) for layer, shape in checkpoint.layers.items()}
    widths = sorted({width for layer in shapes for width in format.widths_of(layer)})
    seconds: dict[Any, dict[int, float]] = {}
    for shape, group_size in tqdm(sorted(set(shapes.values())), desc="milliseconds", unit="shape"):
        settings = Settings([shape], [1], widths, [torch.get_num_threads()], group_size)
        seconds[shape, group_size] = {row["bits"]: 1e3 * row["seconds"] for row in bench_kernel(settings)}
    return {layer: {width: seconds[key][width] for width in format.widths_of(layer)} for layer, key in shapes.items()}


class Search:
    """One run of this program: what was asked for, and what comes of it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.checkpoint = open_checkpoint(options.folder)
        missing = sorted(set(self.checkpoint.format.widths) - set(self.checkpoint.servable_widths))
        if missing:
            raise ValueError(
                f"{options.folder}: found no files of {missing} bits, expected those of all offered widths"
            )
        self.law: Law | None = read_law(options.law) if options.law else None
        self.reference = locate(options.reference) if options.reference else None
        if options.decoder_samples is None:
            options.decoder_samples = DECODER_SAMPLES if self.reference else 0
        if options.decoder_samples < 0 or (options.decoder_samples and not self.reference):
            expected = "a number from 0 up" if self.reference else "--reference, whose predictions they are trained on"
            raise ValueError(f"--decoder-samples: found {options.decoder_samples}, expected {expected}")
        tokenizer = load_tokenizer(self.reference or options.folder)

        text = {"seed": options.seed, "text_column": options.text_column}
        # Decoders are not measured on what they were trained on.
        self.calibration, self.training = split_windows(
            options.calibration,
            tokenizer,
            samples=(options.samples, options.decoder_samples),
            sequence_length=options.sequence_length,
            **text,
        )
        self.sensitivity = draw_windows(
            options.calibration, tokenizer, samples=options.sensitivity_samples, sequence_length=128, **text
        )
        self.milliseconds: Costs | None = None
        self.rows: list[dict[str, Any]] = []
        self.recipes: list[Recipe] = []
        self.decoders: dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]] = {}
        self.start = time.monotonic()

    def settings(self) -> dict[str, Any]:
        """All that the measurements depend on."""
        config = format_to_config(self.checkpoint.format) | {"recipes": []}
        index = (self.options.folder / INDEX_FILE).read_bytes()
        shards = {}
        if (self.options.folder / MANIFEST_FILE).is_file():
            files = read_manifest(self.options.folder)
            shards = {name: entry["sha256"] for name, entry in files.items() if shard_width(name) is not None}
        content = index + json.dumps([config, shards], sort_keys=True).encode()
        return {
            "checkpoint": hashlib.sha256(content).hexdigest(),
            "reference": self.reference.name if self.reference else None,
            "calibration": self.calibration.source,
            "sensitivity": self.sensitivity.source,
            "training": self.training.source,
            "seed": self.options.seed,
            "device": self.options.device,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }

    def run(self) -> list[dict[str, Any]]:
        options, checkpoint = self.options, self.checkpoint
        timed = any(budget.kind == "ms" for budget in options.budget)
        path = None if options.dry_run else options.folder / STATE_FOLDER / "journal.jsonl"
        if not timed:
            self.check_budgets()  # before anything is written
        journal = Journal(path, self.settings(), resume=options.resume)
        if timed:
            # In the journal: a resumed search must use the times of the first run, and they differ from run to run.
            measured = journal.measure("milliseconds", lambda: (layer_milliseconds(checkpoint), 0))
            self.milliseconds = {layer: {int(w): ms for w, ms in own.items()} for layer, own in measured.items()}
        costs = self.check_budgets()
        if options.dry_run:
            for budget, (table, limit) in costs.items():
                least, most = (sum(pick(own.values()) for own in table.values()) / limit for pick in (min, max))
                print(
                    f"{budget.name}: the layers take {least:.0%} of it at their narrowest, {most:.0%} at their widest"
                )
            return []
        source = AutoModelForCausalLM.from_pretrained(self.reference, dtype=torch.bfloat16) if self.reference else None
        planner = Planner(
            SlicedModel(checkpoint, source, device=options.device),
            self.calibration.tokens,
            self.sensitivity.tokens,
            journal,
            options.seed,
            _Bar(),
        )
        print(" " * _NAME_COLUMNS + headings(COLUMNS), flush=True)
        for width in checkpoint.format.widths:
            self.compared(planner, UNIFORM.format(width), "uniform", dict(checkpoint.slice(width).widths))
        for budget, (table, limit) in costs.items():
            name = f"{budget.name}-bits" if budget.kind == "bits" else budget.name
            for shape in options.shapes:
                self.compared(planner, f"{shape}-{name}", "shape", shape_widths(shape, table, limit))
            best: Step | None = None
            for step in self.steps(planner, table, limit):
                check_within(step.widths, table, limit)
                if best is None or step.kl <= best.kl:
                    best = step
                self.show(name, step)
            assert best is not None  # every method takes a step
            best = self.train(planner, name, best)
            self.recipes.append(self.recipe(name, best.widths, best.kl, budget))
            self.foretell(budget, best)
        kind = checkpoint.format.decoder_kind
        stored = {
            recipe.name: {
                layer: kind.encode(Affine(*self.decoders[recipe.name][layer]), width)
                for layer, width in recipe.widths.items()
            }
            for recipe in self.recipes
            if recipe.own_decoders
        }
        add_recipes(checkpoint, self.recipes, stored)
        journal.remove()
        return self.rows

    def compared(self, planner: Planner, name: str, what: str, widths: dict[str, int]) -> None:
        """Measure widths that nobody searched."""
        kl = planner.kl(widths)
        self.recipes.append(self.recipe(name, widths, kl))
        self.show(name, Step(widths, kl, planner.journal.passes, what))

    def check_budgets(self) -> dict[Budget, tuple[Costs, float]]:
        """What layers cost and may cost, for each budget.

        Raises:
            BudgetError: a budget is less than the narrowest widths cost.
        """
        costs = {budget: budget.costs(self.checkpoint, self.milliseconds) for budget in self.options.budget}
        for budget, (table, limit) in costs.items():
            check_feasible(budget, table, limit)
        return costs

    def steps(self, planner: Planner, costs: Costs, limit: float) -> Iterator[Step]:
        options = self.options
        last = None
        if options.method in ("program", "both"):
            for last in planner.program(costs, limit, options.steps):
                yield last
        if options.method in ("evolution", "both"):
            start = last.widths if last else None
            yield from planner.evolution(costs, limit, options.generations, options.offspring, start)

    def train(self, planner: Planner, name: str, best: Step) -> Step:
        """Train decoders for the best widths, if asked for: they are kept where they lose less than the plain ones."""
        tokens, reference = self.training.tokens, self.reference
        if not len(tokens) or reference is None:
            return best

        def run() -> tuple[dict[str, torch.Tensor], int]:
            settings = EndToEndSettings(
                epochs=_EPOCHS, sequences=max(1, _STEP_TOKENS // tokens.shape[1]), device=self.options.device,
                seed=self.options.seed,
            )  # fmt: skip
            trained = train_recipe(SourceModel(reference), self.checkpoint, best.widths, tokens, settings)
            parts = {f"{layer}.scale": each.scale for layer, each in trained.items()}
            parts |= {f"{layer}.offset": each.offset for layer, each in trained.items()}
            return parts, _EPOCHS * _TRAINING_PASSES * tokens.numel()

        parts = planner.journal.tensors(f"{name}-decoders", run)
        decoders = {layer: (parts[f"{layer}.scale"], parts[f"{layer}.offset"]) for layer in best.widths}
        step = Step(best.widths, planner.kl_with(best.widths, decoders), planner.journal.passes, "own decoders")
        self.show(name, step)
        if step.kl >= best.kl:
            return best
        self.decoders[name] = decoders
        return step

    def recipe(self, name: str, widths: dict[str, int], kl: float, budget: Budget | None = None) -> Recipe:
        origin = {
            "reference": self.reference.name if self.reference else "widest slice",
            "calibration": self.calibration.source,
        }
        if budget is not None:
            origin |= {"budget": budget.name, "method": self.options.method, "seed": self.options.seed}
        if name in self.decoders:
            origin["training"] = self.training.source
        return Recipe(name, widths, kl, origin, own_decoders=name in self.decoders)

    def show(self, name: str, step: Step) -> None:
        """Print a step and keep it for ``--json``."""
        layers = self.checkpoint.layers
        row = {
            "name": name,
            "what": step.what,
            "average_bits": average_bits(step.widths, layers),
            "resident_bytes": resident_bytes(step.widths, self.checkpoint.format, layers),
            "kl": step.kl,
            "passes": step.passes,
            "evaluations": step.passes / self.calibration.tokens.numel(),
            "seconds": round(time.monotonic() - self.start, 1),
        }
        self.rows.append(row)
        what = name if step.what in ("uniform", "shape") else f"{name} {step.what}"
        tqdm.write(f"{what:<{_NAME_COLUMNS}}" + figures(row, COLUMNS))
        sys.stdout.flush()

    def foretell(self, budget: Budget, best: Step) -> None:
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
        tqdm.write(f"{budget.name}: the scaling law {said}; measured {best.kl:.3g}")


class _Bar:
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


def main(arguments: Sequence[str] | None = None) -> int:
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        rows = Search(options).run()
        if options.json and not options.dry_run:
            publish_json(options.json, rows)
    except (ValueError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
