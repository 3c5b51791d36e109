"""What the command lines share: types of arguments, how rows of figures are printed, and how threads wait."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Must stand before the first import of torch, whose threads would otherwise spin while they wait: on a machine
# that does anything else they slow each other manyfold. A few turns are good: most waits are shorter than a sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

from vllm_matquant.checkpoint.reader import Checkpoint
from vllm_matquant.checkpoint.slice import Slice
from vllm_matquant.checkpoint.spec import WIDTHS

_CELL = 9  # characters of a figure


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


def chosen_slices(checkpoint: Checkpoint, options: argparse.Namespace) -> list[Slice]:
    """What ``--bits`` and ``--recipes`` ask for; without ``--bits`` every width that the folder can serve.

    Raises:
        CheckpointError: the folder cannot serve one of them: known before the long work.
        ValueError: a name that is neither a recipe of the checkpoint nor a file.
    """
    widths = options.bits or checkpoint.servable_widths
    slices = [*map(checkpoint.slice, widths), *map(checkpoint.slice, chosen_recipes(checkpoint, options.recipes))]
    for each in slices:
        checkpoint.files_for(each)
    return slices


def add_recipes_argument(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--recipes",
        metavar="LIST",
        help=f"recipes to {what} too: names of the checkpoint's, files, or all (its own, but for those of one width)",
    )


def chosen_recipes(checkpoint: Checkpoint, asked: str | None) -> list[str | Path]:
    """The recipes of ``--recipes``: names of the checkpoint's, and files.

    Raises:
        ValueError: a name that is neither a recipe of the checkpoint nor a file.
    """
    own = {recipe.name: recipe for recipe in checkpoint.recipes}
    if asked is None:
        return []
    if asked == "all":
        return [name for name, recipe in own.items() if len(set(recipe.widths.values())) > 1]
    chosen: list[str | Path] = []
    for name in asked.split(","):
        if name not in own and not Path(name).is_file():
            raise ValueError(f"--recipes: found {name!r}, expected a file or one of {', '.join(own) or 'no others'}")
        chosen.append(name if name in own else Path(name))
    return chosen


def headings(columns: Sequence[str]) -> str:
    """The line above those of :func:`figures`."""
    return "  ".join(f"{name:>{_CELL}}" for name in columns)


def figures(row: Mapping[str, Any], columns: Sequence[str]) -> str:
    """A line of numbers, each right-aligned below the name of its column."""
    cells = [(max(_CELL, len(name)), row[name]) for name in columns]
    return "  ".join(f"{value:>{size}{',' if isinstance(value, int) else '.4g'}}" for size, value in cells)
