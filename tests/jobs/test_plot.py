"""The picture of the trade."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.figure
import pytest

from vllm_matquant import cli

run_plot = cli.tool("plot")
QUALITY = [
    {"bits": 2, "bits_per_weight": 2.5, "kl": 1.6},
    {"bits": 3, "bits_per_weight": 3.5, "kl": 0.4},
    {"bits": 2.5, "recipe": "2.5-bits", "bits_per_weight": 3.0, "kl": 0.8},
]
SPEED = [
    {"bits": 16, "output_tokens_per_s": 60.0, "model": "source"},
    {"bits": 2, "output_tokens_per_s": 200.0, "model": "tiny"},
    {"bits": 2.5, "recipe": "2.5-bits", "output_tokens_per_s": 170.0, "model": "tiny"},
    {"bits": 2.5, "recipe": "other", "output_tokens_per_s": 160.0, "model": "tiny"},
]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved."""
    saved = []
    save = matplotlib.figure.Figure.savefig

    def savefig(self: Any, *arguments: Any, **options: Any) -> None:
        saved.append(self)
        save(self, *arguments, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    return saved


def write(folder: Path, **rows: Any) -> list[str]:
    paths = []
    for name, content in rows.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
        paths.append(str(folder / f"{name}.json"))
    return paths


def test_both_panels(tmp_path: Path, figures: list[Any]) -> None:
    rivals = [{"method": "autoround", "bits": 3, "bits_per_weight": 3.3, "kl": 0.45}, {"method": "none"}]
    quality, speed, peers = write(tmp_path, quality=QUALITY, speed=SPEED, rivals=rivals)
    picture = tmp_path / "trade.png"
    assert run_plot([quality, "--speed", speed, "--rivals", peers, "--output", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")
    by_bits, by_speed = figures[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in by_bits.lines}
    assert lines["one width for all layers"] == [[2.5, 1.6], [3.5, 0.4]]
    assert lines["a width for each layer"] == [[3.0, 0.8]]
    assert lines["autoround"] == [[3.3, 0.45]]
    lines = {line.get_label(): line.get_xydata().tolist() for line in by_speed.lines}
    assert lines["one width for all layers"] == [[200.0, 1.6]]
    assert lines["a width for each layer"] == [[170.0, 0.8]]
    assert "bfloat16: 60 tokens/s" in lines


def test_quality_alone(tmp_path: Path) -> None:
    [quality] = write(tmp_path, quality=QUALITY)
    assert run_plot([quality, "--output", str(tmp_path / "trade.svg")]) == 0
    assert b"<svg" in (tmp_path / "trade.svg").read_bytes()


@pytest.mark.parametrize("content", [[], {}, [1]])
def test_other_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: Any) -> None:
    [quality] = write(tmp_path, quality=content)
    with pytest.raises(SystemExit) as stop:
        run_plot([quality, "--output", str(tmp_path / "trade.png")])
    assert stop.value.code == 1
    assert "found no list of rows" in capsys.readouterr().err
