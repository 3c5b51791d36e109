"""The page needs nothing but itself, shows every figure, and takes no name for markup."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.quantize.report.sample_reports import KINDS, make_report
from vllm_matquant.checkpoint.spec import Format
from vllm_matquant.quantize.report.data import LayerRow, Report
from vllm_matquant.quantize.report.page import render_page

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</style></svg></td><b>",
    "{{ 7 * 7 }}{% raw %}",
    r"$\frac{1",
    "&lt;i&gt;\x00\n<i>",
]


class Page(HTMLParser):
    """The elements, attributes and texts of a page."""

    VOID = ("meta", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(name, value or "") for name, value in attributes]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(name, value or "") for name, value in attributes]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(" ".join(data.split()))


def hostile_report(name: str) -> Report:
    layers = [LayerRow(f"model.layers.{block}.{name}", (64, 64), {2: 0.1 / (block + 1)}) for block in range(3)]
    text = {"name": name, "sha256": name}
    return make_report(
        widths=(2,),
        model=name,
        method=name,
        settings={name: name},
        format=Format((2,), 64, (name,)),
        layers=layers,
        quality_text=text,
        calibration=text,
        seconds={name: 1.0},
        software={name: name},
        command=(name,),
    )


def test_stands_alone() -> None:
    text = render_page(make_report(1))
    page = Page(text)
    assert page.open == []
    assert page.tags.keys().isdisjoint({"link", "img", "iframe", "object", "base", "form", "image", "foreignobject"})
    links = [value for name, value in page.attributes if name in ("href", "src", "xlink:href", "action", "data")]
    assert links
    assert all(link.startswith("#") for link in links)
    assert not re.search(r"https?:|//\w|@import|url\((?!#)", text)


def test_policy_allows_its_own_script_alone() -> None:
    page = render_page(make_report(1, (2, 8)))
    [script] = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    [policy] = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_shows_every_figure() -> None:
    report = make_report(blocks=30)
    page = Page(render_page(report))
    assert page.tags["svg"] == len(KINDS) + 2
    assert page.tags["tr"] == 1 + 1 + 7 + 1 + 210
    for shown in ("35.31", "0.1186", "0.1107", "4.30", "143.2 MB", "(53%)", "269.0 MB", "1.11 GB at most"):
        assert shown in page.texts, shown
    assert "calibrate 1.9 s, solve 3 min 34 s, total 1 h 23 min" in page.texts
    assert "built-in text, 16 × 512 tokens, seed 7, SHA-256 " + "ab" * 32 in page.texts
    assert "matquant quantize org/tiny-model --ignore 'a|b'" in page.texts
    layer = report.layers[100]
    row = page.texts.index(layer.name)
    cells = [text for text in page.texts[row:] if text][:9]
    assert cells[:2] == [layer.name, "192 × 576"]
    assert [float(cell) for cell in cells[2:]] == pytest.approx(list(layer.errors.values()), rel=5e-3)


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_no_markup(name: str) -> None:
    harmless, hostile = Page(render_page(hostile_report("name"))), Page(render_page(hostile_report(name)))
    assert hostile.open == []
    assert hostile.tags == harmless.tags
    assert Counter(attribute for attribute, _ in hostile.attributes) == Counter(name for name, _ in harmless.attributes)


def test_what_was_not_measured_is_left_out() -> None:
    layers = [LayerRow("model.layers.0.a", (8, 64), {}), LayerRow("lm_head", (8, 64), {})]
    page = Page(render_page(make_report(layers=layers, quality=[], quality_text={}, calibration=None, command=())))
    assert page.tags["svg"] == 0
    assert "none: the method needs no text" in page.texts
    assert not any("perplexity" in text for text in page.texts if not text.startswith(":root"))


def test_layer_without_errors_among_others() -> None:
    layers = [LayerRow("model.layers.0.a", (8, 64), {2: 0.1, 8: 0.01}), LayerRow("lm_head", (8, 64), {})]
    page = Page(render_page(make_report(widths=(2, 8), layers=layers)))
    row = page.texts.index("lm_head", page.texts.index("Layers"))
    assert [text for text in page.texts[row:] if text][:4] == ["lm_head", "8 × 64", "–", "–"]


def test_same_report_gives_the_same_bytes() -> None:
    """In another process too, whose hashes of strings are others."""
    code = (
        "from tests.quantize.report.sample_reports import make_report;"
        "from vllm_matquant.quantize.report.page import render_page;"
        "import sys; sys.stdout.write(render_page(make_report(1, (2, 8))))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "1", "SOURCE_DATE_EPOCH": "1", "PYTHONIOENCODING": "utf-8"}
    root = Path(__file__).parents[3]
    other = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, check=True)
    assert other.stdout.decode() == render_page(make_report(1, (2, 8)))


def test_experts_that_few_tokens_reached_are_marked() -> None:
    layers = [LayerRow("model.layers.0.a", (8, 64), {}, shown=True), LayerRow("model.layers.0.b", (8, 64), {})]
    page = render_page(make_report(layers=layers))
    assert "1 layers of experts (*) were reached by few tokens" in page
    assert "model.layers.0.a *<" in page
    assert "model.layers.0.b<" in page
    assert "few tokens" not in render_page(make_report(layers=layers[1:]))
