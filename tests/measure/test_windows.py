"""Token windows from every kind of text, and how they begin."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tests.quantize.tiny_sources import VOCABULARY, byte_tokenizer, write_source, write_tokenizer
from vllm_matquant.checkpoint.errors import MissingFileError
from vllm_matquant.measure import text as text_module
from vllm_matquant.measure.text import TextError
from vllm_matquant.measure.windows import (
    TextTokenizer,
    Windows,
    draw_windows,
    load_tokenizer,
    split_windows,
    spread_windows,
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def load(tokenizer: PreTrainedTokenizerFast) -> Any:
    def load_some(
        source: str | Path | None, samples: int = 4, sequence_length: int = 16, seed: int = 0, text_column: str = "text"
    ) -> Windows:
        source = None if source is None else str(source)
        sizes = {"samples": samples, "sequence_length": sequence_length}
        return draw_windows(source, TextTokenizer(tokenizer), **sizes, seed=seed, text_column=text_column)

    return load_some


def windows_of(tokenizer: PreTrainedTokenizerFast, text: str, length: int) -> set[tuple[int, ...]]:
    ids = tokenizer(text)["input_ids"]
    return {tuple(ids[start : start + length]) for start in range(len(ids) - length + 1)}


def test_text(load: Any, tokenizer: PreTrainedTokenizerFast, text_file: Path) -> None:
    windows = load(text_file, seed=3)
    assert windows.tokens.shape == (4, 16)
    assert windows.tokens.dtype == torch.int64
    assert {tuple(window) for window in windows.tokens.tolist()} <= windows_of(tokenizer, text_file.read_text(), 16)
    assert windows.source == {
        "name": "text.txt",
        "sha256": hashlib.sha256(text_file.read_bytes()).hexdigest(),
        "samples": 4,
        "sequence_length": 16,
        "beginning_of_text": False,
        "seed": 3,
    }


def test_seed_says_which_windows(load: Any, text_file: Path) -> None:
    first, again, other = (load(text_file, seed=seed).tokens for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_text_of_just_enough_tokens(load: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("a b c d")
    ids = tokenizer("a b c d")["input_ids"]
    assert load(text, samples=1, sequence_length=len(ids)).tokens.tolist() == [ids]
    with pytest.raises(TextError, match=rf"short\.txt: found {len(ids)} tokens, expected at least {len(ids) + 1}"):
        load(text, samples=1, sequence_length=len(ids) + 1)


def test_empty_text(load: Any, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    with pytest.raises(TextError, match=r"empty\.txt: found 0 tokens, expected at least 64 \(4 x 16\)"):
        load(empty)


def test_jsonl(load: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    # Line and paragraph separators of Unicode may stand in a JSON string as they are.
    documents = ["The cat sat.", "two\u2028lines\x85and\nthree", "The other cat thought." * 20]
    path = tmp_path / "text.jsonl"
    lines = [json.dumps({"id": 1, "text": text}, ensure_ascii=False) for text in documents]
    path.write_text("\n".join([lines[0], "", *lines[1:]]) + "\n", encoding="utf-8")
    windows = load(path)
    text = "\n\n".join(documents)
    assert windows.source["sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert {tuple(window) for window in windows.tokens.tolist()} <= windows_of(tokenizer, text, 16)


@pytest.mark.parametrize("line", ["no JSON", '"text"', "[1]", '{"content": "x"}', '{"text": 3}', '{"text": null}'])
def test_bad_line(load: Any, tmp_path: Path, line: str) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(TextError, match=r'text\.jsonl:2: found .*, expected {"text": "\.\.\."}'):
        load(path)


CHATS = [
    {"messages": [{"role": "user", "content": "The cat?"}, {"role": "assistant", "content": "It sat. " * 40}]},
    {"conversations": [{"from": "human", "value": "The mat?"}, {"from": "gpt", "value": "It thought. " * 40}]},
]
RENDERED = [
    "<user>The cat?</user><assistant>" + "It sat. " * 40 + "</assistant>",
    "<user>The mat?</user><assistant>" + "It thought. " * 40 + "</assistant>",
]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"


def sha256(*documents: str) -> str:
    return hashlib.sha256("\n\n".join(documents).encode()).hexdigest()


@pytest.mark.parametrize("kind", ["strings", "objects"])
def test_a_list_in_json(load: Any, tmp_path: Path, kind: str) -> None:
    documents = ["The cat sat. " * 20, "The other\ncat thought. " * 20]
    path = tmp_path / "text.json"
    path.write_text(json.dumps([{"text": text} for text in documents] if kind == "objects" else documents, indent=1))
    assert load(path).source["sha256"] == sha256(*documents)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "one"}\n{"text": "two"}', r"text\.json: found no valid JSON .* One record in each line is \.jsonl$"),
        ('{"text": "one"}', r"text\.json: found dict, expected a list of texts or of objects with one$"),
        ('["fine", 3]', r"text\.json\[1\]: found '3', expected {\"text\": \"\.\.\.\"}.*--text-column"),
    ],
)
def test_json_that_is_no_list_of_texts(load: Any, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "text.json").write_text(content)
    with pytest.raises(TextError, match=message):
        load(tmp_path / "text.json")


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_tables(load: Any, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    documents = ["The cat sat, " * 20, "The other\ncat thought. " * 20]
    table, path = datasets.Dataset.from_dict({"id": [1, 2], "text": documents}), tmp_path / f"text{suffix}"
    table.to_csv(path) if suffix == ".csv" else table.to_parquet(path)
    assert load(path).source["sha256"] == sha256(*documents)
    with pytest.raises(TextError, match=rf"text\{suffix}: row 1: found .*, expected {{\"prompt\""):
        load(path, text_column="prompt")
    path.write_bytes(b"")
    with pytest.raises(TextError, match=rf"text\{suffix}: found no table "):
        load(path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TextError, match=rf"text\{suffix}: found no package datasets, expected it \(pip install"):
        load(path)


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_chats_are_rendered_as_the_model_is_given_them(load: Any, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"chats{suffix}"
    path.write_text(json.dumps(CHATS) if suffix == ".json" else "\n".join(map(json.dumps, CHATS)))
    with pytest.raises(TextError, match="chat template: found none that renders the records' chats"):
        load(path)
    own = byte_tokenizer()
    own.chat_template = TEMPLATE
    sizes = {"samples": 4, "sequence_length": 16}
    assert draw_windows(str(path), TextTokenizer(own), **sizes, seed=0).source["sha256"] == sha256(*RENDERED)
    assert spread_windows(path, TextTokenizer(own), **sizes).source["sha256"] == sha256(*RENDERED)


def test_several_chat_templates(tmp_path: Path) -> None:
    own = byte_tokenizer()
    own.chat_template = {"default": TEMPLATE, "tool_use": "tools"}
    own.save_pretrained(tmp_path)
    assert (tmp_path / "additional_chat_templates" / "tool_use.jinja").is_file()
    assert load_tokenizer(tmp_path).render(CHATS[0]["messages"]) == RENDERED[0]


def test_a_text_to_measure_on_may_be_records(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    documents = ["The cat sat. " * 20, "The other cat thought. " * 20]
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"body": text}) for text in documents))
    sizes = {"samples": 4, "sequence_length": 16, "text_column": "body"}
    assert spread_windows(path, TextTokenizer(tokenizer), **sizes).source["sha256"] == sha256(*documents)


def test_a_tokenizer_of_another_model(tokenizer: PreTrainedTokenizerFast, text_file: Path, tmp_path: Path) -> None:
    small = TextTokenizer(tokenizer, vocabulary=100)
    with pytest.raises(
        TextError, match=r"tokenizer: found token \d+, expected one of the embedding's 100 \(vocab_size\)"
    ):
        draw_windows(str(text_file), small, samples=4, sequence_length=16, seed=0)
    with pytest.raises(TextError, match="expected one of the embedding's 100"):
        spread_windows(text_file, small, samples=4, sequence_length=16)
    write_source(tmp_path)
    assert load_tokenizer(tmp_path).vocabulary == VOCABULARY


def test_windows_longer_than_the_model_has_positions(text_file: Path, tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    for config in ({"max_position_embeddings": 32}, {"n_positions": 32}, {"text_config": {"n_positions": 32}}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        loaded = load_tokenizer(tmp_path)
        spread_windows(text_file, loaded, samples=1, sequence_length=32)
        message = r"sequence_length: found 33, expected at most the model's 32 positions .*: --sequence-length 32"
        with pytest.raises(TextError, match=message):
            spread_windows(text_file, loaded, samples=1, sequence_length=33)
        with pytest.raises(TextError, match=message):
            draw_windows(str(text_file), loaded, samples=1, sequence_length=33, seed=0)


def test_code_of_a_tokenizer_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    named = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | named))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass OwnTokenizer: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises(MissingFileError, match="tokenizer: found none"):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_no_such_file(load: Any, tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"nowhere\.txt: found no such file, expected .* hf:NAME"):
        load(tmp_path / "nowhere.txt")


def test_bytes_that_are_no_text(load: Any, tmp_path: Path) -> None:
    path = tmp_path / "image.txt"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TextError, match=r"image\.txt: found bytes that are not UTF-8"):
        load(path)


def test_characters_that_are_no_text(load: Any, tmp_path: Path) -> None:
    path = tmp_path / "zeros.txt"
    path.write_bytes(bytes(1000))
    with pytest.raises(TextError, match=r"zeros\.txt: found NUL characters, expected text"):
        load(path)


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": ""}\n'])
def test_json_lines_without_text(load: Any, tmp_path: Path, content: str) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    with pytest.raises(TextError, match=r"empty\.jsonl: found 0 tokens, expected at least 64"):
        load(path)


def test_json_lines_that_are_no_text(load: Any, tmp_path: Path) -> None:
    path = tmp_path / "image.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\xff\xfe\x00\n')
    with pytest.raises(TextError, match=r"image\.jsonl: found bytes that are not UTF-8"):
        load(path)


def test_text_column(load: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": 3, "content": "The cat sat on the mat. " * 20}) + "\n")
    assert load(path, text_column="content").tokens.shape == (4, 16)
    with pytest.raises(TextError, match=r'text\.jsonl:1: found .*, expected {"prompt": "\.\.\."}'):
        load(path, text_column="prompt")


def test_built_in_text_is_enough_for_the_defaults(load: Any) -> None:
    windows = load(None, samples=64, sequence_length=512)
    assert windows.tokens.shape == (64, 512)
    assert windows.source["name"] == "built-in text"


class Counting:
    """A tokenizer that counts the characters it is given."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.characters = 0

    def __call__(self, text: str, **options: Any) -> Any:
        self.characters += len(text)
        return self.tokenizer(text, **options)


# Characters of one to four bytes, so that pieces begin and end inside of some.
SENTENCES = "".join(f"{number} Wörter, {number} слов, {number} 文字, {number} 😀. " for number in range(2_000))


@pytest.mark.parametrize("name", ["text.txt", "text.jsonl"])
def test_of_a_huge_text_a_part_is_read(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_module, "_FILE_CHARACTERS", 2**15)
    path, counting = tmp_path / name, Counting(tokenizer)
    lines = SENTENCES.split(". ")
    as_json = "".join(json.dumps({"text": line}, ensure_ascii=False) + "\n" for line in lines)
    path.write_text(as_json if name.endswith("l") else SENTENCES, encoding="utf-8")
    assert path.stat().st_size > 3 * 2**15

    def load(seed: int) -> Windows:
        return draw_windows(str(path), TextTokenizer(counting), samples=4, sequence_length=64, seed=seed)  # type: ignore[arg-type]

    first, again, other = load(0), load(0), load(1)
    assert counting.characters < 1.1 * 3 * 2**15
    assert torch.equal(first.tokens, again.tokens)
    assert first.source == again.source
    assert not torch.equal(first.tokens, other.tokens)
    for window in first.tokens.tolist():
        # Two pieces, or two lines, are joined by an empty line.
        parts = tokenizer.decode(window).strip("\ufffd\n").split("\n\n")
        assert all(part in SENTENCES for part in parts)


def test_pieces_of_a_huge_text_are_spread_over_it(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(SENTENCES, encoding="utf-8")
    pieces = list(text_module._pieces(path, 1001))
    assert len(pieces) == 64
    assert SENTENCES.startswith(pieces[0])
    assert SENTENCES.endswith(pieces[-1])
    places = [SENTENCES.index(piece) for piece in pieces]
    gaps = [right - left for left, right in pairwise(places)]
    assert max(gaps) < 1.2 * min(gaps)
    assert all(1001 - 6 <= len(piece.encode()) <= 1001 for piece in pieces)


def test_bytes_in_a_huge_text_that_are_no_text(load: Any, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(SENTENCES.encode() * 20 + b"\xff")
    assert path.stat().st_size > text_module._FILE_CHARACTERS
    with pytest.raises(TextError, match=r"text\.txt: found bytes that are not UTF-8"):
        load(path)


class FakeDatasets(ModuleType):
    """The one function of the package datasets that calibration calls."""

    def __init__(self, rows: list[dict[str, str]]) -> None:
        super().__init__("datasets")
        self.rows = rows
        self.calls: list[tuple[object, ...]] = []
        self.read = 0

    def load_dataset(self, name: str, config: str | None, split: str, streaming: bool) -> Iterator[dict[str, str]]:
        self.calls.append((name, config, split, streaming))
        for row in self.rows:
            self.read += 1
            yield row


def test_data_set(load: Any, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeDatasets([{"text": f"Document {number} of the cat. " * 10} for number in range(1000)])
    monkeypatch.setitem(sys.modules, "datasets", fake)
    windows = load("hf:some/name:subset")
    assert fake.calls == [("some/name", "subset", "train", True)]
    assert windows.source["name"] == "hf:some/name:subset"
    text = "\n\n".join(row["text"] for row in fake.rows[: fake.read])
    assert windows.source["sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert {tuple(window) for window in windows.tokens.tolist()} <= windows_of(tokenizer, text, 16)
    assert fake.read < 100  # the data set is streamed only as far as needed
    load("hf:name")
    assert fake.calls[1] == ("name", None, "train", True)


def test_data_set_without_text(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", FakeDatasets([{"question": "?", "answer": "!"}]))
    with pytest.raises(TextError, match=r"hf:x: found columns \['answer', 'question'\], expected one named"):
        load("hf:x")


def test_data_set_with_a_row_without_text(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", FakeDatasets([{"text": "fine"}, {"text": None}]))
    with pytest.raises(TextError, match=r"hf:x: found NoneType in row 2, expected one named \"text\" of text"):
        load("hf:x")


def test_no_package_datasets(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TextError, match=r"hf:x: found no package datasets, expected it \(pip install"):
        load("hf:x")


@pytest.mark.parametrize("seed", range(3))
def test_parts_share_no_token(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, seed: int) -> None:
    text = "".join(map(chr, range(0x20, 0x20 + 90)))  # each token once; two of the characters make one
    path = tmp_path / "text.txt"
    path.write_text(text)
    parts = split_windows(str(path), TextTokenizer(tokenizer), samples=(3, 0, 5), sequence_length=10, seed=seed)
    assert [part.tokens.shape for part in parts] == [(3, 10), (0, 10), (5, 10)]
    ids = torch.cat([part.tokens.flatten() for part in parts]).tolist()
    assert len(set(ids)) == 80
    windows = windows_of(tokenizer, text, 10)
    assert all(tuple(window) in windows for part in parts for window in part.tokens.tolist())
    again = split_windows(str(path), TextTokenizer(tokenizer), samples=(3, 0, 5), sequence_length=10, seed=seed)
    other = split_windows(str(path), TextTokenizer(tokenizer), samples=(3, 0, 5), sequence_length=10, seed=seed + 1)
    assert all(torch.equal(part.tokens, same.tokens) for part, same in zip(parts, again, strict=True))
    assert not torch.equal(parts[0].tokens, other[0].tokens)
    assert parts[2].source == {
        "name": "text.txt", "sha256": hashlib.sha256(text.encode()).hexdigest(), "samples": 5, "sequence_length": 10,
        "beginning_of_text": False, "seed": seed, "part": 2,
    }  # fmt: skip
    with pytest.raises(TextError, match=r"found 89 tokens, expected at least 100 \(10 x 10\)"):
        split_windows(str(path), TextTokenizer(tokenizer), samples=(5, 5), sequence_length=10, seed=seed)


def test_windows_spread_over_a_text(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat and thought of 12345 other mats " * 3)
    ids = tokenizer(path.read_text())["input_ids"]
    windows = spread_windows(path, TextTokenizer(tokenizer), samples=3, sequence_length=10)
    assert windows.tokens.shape == (3, 10)
    assert windows.tokens.dtype == torch.int64
    middle = (len(ids) - 10) // 2
    assert windows.tokens.tolist() == [ids[:10], ids[middle : middle + 10], ids[-10:]]
    assert windows.source == {
        "name": "text.txt",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "samples": 3,
        "sequence_length": 10,
        "beginning_of_text": False,
    }


def test_windows_spread_over_a_short_text(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path, empty, plain = tmp_path / "text.txt", tmp_path / "empty.txt", TextTokenizer(tokenizer)
    path.write_text("xyz xyz")
    empty.touch()
    count = len(tokenizer("xyz xyz")["input_ids"])
    with pytest.raises(TextError, match=rf"text\.txt: found {count} tokens, expected at least 40 \(4 x 10\)"):
        spread_windows(path, plain, samples=4, sequence_length=10)
    with pytest.raises(TextError, match=r"empty\.txt: found 0 tokens"):
        spread_windows(empty, plain, samples=1, sequence_length=2)
    with pytest.raises(TextError, match="sequence_length: found 1, expected at least 2"):
        spread_windows(path, plain, samples=1, sequence_length=1)


@pytest.mark.parametrize("beginning", [(0,), (1, 0)])
def test_windows_begin_as_texts_begin(
    tokenizer: PreTrainedTokenizerFast, text_file: Path, beginning: tuple[int, ...]
) -> None:
    """The text of windows is what windows that much shorter have without a beginning, at the same places."""
    begun, plain, length = TextTokenizer(tokenizer, beginning), TextTokenizer(tokenizer), 20
    rest = length - len(beginning)

    def check(windows: Windows, expected: Windows) -> None:
        assert windows.tokens.dtype == torch.int64
        assert windows.tokens.shape == (len(expected.tokens), length)
        assert windows.tokens[:, : len(beginning)].tolist() == [list(beginning)] * len(expected.tokens)
        assert torch.equal(windows.tokens[:, len(beginning) :], expected.tokens)
        assert windows.source == expected.source | {"sequence_length": length, "beginning_of_text": True}

    for seed in range(3):
        drawn, split = {"samples": 5, "seed": seed}, {"samples": (4, 0, 3), "seed": seed}
        source = str(text_file)
        check(
            draw_windows(source, begun, sequence_length=length, **drawn),
            draw_windows(source, plain, sequence_length=rest, **drawn),
        )
        for windows, expected in zip(
            split_windows(source, begun, sequence_length=length, **split),
            split_windows(source, plain, sequence_length=rest, **split),
            strict=True,
        ):
            check(windows, expected)
    check(
        spread_windows(text_file, begun, samples=6, sequence_length=length),
        spread_windows(text_file, plain, samples=6, sequence_length=rest),
    )


def test_windows_too_short_for_their_beginning(tokenizer: PreTrainedTokenizerFast, text_file: Path) -> None:
    begun = TextTokenizer(tokenizer, (1, 0))
    message = "sequence_length: found 2, expected at least 3: a window of this model begins with"
    with pytest.raises(TextError, match=message):
        draw_windows(str(text_file), begun, samples=1, sequence_length=2, seed=0)
    with pytest.raises(TextError, match=message):
        spread_windows(text_file, begun, samples=1, sequence_length=2)
    assert spread_windows(text_file, begun, samples=1, sequence_length=3).tokens[0, :2].tolist() == [1, 0]


BOTH = "<s> $A </s>"


@pytest.mark.parametrize(
    ("template", "setting", "config", "beginning"),
    [
        ("<s> $A", None, {"model_type": "llama"}, (0,)),  # Llama 3
        (BOTH, None, None, (0,)),
        ("<pad> <s> $A", None, None, (2, 0)),
        ("<s> $A", False, {"model_type": "llama"}, (0,)),  # what the tokenizer does counts, not what its file says
        ("$A </s>", None, {"model_type": "qwen3"}, ()),
        (None, None, {"model_type": "llama", "bos_token_id": 0}, ()),  # SmolLM2: has a token that no text begins with
        (None, False, {"model_type": "qwen2", "bos_token_id": 0}, ()),
        (None, True, {"model_type": "llama"}, (0,)),
        ("$A </s>", True, None, (0,)),
        (None, None, {"model_type": "gemma3_text", "bos_token_id": 2}, (0,)),  # converted from a GGUF file
        (None, None, {"model_type": "gemma2"}, (0,)),
        (None, False, {"model_type": "gemma2", "bos_token_id": 0}, ()),
        (None, None, None, ()),
    ],
)
def test_what_texts_begin_with(
    tmp_path: Path, template: str | None, setting: bool | None, config: dict[str, Any] | None, beginning: tuple[int]
) -> None:
    write_tokenizer(tmp_path, template)
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    file = tmp_path / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    assert "add_bos_token" not in settings
    file.write_text(json.dumps(settings | ({} if setting is None else {"add_bos_token": setting})))
    loaded = load_tokenizer(tmp_path)
    assert loaded.beginning == beginning
    assert loaded.ids("the cat") == byte_tokenizer()("the cat")["input_ids"]


@pytest.mark.parametrize(("config", "beginning"), [({"bos_token_id": 2}, (2,)), ({}, ())])
def test_a_tokenizer_without_a_beginning_of_text_token(
    tmp_path: Path, config: dict[str, Any], beginning: tuple[int, ...]
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma"} | config))
    assert load_tokenizer(tmp_path).beginning == beginning


def test_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(MissingFileError, match=r"tokenizer: found none \(.+\), expected files that transformers can"):
        load_tokenizer(tmp_path)
