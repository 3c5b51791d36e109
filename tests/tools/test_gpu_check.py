"""The check for a machine with a GPU, as far as it goes without one."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import gpu_check
import pytest
import torch
from gpu_check import main

from vllm_matquant.bench import cuda as bench_cuda
from vllm_matquant.bench import kernel as bench_kernel
from vllm_matquant.kernels import ops


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 1
    assert "torch finds no CUDA device" in capsys.readouterr().err


def test_a_library_without_kernels_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ops, "is_built_for", lambda device_type: False)
    assert main([]) == 1
    assert ops.BUILD_COMMAND in capsys.readouterr().err


@pytest.mark.parametrize("status", [0, 1])
def test_the_report_has_machine_tests_and_figures(status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def rows(report: Any) -> Any:
        report("marlin refuses")
        row = {"n": 64, "k": 128, "m": 1, "bits": 2, "seconds": 1e-6, "gb_per_s": 1.0, "read_gb_per_s": 2.0}
        yield row | {"peer_seconds": {"torch": 2e-6}}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ops, "is_built_for", lambda device_type: True)
    monkeypatch.setattr(gpu_check, "describe_machine", lambda: {"gpu": "one"})
    monkeypatch.setattr(gpu_check, "run_tests", lambda: {"exit_status": status, "output": []})
    monkeypatch.setattr(gpu_check, "bench_cuda", rows)
    output = tmp_path / "report.json"
    assert main(["--output", str(output)]) == status
    report = json.loads(output.read_text())
    assert report["machine"] == {"gpu": "one"}
    assert report["refusals"] == ["marlin refuses"]
    assert [row["bits"] for row in report["rows"]] == [2]


def test_rows_of_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, with a product that only looks at its arguments."""
    calls = []

    def linear(x: torch.Tensor, handle: torch.Tensor, rows: int) -> torch.Tensor:
        calls.append(handle.item())
        return x

    def seconds_of(call: Any) -> float:
        call()
        call()
        return 1e-3

    def refuse(rows: int, columns: int) -> Any:
        raise RuntimeError("no such device")

    monkeypatch.setattr(bench_cuda, "DEVICE", "cpu")
    monkeypatch.setattr(bench_kernel, "ROTATED_BYTES", 2**16)
    monkeypatch.setattr(bench_cuda, "seconds_of", seconds_of)
    monkeypatch.setattr(bench_cuda.ops, "linear", linear)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(bench_cuda, "PEERS", {"torch-float16": bench_cuda.torch_float16, "vllm-marlin-int4": refuse})
    refusals: list[str] = []
    rows = list(bench_cuda.bench_cuda([(70, 256)], [1, 3], [2, 5], report=refusals.append))
    assert [(row["bits"], row["m"]) for row in rows] == [(2, 1), (2, 3), (5, 1), (5, 3)]
    assert rows[0]["bytes"] == 2 * 4 * 2 * 512 + 2 * (
        256 + 2 * 128
    )  # tiles of 512 bytes a bit, decoders of 128 a group after 256
    assert rows[0]["gb_per_s"] == pytest.approx(rows[0]["bytes"] / 1e-3 / 1e9)
    assert set(rows[0]["peer_seconds"]) == {"torch-float16"}
    assert refusals == ["vllm-marlin-int4 refuses 70 x 256: no such device"]
    assert len(set(calls)) > 1  # every use takes the next copy


def test_humming_gets_a_layer_of_its_own_for_each_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class HummingLayer(torch.nn.Module):
        def __init__(self, **arguments: Any) -> None:
            super().__init__()
            self.arguments, self.steps = arguments, []
            made.append(self)

        def load_from_unquantized(self, weight: torch.Tensor) -> None:
            self.steps.append(("load", tuple(weight.shape)))

        def transform(self) -> None:
            self.steps.append(("transform",))

        def forward(self, x: torch.Tensor) -> int:
            return made.index(self)

    module = types.ModuleType("humming.layer")
    module.HummingLayer = HummingLayer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "humming", types.ModuleType("humming"))
    monkeypatch.setitem(sys.modules, "humming.layer", module)
    monkeypatch.setattr(bench_cuda, "DEVICE", "cpu")
    monkeypatch.setattr(bench_kernel, "ROTATED_BYTES", 2**14)
    multiply = bench_cuda.PEERS["humming-int3"](64, 256)
    assert made[0].arguments == {
        "shape_n": 64,
        "shape_k": 256,
        "weight_config": {"dtype": "int3", "group_size": 128},
        "torch_dtype": torch.float16,
    }
    assert all(layer.steps == [("load", (64, 256)), ("transform",)] for layer in made)
    uses = [multiply(torch.zeros(1, 256)) for _ in made]
    assert len(made) > 1
    assert sorted(uses) == list(range(len(made)))
