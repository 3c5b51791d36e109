"""Bursts of requests: what is drawn, what is counted, and a short one through engines."""

from __future__ import annotations

import json
from pathlib import Path

import burst
import pytest

from tests.serve.tiny_models import write_checkpoint
from vllm_matquant.checkpoint.spec import Format


def test_requests_come_by_turns_of_calm_and_burst() -> None:
    trace = burst.Trace(400.0, 20.0, 0.5, 4.0, seed=3)
    arrivals = trace.arrivals()
    assert arrivals == trace.arrivals()
    assert [each.at for each in arrivals] == sorted(each.at for each in arrivals)
    assert arrivals != burst.Trace(400.0, 20.0, 0.5, 4.0, seed=4).arrivals()
    bursts = [each for each in arrivals if each.at // 20 % 2 == 1]
    assert 100 < len(arrivals) - len(bursts) < 250  # 200 s at 0.5, and what is left of a gap that began in a burst
    assert 600 < len(bursts) < 900
    assert {burst.PROMPT_TOKENS, burst.ANSWER_TOKENS} == {
        (min(each.prompt for each in arrivals), max(each.prompt for each in arrivals)),
        (min(each.tokens for each in arrivals), max(each.tokens for each in arrivals)),
    }


def test_figures_of_requests() -> None:
    played = {
        "first": [1.0] * 99 + [11.0],
        "between": [0.1] * 90 + [0.5] * 10,
        "alone": [0.5, 0.1],
        "tokens": {"uniform-8": 300, "mine": 100},
    }
    row = burst.row_of("load", played, {"uniform-8": 8.0, "mine": 2.5}, alone=0.1, multiple=3.0)
    assert (row["violations"], row["requests"]) == (10, 100)
    assert row["first_mean"] == pytest.approx(1.1)
    assert row["first_p95"] == 1.0
    assert row["between_p95"] == 0.5
    assert row["average_bits"] == pytest.approx((8.0 * 300 + 2.5 * 100) / 400)


@pytest.mark.slow
def test_a_burst_through_engines(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = write_checkpoint(tmp_path / "model", "llama", Format(group_size=32), max_position_embeddings=512)
    options = ["--bits", "8", "--elastic", "2..8", "--elastic-policy", "load,waiting=1,dwell=0,calm=60"]
    options += ["--seconds", "4", "--turn", "1", "--calm", "2", "--burst", "60", "--most", "2", "--enforce-eager"]
    assert burst.main([str(folder), *options, "--json", str(tmp_path / "rows.json")]) == 0
    rows = {row["served"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert list(rows) == ["8 bits", "load"]
    assert len({row["requests"] for row in rows.values()}) == 1
    assert rows["8 bits"]["average_bits"] == 8
    assert 2 <= rows["load"]["average_bits"] < 8  # it followed
    assert all(row["first_p95"] > row["between_mean"] > 0 for row in rows.values())
    assert "average_bits" in capfd.readouterr().out


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, said in (
        (["--elastic-policy", "tide"], "found 'tide'"),
        ([], "no such folder"),
    ):
        with pytest.raises(SystemExit) as stop:
            burst.main([str(tmp_path / "none"), *options])
        assert stop.value.code
        assert said in capsys.readouterr().err
