"""Records of texts as people keep them: JSON, tables, chats; each is found as a place to name and a JSON value."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Turn = dict[str, Any]
"""What one speaker said: ``role`` and ``content``, both strings, and what else the record has, such as
``tool_calls``."""
Chat = list[Turn]
"""What was said, turn by turn."""
Tools = list[dict[str, Any]]
"""The functions that the model may call in a chat, as OpenAI describes them."""
Render = Callable[[Chat, Tools | None], str]
"""Makes a text of a chat, and of the tools at hand in it if there are any, as a model is given them."""

LINES = (".jsonl", ".ndjson")
TABLES: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".parquet": ("parquet", {}),
}
"""What ``load_dataset`` calls each kind of table, and the options that it needs."""
CHATS = ("messages", "conversations")
_ROLES = {"human": "user", "gpt": "assistant"}  # what ShareGPT's records call them
_TURN = '{"role": "...", "content": "..."} or {"from": "...", "value": "..."}'
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
    """The rows of a table that the library ``datasets`` reads, one after the other; the first below a header is row 1.

    Raises:
        TextError: there is no such library, or it cannot read the file.
    """
    load_dataset = dataset_loader(str(path))
    kind, options = TABLES[path.suffix.lower()]
    try:
        rows = load_dataset(kind, data_files=str(path), split="train", streaming=True, **options)
        for number, row in enumerate(rows, start=1):
            yield f"{path}: row {number}", row
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
        record: an object with the text, or with a chat as ``messages`` or ``conversations`` and maybe its ``tools``.
        column: the text's field.
        render: what makes a text of a chat; None if nothing does.

    Raises:
        TextError: it holds neither, a turn of the chat is faulty, or the chat cannot be rendered.
    """
    found = repr(str(record)[:60])
    expected = f'{{"{column}": "..."}}, or {{"messages": [...]}} (--text-column names another field)'
    if isinstance(record, dict):
        if isinstance(record.get(column), str):
            text: str = record[column]
            return text
        for name in CHATS:
            if column not in record and record.get(name) is not None:
                return _rendered(where, record, name, render)
        if column in record and record[column] is None:
            found, expected = f'an empty "{column}"', f"{expected}. Leave such records out"
    raise TextError(f"{where}: found {found}, expected {expected}")


def _rendered(where: str, record: dict[str, Any], name: str, render: Render | None) -> str:
    """The text of the chat that a record has in the field ``name``.

    Raises:
        TextError: the chat or its tools are faulty, or the chat cannot be rendered.
    """
    chat, tools = _chat(where, name, record[name]), _tools(where, record.get("tools"))
    if render is None:
        raise TextError(f"{where}: found a chat, expected text: no tokenizer with a chat template is at hand")
    try:
        return render(chat, tools)
    except TextError as cause:  # which names the tokenizer
        raise TextError(f"{where}: {cause}") from cause


def _chat(where: str, name: str, turns: Any) -> Chat:
    """A chat from OpenAI's records (role, content) or ShareGPT's (from, value).

    Raises:
        TextError: it is neither, or a turn is faulty.
    """
    if not isinstance(turns, list):
        raise TextError(f'{where}: found {type(turns).__name__} as "{name}", expected a list of turns, {_TURN}')
    if not turns:
        raise TextError(f'{where}: found no turn in "{name}", expected at least one, {_TURN}. Leave such records out')
    return [_turn(f'{where}: turn {number} of "{name}"', turn) for number, turn in enumerate(turns, start=1)]


def _turn(where: str, found: Any) -> Turn:
    """A turn in OpenAI's form; a field that is null, as tables fill those that other turns have, is left out.

    Raises:
        TextError: it is no object, has no role, or its content is no text.
    """
    if not isinstance(found, dict):
        raise TextError(f"{where}: found {type(found).__name__}, expected {_TURN}")
    turn = {key: value for key, value in found.items() if value is not None}
    for other, name in (("from", "role"), ("value", "content")):
        if name not in turn and other in turn:
            turn[name] = turn.pop(other)
    role = turn.get("role")
    if not isinstance(role, str):
        raise TextError(f"{where}: found {_kind(role)} as role, expected {_TURN}")
    calls = _calls(where, turn.pop("tool_calls", []))
    # Beside tool calls OpenAI's content is null; many templates add it to a string.
    content = turn.get("content", "" if calls else None)
    turn |= {"role": _ROLES.get(role, role), "content": _content(where, content)}
    return turn | ({"tool_calls": calls} if calls else {})  # templates take an empty list for a call


def _content(where: str, content: Any) -> str:
    """The text of a turn's content, which may be a list of parts.

    Raises:
        TextError: it is no text, or a part is none.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise TextError(f"{where}: found {_kind(content)} as content, expected a text (null beside tool_calls alone)")
    # As vLLM joins them for a template that takes strings.
    return "\n".join(_part(where, part) for part in content)


def _part(where: str, part: Any) -> str:
    """The text of a part of a turn's content.

    Raises:
        TextError: it is no part, or not one of type text.
    """
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        text: str = part["text"]
        return text
    what = f'of type "{kind}"' if isinstance(kind, str) and kind != "text" else repr(str(part)[:60])
    raise TextError(
        f'{where}: found a part {what} in content, expected {{"type": "text", "text": "..."}}: '
        "calibration takes texts alone. Leave such records out"
    )


def _calls(where: str, calls: Any) -> list[dict[str, Any]]:
    """A turn's tool calls, the arguments of each as an object.

    OpenAI's arguments are a string that holds JSON; the templates of transformers expect what it holds.

    Raises:
        TextError: it is no list of objects.
    """
    if not _all_objects(calls):
        raise TextError(f"{where}: found {str(calls)[:60]!r} as tool_calls, expected a list of objects")
    return [_call(call) for call in calls]


def _call(call: dict[str, Any]) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return call | {"function": _call(call["function"])}
    return call | {"arguments": _parsed(call.get("arguments") or {}, dict)}


def _tools(where: str, tools: Any) -> Tools | None:
    """A record's tools; None if it has none.

    Raises:
        TextError: it is no list of objects.
    """
    tools = _parsed(tools or [], list)
    if not _all_objects(tools):
        raise TextError(f'{where}: found {str(tools)[:60]!r} as "tools", expected a list of objects')
    return tools or None


def _parsed(value: Any, kind: type) -> Any:
    """What a string holds, if it is JSON of a kind; any other value as it is."""
    if isinstance(value, str):
        try:
            content = json.loads(value)
        except (ValueError, RecursionError):
            return value
        if isinstance(content, kind):
            return content
    return value


def _all_objects(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, dict) for value in values)


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__
