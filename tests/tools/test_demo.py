"""How the demo shows what was measured."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import demo
import pytest
import torch

from vllm_matquant.checkpoint.reader import open_checkpoint
from vllm_matquant.checkpoint.recipe import Recipe
from vllm_matquant.checkpoint.recipe_store import add_recipes
from vllm_matquant.measure.windows import Windows


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
        for bits in (8, 4, 3.5, 3)
    ]


REFERENCE = {"bits": 16, "output_tokens_per_s": 60.5, "model": "source"}


def test_table(rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    demo.print_table(rows, REFERENCE)
    said = capsys.readouterr().out
    titles, *lines = said.splitlines()
    assert [len(line) for line in lines[:4]] == [len(titles)] * 4
    assert lines[0].split() == ["8", "8.50", "120.0", "123.5", "20.12", "0.0039"]
    assert "the bfloat16 model: perplexity 19.88, 60.5 tokens/s" in said
    for bits in (8, 4, 3.5, 3):
        assert f"  {bits} bits: At {bits} bits the answer is Paris." in said
    assert max(map(len, said.splitlines())) <= 120


def test_picture(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    demo.save_picture(rows, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_recipes_are_searched_once(nested: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(nested, tmp_path / "nested"))
    monkeypatch.setattr(demo, "SEARCH", ("--samples", "2", "--sequence-length", "16", "--sensitivity-samples", "2",
                                         "--steps", "0"))  # fmt: skip
    demo.add_recipes(source, folder)
    assert {"2.5-bits", "3.5-bits"} <= {recipe.name for recipe in open_checkpoint(folder).recipes}
    monkeypatch.setattr(demo.cli, "main", lambda arguments: pytest.fail(f"searched again: {arguments}"))
    demo.add_recipes(source, folder)


def test_rows_come_with_the_widest_first(
    nested: Path, source: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(nested, tmp_path / "nested"))
    checkpoint = open_checkpoint(folder)
    widths = dict.fromkeys(checkpoint.layers, 2) | {next(iter(checkpoint.layers)): 8}
    add_recipes(checkpoint, [Recipe(f"{budget}-bits", widths) for budget in demo.BUDGETS])

    def serve(folder: Path, slices: Any, load: Any, reference: Path, elastic: bool) -> Any:
        assert elastic
        for part in (None, *slices):
            named = {"bits": 16} if part is None else part.label
            yield named | {"output_tokens_per_s": 1.0, "resident_bytes": 7_000_000, "model": "m", "answer": "Paris"}

    monkeypatch.setattr(demo, "WIDTHS", (8, 2))
    monkeypatch.setattr(demo, "bench_serve", serve)
    few = Windows(torch.ones(1, 8, dtype=torch.int64), {})
    monkeypatch.setattr(demo, "spread_windows", lambda *arguments, **options: few)
    *rows, reference = demo.collect_rows(source, folder, text_file)
    assert reference["bits"] == 16
    assert [row["bits"] for row in rows] == sorted((row["bits"] for row in rows), reverse=True)
    assert [row.get("recipe") for row in rows] == [None, "3.5-bits", "2.5-bits", None]
    assert rows[1]["resident_megabytes"] == open_checkpoint(folder).slice("3.5-bits").resident_bytes / 1e6
    assert {"kl", "perplexity", "output_tokens_per_s"} <= set(rows[1])


@pytest.mark.parametrize(("answer", "said"), [("Paris", "the same answer"), ("Rome", "another answer")])
def test_drafts(
    nested: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], answer: str, said: str
) -> None:
    def serve(folder: Path, slices: Any, load: Any) -> Any:
        assert (folder, [each.width for each in slices], load.speculate_bits) == (nested, [8], 4)
        yield {"bits": 8, "output_tokens_per_s": 80.0, "acceptance": 0.625, "answer": answer}

    monkeypatch.setattr(demo, "bench_serve", serve)
    row = demo.draft_row(nested, {"answer": "Paris"})
    demo.print_drafts(row)
    expected = f"8 bits with drafts: 62% of what 4 bits drafted was accepted, 80.0 tokens/s, {said}"
    assert capsys.readouterr().out.splitlines()[-1] == expected
    assert row["same_answer"] is (answer == "Paris")


def test_a_sound_checkpoint_is_used_again(
    nested: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo.cli, "main", lambda arguments: pytest.fail(f"quantized again: {arguments}"))
    assert demo.nested_checkpoint(source, nested) == nested
    assert "run with --fresh to quantize again" in capsys.readouterr().out


def test_leftovers_of_an_earlier_demo_are_replaced(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    calls: list[list[str]] = []
    monkeypatch.setattr(demo.cli, "main", calls.append)
    demo.nested_checkpoint(source, folder)
    [call] = calls
    assert call[:6] == ["quantize", str(source), "--output", str(folder), "--group-size", "64"]
    assert call[6:] == ["--samples", "32", "--no-report", "--setting", "end_to_end.epochs=0.5"]
    assert not folder.exists()
