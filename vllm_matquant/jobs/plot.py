"""The job that draws quality against bits per weight and against tokens per second."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from vllm_matquant.jobs.arguments import output_file
from vllm_matquant.jobs.job import Job, Say, argument, running, silent

Row = Mapping[str, Any]
Rows = Path | str | Sequence[Row]
"""Rows, or the file that a command wrote them to with ``--json``."""


@dataclass(frozen=True)
class Plot(Job[Path]):
    """Draw quality against bits per weight and against tokens per second: what every width and every recipe gives.

    Gives the picture's path. In Python rows themselves may take the place of files.
    """

    quality: Rows = field(
        metadata=argument(
            "what matquant evaluate --recipes all --json wrote",
            parse=Path,
            positional=True,
            metavar="EVALUATE.json",
            as_is=(list, tuple),
        )
    )
    output: Path | str = field(metadata=argument("the picture", parse=output_file, metavar="OUT.png"))
    _: KW_ONLY
    speed: Rows | None = field(
        default=None,
        metadata=argument(
            "what matquant bench serve --recipes all --json wrote",
            parse=Path,
            metavar="BENCH.json",
            as_is=(list, tuple),
        ),
    )
    rivals: Rows | None = field(
        default=None,
        metadata=argument(
            "rows with method, bits_per_weight and kl of models that were quantized for one width",
            parse=Path,
            metavar="JSON",
            as_is=(list, tuple),
        ),
    )

    def run(self, say: Say = silent) -> Path:
        speed = [] if self.speed is None else read_rows(self.speed)
        rivals = [] if self.rivals is None else [row for row in read_rows(self.rivals) if "bits_per_weight" in row]
        output = Path(self.output)
        try:
            draw(read_rows(self.quality), speed, rivals, output)
        except KeyError as error:
            raise ValueError(
                f"rows: found one without {error}, expected those of matquant evaluate and bench"
            ) from error
        say(str(output))
        return output


def read_rows(source: Rows) -> Sequence[Row]:
    """Rows, or those in the file that ``matquant evaluate`` or ``matquant bench serve`` wrote.

    Raises:
        ValueError: no such rows.
    """
    rows = json.loads(Path(source).read_text(encoding="utf-8")) if isinstance(source, (Path, str)) else source
    if not isinstance(rows, (list, tuple)) or not rows or not all(isinstance(row, Mapping) for row in rows):
        name = f"{source}: " if isinstance(source, (Path, str)) else "rows: "
        raise ValueError(
            f"{name}found no list of rows, expected what matquant evaluate or bench serve write with --json"
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
    """Two panels, KL divergence on a logarithmic axis in both.

    Args:
        quality: rows of ``matquant evaluate``.
        speed: rows of ``matquant bench serve``, that of the unquantized model among them or not.
        rivals: rows with ``method``, ``bits_per_weight`` and ``kl`` of models that were quantized for one width.
        file: the picture.
    """
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


plot = running(Plot)
