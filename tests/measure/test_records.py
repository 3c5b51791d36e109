"""Records as people keep them: chats with tools, faulty turns, tables, and every suffix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.quantize.tiny_sources import byte_tokenizer
from vllm_matquant.measure.records import Chat, Tools, text_of
from vllm_matquant.measure.text import TextError, read_source
from vllm_matquant.measure.windows import TextTokenizer

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
ARGUMENTS = {"city": "Paris", "days": 2}
TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ '' + m.content }}"
    "{% if 'tool_calls' in m %}{% for c in m.tool_calls %}"
    "<call {{ c.function.name }} {% for k, v in c.function.arguments.items() %}{{ k }}={{ v }} {% endfor %}/>"
    "{% endfor %}{% endif %}"
    "{% if m.tool_call_id %}({{ m.tool_call_id }}){% endif %}</{{ m.role }}>{% endfor %}"
)


def call(arguments: Any = ARGUMENTS) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}}


def rendered(record: Any) -> str:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return text_of("chats.jsonl:3", record, "text", TextTokenizer(tokenizer).render)


def given(record: Any) -> tuple[Chat, Tools | None]:
    """What a record's chat is rendered from."""
    calls: list[tuple[Chat, Tools | None]] = []

    def render(chat: Chat, tools: Tools | None) -> str:
        calls.append((chat, tools))
        return ""

    text_of("chats.jsonl:3", record, "text", render)
    return calls[0]


def turns(*contents: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content} for content in contents]}


@pytest.mark.parametrize("arguments", [ARGUMENTS, json.dumps(ARGUMENTS)])
@pytest.mark.parametrize("content", ["", None])
def test_tool_calls_and_tools_reach_the_template(arguments: Any, content: str | None, tmp_path: Path) -> None:
    record = {
        "messages": [
            {"role": "user", "content": "And in Paris?"},
            {"role": "assistant", "content": content, "tool_calls": [call(arguments)]},
            {"role": "tool", "content": "Sun.", "tool_call_id": "1"},
        ],
        "tools": TOOLS,
    }
    expected = (
        f"<tools>{json.dumps(TOOLS)}</tools><user>And in Paris?</user>"
        "<assistant><call weather city=Paris days=2 /></assistant><tool>Sun.(1)</tool>"
    )
    before = json.dumps(record)
    assert rendered(record) == expected
    assert json.dumps(record) == before
    tokenizer, path = byte_tokenizer(), tmp_path / "chats.jsonl"
    tokenizer.chat_template = TEMPLATE
    path.write_text(before + "\n")
    assert read_source(str(path), 1000, render=TextTokenizer(tokenizer).render) == expected


def test_a_turn_keeps_its_other_fields() -> None:
    record = {
        "conversations": [
            {"from": "human", "value": "Why?", "weight": 0, "name": None, "tool_calls": None},
            {"from": "gpt", "value": "So.", "reasoning_content": "Hm.", "tool_calls": []},
            {"role": "user", "content": "Oh.", "from": "a forum", "value": 3},
        ]
    }
    assert given(record) == (
        [
            {"role": "user", "content": "Why?", "weight": 0},
            {"role": "assistant", "content": "So.", "reasoning_content": "Hm."},
            {"role": "user", "content": "Oh.", "from": "a forum", "value": 3},
        ],
        None,
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [('{"a": [1]}', {"a": [1]}), ("", {}), (None, {}), ("[1]", "[1]"), ('{"a', '{"a'), ({"a": 1}, {"a": 1})],
)
def test_arguments_of_a_tool_call(arguments: Any, expected: Any) -> None:
    flat = {"name": "weather", "arguments": arguments}
    chat, _ = given({"messages": [{"role": "assistant", "tool_calls": [call(arguments), flat]}]})
    assert chat == [
        {"role": "assistant", "content": "", "tool_calls": [call(expected), {"name": "weather", "arguments": expected}]}
    ]


@pytest.mark.parametrize(
    ("tools", "expected"), [(None, None), ([], None), (TOOLS, TOOLS), (json.dumps(TOOLS), TOOLS), ("[]", None)]
)
def test_tools(tools: Any, expected: Any) -> None:
    assert given(turns("Hi.") | {"tools": tools})[1] == expected


@pytest.mark.parametrize("tools", ["no JSON", {"name": "weather"}, ["weather"], 3])
def test_faulty_tools(tools: Any) -> None:
    with pytest.raises(TextError, match=r'^chats\.jsonl:3: found .* as "tools", expected a list of objects'):
        rendered(turns("Hi.") | {"tools": tools})


def test_content_in_parts() -> None:
    parts = [{"type": "text", "text": "One,"}, {"type": "text", "text": "two.", "image_url": None}]
    assert rendered(turns(parts, "three", [])) == "<user>One,\ntwo.</user><user>three</user><user></user>"


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ("Hi.", r'found str, expected {"role": "\.\.\.", "content": "\.\.\."} or {"from"'),
        ({"content": "x"}, 'found nothing as role, expected {"role"'),
        ({"from": 3, "value": "x"}, 'found int as role, expected {"role"'),
        ({"role": "user"}, "found nothing as content, expected a text"),
        ({"role": "user", "content": None}, r"found nothing as content, expected a text \(null beside tool_calls"),
        ({"role": "user", "content": None, "tool_calls": []}, "found nothing as content"),
        ({"role": "tool", "content": {"sun": True}}, "found dict as content, expected a text"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, 'found a part of type "image_url" in'),
        ({"role": "user", "content": [{"type": "text"}]}, r"found a part \"{'type': 'text'}\" in content, expected"),
        ({"role": "user", "content": ["Hi."]}, "found a part 'Hi.' in content, expected"),
        ({"role": "assistant", "tool_calls": "x"}, "found 'x' as tool_calls, expected a list of objects"),
        ({"role": "assistant", "tool_calls": ["x"]}, r"found .* as tool_calls, expected a list of objects"),
    ],
)
@pytest.mark.parametrize("name", ["messages", "conversations"])
def test_a_faulty_turn_is_named(turn: Any, message: str, name: str) -> None:
    with pytest.raises(TextError, match=rf'^chats\.jsonl:3: turn 2 of "{name}": {message}'):
        rendered({name: [{"role": "user", "content": "fine"}, turn]})


@pytest.mark.parametrize(
    ("messages", "message"),
    [([], 'found no turn in "messages", expected at least one'), ("Hi.", 'found str as "messages", expected a list')],
)
def test_no_turns(messages: Any, message: str) -> None:
    with pytest.raises(TextError, match=rf"^chats\.jsonl:3: {message}"):
        rendered({"messages": messages})


def test_a_chat_that_the_template_refuses_is_named() -> None:
    with pytest.raises(TextError, match=r"^chats\.jsonl:3: .*chat template: found none that renders"):
        rendered({"messages": [{"role": "assistant", "tool_calls": [call("[1]")]}]})


@pytest.mark.parametrize("suffix", [".ndjson", ".JSONL", ".NdJson", ".Json", ".JSON"])
def test_suffixes_of_json(tmp_path: Path, suffix: str) -> None:
    path, records = tmp_path / f"text{suffix}", [{"text": "The cat."}, {"text": "The mat."}]
    as_lines = "\n".join(map(json.dumps, records))
    path.write_text(json.dumps(records) if suffix.lower() == ".json" else as_lines)
    assert read_source(str(path), 1000) == "The cat.\n\nThe mat."


TABLES = [(".csv", ","), (".tsv", "\t"), (".CSV", ","), (".Tsv", "\t"), (".parquet", None), (".PARQUET", None)]


def write_table(path: Path, separator: str | None, texts: list[str | None]) -> Path:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"id": list(range(len(texts))), "text": texts})
    table.to_csv(path, sep=separator) if separator else table.to_parquet(path)
    return path


@pytest.mark.parametrize(("suffix", "separator"), TABLES)
def test_suffixes_of_tables(tmp_path: Path, suffix: str, separator: str | None) -> None:
    path = write_table(tmp_path / f"text{suffix}", separator, ["The cat, and\tthe dog.", "The mat."])
    assert read_source(str(path), 1000) == "The cat, and\tthe dog.\n\nThe mat."


@pytest.mark.parametrize(("suffix", "separator"), TABLES)
def test_an_empty_cell_is_named(tmp_path: Path, suffix: str, separator: str | None) -> None:
    path = write_table(tmp_path / f"text{suffix}", separator, ["The cat.", "The mat.", None, "The end."])
    with pytest.raises(TextError, match=rf'text\{suffix}: row 3: found an empty "text", expected .*Leave such records'):
        read_source(str(path), 1000)


def test_a_missing_file_names_all_suffixes(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"expected a \.txt, \.json, \.jsonl, \.ndjson, \.csv, \.tsv or \.parquet file"):
        read_source(str(tmp_path / "nowhere"), 1000)
