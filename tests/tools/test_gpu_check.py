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
from gpu_check import Part, main

from tests.cuda import random_layers
from tests.cuda.random_layers import Layer
from vllm_matquant.bench import cuda as bench_cuda
from vllm_matquant.bench import kernel as bench_kernel
from vllm_matquant.kernels.weight import find_weight


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so() -> None:
    with pytest.raises(SystemExit, match="torch finds no CUDA device"):
        main([])


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Of a machine with a GPU, where the parts are scripts in a folder, which is returned."""
    monkeypatch.setattr(gpu_check, "describe_machine", lambda: {"gpu": "one", "torch": "2"})
    script = tmp_path / "gpu_check.py"
    named = "sys.argv[sys.argv.index('--part') + 1]"
    script.write_text(f"import pathlib, sys\nexec(pathlib.Path({str(tmp_path)!r}, {named}).read_text())\n")
    monkeypatch.setattr(gpu_check, "__file__", str(script))
    monkeypatch.setattr(gpu_check, "PARTS", {name: Part(lambda: iter(()), 20) for name in ("one", "two", "three")})
    for name in gpu_check.PARTS:
        (tmp_path / name).write_text("print('something')")
    return tmp_path


def run(folder: Path, *options: str) -> tuple[int, dict[str, Any]]:
    output = folder / "report.json"
    status = main(["--output", str(output), "--parts", "one,two,three", *options])
    return status, json.loads(output.read_text())["parts"]


ROW = "print('gpu-check-result {\"bits\": 2}', flush=True)\n"


def test_a_part_that_ends_badly_ends_alone(machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (machine / "one").write_text(f"{ROW}print('said', flush=True)\nimport os; os.abort()")
    (machine / "two").write_text(ROW)
    status, parts = run(machine)
    assert status == 1
    assert parts["one"]["outcome"] == "ended with -6"
    assert parts["one"]["rows"] == parts["two"]["rows"] == [{"bits": 2}]
    assert parts["one"]["output"][0] == "said"
    assert parts["two"]["outcome"] == parts["three"]["outcome"] == "right"
    said = capsys.readouterr().out
    assert "said" in said
    assert "gpu-check-result" not in said
    assert "one         ended with -6" in said


def test_a_part_that_hangs_is_cut_off_and_its_rows_stay(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu_check.PARTS, "two", Part(lambda: iter(()), 2))
    (machine / "two").write_text(f"{ROW}import time; time.sleep(60)")
    status, parts = run(machine)
    assert status == 1
    assert parts["two"]["outcome"] == "cut off after 2 s"
    assert parts["two"]["rows"] == [{"bits": 2}]
    assert parts["three"]["outcome"] == "right"


def test_a_second_run_goes_on_after_what_was_right(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (machine / "one").write_text(ROW)
    (machine / "two").write_text("raise SystemExit(3)")
    assert run(machine)[0] == 1
    (machine / "one").write_text("raise SystemExit(1)")
    (machine / "two").write_text(ROW)
    status, parts = run(machine)
    assert status == 0
    assert parts["one"]["rows"] == parts["two"]["rows"] == [{"bits": 2}]
    assert run(machine, "--fresh")[0] == 1
    (machine / "one").write_text(ROW)
    assert run(machine)[0] == 0
    (machine / "one").write_text("raise SystemExit(1)")
    monkeypatch.setattr(gpu_check, "sources", lambda: "others")  # what was right then is not known to be right now
    assert run(machine)[0] == 1


def test_what_a_machine_lacks_and_what_time_is_left_for(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        gpu_check.PARTS, "one", Part(lambda: iter(()), 20, gpu_check._without("python3", "no-such-tool"))
    )
    status, parts = run(machine)
    assert status == 0
    assert parts["one"]["outcome"] == "left out: no no-such-tool"
    status, parts = run(machine, "--minutes", "0.1", "--fresh")
    assert parts["two"]["outcome"].startswith("left out: no time left")


def test_no_such_part(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--parts", "speed,sped"])
    assert "--parts: found sped, expected some of build, products, speed" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["products", "one_product"])
def test_the_parts_that_compare_products(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tensors that stay on the CPU, and products in float64 in the place of the kernels'."""
    made: list[Layer] = []

    def remember(make: Any) -> Any:
        def make_on_the_cpu(*arguments: Any, device: str, **options: Any) -> Layer:
            assert device == "cuda"
            made.append(make(*arguments, device="cpu", **options))
            return made[-1]

        return make_on_the_cpu

    def linear(x: torch.Tensor, handle: torch.Tensor, rows: int, bias: None) -> torch.Tensor:
        layer = made[-1]
        assert torch.equal(handle, layer.weight.handle)
        weights, _ = layer.weights([int(width) for each in layer.weight.segments for width in each.active_width])
        assert len(weights) == rows
        return (x.double() @ weights.T * scale).to(x.dtype)

    def linear_by_row(x: torch.Tensor, handles: torch.Tensor, slots: torch.Tensor, rows: int, bias: None) -> Any:
        assert slots.tolist() == [0, 1, 0, 1, 0, 1, 0, 1, 0]
        result = torch.empty(len(x), rows, dtype=x.dtype)
        for slot, handle in enumerate(handles.tolist()):
            weights, _ = made[-1].weights(find_weight(torch.tensor([handle])).active_widths)
            result[slots == slot] = (x[slots == slot].double() @ weights.T * scale).to(x.dtype)
        return result

    monkeypatch.setattr(type(random_layers.CUDA), "linear_by_row", staticmethod(linear_by_row), raising=False)
    monkeypatch.setattr(random_layers, "make_segments", remember(random_layers.make_segments))
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    monkeypatch.setattr(type(random_layers.CUDA), "linear", staticmethod(linear), raising=False)
    scale = 1.0
    rows = list((gpu_check.PARTS | gpu_check.HIDDEN_PARTS)[part].run())
    assert {row["decoders"] for row in rows} == {"affine-float16", "affine-int8", "codebook-4d"}
    scale = 1.1
    with pytest.raises(AssertionError, match="times the tolerance"):
        list((gpu_check.PARTS | gpu_check.HIDDEN_PARTS)[part].run())


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
    monkeypatch.setattr(bench_cuda, "PEERS", {"torch-bfloat16": bench_cuda.torch_bfloat16, "vllm-marlin-int4": refuse})
    monkeypatch.setattr(bench_cuda, "CODEBOOK_SHAPES", [(70, 256)])
    refusals: list[str] = []
    rows = list(bench_cuda.bench_cuda([(70, 256)], [1, 3], [2, 5], report=refusals.append))
    rows, of_codebooks = rows[:4], rows[4:]
    assert [(row["bits"], row["m"]) for row in rows] == [(2, 1), (2, 3), (5, 1), (5, 3)]
    assert [(row["bits"], row["m"]) for row in of_codebooks] == [(2, 1), (5, 1)]
    assert {row["decoders"] for row in of_codebooks} == {"codebook-4d"}
    # A codebook of 256 bytes; of a row of tiles 128 bytes and 64 of a group.
    assert of_codebooks[0]["bytes"] == 2 * 4 * 2 * 512 + 256 + 2 * (128 + 2 * 64)
    assert rows[0]["bytes"] == 2 * 4 * 2 * 512 + 2 * (
        256 + 2 * 128
    )  # tiles of 512 bytes a bit, decoders of 128 a group after 256
    assert rows[0]["gb_per_s"] == pytest.approx(rows[0]["bytes"] / 1e-3 / 1e9)
    assert set(rows[0]["peer_seconds"]) == {"torch-bfloat16"}
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
        "torch_dtype": torch.bfloat16,
    }
    assert all(layer.steps == [("load", (64, 256)), ("transform",)] for layer in made)
    uses = [multiply(torch.zeros(1, 256)) for _ in made]
    assert len(made) > 1
    assert sorted(uses) == list(range(len(made)))
