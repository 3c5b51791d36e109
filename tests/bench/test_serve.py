"""The speeds of `matquant bench serve`, with engines faked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_matquant.bench import llama_cpp
from vllm_matquant.bench import serve as serving
from vllm_matquant.bench.serve import Load, Served, bench_serve
from vllm_matquant.checkpoint.reader import open_checkpoint
from vllm_matquant.jobs.table import figures


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Who was measured, one after the other."""
    measured: list[str] = []
    config = SimpleNamespace(front=SimpleNamespace(offer=SimpleNamespace(refusal=None)))
    engine = SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=SimpleNamespace(quant_config=config)))

    class FakeServed:
        def __init__(self, folder: Path, parts: Sequence[Any], load: Load) -> None:
            self.name = parts[0].name if parts else "reference"
            self.llm = engine

        def describe(self) -> dict[str, Any]:
            return {"model": "fake"}

        def answers(self, choices: Sequence[Any]) -> list[str]:
            return [f"{self.name} at {choice}" for choice in choices]

        def measure(self) -> dict[str, float]:
            measured.append(self.name)
            return {"output_tokens_per_s": 10.0 + len(measured), "decode_tokens_per_s": 20.0}

    class FakePeer:
        bits_per_weight = 4.5

        def __init__(
            self, program: Path, folder: Path, config: dict[str, Any], type_: str, threads: int, head: int | None
        ) -> None:
            self.type, self.head_type = type_, "BF16" if head is None else f"Q{head}"

        def measure(self, batch: int, prompt_tokens: int, output_tokens: int) -> dict[str, float]:
            measured.append(f"{self.type} {batch} {prompt_tokens} {output_tokens}")
            return {"prompt_tokens_per_s": 1.0, "decode_tokens_per_s": float(len(measured))}

    def switch(choice: Any) -> str:
        measured.append(f"switch to {choice}")
        return str(choice)

    monkeypatch.setattr(serving, "Served", FakeServed)
    monkeypatch.setattr(serving, "_switch", switch)
    monkeypatch.setattr(serving, "ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(workers))
    monkeypatch.setattr(llama_cpp, "LlamaCpp", FakePeer)
    monkeypatch.setattr(llama_cpp, "misfit", lambda config, width, head: "none" if width == 8 else None)
    return measured


def test_ours_and_llama_cpp_take_turns(nested: Path, order: list[str], tmp_path: Path) -> None:
    slices = [open_checkpoint(nested).slice(width) for width in (2, 4, 8)]
    load = Load(batch=2, output_tokens=8, prompt_tokens=32, rounds=3)
    rows = list(bench_serve(nested, slices, load, tmp_path, tmp_path / "llama-batched-bench"))
    names = [each.name for each in slices]
    of_2_bits = [names[0], "Q2_K 2 32 8", "IQ2_XS 2 32 8"]
    assert order == ["reference"] * 3 + of_2_bits * 3 + [names[1], "Q4_0 2 32 8"] * 3 + [names[2]] * 3
    assert [row.get("bits") for row in rows] == [16, 2, None, None, 4, None, 8]
    assert [row["model"] for row in rows[2:4]] == ["llama.cpp Q2_K, head BF16", "llama.cpp IQ2_XS, head BF16"]
    assert rows[0]["output_tokens_per_s"] == 12.0
    assert rows[0]["output_tokens_per_s_range"] == [11.0, 13.0]
    assert rows[2] == {
        "model": "llama.cpp Q2_K, head BF16",
        "bits_per_weight": 4.5,
        "prompt_tokens_per_s": 1.0,
        "prompt_tokens_per_s_range": [1.0, 1.0],
        "decode_tokens_per_s": 8.0,
        "decode_tokens_per_s_range": [5.0, 11.0],
        "batch": 2,
    }


@pytest.mark.parametrize(
    ("tied", "widths", "head"),
    [
        (False, {"lm_head": 6}, "Q6"),
        (True, {"model.embed_tokens": 8}, "Q8"),
        (False, {"model.embed_tokens": 8}, "BF16"),
    ],
)
def test_the_peers_head_is_quantized_like_ours(
    tied: bool, widths: dict[str, int], head: str, order: list[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
    part = SimpleNamespace(width=4, widths=widths)
    [peer] = serving._peers_of(part, tmp_path, tmp_path, tmp_path)  # type: ignore[arg-type]
    assert (peer.type, peer.head_type) == ("Q4_0", head)


def test_one_round_has_no_range(nested: Path, order: list[str]) -> None:
    rows = list(bench_serve(nested, [open_checkpoint(nested).slice(4)], Load()))
    assert order == [open_checkpoint(nested).slice(4).name]
    speeds = {"output_tokens_per_s": 11.0, "decode_tokens_per_s": 20.0}
    assert rows == [{"bits": 4, **speeds, "model": "fake", "answer": "uniform-4 at None"}]


def test_one_engine_is_switched_from_each_slice_to_the_next(nested: Path, order: list[str]) -> None:
    slices = [open_checkpoint(nested).slice(width) for width in (8, 2)]
    rows = list(bench_serve(nested, slices, Load(), elastic=True))
    assert order == ["switch to 8", "uniform-8", "switch to 2", "uniform-8"]  # the engine has the first one's name
    assert [row["bits"] for row in rows] == [8, 2]
    assert [row["answer"] for row in rows] == ["uniform-8 at 8", "uniform-8 at 2"]  # of one batch


def test_what_could_not_be_measured_is_none() -> None:
    unknown = {"decode_tokens_per_s": float("nan")}
    assert serving._summary([unknown]) == {"decode_tokens_per_s": None}
    assert serving._summary([unknown, {"decode_tokens_per_s": 3.0}]) == {"decode_tokens_per_s": 3.0}
    assert figures({"bits": 4, "speed": 2.5, "unknown": None}, ["bits", "speed", "unknown"]).split() == [
        "4",
        "2.5",
        "-",
    ]


def test_roofline_is_the_share_of_a_plain_read() -> None:
    row = {"decode_tokens_per_s": 40.0, "read_gb_per_s": 50.0, "step_bytes": 10**9, "batch": 2}
    assert serving._roofline(row) == {"roofline": 40 / 2 * 1 / 50}
    assert serving._roofline(row | {"decode_tokens_per_s": None}) == {}
    assert serving._roofline({"decode_tokens_per_s": 40.0}) == {}  # not on a CPU


@pytest.mark.parametrize(("tokens", "expected"), [(5, 2 * 4 / 0.5), (1, float("nan"))])
def test_decoding_leaves_out_the_first_token(monkeypatch: pytest.MonkeyPatch, tokens: int, expected: float) -> None:
    monkeypatch.setattr(Served, "__init__", lambda self: None)
    served = Served()  # type: ignore[call-arg]
    served.load = Load(batch=2, output_tokens=tokens)
    served.prompt_tokens, served.memory = 20, None
    monkeypatch.setattr(served, "_generate", lambda count: (0.25 if count == 1 else 0.75, 20))
    measured = served.measure()
    assert measured["decode_tokens_per_s"] == pytest.approx(expected, nan_ok=True)
    assert measured["prompt_tokens_per_s"] == 80.0
    assert "read_gb_per_s" not in measured
