"""Text to measure and calibrate on: from a file, a data set of a hub, or the text that every Python carries."""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from vllm_matquant.checkpoint.files import check_content
from vllm_matquant.measure.records import (
    CHATS,
    LINES,
    TABLES,
    Render,
    dataset_loader,
    json_records,
    table_records,
    text_of,
)
from vllm_matquant.measure.records import TextError as TextError

HUB = "hf:"
_FILE_CHARACTERS = 2**20  # of a file, however few are asked for
_PIECES = 64  # of a larger text file, spread evenly over it
_HELD_OUT_CHARACTERS = 200_000
_REFERENCE_CHARACTERS = 48_000  # of the language reference: half as much as the prose


def read_source(
    source: str | None, characters: int, column: str = "text", render: Render | None = None, *, whole: bool = False
) -> str:
    """The text of a source, its documents joined by empty lines.

    Of a source that holds far more text than is asked for only a part is read, always the same: pieces spread over a
    text file, the first records of any other file, the first rows of a data set.

    Args:
        source: ``FILE.json``, a list of texts or of records; ``FILE.jsonl`` or ``FILE.ndjson``, a record in each line;
            ``FILE.csv``, ``FILE.tsv`` or ``FILE.parquet``, a record in each row; any other file is text;
            ``hf:NAME[:CONFIG]``, a data set whose "train" split is streamed; None for the text that comes with this
            package. A record has a field of text, or a chat as ``messages`` or ``conversations``, maybe with ``tools``.
        characters: how many are asked for; of a file at least 2**20 are read, if it holds them.
        column: the text's field in a record, or column in a data set.
        render: makes a text of a chat.
        whole: read all of a file.

    Raises:
        TextError: no such file, a record without text, bytes that are no text, or no ``datasets`` package.
        PointerFileError: Git has not fetched the file's content.
        OSError: the text cannot be read.
    """
    return "\n\n".join(_documents(source, characters, column, render, whole))


def read_text(path: Path) -> str:
    """The content of a text file.

    Raises:
        TextError: it is not UTF-8, or holds NUL characters.
        PointerFileError: Git has not fetched the file's content.
        OSError: it cannot be read.
    """
    check_content(path)
    return _decode(path, path.read_bytes())


def _decode(path: Path, content: bytes, final: bool = True) -> str:
    """The text of a file's bytes; a character that their end cuts is left out unless they are the ``final`` ones."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(content, final)
    except UnicodeDecodeError as cause:
        raise TextError(f"{path}: found bytes that are not UTF-8 ({cause}), expected text") from cause
    if "\0" in text:
        raise TextError(f"{path}: found NUL characters, expected text")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _documents(source: str | None, characters: float, column: str, render: Render | None, whole: bool) -> Iterator[str]:
    if source is None:
        yield from _builtin_documents()
        return
    if source.startswith(HUB):
        yield from _some(_hub_documents(source, column, render), characters)
        return
    path, characters = Path(source), math.inf if whole else max(characters, _FILE_CHARACTERS)
    if not path.is_file():
        raise TextError(
            f"{path}: found no such file, expected a .txt, .json, .jsonl, .ndjson, .csv, .tsv or .parquet file, "
            f"or {HUB}NAME"
        )
    check_content(path)
    if (records := _records(path, column)) is not None:
        yield from _some((text_of(*found, column, render) for found in records), characters)
    elif path.stat().st_size <= characters:
        yield read_text(path)
    else:
        yield from _pieces(path, int(characters) // _PIECES)


def _records(path: Path, column: str) -> Iterator[tuple[str, Any]] | None:
    """The records of a file, each with what to call it in an error; None if it is plain text."""
    suffix = path.suffix.lower()
    if suffix in LINES:
        return _lines(path)
    if suffix == ".json":
        return json_records(path, _decode(path, path.read_bytes()), column)
    return table_records(path) if suffix in TABLES else None


def _some(documents: Iterator[str], characters: float) -> Iterator[str]:
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
    yield resources.files(__package__).joinpath("builtin.txt").read_text(encoding="utf-8")
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


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    """The records of a file with one in each line."""
    # Lines end at "\n" alone: other separators may stand inside a string.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text = _decode(path, line).strip()
            if not text:
                continue
            try:
                record = json.loads(text)
            except json.JSONDecodeError:
                record = text
            yield f"{path}:{number}", record


def _hub_documents(source: str, column: str, render: Render | None) -> Iterator[str]:
    load_dataset = dataset_loader(source)
    name, _, config = source.removeprefix(HUB).partition(":")
    for number, row in enumerate(load_dataset(name, config or None, split="train", streaming=True), start=1):
        if not isinstance(row.get(column), str) and (column in row or not set(CHATS) & set(row)):
            found = f"columns {sorted(row)}" if column not in row else f"{type(row[column]).__name__} in row {number}"
            raise TextError(f'{source}: found {found}, expected one named "{column}" of text')
        yield text_of(f"{source}: row {number}", row, column, render)
