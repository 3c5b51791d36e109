"""Make and measure the rows of MatQuant's tables (arXiv 2502.06786), and its Mix'n'Match.

Each row is one parent, whose slices serve every width, or a model for each width alone. In every model the linear
layers of the transformer blocks are quantized, and all else is the source's. Models and figures stay in the output
folder; another run makes and measures only what is not there yet, and shows all rows that it is asked for.
"""

from __future__ import annotations

import argparse
import hashlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import vllm_matquant.cli.threads  # noqa: F401 - before torch

# isort: split
import torch
from figure_tables import draw_mixes, draw_rows, mix_tables, row_tables
from mix_n_match import MIXED, mixes
from paper_rows import ROWS, Effort, Model, Row, check_effort
from results_folder import RECORD_FILE, MakeError, fill, stored_bits
from slice_figures import Case, Measured

from vllm_matquant.checkpoint.files import publish_json, publish_text, read_json
from vllm_matquant.checkpoint.reader import open_checkpoint
from vllm_matquant.checkpoint.spec import WIDTHS
from vllm_matquant.jobs.arguments import float_list, positive, width_list
from vllm_matquant.measure.windows import TextTokenizer, draw_windows, load_tokenizer, spread_windows
from vllm_matquant.quantize.source import SourceModel, locate
from vllm_matquant.research.shapes import SHAPES
from vllm_matquant.train.pipeline import read_texts

ALONE = (2, 3, 4, 6, 8)  # widths that the paper trains a model for
MEASURED_FILE = "measured.json"
_EPILOG = f"""rows: {", ".join(ROWS)}

A row ending in -from-8 has the loss [8,4,8->2] and one in -and-8 [8,4,2,8->2] (co-distillation); the others of MatQuant
have [8,4,2], one ending in -extra with a level more in each slice (extra precision, for which the paper counts 2.05
bits). omniquant and qat are models for each width alone, omniquant-sliced and qat-sliced 8-bit models cut down.
For budgets that are searched, run matquant search on the folder of a row in OUT; --mix shows what it finds.

    python tools/matquant_figures.py MODEL --text news.txt --output OUT --rows omniquant,matquant-omni
    python tools/matquant_figures.py MODEL --text news.txt --output OUT --rows nested --mix nested
"""


def row_list(text: str) -> tuple[str, ...]:
    """Parse names of rows."""
    names = tuple(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in ROWS]:
        raise argparse.ArgumentTypeError(f"found {unknown[0]!r}, expected some of {', '.join(ROWS)}")
    return names


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder with config.json, safetensors files and tokenizer, or a name on the hub")
    parser.add_argument(
        "--text", type=Path, nargs="+", required=True, metavar="FILE", help="texts that no model has learned from"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="OUT", help="folder of all results")
    parser.add_argument(
        "--rows", type=row_list, default=tuple(ROWS), metavar="NAME,...", help="to make and measure (default: all)"
    )
    parser.add_argument("--bits", type=width_list, default=WIDTHS, help="widths to measure (default: 2 to 8)")
    parser.add_argument(
        "--alone", type=width_list, default=ALONE, help="widths with models of their own (default: 2,3,4,6,8)"
    )
    parser.add_argument(
        "--mix", type=row_list, default=(), metavar="NAME,...", help="rows whose parents mix widths too"
    )
    parser.add_argument(
        "--mix-bits",
        type=float_list,
        default=(2.5, 3.0, 4.0, 5.0, 6.0, 7.0),
        metavar="LIST",
        help="the most that the average width of a mix may be (default: 2.5,3,4,5,6,7)",
    )
    parser.add_argument("--dry-run", action="store_true", help="list what would be made and measured, write nothing")
    parser.add_argument("--seed", type=int, default=0, help="of all windows' places (default: %(default)s)")
    held_out = parser.add_argument_group("held-out texts")
    held_out.add_argument(
        "--held-out-samples", type=positive, default=16, metavar="N", help="windows of each (default: %(default)s)"
    )
    held_out.add_argument(
        "--held-out-length", type=positive, default=512, metavar="N", help="tokens of a window (default: %(default)s)"
    )
    quantize = parser.add_argument_group("matquant quantize")
    quantize.add_argument("--group-size", type=positive, default=64, help="columns that share a scale (default: 64)")
    quantize.add_argument("--calibration", metavar="hf:NAME|FILE", help="text to learn from; default: a built-in one")
    quantize.add_argument("--samples", type=positive, default=64, help="windows of it (default: %(default)s)")
    quantize.add_argument("--sequence-length", type=positive, default=512, help="tokens in each (default: %(default)s)")
    quantize.add_argument(
        "--setting",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of every method that has it, such as clipping.iterations=20; may be given several times",
    )
    train = parser.add_argument_group("matquant train")
    train.add_argument(
        "--training-text",
        action="append",
        default=[],
        metavar="hf:NAME|FILE",
        help="text to train on; may be given several times (default: that of --calibration)",
    )
    train.add_argument(
        "--learn-text", action="store_true", help="learn the text's next tokens, not the source's predictions"
    )
    train.add_argument("--steps", type=positive, default=100, help="of each training (default: %(default)s)")
    train.add_argument("--batch", type=positive, default=2, help="windows in a step (default: %(default)s)")
    train.add_argument("--training-length", type=positive, default=256, help="tokens in each (default: %(default)s)")
    train.add_argument("--code-rate", type=float, default=0.02, help="of positions (default: %(default)s)")
    train.add_argument("--decoder-rate", type=float, default=0.001, help="of decoders (default: %(default)s)")
    train.add_argument(
        "--wide-weight",
        type=float,
        default=0.1,
        help="what a term counts whose width is not the narrowest, here and in matquant-omni (default: %(default)s)",
    )
    return parser


def effort_of(options: argparse.Namespace, source: Path) -> Effort:
    """What the options say of how models are made; files by their whole paths."""

    def whole(text: str) -> str:
        return str(Path(text).resolve()) if Path(text).exists() else text

    return Effort(
        source=source.resolve(),
        group_size=options.group_size,
        calibration=None if options.calibration is None else whole(options.calibration),
        samples=options.samples,
        sequence_length=options.sequence_length,
        settings=options.setting,
        texts=[whole(text) for text in options.training_text],
        learn_text=options.learn_text,
        steps=options.steps,
        batch=options.batch,
        training_length=options.training_length,
        code_rate=options.code_rate,
        decoder_rate=options.decoder_rate,
        wide_weight=options.wide_weight,
        seed=options.seed,
        alone=options.alone,
    )


def check(
    effort: Effort, rows: Sequence[Row], options: argparse.Namespace, facts: Mapping[str, Mapping[str, Any]]
) -> None:
    """Check what can be checked before anything is made.

    Args:
        effort: what models are made of.
        rows: to make.
        options: of the command line.
        facts: see :func:`facts_of`.

    Raises:
        ValueError: a setting is none of a method's, a row has no parent to mix, or a model in the folder was made by
            another command or of other tokens.
    """
    check_effort(effort)
    asked = {row.name: row for row in rows}
    for name in options.mix:
        if name not in asked:
            raise ValueError(f"--mix: found {name}, expected one of --rows ({', '.join(asked)})")
        if {width: asked[name].models.get(width) for width in MIXED} != dict.fromkeys(MIXED, asked[name].models.get(2)):
            raise ValueError(
                f"--mix: found {name}, expected a row with one parent of {', '.join(map(str, MIXED))} bits"
            )
    for most in options.mix_bits:
        if not MIXED[0] <= most <= MIXED[-1]:
            raise ValueError(f"--mix-bits: found {most:g}, expected {MIXED[0]} to {MIXED[-1]}")
    for name, expected in facts.items():
        record = options.output / name / RECORD_FILE
        made = read_json(record) if record.exists() else expected
        for fact, value in expected.items():
            if made.get(fact) != value:
                raise ValueError(
                    f"{record}: {fact}: found {_shown(made.get(fact))}, expected {_shown(value)}; remove "
                    f"{record.parent}, or give another --output"
                )


def _shown(value: object) -> str:
    return shlex.join(value) if isinstance(value, list) else str(value)


def models_of(rows: Sequence[Row]) -> list[Model]:
    """The models that rows need, in the order in which they can be made, each once."""
    return list({model.name: model for row in rows for model in row.lineages}.values())


def facts_of(effort: Effort, models: Sequence[Model], tokenizer: TextTokenizer) -> dict[str, dict[str, Any]]:
    """What each model's record keeps of how it was made: what decides of its command, and which tokens it learned from.

    Raises:
        TextError: a text is too short, or there is no such file.
    """

    @cache
    def calibration() -> str:
        drawn = draw_windows(
            effort.calibration,
            tokenizer,
            samples=effort.samples,
            sequence_length=effort.sequence_length,
            seed=effort.seed,
        )
        return digest(drawn.tokens)

    @cache
    def training() -> str:
        texts: list[str | None] = [*effort.texts] or [effort.calibration]
        return digest(read_texts(texts, tokenizer, effort.training)[0])

    def digest(tokens: torch.Tensor) -> str:
        return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()

    def learned(model: Model) -> dict[str, Any]:
        return {"tokens_sha256": training() if model.parent else calibration()} if model.tokens else {}

    return {model.name: {"made_by": model.told, **learned(model)} for model in models}


def cases_of(row: Row, bits: Sequence[int], output: Path) -> list[Case]:
    """The widths of a row that was made."""
    opened = {name: open_checkpoint(output / name) for name in {model.name for model in row.models.values()}}
    shared = {
        "learned_tokens": sum(model.tokens for model in row.lineages),
        "seconds": sum(read_json(output / model.name / RECORD_FILE)["seconds"] for model in row.lineages),
    }
    cases = []
    for width in (width for width in bits if width in row.models):
        checkpoint = opened[row.models[width].name]
        facts = {"row": row.name, "bits": width, "trained": width in row.trained} | shared
        facts["bits_per_weight"] = stored_bits(checkpoint, checkpoint.slice(width))
        cases.append(Case(f"{row.name}, {width} bits", checkpoint, checkpoint.slice(width), facts))
    return cases


def mixes_of(row: Row, most_bits: Sequence[float], output: Path) -> list[Case]:
    """The mixes of widths that a row's parent is measured at."""
    checkpoint, cases = open_checkpoint(output / row.models[MIXED[0]].name), []
    for shape, served in mixes(checkpoint, most_bits):
        facts = {"row": row.name, "shape": shape, "average_bits": served.average_bits}
        facts["bits_per_weight"] = stored_bits(checkpoint, served)
        cases.append(Case(f"{row.name}, {shape}, {served.average_bits:.3g} bits", checkpoint, served, facts))
    return cases


def tell(models: Sequence[Model], rows: Sequence[Row], options: argparse.Namespace) -> None:
    """Say what would be made and measured."""
    for model in models:
        there = (options.output / model.name).exists()
        learned = f"{model.tokens:,} tokens" if model.tokens else "no text"
        print(f"{model.name}: {'there already' if there else 'to make'}, learns from {learned}")
        print(f"    matquant {shlex.join(model.command(options.output, options.output / model.name)[3:])}")
    widths = {row.name: [width for width in options.bits if width in row.models] for row in rows}
    for name, own in widths.items():
        print(f"{name}: measured at {', '.join(map(str, own))} bits")
    count = sum(map(len, widths.values()))
    mixes = len(options.mix) * (len(SHAPES) * len(options.mix_bits) + len(WIDTHS))
    print(f"{count} slices and up to {mixes} mixes are measured on each of {len(options.text)} texts, unless they were")


def make(models: Sequence[Model], output: Path, facts: Mapping[str, Mapping[str, Any]], prog: str) -> set[str]:
    """Make the models that are not there; gives the names of those that are then."""
    made: set[str] = set()
    for model in models:
        if (output / model.name).exists():
            print(f"{model.name}: there already", flush=True)
        elif model.parent and model.parent.name not in made:
            print(f"{prog}: {model.name}: found no {model.parent.name}, expected it to train", file=sys.stderr)
            continue
        else:
            try:
                fill(model.name, partial(model.command, output), output, facts[model.name])
            except MakeError as error:
                print(f"{prog}: {error}", file=sys.stderr, flush=True)
                continue
        made.add(model.name)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    parser = build_parser()
    options = parser.parse_args(arguments)
    options.output = options.output.resolve()
    output: Path = options.output
    if len({text.name for text in options.text}) < len(options.text):
        names = ", ".join(map(str, options.text))
        parser.error(f"argument --text: found {names}, expected files of different names: figures bear them")
    try:
        source = locate(options.model)
        tokenizer = load_tokenizer(source)
        windows = {
            text.name: spread_windows(
                text, tokenizer, samples=options.held_out_samples, sequence_length=options.held_out_length
            )
            for text in options.text
        }
        effort = effort_of(options, source)
        rows = [ROWS[name](effort) for name in options.rows]
        models = models_of(rows)
        facts = facts_of(effort, models, tokenizer)
        check(effort, rows, options, facts)
        if options.dry_run:
            tell(models, rows, options)
            return 0
        matrices = SourceModel(source).matrices.values()
        layers = {matrix.name: matrix.shape for matrix in matrices if matrix.block is not None}
        output.mkdir(parents=True, exist_ok=True)
        there = make(models, output, facts, parser.prog)
        whole = [row for row in rows if all(model.name in there for model in row.lineages)]
        if not whole:
            parser.exit(1, f"{parser.prog}: no row could be made\n")
        cases = [case for row in whole for case in cases_of(row, options.bits, output)]
        mixed = [case for row in whole if row.name in options.mix for case in mixes_of(row, options.mix_bits, output)]
        measured = Measured(output / MEASURED_FILE)
        for each in windows.values():
            measured.measure([*cases, *mixed], source, layers, each)
    except (ValueError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    figures = {"rows": measured.figures(cases, windows), "mixes": measured.figures(mixed, windows)}
    publish_json(output / "figures.json", figures)
    told = "\n".join(filter(None, (row_tables(figures["rows"]), mix_tables(figures["mixes"]))))
    publish_text(output / "figures.md", told)
    draw_rows(figures["rows"], output / "interpolation.png")
    if figures["mixes"]:
        draw_mixes(figures["mixes"], output / "mix-n-match.png")
    print(told)
    return 0 if len(whole) == len(rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
