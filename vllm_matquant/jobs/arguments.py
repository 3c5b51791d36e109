"""From the text of a command line to values, and back."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_matquant.checkpoint.quantization_config import is_group_size
from vllm_matquant.checkpoint.spec import WIDTHS, GroupSize
from vllm_matquant.jobs.job import show


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


def positive_list(text: str) -> tuple[int, ...]:
    """Parse ``1,2,8``."""
    return tuple(dict.fromkeys(positive(part) for part in text.split(",")))


def float_list(text: str) -> tuple[float, ...]:
    """Parse ``0.1,2.5``: positive numbers."""
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all(0 < number < float("inf") for number in numbers):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected positive numbers such as 0.5,2.5")
    return numbers


def output_folder(text: str) -> Path:
    """A folder to write, which must not be there yet, or be empty."""
    path = Path(text)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise argparse.ArgumentTypeError(f"found {path}, expected a folder that is not there, or is empty")
    return path


def output_file(text: str) -> Path:
    """A file to write, whose folder must be there before the work begins."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        found = "a folder" if path.is_dir() else f"no folder {path.parent}"
        raise argparse.ArgumentTypeError(f"found {found}, expected a file in a folder that exists")
    return path


def group_size(text: str) -> GroupSize:
    """Parse a number of columns, ``auto`` or ``channel``."""
    size = int(text) if text.isdigit() else text
    if not is_group_size(size):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a multiple of 8, auto or channel")
    return size


def group_size_for(text: str) -> tuple[str, GroupSize]:
    """Parse ``REGEX=SIZE``."""
    expression, equals, size = text.rpartition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected REGEX=SIZE")
    return expression, group_size(size)


def bits_for(text: str) -> tuple[str, tuple[int, ...]]:
    """Parse ``REGEX=WIDTHS``."""
    expression, equals, widths = text.rpartition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected REGEX=WIDTHS")
    return expression, width_list(widths)


def show_rule(rule: tuple[str, Any]) -> str:
    """The text that :func:`group_size_for` and :func:`bits_for` parse."""
    return f"{rule[0]}={show(rule[1])}"


def names_of(known: Sequence[str], word: str) -> Any:
    """The function that parses ``a,b``, some of the ``known`` names, or ``word``, which stands for all or none."""

    def parse(text: str) -> tuple[str, ...]:
        if text in ("", word):
            return tuple(known) if text == "all" else ()
        names = tuple(text.split(","))
        if not set(names) <= set(known):
            raise argparse.ArgumentTypeError(f"found {text!r}, expected some of {', '.join(known)}, or {word}")
        return names

    return parse
