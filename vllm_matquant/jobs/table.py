"""Rows of figures as lines of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_CELL = 9  # characters of a figure


def headings(columns: Sequence[str]) -> str:
    """The line above those of :func:`figures`."""
    return "  ".join(f"{name:>{_CELL}}" for name in columns)


def figures(row: Mapping[str, Any], columns: Sequence[str]) -> str:
    """A line of numbers, each right-aligned below the name of its column; a dash is one that the row does not have."""
    return "  ".join(f"{_written(row.get(name)):>{max(_CELL, len(name))}}" for name in columns)


def _written(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
