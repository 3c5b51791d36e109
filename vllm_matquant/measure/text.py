"""Text to measure and calibrate on: from a file, a data set of a hub, or the text that every Python carries."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from vllm_matquant.checkpoint.files import check_content

HUB = "hf:"
_FILE_CHARACTERS = 2**20  # of a file, however few are asked for
_PIECES = 64  # of a larger text file, spread evenly over it
_HELD_OUT_CHARACTERS = 200_000
_REFERENCE_CHARACTERS = 48_000  # of the language reference: half as much as the prose


class TextError(ValueError):
    """A text cannot be used; the message names the source, what was found and what was expected."""


def read_source(source: str | None, characters: int, column: str = "text") -> str:
    """The text of a source, its documents joined by empty lines.

    Of a source that holds far more text than is asked for only a part is read, always the same: pieces spread over a
    text file, the first lines of a JSON-lines file, the first rows of a data set.

    Args:
        source: ``FILE.txt``; ``FILE.jsonl``, an object in each line; ``hf:NAME[:CONFIG]``, a data set whose "train"
            split is streamed; None for the text that comes with this package.
        characters: how many are asked for; of a file at least 2**20 are read, if it holds them.
        column: the text's field in a line, or column in a data set.

    Raises:
        TextError: no such file, a line without text, bytes that are no text, or no ``datasets`` package.
        OSError: the text cannot be read.
    """
    return "\n\n".join(_documents(source, characters, column))


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


def _documents(source: str | None, characters: int, column: str) -> Iterator[str]:
    if source is None:
        yield from _builtin_documents()
        return
    if source.startswith(HUB):
        yield from _some(_hub_documents(source, column), characters)
        return
    path, characters = Path(source), max(characters, _FILE_CHARACTERS)
    if not path.is_file():
        raise TextError(f"{path}: found no such file, expected a .txt or .jsonl file, or {HUB}NAME")
    check_content(path)
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
                raise TextError(f'{path}:{number}: found {text[:60]!r}, expected {{"{column}": "..."}}')
            yield document[column]


def _hub_documents(source: str, column: str) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError as cause:
        found = "found no package datasets, expected it (pip install 'vllm_matquant[calibration]')"
        raise TextError(f"{source}: {found}") from cause
    name, _, config = source.removeprefix(HUB).partition(":")
    for row in load_dataset(name, config or None, split="train", streaming=True):
        if not isinstance(row.get(column), str):
            found = f"columns {sorted(row)}" if column not in row else f"{type(row[column]).__name__} in a row"
            raise TextError(f'{source}: found {found}, expected one named "{column}" of text')
        yield row[column]
