"""Records of texts as people keep them: JSON, tables, chats; each is found as a place to name and a JSON value."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Chat = list[dict[str, str]]
"""What was said: the role of each speaker, and the content."""
Render = Callable[[Chat], str]
"""Makes a text of a chat as a model is given it."""

TABLES = {".csv": "csv", ".parquet": "parquet"}
CHATS = ("messages", "conversations")
_ROLES = {"human": "user", "gpt": "assistant"}  # what ShareGPT's records call them
_EXTRA = "pip install 'vllm_matquant[calibration]'"


class TextError(ValueError):
    """A text cannot be used; the message names the source, what was found and what was expected."""


def json_records(path: Path, text: str, column: str) -> Iterator[tuple[str, Any]]:
    """The records of a JSON file that holds a list.

    Args:
        path: the file.
        text: its content.
        column: the field that a record which is a text is put in.

    Raises:
        TextError: it holds something else.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as cause:
        hint = ". One record in each line is .jsonl" if text.lstrip()[:1] == "{" else ""
        raise TextError(f"{path}: found no valid JSON ({cause}), expected a list of texts{hint}") from cause
    if not isinstance(content, list):
        raise TextError(f"{path}: found {type(content).__name__}, expected a list of texts or of objects with one")
    for number, record in enumerate(content):
        # A text may stand for itself here; in JSON lines it is more likely a mistake.
        yield f"{path}[{number}]", {column: record} if isinstance(record, str) else record


def table_records(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a table that the library ``datasets`` reads, one after the other.

    Raises:
        TextError: there is no such library, or it cannot read the file.
    """
    load_dataset = dataset_loader(str(path))
    try:
        for row in load_dataset(TABLES[path.suffix], data_files=str(path), split="train", streaming=True):
            yield str(path), row
    except Exception as cause:  # each format's reader has its own
        reason = str(cause.__cause__ or cause).strip().split("\n")[0]
        raise TextError(f"{path}: found no table ({reason}), expected a {path.suffix} file with a header") from cause


def dataset_loader(source: str) -> Callable[..., Any]:
    """The function ``load_dataset`` of the library ``datasets``.

    Raises:
        TextError: there is no such library, which ``source`` needs.
    """
    try:
        from datasets import load_dataset
    except ImportError as cause:
        raise TextError(f"{source}: found no package datasets, expected it ({_EXTRA})") from cause
    loader: Callable[..., Any] = load_dataset
    return loader


def text_of(where: str, record: Any, column: str, render: Render | None) -> str:
    """The text of a record.

    Args:
        where: to name in an error.
        record: an object with the text, or with a chat as ``messages`` or ``conversations``.
        column: the text's field.
        render: what makes a text of a chat; None if nothing does.

    Raises:
        TextError: it holds neither, or the chat cannot be rendered.
    """
    if isinstance(record, dict):
        if isinstance(record.get(column), str):
            text: str = record[column]
            return text
        for name in CHATS:
            if column not in record and (chat := _chat(record.get(name))):
                if render is None:
                    raise TextError(
                        f"{where}: found a chat, expected text: no tokenizer with a chat template is at hand"
                    )
                return render(chat)
    expected = f'{{"{column}": "..."}}, or {{"messages": [...]}} (--text-column names another field)'
    raise TextError(f"{where}: found {str(record)[:60]!r}, expected {expected}")


def _chat(turns: Any) -> Chat | None:
    """A chat from OpenAI's records (role, content) or ShareGPT's (from, value); None if it is neither."""
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        return None
    chat = []
    for turn in turns:
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            return None
        chat.append({"role": _ROLES.get(role, role), "content": content})
    return chat
