"""How the demo shows what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import demo
import pytest


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return [
        {
            "bits": bits,
            "bits_per_weight": bits + 0.5,
            "resident_megabytes": 15.0 * bits,
            "output_tokens_per_s": 123.456,
            "perplexity": 20.0 + 1 / bits,
            "reference_perplexity": 19.876,
            "kl": 0.5**bits,
            "answer": f"At {bits} bits the answer is Paris. " * 8,
            "model": "tiny",
        }
        for bits in demo.WIDTHS
    ]


def test_table(rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    demo.print_table(rows)
    said = capsys.readouterr().out
    titles, *lines = said.splitlines()
    assert [len(line) for line in lines[:5]] == [len(titles)] * 5
    assert lines[0].split() == ["8", "8.50", "120.0", "123.5", "20.12", "0.0039"]
    assert "perplexity of the bfloat16 model: 19.88" in said
    for bits in demo.WIDTHS:
        assert f"  {bits} bits: At {bits} bits the answer is Paris." in said
    assert max(map(len, said.splitlines())) <= 120


def test_picture(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    demo.save_picture(rows, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_a_sound_checkpoint_is_used_again(
    nested: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo.quantize, "main", lambda arguments: pytest.fail(f"quantized again: {arguments}"))
    assert demo.nested_checkpoint(source, nested) == nested
    assert "run with --fresh to quantize again" in capsys.readouterr().out


def test_leftovers_of_an_earlier_demo_are_replaced(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    calls: list[list[str]] = []
    monkeypatch.setattr(demo.quantize, "main", calls.append)
    demo.nested_checkpoint(source, folder)
    assert calls == [[str(source), "--output", str(folder), "--group-size", "64"]]
    assert not folder.exists()
