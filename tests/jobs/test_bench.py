"""The command line of the benchmarks, with measured figures faked."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from vllm_matquant import cli
from vllm_matquant.bench import kernel
from vllm_matquant.bench import serve as serving
from vllm_matquant.bench.serve import COLUMNS, Load
from vllm_matquant.checkpoint.slice import Slice
from vllm_matquant.jobs import bench as bench_job
from vllm_matquant.jobs.bench import BenchKernel
from vllm_matquant.kernels import ops

run_bench = cli.tool("bench")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, tuple[int, ...], dict[str, Any]]]:
    """What the benchmark was asked to measure, while it measures nothing."""
    asked: list[tuple[Path, tuple[int, ...], dict[str, Any]]] = []

    def measure(
        folder: Path,
        slices: Sequence[Slice],
        load: Load,
        reference: Path | None = None,
        llama_cpp: Path | None = None,
        elastic: bool = False,
    ) -> Iterator[dict[str, Any]]:
        widths = [each.width for each in slices]
        others = {"reference": reference, "llama_cpp": llama_cpp, "elastic": elastic}
        asked.append((folder, tuple(widths), dataclasses.asdict(load) | others))
        for bits in widths if reference is None else (16, *widths):
            yield {
                "bits": bits,
                "output_tokens_per_s": 100.0 / bits,
                "decode_tokens_per_s": 125.0 / bits,
                "resident_bytes": 1_000_000 * bits,
                "load_seconds": 2.5,
                "batch": load.batch,
                "model": folder.name,
                "answer": "Paris",
            }
            if llama_cpp and bits == 4:
                yield {"model": "llama.cpp Q4_0", "batch": 1, "prompt_tokens_per_s": 50.0, "decode_tokens_per_s": 12.5}

    monkeypatch.setattr(bench_job, "measure_serving", measure)
    return asked


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        run_bench(list(map(str, arguments)))
    return stop.value.code, capsys.readouterr().err.strip().splitlines()[-1]


def test_serve(nested: Path, calls: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["serve", str(nested), "--batch", "3", "--output-tokens", "16", "--prompt", "Why?"]
    assert run_bench([*arguments, "--json", str(tmp_path / "rows.json"), "--plot", str(tmp_path / "plot.png")]) == 0
    assert calls[0][:2] == (nested, (2, 4, 8))
    load = {"batch": 3, "output_tokens": 16, "prompt": "Why?", "activation_bits": None, "prompt_tokens": None}
    load |= {"rounds": 1, "speculate_bits": None, "speculate_tokens": None}
    assert calls[0][2] == load | {"reference": None, "llama_cpp": None, "elastic": False}
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["bits"] for row in rows] == [2, 4, 8]
    named = {"bits", "output_tokens_per_s", "decode_tokens_per_s", "resident_bytes", "load_seconds", "batch", "model"}
    assert all(named <= set(row) for row in rows)
    titles, *lines = capsys.readouterr().out.splitlines()
    assert titles.split() == list(COLUMNS)
    assert lines[1].split() == ["4", "25", "31.25", "-", "-", "4,000,000", "2.5", "3"]  # of which no more was measured
    picture = (tmp_path / "plot.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n")
    assert struct.unpack(">II", picture[16:24]) == (900, 600)


def test_widths(nested: Path, calls: list) -> None:
    assert run_bench(["serve", str(nested), "--bits", "8,2", "--elastic"]) == 0
    assert calls[0][1] == (2, 8)
    assert calls[0][2]["elastic"] is True


@pytest.mark.parametrize(("text", "bits"), [("3", 3), ("2.5", 2.5), ("mine", "mine")])
def test_drafts(nested: Path, calls: list, capsys: pytest.CaptureFixture[str], text: str, bits: object) -> None:
    options = ["--bits", "8", "--speculate-bits", text, "--speculate-tokens", "3"]
    assert run_bench(["serve", str(nested), *options]) == 0
    assert (calls[0][2]["speculate_bits"], calls[0][2]["speculate_tokens"]) == (bits, 3)
    assert capsys.readouterr().out.split("\n")[0].split()[-1] == "acceptance"


def test_without_vllm(
    nested: Path, calls: list, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serving, "find_spec", lambda name: None)
    status, said = refusal(capsys, "serve", nested)
    assert status == 1
    assert "vllm: found no such package, expected vLLM 0.32 or newer (pip install 'vllm_matquant[cuda]'" in said
    assert calls == []


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--bits", "3"], 1, "bits: found 3, expected one of the offered widths [2, 4, 8]"),
        (["--bits", "0"], 2, "argument --bits: found '0'"),
        (["--batch", "0"], 2, "argument --batch: found '0', expected a positive integer"),
        (["--output-tokens", "-1"], 2, "argument --output-tokens"),
        (["--json", "/no/such/folder/x.json"], 2, "argument --json: found no folder /no/such/folder"),
        (["--speculate-bits", "9"], 2, "argument --speculate-bits: found '9', expected a width from 2 to 8"),
        (["--speculate-bits", "3", "--elastic"], 1, "speculate_bits: found it with --elastic, expected one of them"),
        (["--plot", "/no/such/folder/x.png"], 2, "argument --plot: found no folder /no/such/folder"),
    ],
)
def test_refusals(
    nested: Path, calls: list, capsys: pytest.CaptureFixture[str], options: list[str], status: int, message: str
) -> None:
    found, said = refusal(capsys, "serve", nested, *options)
    assert found == status
    assert message in said
    assert calls == []


def test_reference_and_llama_cpp(nested: Path, calls: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = tmp_path / "llama-batched-bench"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    rows, picture = tmp_path / "rows.json", tmp_path / "plot.png"
    options = ["--reference", tmp_path, "--activation-bits", "8", "--llama-cpp", program, "--json", rows]
    options += ["--prompt-tokens", "512", "--rounds", "3", "--plot", picture]
    assert run_bench(["serve", str(nested), *map(str, options)]) == 0
    asked = calls[0][2]
    assert (asked["activation_bits"], asked["prompt_tokens"], asked["rounds"]) == (8, 512, 3)
    assert (asked["reference"], asked["llama_cpp"]) == (tmp_path, program)
    assert [row.get("bits") for row in json.loads(rows.read_text())] == [16, 2, 4, None, 8]
    said = capsys.readouterr().out
    assert f"llama.cpp: {program}, built for none past AVX2" in said
    assert "llama.cpp Q4_0: 12.5 tokens per second decoded, 50 of the prompt, batch 1" in said
    assert picture.is_file()


def test_llama_cpp_is_missing(nested: Path, calls: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = refusal(capsys, "serve", nested, "--llama-cpp", tmp_path / "none")
    assert status == 1
    assert f"llama_cpp: found no program {tmp_path}/none, expected a build's llama-batched-bench" in said
    assert calls == []


def test_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Really measured, on small layers and for a moment."""
    monkeypatch.setattr(kernel, "ROTATED_BYTES", 2**16)
    monkeypatch.setattr(kernel, "SECONDS", 0.0)
    rows_file, picture = tmp_path / "rows.json", tmp_path / "plot.png"
    arguments = ["kernel", "--shapes", "48x64,33x96", "--bits", "2,5,8", "--batch", "1,3", "--threads", "1,2"]
    arguments += ["--group-size", "32", "--peers", "torch-bf16"]
    assert run_bench([*arguments, "--json", str(rows_file), "--plot", str(picture)]) == 0
    rows = json.loads(rows_file.read_text())
    measured = [(row["n"], row["k"], row["threads"], row["m"], row["bits"]) for row in rows]
    assert measured == [
        (n, k, threads, m, bits)
        for n, k in ((48, 64), (33, 96))
        for threads in (2, 1)
        for m in (1, 3)
        for bits in (2, 5, 8)
    ]
    assert (
        rows[0]
        | {
            "backend": "cpu",
            "isa": ops.cpu_isa(),
            "group_size": 32,
            "bytes": 3 * (2 * 2 * 64) + 3 * (64 + 32 * 2),  # rows of tiles times planes and their columns, and decoders
        }
        == rows[0]
    )
    for row in rows:
        assert row["seconds"] > 0
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["seconds"] / 1e9)
        assert row["roofline"] == pytest.approx(row["gb_per_s"] / row["read_gb_per_s"])
        assert row["peer_seconds"].keys() == {"torch-bf16"}
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(rows)
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")


def test_a_peer_that_refuses_a_shape_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(rows: int, columns: int, group_size: int) -> None:
        raise RuntimeError("rows: expected a multiple of 32\nand more")

    monkeypatch.setitem(kernel.PEERS, "vllm-int4", refuse)
    monkeypatch.setattr(kernel, "ROTATED_BYTES", 2**14)
    monkeypatch.setattr(kernel, "SECONDS", 0.0)
    arguments = [
        "--shapes",
        "33x64",
        "--bits",
        "3",
        "--batch",
        "1",
        "--threads",
        "1",
        "--peers",
        "vllm-int4,torch-bf16",
    ]
    assert run_bench(["kernel", *arguments]) == 0
    said = capsys.readouterr()
    assert said.err == "vllm-int4 refuses 33 x 64: rows: expected a multiple of 32\n"
    assert said.out.splitlines()[1].split()[-2] == "nan"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--shapes", "llama", "found 'llama', expected some of smollm2-135m"),
        ("--shapes", "64x65", "found '64x65', expected some of smollm2-135m"),
        ("--shapes", "64x64x64", "found '64x64x64'"),
        ("--peers", "torch", "found 'torch', expected some of torch-bf16, vllm-bf16, vllm-int4, or none"),
        ("--batch", "1,0", "found '0', expected a positive integer"),
        ("--bits", "9", "found '9'"),
        ("--activation-bits", "4", "invalid choice"),
    ],
)
def test_kernel_refusals(option: str, value: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = refusal(capsys, "kernel", option, value)
    assert status == 2
    assert message in said


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--shapes", "128x8x2048", "expected some of qwen3-30b-a3b, olmoe-1b-7b, deepseek-v2-lite or EXPERTS x CHOSEN"),
        ("--shapes", "8x8x64x64", "with fewer chosen than experts"),
        ("--shapes", "8x2x64x40", "multiples of 16 features"),
        ("--peers", "torch", "found 'torch', expected some of vllm-bf16, or none"),
    ],
)
def test_experts_refusals(option: str, value: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = refusal(capsys, "experts", option, value)
    assert status == 2
    assert message in said


def test_shapes_of_models() -> None:
    job = BenchKernel(shapes="llama-3-8b,4096x4096,32x64")
    assert job.shapes == (*kernel.SHAPES["llama-3-8b"], (32, 64))


def test_no_such_folder(tmp_path: Path, calls: list, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = refusal(capsys, "serve", tmp_path / "nowhere")
    assert status == 1
    assert "nowhere: checkpoint: found no such folder" in said


def test_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    status, said = refusal(capsys)
    assert status == 2
    assert "required: COMMAND" in said
