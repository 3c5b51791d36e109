"""Calibration text: from a file, a data set of a hub, or the text that every Python carries."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

_HUB = "hf:"
_CHARACTERS_PER_TOKEN = 8  # more than any tokenizer of natural text takes on average
_MARGIN = 4  # a data set is read until it holds this many times the tokens asked for, to sample windows from
_REFERENCE_CHARACTERS = 40_000  # of the language reference: half as much as the prose


class CalibrationError(ValueError):
    """The calibration text cannot be used; the message names the source, what was found and what was expected."""


@dataclass(frozen=True)
class Calibration:
    """Token windows to calibrate on.

    Attributes:
        tokens: int64 [samples, sequence_length].
        source: what they were made from, for the manifest: name, SHA-256 of the text, samples, length and seed.
    """

    tokens: torch.Tensor
    source: dict[str, Any]


def load_calibration(
    source: str | None, tokenizer: PreTrainedTokenizerBase, *, samples: int, sequence_length: int, seed: int
) -> Calibration:
    """Tokenize a text and take ``samples`` windows at random places.

    Args:
        source: ``FILE.txt``; ``FILE.jsonl`` with a "text" field in each line; ``hf:NAME[:CONFIG]``, a data set with a
            "text" column whose "train" split is streamed; None for the documentation that Python carries.
        seed: of the windows' places.

    Raises:
        CalibrationError: no such file, a line without text, a text with too few tokens, or no ``datasets`` package.
    """
    wanted = samples * sequence_length
    text = "\n\n".join(_documents(source, wanted * _CHARACTERS_PER_TOKEN * _MARGIN))
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    name = source or "built-in text"
    if len(ids) < wanted:
        raise CalibrationError(
            f"{name}: found {len(ids):,} tokens, expected at least {wanted:,} ({samples} x {sequence_length}). "
            "Give a longer text or fewer samples"
        )
    places = torch.randint(
        len(ids) - sequence_length + 1, (samples,), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    tokens = torch.tensor([ids[place : place + sequence_length] for place in places])
    described = {
        "name": name if name.startswith(_HUB) else Path(name).name,
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "samples": samples,
        "sequence_length": sequence_length,
        "seed": seed,
    }
    return Calibration(tokens, described)


def read_text(path: Path) -> str:
    """The content of a text file.

    Raises:
        CalibrationError: it is not UTF-8.
        OSError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as cause:
        raise CalibrationError(f"{path}: found bytes that are not UTF-8 ({cause}), expected text") from cause


def _documents(source: str | None, characters: int) -> Iterator[str]:
    if source is None:
        yield from _builtin_documents()
    elif source.startswith(_HUB):
        yield from _hub_documents(source, characters)
    else:
        yield from _file_documents(Path(source))


def _builtin_documents() -> Iterator[str]:
    # About 32,000 tokens, on every machine without a download: prose of many kinds that was written for this purpose,
    # and the language reference that Python carries.
    yield resources.files(__package__).joinpath("calibration.txt").read_text(encoding="utf-8")
    from pydoc_data.topics import topics

    yield "\n\n".join(topics[name] for name in sorted(topics))[:_REFERENCE_CHARACTERS]


def _file_documents(path: Path) -> Iterator[str]:
    if not path.is_file():
        raise CalibrationError(f"{path}: found no such file, expected a .txt or .jsonl file, or {_HUB}NAME")
    text = read_text(path)
    if path.suffix != ".jsonl":
        yield text
        return
    # Not splitlines(), which also cuts at characters that JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)
        except json.JSONDecodeError:
            document = None
        if not isinstance(document, dict) or not isinstance(document.get("text"), str):
            raise CalibrationError(f'{path}:{number}: found {line[:60]!r}, expected {{"text": "..."}}')
        yield document["text"]


def _hub_documents(source: str, characters: int) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError as cause:
        found = "found no package datasets, expected it (pip install 'vllm_matquant[calibration]')"
        raise CalibrationError(f"{source}: {found}") from cause
    name, _, config = source.removeprefix(_HUB).partition(":")
    total = 0
    for row in load_dataset(name, config or None, split="train", streaming=True):
        if "text" not in row:
            raise CalibrationError(f'{source}: found columns {sorted(row)}, expected one named "text"')
        yield row["text"]
        total += len(row["text"])
        if total >= characters:
            return
