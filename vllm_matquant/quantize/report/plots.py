"""The figures of the report as SVG for an HTML page: the same bytes each time, in the page's own colours.

matplotlib draws with stand-ins for the page's colours: that of its text, and ``--width-2`` to ``--width-8``.
"""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from statistics import fmean
from typing import Any

from vllm_matquant.quantize.report.data import LayerRow, Report, finite

_TEXT = "#0f0f0f"
_SETTINGS = {
    "svg.fonttype": "none",  # text stays text
    "font.family": "sans-serif",
    "font.size": 9,
    "text.parse_math": False,  # a name may hold a dollar sign
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.2,
    "grid.linewidth": 0.6,
    "grid.color": _TEXT,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _TEXT),
}

Lines = dict[int, dict[int, float]]  # error by width and depth


def plot_errors(layers: Iterable[LayerRow]) -> dict[str, str]:
    """Relative output error against depth, a line for each width: a figure for each kind of layer, all of one scale.

    Layers of one kind in one block, such as experts, count with their mean. Errors that a logarithmic axis has no place
    for, zero among them, are left out.

    Returns:
        SVG elements by kind, in the model's order; none where no errors are known.
    """
    errors: dict[str, dict[tuple[int, int], list[float]]] = defaultdict(lambda: defaultdict(list))
    for layer in layers:
        for width, error in layer.errors.items():
            if layer.depth is not None and _fits_log_axis(error):
                errors[layer.kind][width, layer.depth].append(error)
    kinds = {kind: {place: fmean(found) for place, found in of_kind.items()} for kind, of_kind in errors.items()}
    all_errors = [error for of_kind in kinds.values() for error in of_kind.values()]
    all_depths = [depth for of_kind in kinds.values() for _, depth in of_kind]

    def draw(axes: Any, of_kind: dict[tuple[int, int], float]) -> None:
        for width in sorted({width for width, _ in of_kind}):
            line = sorted((depth, error) for (of, depth), error in of_kind.items() if of == width)
            # A line of one point would not be seen.
            axes.plot(*zip(*line, strict=True), color=_stand_in(width), marker="" if len(line) > 1 else "o")
        axes.set(xlabel="block", ylabel="relative output error")
        axes.set(xlim=(min(all_depths) - 0.5, max(all_depths) + 0.5))
        axes.xaxis.get_major_locator().set_params(integer=True)
        _scale(axes, all_errors)

    return {kind: _svg(kind, draw, of_kind) for kind, of_kind in kinds.items()}


def plot_quality(report: Report) -> dict[str, str]:
    """KL divergence and perplexity against bits per weight.

    Returns:
        SVG elements by title; none where the quality was not measured.
    """

    def draw(axes: Any, points: list[tuple[int, float, float]], label: str, source: float | None) -> None:
        axes.plot([x for _, x, _ in points], [y for *_, y in points], color=_TEXT, linewidth=0.8, alpha=0.5)
        for bits, x, y in points:
            axes.plot([x], [y], "o", color=_stand_in(bits))
            axes.annotate(f"{bits} bits", (x, y), (5, 5), textcoords="offset points")
        values = [y for *_, y in points]
        if source is not None:
            axes.axhline(source, color=_TEXT, linestyle="--", linewidth=0.8)
            place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
            axes.annotate("source", (0, source), (3, 3), **place)
            values.append(source)
        axes.margins(x=0.15)
        axes.set(xlabel="bits per weight", ylabel=label)
        _scale(axes, values)

    figures = {}
    for title, field, label, source in (
        ("KL divergence from the source", "kl", "nats per token", None),
        ("Perplexity", "perplexity", "perplexity", report.source_perplexity),
    ):
        measured = [(row.bits, row.bits_per_weight, getattr(row, field)) for row in report.width_rows()]
        points = [point for point in measured if _fits_log_axis(point[2])]
        if points:
            figures[title] = _svg(title, draw, points, label, source)
    return figures


def _fits_log_axis(value: float | None) -> bool:
    value = finite(value)
    return value is not None and value > 0


def _stand_in(width: int) -> str:
    return f"#0000{width:02x}"


def _scale(axes: Any, values: list[float]) -> None:
    """A logarithmic y axis around ``values`` with plain numbers: powers of ten, and more where these are few."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = min(values) / 1.5, max(values) * 1.5
    axes.set(yscale="log", ylim=(low, high))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _svg(title: str, draw: Callable[..., None], *arguments: Any) -> str:
    """What ``draw`` draws on the axes of a new figure, as an SVG element."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # The salt keeps identifiers the same from run to run, and apart from those of the page's other figures.
    with rc_context(_SETTINGS | {"svg.hashsalt": title}):
        figure = Figure(figsize=(4.2, 2.9), layout="constrained")
        draw(figure.subplots(), *arguments)
        file = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    return _embeddable(file.getvalue())


def _embeddable(svg: str) -> str:
    """An SVG file as part of an HTML page: no prolog, no size, no style sheet, the page's colours."""
    drawing = re.sub(r'.*?<svg [^>]*(viewBox="[^"]*")[^>]*>', r'<svg \1 role="img">', svg, count=1, flags=re.DOTALL)
    drawing = re.sub(r"<style.*?</style>", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r' id="[^"]*_\d+"', "", drawing)  # figure_1, axes_1: the same in every figure, and never used
    drawing = re.sub(r"font-family: [^;]*; ", "", drawing)
    drawing = drawing.replace("xlink:href", "href").replace(_TEXT, "currentColor")
    drawing = re.sub(r"#0000(0[2-8])", lambda match: f"var(--width-{int(match[1])})", drawing)
    return drawing.strip()
