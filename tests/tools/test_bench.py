"""The command line of the benchmarks, with measured figures faked."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import bench
import pytest


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, tuple[int, ...], dict[str, Any]]]:
    """What the benchmark was asked to measure, while it measures nothing."""
    asked: list[tuple[Path, tuple[int, ...], dict[str, Any]]] = []

    def measure(folder: Path, widths: Sequence[int], **options: Any) -> Iterator[dict[str, Any]]:
        asked.append((folder, tuple(widths), options))
        for bits in widths:
            yield {
                "bits": bits,
                "output_tokens_per_s": 100.0 / bits,
                "resident_bytes": 1_000_000 * bits,
                "load_seconds": 2.5,
                "batch": options["batch"],
                "model": folder.name,
                "answer": "Paris",
            }

    monkeypatch.setattr(bench, "bench_serve", measure)
    return asked


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        bench.main(list(map(str, arguments)))
    return stop.value.code, capsys.readouterr().err.strip().splitlines()[-1]


def test_serve(nested: Path, calls: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["serve", str(nested), "--batch", "3", "--output-tokens", "16", "--prompt", "Why?"]
    assert bench.main([*arguments, "--json", str(tmp_path / "rows.json"), "--plot", str(tmp_path / "plot.png")]) == 0
    assert calls == [(nested, (2, 4, 8), {"batch": 3, "output_tokens": 16, "prompt": "Why?"})]
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["bits"] for row in rows] == [2, 4, 8]
    named = {"bits", "output_tokens_per_s", "resident_bytes", "load_seconds", "batch", "model"}
    assert all(named <= set(row) for row in rows)
    titles, *lines = capsys.readouterr().out.splitlines()
    assert titles.split() == list(bench.COLUMNS)
    assert lines[1].split() == ["4", "25", "4,000,000", "2.5", "3"]
    picture = (tmp_path / "plot.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n")
    assert struct.unpack(">II", picture[16:24]) == (900, 600)


def test_widths(nested: Path, calls: list) -> None:
    assert bench.main(["serve", str(nested), "--bits", "8,2"]) == 0
    assert calls[0][1] == (2, 8)


def test_plot_without_matplotlib(
    nested: Path, calls: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, said = refusal(capsys, "serve", nested, "--plot", tmp_path / "plot.png")
    assert status == 1
    assert "--plot: found no package matplotlib, expected it (pip install 'vllm_matquant[plot]')" in said
    assert calls == []


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--bits", "3"], 1, "bits: found 3, expected one of the offered widths [2, 4, 8]"),
        (["--bits", "0"], 2, "argument --bits: found '0'"),
        (["--batch", "0"], 2, "argument --batch: found '0', expected a positive integer"),
        (["--output-tokens", "-1"], 2, "argument --output-tokens"),
        (["--json", "/no/such/folder/x.json"], 2, "argument --json: found no folder /no/such/folder"),
        (["--plot", "/no/such/folder/x.png"], 2, "argument --plot: found no folder /no/such/folder"),
    ],
)
def test_refusals(
    nested: Path, calls: list, capsys: pytest.CaptureFixture[str], options: list[str], status: int, message: str
) -> None:
    found, said = refusal(capsys, "serve", nested, *options)
    assert found == status
    assert message in said
    assert calls == []


def test_no_such_folder(tmp_path: Path, calls: list, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = refusal(capsys, "serve", tmp_path / "nowhere")
    assert status == 1
    assert "nowhere: checkpoint: found no such folder" in said


def test_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    status, said = refusal(capsys)
    assert status == 2
    assert "required: command" in said
