"""Types of command-line arguments."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from vllm_matquant.jobs.arguments import output_file, positive, width_list
from vllm_matquant.jobs.table import figures, headings


@pytest.mark.parametrize(("text", "widths"), [("4", (4,)), ("8,2,4", (2, 4, 8)), ("2, 3", (2, 3))])
def test_width_list(text: str, widths: tuple[int, ...]) -> None:
    assert width_list(text) == widths


@pytest.mark.parametrize("text", ["", "1", "9", "4,4", "4,", "four", "2-8", "-4", "4.5"])
def test_bad_width_list(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"found '{text}', expected distinct widths from 2 to 8"):
        width_list(text)


def test_positive() -> None:
    assert positive("12") == 12
    for text in ("", "0", "-1", "1.5", "many"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected a positive integer"):
            positive(text)


def test_output_file(tmp_path: Path) -> None:
    assert output_file(str(tmp_path / "rows.json")) == tmp_path / "rows.json"
    with pytest.raises(argparse.ArgumentTypeError, match="found a folder, expected a file"):
        output_file(str(tmp_path))
    with pytest.raises(argparse.ArgumentTypeError, match=r"found no folder .*nowhere, expected a file in a folder"):
        output_file(str(tmp_path / "nowhere" / "rows.json"))


def test_figures() -> None:
    row = {"bits": 8, "resident_bytes": 1234567, "kl": 0.000123456, "left out": "x"}
    columns = ("bits", "resident_bytes", "kl")
    assert headings(columns) == "     bits  resident_bytes         kl"
    assert figures(row, columns) == "        8       1,234,567  0.0001235"
