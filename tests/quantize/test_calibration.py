"""Calibration text from every kind of source."""

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

from tests.quantize.tiny_sources import byte_tokenizer
from vllm_matquant.quantize import calibration
from vllm_matquant.quantize.calibration import Calibration, CalibrationError, load_calibration, load_parts


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def load(tokenizer: PreTrainedTokenizerFast) -> Any:
    def load_some(
        source: str | Path | None, samples: int = 4, sequence_length: int = 16, seed: int = 0, text_column: str = "text"
    ) -> Calibration:
        source = None if source is None else str(source)
        sizes = {"samples": samples, "sequence_length": sequence_length}
        return load_calibration(source, tokenizer, **sizes, seed=seed, text_column=text_column)

    return load_some


def windows_of(tokenizer: PreTrainedTokenizerFast, text: str, length: int) -> set[tuple[int, ...]]:
    ids = tokenizer(text)["input_ids"]
    return {tuple(ids[start : start + length]) for start in range(len(ids) - length + 1)}


def test_text(load: Any, tokenizer: PreTrainedTokenizerFast, text_file: Path) -> None:
    calibration = load(text_file, seed=3)
    assert calibration.tokens.shape == (4, 16)
    assert calibration.tokens.dtype == torch.int64
    assert {tuple(window) for window in calibration.tokens.tolist()} <= windows_of(tokenizer, text_file.read_text(), 16)
    assert calibration.source == {
        "name": "text.txt",
        "sha256": hashlib.sha256(text_file.read_bytes()).hexdigest(),
        "samples": 4,
        "sequence_length": 16,
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
    with pytest.raises(
        CalibrationError, match=rf"short\.txt: found {len(ids)} tokens, expected at least {len(ids) + 1}"
    ):
        load(text, samples=1, sequence_length=len(ids) + 1)


def test_empty_text(load: Any, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    with pytest.raises(CalibrationError, match=r"empty\.txt: found 0 tokens, expected at least 64 \(4 x 16\)"):
        load(empty)


def test_jsonl(load: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    # Line and paragraph separators of Unicode may stand in a JSON string as they are.
    documents = ["The cat sat.", "two\u2028lines\x85and\nthree", "The other cat thought." * 20]
    path = tmp_path / "text.jsonl"
    lines = [json.dumps({"id": 1, "text": text}, ensure_ascii=False) for text in documents]
    path.write_text("\n".join([lines[0], "", *lines[1:]]) + "\n", encoding="utf-8")
    calibration = load(path)
    text = "\n\n".join(documents)
    assert calibration.source["sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert {tuple(window) for window in calibration.tokens.tolist()} <= windows_of(tokenizer, text, 16)


@pytest.mark.parametrize("line", ["no JSON", '"text"', "[1]", '{"content": "x"}', '{"text": 3}', '{"text": null}'])
def test_bad_line(load: Any, tmp_path: Path, line: str) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(CalibrationError, match=r'text\.jsonl:2: found .*, expected {"text": "\.\.\."}'):
        load(path)


def test_no_such_file(load: Any, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"nowhere\.txt: found no such file, expected .* hf:NAME"):
        load(tmp_path / "nowhere.txt")


def test_bytes_that_are_no_text(load: Any, tmp_path: Path) -> None:
    path = tmp_path / "image.txt"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CalibrationError, match=r"image\.txt: found bytes that are not UTF-8"):
        load(path)


def test_characters_that_are_no_text(load: Any, tmp_path: Path) -> None:
    path = tmp_path / "zeros.txt"
    path.write_bytes(bytes(1000))
    with pytest.raises(CalibrationError, match=r"zeros\.txt: found NUL characters, expected text"):
        load(path)


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": ""}\n'])
def test_json_lines_without_text(load: Any, tmp_path: Path, content: str) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    with pytest.raises(CalibrationError, match=r"empty\.jsonl: found 0 tokens, expected at least 64"):
        load(path)


def test_json_lines_that_are_no_text(load: Any, tmp_path: Path) -> None:
    path = tmp_path / "image.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\xff\xfe\x00\n')
    with pytest.raises(CalibrationError, match=r"image\.jsonl: found bytes that are not UTF-8"):
        load(path)


def test_text_column(load: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": 3, "content": "The cat sat on the mat. " * 20}) + "\n")
    assert load(path, text_column="content").tokens.shape == (4, 16)
    with pytest.raises(CalibrationError, match=r'text\.jsonl:1: found .*, expected {"prompt": "\.\.\."}'):
        load(path, text_column="prompt")


def test_built_in_text_is_enough_for_the_defaults(load: Any) -> None:
    calibration = load(None, samples=64, sequence_length=512)
    assert calibration.tokens.shape == (64, 512)
    assert calibration.source["name"] == "built-in text"


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
    monkeypatch.setattr(calibration, "_FILE_CHARACTERS", 2**15)
    path, counting = tmp_path / name, Counting(tokenizer)
    lines = SENTENCES.split(". ")
    as_json = "".join(json.dumps({"text": line}, ensure_ascii=False) + "\n" for line in lines)
    path.write_text(as_json if name.endswith("l") else SENTENCES, encoding="utf-8")
    assert path.stat().st_size > 3 * 2**15

    def load(seed: int) -> Calibration:
        return load_calibration(str(path), counting, samples=4, sequence_length=64, seed=seed)  # type: ignore[arg-type]

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
    pieces = list(calibration._pieces(path, 1001))
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
    assert path.stat().st_size > calibration._FILE_CHARACTERS
    with pytest.raises(CalibrationError, match=r"text\.txt: found bytes that are not UTF-8"):
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
    calibration = load("hf:some/name:subset")
    assert fake.calls == [("some/name", "subset", "train", True)]
    assert calibration.source["name"] == "hf:some/name:subset"
    text = "\n\n".join(row["text"] for row in fake.rows[: fake.read])
    assert calibration.source["sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert {tuple(window) for window in calibration.tokens.tolist()} <= windows_of(tokenizer, text, 16)
    assert fake.read < 100  # the data set is streamed only as far as needed
    load("hf:name")
    assert fake.calls[1] == ("name", None, "train", True)


def test_data_set_without_text(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", FakeDatasets([{"question": "?", "answer": "!"}]))
    with pytest.raises(CalibrationError, match=r"hf:x: found columns \['answer', 'question'\], expected one named"):
        load("hf:x")


def test_data_set_with_a_row_without_text(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", FakeDatasets([{"text": "fine"}, {"text": None}]))
    with pytest.raises(CalibrationError, match=r"hf:x: found NoneType in a row, expected one named \"text\" of text"):
        load("hf:x")


def test_no_package_datasets(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match=r"hf:x: found no package datasets, expected it \(pip install"):
        load("hf:x")


@pytest.mark.parametrize("seed", range(3))
def test_parts_share_no_token(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, seed: int) -> None:
    text = "".join(map(chr, range(0x20, 0x20 + 90)))  # each token once; two of the characters make one
    path = tmp_path / "text.txt"
    path.write_text(text)
    parts = load_parts(str(path), tokenizer, samples=(3, 0, 5), sequence_length=10, seed=seed)
    assert [part.tokens.shape for part in parts] == [(3, 10), (0, 10), (5, 10)]
    ids = torch.cat([part.tokens.flatten() for part in parts]).tolist()
    assert len(set(ids)) == 80
    windows = windows_of(tokenizer, text, 10)
    assert all(tuple(window) in windows for part in parts for window in part.tokens.tolist())
    again = load_parts(str(path), tokenizer, samples=(3, 0, 5), sequence_length=10, seed=seed)
    other = load_parts(str(path), tokenizer, samples=(3, 0, 5), sequence_length=10, seed=seed + 1)
    assert all(torch.equal(part.tokens, same.tokens) for part, same in zip(parts, again, strict=True))
    assert not torch.equal(parts[0].tokens, other[0].tokens)
    assert parts[2].source == {
        "name": "text.txt", "sha256": hashlib.sha256(text.encode()).hexdigest(), "samples": 5, "sequence_length": 10,
        "seed": seed, "part": 2,
    }  # fmt: skip
    with pytest.raises(CalibrationError, match=r"found 89 tokens, expected at least 100 \(10 x 10\)"):
        load_parts(str(path), tokenizer, samples=(5, 5), sequence_length=10, seed=seed)
