"""What several command lines share: types of arguments, and how rows of figures are printed."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_matquant.checkpoint.spec import WIDTHS


def width_list(text: str) -> tuple[int, ...]:
    """Parse ``2,3,4``: distinct widths in any order."""
    try:
        widths = sorted(int(part) for part in text.split(","))
    except ValueError:
        widths = []
    if not widths or len(set(widths)) < len(widths) or not set(widths) <= set(WIDTHS):
        expected = f"distinct widths from {WIDTHS[0]} to {WIDTHS[-1]}, such as 2,4,8"
        raise argparse.ArgumentTypeError(f"found {text!r}, expected {expected}")
    return tuple(widths)


def positive(text: str) -> int:
    """Parse a positive integer."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a positive integer")
    return int(text)


def output_file(text: str) -> Path:
    """A file to write, whose folder must be there before the work begins."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        found = "a folder" if path.is_dir() else f"no folder {path.parent}"
        raise argparse.ArgumentTypeError(f"found {found}, expected a file in a folder that exists")
    return path


def figures(row: Mapping[str, Any], columns: Sequence[str]) -> str:
    """A line of numbers, each right-aligned below the name of its column."""
    cells = [(name, row[name]) for name in columns]
    return "  ".join(f"{value:>{len(name)}{',' if isinstance(value, int) else '.4g'}}" for name, value in cells)
