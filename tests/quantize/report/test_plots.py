"""The figures show the numbers that they were given: read back from the coordinates of the SVG."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
import torch

from tests.quantize.report.sample_reports import KINDS, QUALITY, layer_rows, make_report
from vllm_matquant.checkpoint.spec import WIDTHS
from vllm_matquant.quantize.report.data import LayerRow
from vllm_matquant.quantize.report.plots import plot_errors, plot_quality


def lines(svg: str) -> dict[int, list[tuple[float, float]]]:
    """The points of the line of each width."""
    found = {}
    for path in ElementTree.fromstring(svg).iter("path"):
        colour = re.search(r"stroke: var\(--width-(\d)\)", path.get("style", ""))
        if colour and path.get("clip-path"):
            numbers = [float(number) for number in re.findall(r"[\d.]+", path.get("d", ""))]
            found[int(colour[1])] = list(zip(numbers[::2], numbers[1::2], strict=True))
    return found


def assert_linear(values: list[float], coordinates: list[float]) -> None:
    """The coordinates are the values, scaled and shifted."""
    design = torch.tensor([[value, 1.0] for value in values], dtype=torch.float64)
    target = torch.tensor(coordinates, dtype=torch.float64)
    fitted = design @ torch.linalg.lstsq(design, target).solution
    torch.testing.assert_close(fitted, target, rtol=0, atol=1e-3)


def test_lines_show_the_errors() -> None:
    layers = layer_rows(blocks=30)
    figures = plot_errors(layers)
    assert list(figures) == list(KINDS)
    values, coordinates = [], []
    for kind, svg in figures.items():
        shown = lines(svg)
        assert tuple(sorted(shown)) == WIDTHS
        for width, points in shown.items():
            of_kind = [layer for layer in layers if layer.kind == kind]
            assert_linear([layer.depth or 0 for layer in of_kind], [x for x, _ in points])
            values += [math.log(layer.errors[width]) for layer in of_kind]
            coordinates += [y for _, y in points]
    assert_linear(values, coordinates)  # one scale for all figures


def test_experts_count_with_their_mean_and_zeros_not_at_all() -> None:
    def row(name: str, error: float) -> LayerRow:
        return LayerRow(f"model.layers.{name}", (8, 64), {2: error})

    experts = [row("0.experts.0.up", 0.1), row("0.experts.1.up", 0.3), row("1.experts.0.up", 0.2)]
    others = [row("0.experts.2.up", 0.0), row("1.experts.1.up", math.nan), LayerRow("lm_head", (8, 64), {2: 0.5})]
    [(kind, svg)] = plot_errors(experts + others).items()
    assert kind == "experts.*.up"
    [(_, first), (_, second)] = lines(svg)[2]
    assert first == pytest.approx(second)


def test_a_single_block_is_seen() -> None:
    def marks(blocks: int) -> int:
        [svg] = plot_errors(layer_rows(blocks)[::7]).values()
        return len(re.findall(r"<use [^>]*var\(--width-", svg))

    assert marks(1) == len(WIDTHS)
    assert marks(2) == 0


def test_quality() -> None:
    report = make_report()
    figures = plot_quality(report)
    bits = {row.bits: row.bits_per_weight for row in report.width_rows()}
    assert list(figures) == ["KL divergence from the source", "Perplexity"]
    for svg, column in zip(figures.values(), (1, 0), strict=True):
        places = {}
        for use in ElementTree.fromstring(svg).iter("use"):
            colour = re.search(r"var\(--width-(\d)\)", use.get("style", ""))
            if colour:
                places[int(colour[1])] = (float(use.get("x", "")), float(use.get("y", "")))
        assert_linear([bits[width] for width in places], [x for x, _ in places.values()])
        assert_linear([math.log(QUALITY[width][column]) for width in places], [y for _, y in places.values()])
        assert len(places) == len(WIDTHS)


def test_nothing_to_draw() -> None:
    assert plot_quality(make_report(quality=[])) == {}
    assert plot_errors([LayerRow("model.layers.0.a", (8, 64), {})]) == {}
    diverged = make_report(widths=(2,))
    diverged.quality[0].update(perplexity=math.inf, kl=math.nan)
    assert plot_quality(diverged) == {}


def test_identifiers_are_apart() -> None:
    figures = [*plot_errors(layer_rows(2)).values(), *plot_quality(make_report()).values()]
    identifiers = [name for svg in figures for name in re.findall(r' id="([^"]+)"', svg)]
    assert len(identifiers) == len(set(identifiers)) > len(figures)
    for svg in figures:
        assert set(re.findall(r'(?:href="#|url\(#)(\w+)', svg)) <= set(re.findall(r' id="([^"]+)"', svg))
