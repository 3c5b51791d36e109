"""Tables and pictures of what tools/matquant_figures.py has measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

Figures = Sequence[dict[str, Any]]
INTERPOLATED = "*"  # behind the figures of a width that no loss names


def row_tables(rows: Figures) -> str:
    """For each text a table in Markdown: a line for each row, a column for each width."""
    lines = []
    widths = sorted({row["bits"] for row in rows})
    for text, of_text in _by("text", rows):
        lines += [f"{_heading(text, of_text)} {INTERPOLATED}: the row's loss does not name this width.", ""]
        lines += [f"| | {' | '.join(f'{width} bits' for width in widths)} | tokens learned from | seconds |"]
        lines += ["|---" * (len(widths) + 3) + "|"]
        for name, own in _by("row", of_text):
            cells = {row["bits"]: f"{_quality(row)}{'' if row['trained'] else INTERPOLATED}" for row in own}
            told = " | ".join(cells.get(width, "") for width in widths)
            lines.append(f"| {name} | {told} | {own[0]['learned_tokens']:,} | {own[0]['seconds']:.0f} |")
        lines.append("")
    return "\n".join(lines)


def mix_tables(mixes: Figures) -> str:
    """For each text and parent a table in Markdown: a line for each mix of widths."""
    lines = []
    for text, of_text in _by("text", mixes):
        for name, own in _by("row", of_text):
            lines += [f"Mix'n'Match of {name}. {_heading(text, own)}", ""]
            lines += ["| shape | average bits | bits per weight as stored | |", "|---" * 4 + "|"]
            for mix in own:
                bits = f"{mix['average_bits']:.3f} | {mix['bits_per_weight']:.3f}"
                lines.append(f"| {mix['shape']} | {bits} | {_quality(mix)} |")
            lines.append("")
    return "\n".join(lines)


def draw_rows(rows: Figures, file: Path) -> None:
    """For each text a panel: KL divergence against width, hollow where the row's loss does not name the width."""

    def draw(panel: Any, of_text: Figures) -> None:
        for name, own in _by("row", of_text):
            own = sorted(own, key=lambda row: row["bits"])
            (line,) = panel.plot([row["bits"] for row in own], [row["kl"] for row in own], label=name)
            for row in own:
                face = line.get_color() if row["trained"] else "white"
                panel.plot(row["bits"], row["kl"], "o", color=line.get_color(), markerfacecolor=face)
        panel.set(xlabel="bits; hollow: interpolated")

    _draw(list(_by("text", rows)), draw, file)


def draw_mixes(mixes: Figures, file: Path) -> None:
    """For each text and parent a panel: KL divergence against average bits, a line for each shape."""

    def draw(panel: Any, of_parent: Figures) -> None:
        for shape, own in _by("shape", of_parent):
            own = sorted(own, key=lambda mix: mix["average_bits"])
            panel.plot([mix["average_bits"] for mix in own], [mix["kl"] for mix in own], "o-", label=shape)
        panel.set(xlabel="average bits")

    panels = [(f"{name}, {text}", own) for text, of_text in _by("text", mixes) for name, own in _by("row", of_text)]
    _draw(panels, draw, file)


def _draw(panels: Sequence[tuple[str, Figures]], draw: Callable[[Any, Figures], None], file: Path) -> None:
    figure = Figure(figsize=(7 * len(panels), 5), layout="constrained")
    for panel, (title, figures) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(panel, figures)
        panel.set(title=title, yscale="log", ylabel="KL divergence from the source, nats per token")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    figure.savefig(file, dpi=130)


def _by(name: str, figures: Figures) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The figures that have each value of a field, in the order of their first ones."""
    for value in dict.fromkeys(each[name] for each in figures):
        yield value, [each for each in figures if each[name] == value]


def _heading(text: str, figures: Figures) -> str:
    tokens, loss = figures[0]["tokens"], math.log(figures[0]["reference_perplexity"])
    return (
        f"{text}, {tokens:,} tokens: KL divergence from the source model, in parentheses log-perplexity above its "
        f"{loss:.4f}, in nats."
    )


def _quality(figures: dict[str, Any]) -> str:
    return f"{figures['kl']:.4g} ({figures['gap']:.4f})"
