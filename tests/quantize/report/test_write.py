"""The files of a report lie next to a checkpoint: whole, and harmless to it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.quantize.report.sample_reports import layer_rows, make_report
from vllm_matquant.checkpoint.names import DOCUMENT_FILES
from vllm_matquant.quantize.report import write
from vllm_matquant.quantize.report.data import Report
from vllm_matquant.quantize.report.write import write_report


def small_report(**fields: Any) -> Report:
    """A report with three figures: they take most of the time."""
    return make_report(layers=layer_rows(blocks=2)[::7], **fields)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_files(tmp_path: Path) -> None:
    report = small_report()
    write_report(report, tmp_path)
    assert contents(tmp_path).keys() == set(DOCUMENT_FILES)
    assert json.loads((tmp_path / "report" / "report.json").read_text()) == json.loads(json.dumps(report.to_dict()))
    assert (tmp_path / "report" / "index.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert (tmp_path / "README.md").read_text(encoding="utf-8").startswith("---\nbase_model: org/tiny-model\n")


def test_same_report_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_report(small_report(), tmp_path / name)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_only_the_measured_figures_change(tmp_path: Path) -> None:
    """The model card tells of the checkpoint, not of the machine's speed."""
    write_report(small_report(), tmp_path)
    before = contents(tmp_path)
    write_report(small_report(seconds={"total": 1.0}, peak_memory_bytes=5), tmp_path)
    after = contents(tmp_path)
    assert [name for name in before if before[name] != after[name]] == [
        name for name in before if name.startswith("report")
    ]


def test_nothing_is_written_unless_all_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(report: Any) -> str:
        raise RuntimeError

    monkeypatch.setattr(write, "render_card", fail)
    with pytest.raises(RuntimeError):
        write_report(small_report(), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("written", range(len(DOCUMENT_FILES)))
def test_each_file_is_new_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int) -> None:
    write_report(small_report(method="old"), tmp_path)
    old = contents(tmp_path)
    replaced: list[Path] = []

    def replace(one: Path, other: Path, real: Any = os.replace) -> None:
        if len(replaced) == written:
            raise OSError(28, "No space left on device")
        real(one, other)
        replaced.append(other)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(OSError, match="No space left"):
            write_report(small_report(method="new"), tmp_path)
    new = contents(tmp_path)
    assert new.keys() == old.keys()
    changed = {name for name in new if new[name] != old[name]}
    assert changed == {str(path.relative_to(tmp_path)) for path in replaced}
    assert len(changed) == written
