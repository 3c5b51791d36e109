"""From a real model to tokens at several widths: fetch, quantize, evaluate, serve, and show it all in one table."""

from __future__ import annotations

import argparse
import logging
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fetch_model
import quantize
from bench import PROMPT, Load, bench_serve

from vllm_matquant.checkpoint.errors import CheckpointError
from vllm_matquant.checkpoint.files import publish_json
from vllm_matquant.checkpoint.reader import open_checkpoint
from vllm_matquant.quantize.calibration import read_text
from vllm_matquant.quantize.evaluate import evaluate, text_windows
from vllm_matquant.quantize.source import load_tokenizer

WIDTHS = (8, 6, 4, 3, 2)
FOLDER = fetch_model.CACHE / "demo"
GROUP_SIZE = 64  # 576, this model's hidden size, is no multiple of 128
COLUMNS = {
    "bits": ("width", "{:d}"),
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
        quantize.main([str(model), "--output", str(folder), "--group-size", str(GROUP_SIZE)])
    return folder


def collect_rows(model: Path, nested: Path, text: Path) -> list[dict[str, Any]]:
    """Quality and speed of each width."""
    tokens = text_windows(read_text(text), load_tokenizer(model), samples=8, sequence_length=512)
    quality = list(evaluate(open_checkpoint(nested), model, tokens, WIDTHS))
    rows = []
    for measured, served in zip(quality, bench_serve(nested, WIDTHS, Load()), strict=True):
        print(f"served {served['bits']} bits", flush=True)
        rows.append(measured | served | {"resident_megabytes": served["resident_bytes"] / 1e6})
    return rows


def cells(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    return [[form.format(row[name]) for name, (_, form) in COLUMNS.items()] for row in rows]


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    lines = [[title for title, _ in COLUMNS.values()], *cells(rows)]
    sizes = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.rjust(size) for cell, size in zip(line, sizes, strict=True)))
    print(f"\nperplexity of the bfloat16 model: {rows[0]['reference_perplexity']:.2f}\n\n{PROMPT}")
    for row in rows:
        print(textwrap.fill(row["answer"], 110, initial_indent=f"  {row['bits']} bits: ", subsequent_indent=" " * 10))


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
    rows = collect_rows(model, nested, text)
    print_table(rows)
    publish_json(FOLDER / "demo.json", rows)
    save_picture(rows, FOLDER / "demo.png")
    print(f"\nsaved as {FOLDER / 'demo.json'} and {FOLDER / 'demo.png'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
