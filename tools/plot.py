"""Draw quality against bits per weight and against tokens per second: what every width and every recipe gives."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from arguments import output_file

Row = Mapping[str, Any]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows that evaluate.py or bench.py serve wrote.

    Raises:
        ValueError: no such rows.
    """
    rows = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(
            f"{path}: found no list of rows, expected what evaluate.py or bench.py serve writes with --json"
        )
    return rows


def key(row: Row) -> Any:
    """What tells a row's width or recipe from others."""
    return row.get("recipe", row.get("bits"))


def joined(quality: Sequence[Row], speed: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows of both, where both have the same width or recipe."""
    speeds = {key(row): row for row in speed}
    return [{**speeds[key(row)], **row} for row in quality if key(row) in speeds]


def draw(quality: Sequence[Row], speed: Sequence[Row], rivals: Sequence[Row], file: Path) -> None:
    """Two panels, KL divergence on a logarithmic axis in both (needs matplotlib).

    Args:
        quality: rows of evaluate.py.
        speed: rows of bench.py serve, that of the unquantized model among them or not.
        rivals: rows with ``method``, ``bits_per_weight`` and ``kl`` of models that were quantized for one width.
        file: the picture.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.8), layout="constrained")
    by_bits, by_speed = figure.subplots(1, 2, sharey=True)
    both = joined(quality, speed)
    for panel, rows, x in ((by_bits, quality, "bits_per_weight"), (by_speed, both, "output_tokens_per_s")):
        widths = sorted((row for row in rows if "recipe" not in row), key=lambda row: row["bits"])
        recipes = sorted((row for row in rows if "recipe" in row), key=lambda row: row["bits"])
        for kind, own, style in (("one width for all layers", widths, "o-"), ("a width for each layer", recipes, "D")):
            if own:
                panel.plot([row[x] for row in own], [row["kl"] for row in own], style, label=kind, markersize=6)
        for row in widths + recipes:
            panel.annotate(
                f"{row['bits']:.3g}", (row[x], row["kl"]), textcoords="offset points", xytext=(5, 4), fontsize=8
            )
        panel.set_yscale("log")
        panel.grid(alpha=0.3)
    for method in dict.fromkeys(row["method"] for row in rivals):
        own = [row for row in rivals if row["method"] == method]
        by_bits.plot([row["bits_per_weight"] for row in own], [row["kl"] for row in own], "x", label=method)
    by_bits.set(xlabel="bits per weight, decoders counted", ylabel="KL divergence from the source, nats per token")
    by_speed.set(xlabel="tokens per second, one request")
    unquantized = [row for row in speed if row.get("bits") == 16]
    for row in unquantized:
        label = f"bfloat16: {row['output_tokens_per_s']:.3g} tokens/s"
        by_speed.axvline(row["output_tokens_per_s"], color="gray", linestyle=":", label=label)
    by_bits.legend()
    if both or unquantized:
        by_speed.legend()
    names = [row["model"] for row in speed if row.get("bits") != 16 and "model" in row]
    figure.suptitle(f"{names[0] if names else 'one checkpoint'}: bits where they count")
    figure.savefig(file, dpi=130, format=file.suffix.removeprefix(".") or "png")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("quality", type=Path, metavar="EVALUATE.json", help="what evaluate.py --recipes all wrote")
    parser.add_argument("--speed", type=Path, metavar="BENCH.json", help="what bench.py serve --recipes all wrote")
    parser.add_argument("--rivals", type=Path, metavar="JSON", help="what compare_quantizers.py wrote")
    parser.add_argument("--output", type=output_file, required=True, metavar="OUT.png", help="the picture")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        speed = read_rows(options.speed) if options.speed else []
        rivals = [row for row in read_rows(options.rivals) if "bits_per_weight" in row] if options.rivals else []
        draw(read_rows(options.quality), speed, rivals, options.output)
    except (ValueError, OSError, KeyError, ImportError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    print(options.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
