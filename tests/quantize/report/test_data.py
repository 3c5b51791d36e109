"""What a report derives from the measured figures, and its JSON."""

from __future__ import annotations

import json
import math

import pytest

from tests.quantize.report.sample_reports import KINDS, QUALITY, SOURCE_PERPLEXITY, make_report
from vllm_matquant.checkpoint.quantization_config import format_to_config
from vllm_matquant.checkpoint.spec import Format
from vllm_matquant.quantize.report.data import LayerRow


@pytest.mark.parametrize(
    ("name", "kind", "depth"),
    [
        ("model.layers.3.self_attn.q_proj", "self_attn.q_proj", 3),
        ("model.layers.12.mlp.experts.7.up_proj", "mlp.experts.*.up_proj", 12),
        ("model.layers.0.mlp.experts.70.up_proj", "mlp.experts.*.up_proj", 0),
        ("lm_head", "lm_head", None),
        ("model.embed_tokens", "model.embed_tokens", None),
        ("layer2.proj", "layer2.proj", None),
    ],
)
def test_kind_and_depth(name: str, kind: str, depth: int | None) -> None:
    layer = LayerRow(name, (8, 8), {})
    assert (layer.kind, layer.depth) == (kind, depth)


def test_width_rows() -> None:
    rows = make_report(widths=(2, 4, 8)).width_rows()
    assert [row.bits for row in rows] == [8, 4, 2]
    for row in rows:
        # Two codes of 8 bits for each group of 64, and two steps of 16 for each row of 576 or, in one layer, 1536;
        # above 4 bits two float16 for each group.
        rows = {columns: sum(shape[0] for shape in KINDS.values() if shape[1] == columns) for columns in (576, 1536)}
        weights = sum(count * columns for columns, count in rows.items())
        decoder = 16 / 64 + 32 * sum(rows.values()) / weights if row.bits <= 4 else 32 / 64
        assert row.bits_per_weight == pytest.approx(row.bits + decoder)
        assert row.bytes == 90_000_000 + 13_300_000 * row.bits
        assert row.perplexity == QUALITY[row.bits][0]
        assert math.exp(row.gap or 0) == pytest.approx(QUALITY[row.bits][0] / SOURCE_PERPLEXITY)
        assert row.kl == QUALITY[row.bits][1]


def test_bits_per_weight_counts_every_layer_by_its_size() -> None:
    layers = [LayerRow("a", (8, 256), {}), LayerRow("b", (24, 64), {})]
    report = make_report(widths=(3,), layers=layers, format=Format((3,), "channel"))
    [row] = report.width_rows()
    # For each row and group two codes of 8 bits and two steps of 16.
    assert row.bits_per_weight == pytest.approx(3 + (16 + 32) * (8 + 24) / (8 * 256 + 24 * 64))


@pytest.mark.parametrize("diverged", [math.inf, math.nan])
def test_figures_that_are_not_finite(diverged: float) -> None:
    report = make_report(widths=(2, 8))
    report.quality[0].update(perplexity=diverged, kl=diverged)
    eight, two = report.width_rows()
    assert (two.perplexity, two.gap, two.kl) == (None, None, None)
    assert None not in eight
    assert report.to_dict()["quality"][0]["kl"] is None


def test_nothing_measured() -> None:
    report = make_report(quality=[], layers=[LayerRow("model.layers.0.a", (8, 64), {})])
    assert report.source_perplexity is None
    assert {(row.perplexity, row.gap, row.kl) for row in report.width_rows()} == {(None, None, None)}


def test_json() -> None:
    report = make_report(blocks=3)
    content = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert content["report_version"] == 1
    assert content["format"] == format_to_config(report.format)
    assert content["quality"] == report.quality
    assert content["bytes"]["3"] == report.bytes[3]
    assert content["settings"] == {"damping": 0.01, "sweeps": 2}
    assert len(content["layers"]) == 21
    layer = report.layers[9]
    assert content["layers"][9] == {
        "name": "model.layers.1.self_attn.v_proj",
        "shape": [192, 576],
        "errors": {str(width): error for width, error in layer.errors.items()},
        "shown": False,
    }
