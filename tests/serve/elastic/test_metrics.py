"""The metrics of an elastic server, and the dashboard that shows them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import vllm.v1.metrics.loggers
from prometheus_client import CollectorRegistry

from tests.serve.elastic.slices import EIGHT, an_offer
from vllm_matquant.serve.elastic.metrics import ElasticMetrics

DASHBOARD = json.loads((Path(__file__).parents[3] / "docs/guide/grafana.json").read_text(encoding="utf-8"))
PANELS = {panel["title"]: panel for panel in DASHBOARD["panels"]}
_HISTOGRAM = re.compile(r"_(bucket|sum|count)$")


def metrics_of(panel: dict[str, Any]) -> set[str]:
    """Names of the metrics that a panel asks for."""
    return {name for each in panel["targets"] for name in re.findall(r"\b(?:matquant_|vllm:)\w+", each["expr"])}


@pytest.mark.parametrize("title", PANELS)
def test_the_dashboard_asks_for_metrics_that_there_are(title: str) -> None:
    registry = CollectorRegistry()
    ElasticMetrics(an_offer(), EIGHT, registry)
    ours = {family.name + suffix for family in registry.collect() for suffix in ("", "_total")}
    theirs = Path(vllm.v1.metrics.loggers.__file__).read_text(encoding="utf-8")
    asked = metrics_of(PANELS[title])
    assert asked
    for name in (_HISTOGRAM.sub("", name) for name in asked):
        assert name in ours or f'"{name}"' in theirs, name


def test_the_dashboard_shows_all_metrics_of_ours_and_no_panel_hides_another() -> None:
    registry = CollectorRegistry()
    ElasticMetrics(an_offer(), EIGHT, registry)
    shown = set().union(*map(metrics_of, PANELS.values()))
    shown = {re.sub(r"_(total|bucket)$", "", name) for name in shown}
    assert {family.name for family in registry.collect()} - {
        "matquant_active"
    } <= shown  # which the width shows already
    places = [
        (panel["gridPos"]["x"] + column, panel["gridPos"]["y"] + row)
        for panel in PANELS.values()
        for column in range(panel["gridPos"]["w"])
        for row in range(panel["gridPos"]["h"])
    ]
    assert len(set(places)) == len(places)
    assert max(column for column, _ in places) < 24
