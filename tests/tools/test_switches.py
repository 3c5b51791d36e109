"""Switches under load: a short run through an engine, and that a wrong answer would be noticed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import switches

from tests.serve.tiny_models import write_checkpoint
from vllm_matquant.checkpoint.spec import Format

OPTIONS = ["--elastic", "2..8", "--switches", "60", "--clients", "3", "--tokens", "6"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        ["--enforce-eager"],
        # In eager mode vLLM 0.32 has no pipelines on a CPU.
        ["--pipeline-parallel-size", "2"],
    ],
)
def test_switches_under_load(tmp_path: Path, capfd: pytest.CaptureFixture[str], how: list[str]) -> None:
    folder = write_checkpoint(tmp_path / "model", "llama", Format(group_size=32), max_position_embeddings=512)
    assert switches.main([str(folder), *OPTIONS, *how, "--json", str(tmp_path / "row.json")]) == 0
    row = json.loads((tmp_path / "row.json").read_text())
    assert row["switches"] == 60
    assert row["distinct_answers"] > 8  # slices answer differently, so that a wrong one shows
    assert sum(row["answers"].values()) > 5
    assert len(row["answers"]) > 1
    assert not row["wrong"]
    assert not row["failed"]
    assert "0 wrong, 0 failed" in capfd.readouterr().out


def test_other_answers_are_wrong() -> None:
    tally = switches.Tally()
    expected = {("uniform-8", 0): [1, 2], ("uniform-2", 0): [3, 4]}
    tally.count("first", "uniform-8", 0, [1, 2], expected)
    tally.count("second", "uniform-8", 0, [3, 4], expected)
    tally.count("third", "uniform-2", 0, [3, 4], expected)
    assert tally.answers == {"uniform-8": 2, "uniform-2": 1}
    [wrong] = tally.wrong
    assert wrong.startswith("second: prompt 0, uniform-8")


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        switches.main([str(tmp_path / "none")])
    assert stop.value.code
    assert "no such folder" in capsys.readouterr().err
