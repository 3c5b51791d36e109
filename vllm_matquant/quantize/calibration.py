"""Calibration text: from a file, a data set of a hub, or the text that every Python carries."""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

_HUB = "hf:"
_CHARACTERS_PER_TOKEN = 8  # more than any tokenizer of natural text takes on average
_MARGIN = 4  # as much text is read as holds this many times the tokens asked for, to sample windows from
_FILE_CHARACTERS = 2**20  # of a file, however few tokens are asked for
_PIECES = 64  # of a larger text file, spread evenly over it
_HELD_OUT_CHARACTERS = 200_000
_REFERENCE_CHARACTERS = 48_000  # of the language reference: half as much as the prose


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
    source: str | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    sequence_length: int,
    seed: int,
    text_column: str = "text",
) -> Calibration:
    """Tokenize a text and take ``samples`` windows at random places.

    Of a source that holds far more text than is asked for only a part is read, always the same: pieces spread over a
    text file, the first lines of a JSON-lines file, the first rows of a data set.

    Args:
        source: ``FILE.txt``; ``FILE.jsonl``, an object in each line; ``hf:NAME[:CONFIG]``, a data set whose "train"
            split is streamed; None for the text that comes with this package.
        seed: of the windows' places.
        text_column: the text's field in a line, or column in a data set.

    Raises:
        CalibrationError: no such file, a line without text, a text with too few tokens, or no ``datasets`` package.
        OSError: the text cannot be read.
    """
    ids, described = _tokenize(source, tokenizer, samples, sequence_length, text_column)
    places = torch.randint(
        len(ids) - sequence_length + 1, (samples,), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    tokens = torch.tensor([ids[place : place + sequence_length] for place in places])
    return Calibration(tokens, described | {"seed": seed})


def load_parts(
    source: str | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: Sequence[int],
    sequence_length: int,
    seed: int,
    text_column: str = "text",
) -> list[Calibration]:
    """Likewise, several sets of windows no two of which share a token: to train on one, say, and measure on another.

    Args:
        samples: how many windows each set has.

    Raises:
        CalibrationError, OSError: as :func:`load_calibration`.
    """
    ids, described = _tokenize(source, tokenizer, sum(samples), sequence_length, text_column)
    count = len(ids) // sequence_length
    windows = torch.tensor(ids[: count * sequence_length]).view(count, sequence_length)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[: sum(samples)]
    return [
        Calibration(windows[part], described | {"samples": size, "seed": seed, "part": index})
        for index, (size, part) in enumerate(zip(samples, order.split(list(samples)), strict=True))
    ]


def _tokenize(
    source: str | None, tokenizer: PreTrainedTokenizerBase, samples: int, sequence_length: int, text_column: str
) -> tuple[list[int], dict[str, Any]]:
    """The tokens of a text that is long enough for the windows, and what to say of it."""
    wanted = samples * sequence_length
    text = "\n\n".join(_documents(source, wanted * _CHARACTERS_PER_TOKEN * _MARGIN, text_column))
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    name = source or "built-in text"
    if len(ids) < wanted:
        raise CalibrationError(
            f"{name}: found {len(ids):,} tokens, expected at least {wanted:,} ({samples} x {sequence_length}). "
            "Give a longer text or fewer samples"
        )
    return ids, {
        "name": name if name.startswith(_HUB) else Path(name).name,
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "samples": samples,
        "sequence_length": sequence_length,
    }


def read_text(path: Path) -> str:
    """The content of a text file.

    Raises:
        CalibrationError: it is not UTF-8, or holds NUL characters.
        OSError: it cannot be read.
    """
    return _decode(path, path.read_bytes())


def _decode(path: Path, content: bytes, final: bool = True) -> str:
    """The text of a file's bytes; a character that their end cuts is left out unless they are the ``final`` ones."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(content, final)
    except UnicodeDecodeError as cause:
        raise CalibrationError(f"{path}: found bytes that are not UTF-8 ({cause}), expected text") from cause
    if "\0" in text:
        raise CalibrationError(f"{path}: found NUL characters, expected text")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _documents(source: str | None, characters: int, column: str) -> Iterator[str]:
    if source is None:
        yield from _builtin_documents()
        return
    if source.startswith(_HUB):
        yield from _some(_hub_documents(source, column), characters)
        return
    path, characters = Path(source), max(characters, _FILE_CHARACTERS)
    if not path.is_file():
        raise CalibrationError(f"{path}: found no such file, expected a .txt or .jsonl file, or {_HUB}NAME")
    if path.suffix == ".jsonl":
        yield from _some(_json_documents(path, column), characters)
    elif path.stat().st_size <= characters:
        yield read_text(path)
    else:
        yield from _pieces(path, characters // _PIECES)


def _some(documents: Iterator[str], characters: int) -> Iterator[str]:
    """Documents up to the one with which they hold ``characters``."""
    total = 0
    for document in documents:
        yield document
        total += len(document)
        if total >= characters:
            return


def _builtin_documents() -> Iterator[str]:
    # About 33,000 tokens, on every machine without a download: prose of many kinds that was written for this purpose,
    # and the language reference that Python carries.
    yield resources.files(__package__).joinpath("calibration.txt").read_text(encoding="utf-8")
    yield _language_reference()[:_REFERENCE_CHARACTERS]


def held_out_text() -> str:
    """A part of the language reference, some 50,000 tokens, that the built-in calibration text leaves out."""
    return _language_reference()[_REFERENCE_CHARACTERS : _REFERENCE_CHARACTERS + _HELD_OUT_CHARACTERS]


def _language_reference() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _pieces(path: Path, length: int) -> Iterator[str]:
    """Pieces of ``length`` bytes, but for characters that their ends cut."""
    last = path.stat().st_size - length
    rest_of_character = bytes(range(0x80, 0xC0))
    with path.open("rb") as file:
        for index in range(_PIECES):
            file.seek(last * index // (_PIECES - 1))
            yield _decode(path, file.read(length).lstrip(rest_of_character), final=index == _PIECES - 1)


def _json_documents(path: Path, column: str) -> Iterator[str]:
    # Lines end at "\n" alone: other separators may stand inside a string.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text = _decode(path, line).strip()
            if not text:
                continue
            try:
                document = json.loads(text)
            except json.JSONDecodeError:
                document = None
            if not isinstance(document, dict) or not isinstance(document.get(column), str):
                raise CalibrationError(f'{path}:{number}: found {text[:60]!r}, expected {{"{column}": "..."}}')
            yield document[column]


def _hub_documents(source: str, column: str) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError as cause:
        found = "found no package datasets, expected it (pip install 'vllm_matquant[calibration]')"
        raise CalibrationError(f"{source}: {found}") from cause
    name, _, config = source.removeprefix(_HUB).partition(":")
    for row in load_dataset(name, config or None, split="train", streaming=True):
        if not isinstance(row.get(column), str):
            found = f"columns {sorted(row)}" if column not in row else f"{type(row[column]).__name__} in a row"
            raise CalibrationError(f'{source}: found {found}, expected one named "{column}" of text')
        yield row[column]
