"""The model card: what a hub reads in front, what people read below."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

from tests.quantize.report.sample_reports import layer_rows, make_report
from vllm_matquant.checkpoint.names import shard_name
from vllm_matquant.checkpoint.spec import WIDTHS, Format
from vllm_matquant.quantize.report.card import read_license, render_card
from vllm_matquant.quantize.report.data import LayerRow


def split(card: str) -> tuple[dict[str, Any], str]:
    """(front matter, body)."""
    empty, front, body = card.split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(front), body


def html(body: str) -> str:
    return MarkdownIt("commonmark", {"html": True}).enable("table").render(body)


def test_front_matter() -> None:
    front, _ = split(render_card(make_report()))
    assert front == {
        "base_model": "org/tiny-model",
        "base_model_relation": "quantized",
        "library_name": "vllm",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["vllm", "quantized", "matquant"],
    }


def test_front_matter_names_no_base_model_that_a_hub_would_refuse() -> None:
    front, _ = split(render_card(make_report(model="my model: v2\n---", license={})))
    assert front.keys().isdisjoint({"base_model", "license"})


def test_every_width_can_be_served() -> None:
    _, body = split(render_card(make_report(widths=(2, 4, 8))))
    for width in (2, 4, 8):
        assert f"    vllm serve NAME --bits {width}\n" in body
    assert "serves at 2, 4 or 8 bits" in body
    assert '"bits": 8' in body


@pytest.mark.parametrize("shown", range(3))
def test_experts_that_few_tokens_reached_are_counted(shown: int) -> None:
    layers = [LayerRow(f"model.layers.{index}.a", (8, 64), {}, index < shown) for index in range(4)]
    _, body = split(render_card(make_report(layers=layers)))
    assert (f"reached {shown} of the 4 quantized layers, which belong to experts" in body) == (shown > 0)
    assert body.count("few tokens") == min(shown, 1)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_checkpoint_of_one_width_has_no_files_to_leave_out(width: int) -> None:
    _, body = split(render_card(make_report(widths=(width,))))
    assert "vLLM downloads no more than the width needs.\n\n## How it was made" in body
    assert "--exclude" not in body


def test_table_of_widths() -> None:
    _, body = split(render_card(make_report()))
    rendered = html(body)
    assert rendered.count("<table>") == 2
    assert "| source | | 269.0 MB | 31.61 | | |" in body
    assert "| 4 bits | 4.30 | 143.2 MB | 35.31 | 0.1107 | 0.1186 |" in body
    assert "8,176 tokens: news.txt, 16 × 512 tokens" in body


@pytest.mark.parametrize("format_", [Format(), Format((2, 4, 7)), Format((2, 3, 5), slicing="round"), Format((6,))])
def test_excluded_files_are_those_that_the_width_does_not_read(format_: Format) -> None:
    _, body = split(render_card(make_report(format=format_)))
    stored = [width for width in WIDTHS if width <= format_.stored_width(format_.max_width)]
    excludes = dict(
        (int(line.split("#")[1].split()[0]), line.split("'")[1]) for line in body.splitlines() if "--exclude" in line
    )
    for width in format_.widths:
        fetched = [of for of in stored if not fnmatchcase(shard_name(of, 1, 1), excludes.get(width, ""))]
        assert fetched == [of for of in stored if of <= format_.stored_width(width)]
    for width in stored:
        assert f"| `model-width{width}-*` |" in body


def test_how_it_was_made() -> None:
    _, body = split(render_card(make_report()))
    assert "\n    matquant quantize org/tiny-model --ignore 'a|b'\n" in body
    assert "built-in text, 16 × 512 tokens, seed 7, SHA-256" in body
    assert "damping 0.01, sweeps 2" in body
    assert "- not quantized: `lm_head`\n" in body


def test_layers_with_widths_of_their_own() -> None:
    layers = [row.name for row in layer_rows(2)]
    own = {**dict.fromkeys([name for name in layers if "down_proj" in name], (4, 8)), layers[0]: (3,)}
    _, body = split(render_card(make_report(format=Format((2, 8), 64, layer_widths=own))))
    assert "- served at 4 or 8 bits only: 2 of the 14 quantized layers;" in body
    assert "- served at 3 bits only: 1 of the 14 quantized layers;" in body
    # Two bits read planes 3 and 4 of these layers, which thus lie in the shards of two bits.
    assert "| `model-width3-*` | what lifts width 2 to 3: needed from 8 bits on |" in body
    assert "served at" not in render_card(make_report())


def test_tensor_parallel_sizes_that_do_not_fit() -> None:
    layers = [LayerRow("model.layers.0.mlp.down_proj", (64, 512), {})]
    _, body = split(render_card(make_report(layers=layers, format=Format(group_size=128))))
    refused = "is refused on 8 ranks: model.layers.0.mlp.down\\_proj has 512 input features, no multiple of 8 x 128."
    assert refused in body
    _, body = split(render_card(make_report(layers=layers, format=Format(group_size=64))))
    assert "Tensor parallelism" not in body


def test_nothing_measured() -> None:
    _, body = split(render_card(make_report(quality=[], quality_text={}, calibration=None)))
    assert "Perplexity was not measured." in body
    assert "| 4 bits | 4.30 | 143.2 MB |" in body
    assert "float32" not in body


@pytest.mark.parametrize(
    "name",
    [
        "<script>alert(1)</script>",
        "a`b``c",
        "# x\n\n<b>bold</b>\n---\n",
        "[x](javascript:alert(1))",
        "![x](y)",
        "&lt;b&gt;",
        "a|b|c",
    ],
)
def test_names_are_no_markup(name: str) -> None:
    text = {"name": name, "sha256": "0"}
    fields = {"model": name, "method": name, "settings": {name: name}, "software": {name: name}, "command": (name,)}
    report = make_report(**fields, quality_text=text, calibration=text, format=Format(WIDTHS, 64, (name,)))
    _, body = split(render_card(report))
    rendered = html(body)
    harmless = html(split(render_card(make_report()))[1])
    for tag in ("script", "b", "img", "a", "h1", "h2", "hr", "table", "pre", "li", "td"):
        assert rendered.count(f"<{tag}>") + rendered.count(f"<{tag} ") == harmless.count(f"<{tag}>") + harmless.count(
            f"<{tag} "
        ), tag


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: mit\ntags:\n- x\n---\n# Model\n", {"license": "mit"}),
        (
            "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n",
            {"license": "other", "license_name": "own", "license_link": "LICENSE"},
        ),
        ("---\nlicense: [mit, apache-2.0]\n---\n", {}),
        ("---\nlicense: {\n---\n", {}),
        ("# No front matter\n", {}),
        (None, {}),
    ],
)
def test_license_of_the_source(tmp_path: Path, card: str | None, expected: dict[str, str]) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert read_license(tmp_path) == expected


def test_license_in_a_card_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    assert read_license(tmp_path) == {}
