"""From a real model to tokens at several widths: fetch, quantize, search, evaluate, serve, and show it all at once.

One engine serves every width and recipe: it answers at all of them in one batch, and is switched from one to the next.
Another lets a narrow slice draft for the widest.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fetch_model

import vllm_matquant.cli.threads  # noqa: F401 - before torch

# isort: split
from vllm_matquant import cli
from vllm_matquant.bench.serve import PROMPT, UNQUANTIZED_BITS, Load, bench_serve
from vllm_matquant.checkpoint.errors import CheckpointError
from vllm_matquant.checkpoint.files import publish_json
from vllm_matquant.checkpoint.reader import open_checkpoint
from vllm_matquant.checkpoint.slice import Slice
from vllm_matquant.jobs.plot import draw
from vllm_matquant.measure.evaluate import evaluate
from vllm_matquant.measure.windows import load_tokenizer, spread_windows

WIDTHS = (8, 6, 4, 3, 2)
BUDGETS = (3.5, 2.5)
DRAFT = 4  # bits
# A part of what quantizing and a search take by default, for the sake of minutes.
# Little training: the demo is to be over in minutes.
QUANTIZE = ("--samples", "32", "--no-report", "--setting", "end_to_end.epochs=0.5")
SEARCH = ("--samples", "8", "--sensitivity-samples", "32", "--steps", "2", "--decoder-samples", "8")
FOLDER = fetch_model.CACHE / "demo"
GROUP_SIZE = 64  # 576, this model's hidden size, is no multiple of 128
COLUMNS = {
    "bits": ("bits", "{:.3g}"),
    "bits_per_weight": ("bits/weight", "{:.2f}"),
    "resident_megabytes": ("resident MB", "{:.1f}"),
    "output_tokens_per_s": ("tokens/s", "{:.1f}"),
    "perplexity": ("perplexity", "{:.2f}"),
    "kl": ("KL", "{:.4f}"),
}


def nested_checkpoint(model: Path, folder: Path) -> Path:
    """The quantized model; what an earlier demo made is used again."""
    try:
        open_checkpoint(folder)
        print(f"using {folder}; run with --fresh to quantize again")
    except CheckpointError:
        shutil.rmtree(folder, ignore_errors=True)
        cli.main(["quantize", str(model), "--output", str(folder), "--group-size", str(GROUP_SIZE), *QUANTIZE])
    return folder


def add_recipes(model: Path, nested: Path) -> None:
    """Search the recipes of the budgets, unless the checkpoint has them."""
    wanted = [f"{budget}-bits" for budget in BUDGETS]
    if not set(wanted) <= {recipe.name for recipe in open_checkpoint(nested).recipes}:
        print(f"searching recipes of {', '.join(map(str, BUDGETS))} bits on average", flush=True)
        cli.main(["search", str(nested), "--budget", ",".join(map(str, BUDGETS)), "--reference", str(model), *SEARCH])


def collect_rows(model: Path, nested: Path, text: Path) -> list[dict[str, Any]]:
    """Quality and speed of each width and recipe, the widest first; the speed of the unquantized model comes last."""
    tokens = spread_windows(text, load_tokenizer(model), samples=8, sequence_length=512).tokens
    checkpoint = open_checkpoint(nested)
    slices = [*map(checkpoint.slice, WIDTHS), *(checkpoint.slice(f"{budget}-bits") for budget in BUDGETS)]
    quality = list(evaluate(checkpoint, model, tokens, slices))
    rows = []
    reference, *speeds = bench_rows(model, nested, slices)
    for part, measured, served in zip(slices, quality, speeds, strict=True):
        # What a server of this slice alone would hold: the one that was measured holds them all.
        rows.append(measured | served | {"resident_megabytes": part.resident_bytes / 1e6})
    return [*sorted(rows, key=lambda row: -row["bits"]), reference]


def bench_rows(model: Path, nested: Path, slices: Sequence[Slice]) -> list[dict[str, Any]]:
    """The rows of ``bench serve``, each said when it is there; one engine serves all slices."""
    rows = []
    for row in bench_serve(nested, slices, Load(), reference=model, elastic=True):
        what = "bfloat16" if row["bits"] == UNQUANTIZED_BITS else f"{row['bits']:.3g} bits"
        print(f"served {what}", flush=True)
        rows.append(row)
    return rows


def draft_row(nested: Path, widest: dict[str, Any]) -> dict[str, Any]:
    """The row of ``bench serve`` for the widest slice with drafts, and whether its answer is the same."""
    checkpoint = open_checkpoint(nested)
    [row] = bench_serve(nested, [checkpoint.slice(WIDTHS[0])], Load(speculate_bits=DRAFT))
    print(f"served {row['bits']:.3g} bits with drafts of {DRAFT}", flush=True)
    return row | {"draft_bits": DRAFT, "same_answer": row["answer"] == widest["answer"]}


def print_drafts(row: dict[str, Any]) -> None:
    accepted = f"{row['acceptance']:.0%} of what {row['draft_bits']} bits drafted was accepted"
    same = "the same answer" if row["same_answer"] else "another answer"
    print(f"\n{row['bits']:.3g} bits with drafts: {accepted}, {row['output_tokens_per_s']:.1f} tokens/s, {same}")


def cells(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    return [[form.format(row[name]) for name, (_, form) in COLUMNS.items()] for row in rows]


def print_table(rows: Sequence[dict[str, Any]], reference: dict[str, Any]) -> None:
    lines = [[title for title, _ in COLUMNS.values()], *cells(rows)]
    sizes = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.rjust(size) for cell, size in zip(line, sizes, strict=True)))
    speed = f"{reference['output_tokens_per_s']:.1f} tokens/s"
    print(f"\nthe bfloat16 model: perplexity {rows[0]['reference_perplexity']:.2f}, {speed}")
    print(f"bits with a fraction are recipes: a width for each layer\n\n{PROMPT}")
    for row in rows:
        print(
            textwrap.fill(row["answer"], 110, initial_indent=f"  {row['bits']:.3g} bits: ", subsequent_indent=" " * 10)
        )


def save_picture(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """The table, with each answer, as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 1 + 0.75 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.set_axis_off()
    titles = [*(title for title, _ in COLUMNS.values()), PROMPT]
    body = [[*row, textwrap.fill(answer["answer"], 95)] for row, answer in zip(cells(rows), rows, strict=True)]
    widths = [0.07] * len(COLUMNS) + [1 - 0.07 * len(COLUMNS)]
    table = axes.table(body, colLabels=titles, colWidths=widths, cellLoc="left", loc="center")
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    table.scale(1, 3.2)
    figure.suptitle(f"{rows[0]['model']}: one checkpoint, every width")
    figure.savefig(file, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fresh", action="store_true", help="quantize again, even if a demo's result is there")
    options = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if options.fresh:
        shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    model, text = fetch_model.fetch_model(), fetch_model.fetch_text()
    nested = nested_checkpoint(model, FOLDER / "SmolLM2-135M-Instruct-matquant")
    add_recipes(model, nested)
    *rows, reference = collect_rows(model, nested, text)
    drafted = draft_row(nested, rows[0])
    print_table(rows, reference)
    print_drafts(drafted)
    publish_json(FOLDER / "demo.json", [*rows, drafted, reference])
    save_picture(rows, FOLDER / "demo.png")
    draw(rows, [*rows, reference], [], FOLDER / "trade.png")
    print(f"\nsaved as demo.json, demo.png and trade.png in {FOLDER}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
