"""Kernels compiled at run time, as far as that goes without a GPU: the program, its key, and the choice of kernels."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.cuda.emulation import SOURCES
from tests.cuda.random_layers import make_input, make_layer
from vllm_matquant.kernels import cuda_jit, cuda_launch
from vllm_matquant.kernels.cuda_launch import Instance, choose_instance, grouping_of, read_instances

INSTANCES = read_instances()


def test_the_sources_are_part_of_the_package() -> None:
    assert (cuda_launch.SOURCES / "cuda" / "kernels.cu").read_text() == (SOURCES / "cuda" / "kernels.cu").read_text()


def test_every_kernel_is_listed_once() -> None:
    names = [instance.name for instance in INSTANCES]
    assert len(set(names)) == len(names)
    for dtype in (torch.float16, torch.bfloat16):
        found = {(one.tokens, one.groups) for one in INSTANCES if one.dtype == dtype}
        assert found == {(8, 1), (8, 2), (8, 4), (16, 1), (16, 2), (16, 4), (24, 1), (24, 2), (0, 1), (0, 2), (0, 4)}


@pytest.mark.parametrize(
    ("tokens", "groups", "chosen"), [(1, 1, 8), (8, 1, 8), (9, 2, 16), (17, 1, 24), (64, 1, 24), (17, 4, 16), (0, 4, 0)]
)
def test_the_kernel_for_the_fewest_tokens_that_are_enough(tokens: int, groups: int, chosen: int) -> None:
    assert choose_instance(INSTANCES, torch.float16, tokens, groups).tokens == chosen


def test_a_missing_kernel_is_named() -> None:
    with pytest.raises(ValueError, match=r"no kernel for torch.float32 and 2 groups in 128 columns"):
        choose_instance(INSTANCES, torch.float32, 1, 2)


@pytest.mark.parametrize(
    ("group_size", "columns", "expected"),
    [(32, 4096, (4, 0)), (64, 64, (2, 0)), (128, 4096, (1, 0)), (512, 4096, (1, 2)), (100, 100, (1, 31))],
)
def test_groups_of_a_step(group_size: int, columns: int, expected: tuple[int, int]) -> None:
    assert grouping_of(group_size, columns) == expected


@pytest.mark.parametrize("group_size", [16, 96, 0])
def test_groups_that_kernels_do_not_serve(group_size: int) -> None:
    with pytest.raises(ValueError, match=f"group_size: found {group_size}, expected 32, 64, 128 or a greater power"):
        grouping_of(group_size, 4096)


class Recorder:
    """Launches nothing and remembers what it was asked for."""

    instances = INSTANCES
    processors = 100

    def __init__(self) -> None:
        self.launched: list[tuple[Instance, tuple[int, ...], int]] = []

    def launch(self, instance: Instance, grid: tuple[int, ...], shared_bytes: int, arguments: object) -> None:
        self.launched.append((instance, grid, shared_bytes))


@pytest.mark.parametrize(
    ("rows", "columns", "tokens", "grid"),
    [
        (64, 8192, 1, (1, 16, 1)),  # no more blocks than leave a step to each of their warps
        (4096, 8192, 1, (64, 5, 1)),  # 3 blocks for each of 100 multiprocessors
        (64 * 400, 1024, 1, (400, 1, 1)),
        (4096, 8192, 64, (64, 2, 3)),
    ],
)
def test_columns_are_divided_until_the_device_is_full(
    rows: int, columns: int, tokens: int, grid: tuple[int, ...]
) -> None:
    recorder = Recorder()
    planes = torch.empty(-(-rows // 64), columns // 64, 4, 512, dtype=torch.uint8, device="meta")
    decoders = torch.empty(1, planes.shape[0], columns // 128, 8, 2, 8, dtype=torch.float16, device="meta")
    x = torch.empty(tokens, columns, dtype=torch.float16, device="meta")
    active = torch.empty(1, dtype=torch.int32, device="meta")
    result = cuda_launch.multiply(recorder, x, planes, decoders, active, [4], [rows], 128)
    assert result.shape == (tokens, rows)
    [(_, launched, _)] = recorder.launched
    assert launched == grid


def test_many_tokens_dequantize_once() -> None:
    recorder = Recorder()
    layer = make_layer([70], 200, 64, [4])
    x = make_input(65, 200, torch.float16)
    active = torch.tensor([4], dtype=torch.int32)
    cuda_launch.multiply(recorder, x, layer.planes, layer.decoders, active, [4], [70], 64)
    [(instance, grid, shared_bytes)] = recorder.launched
    assert (instance.name, grid, shared_bytes) == ("matquant_dequantize_float16_2", (2, 1), 0)


def test_the_key_changes_with_sources_architecture_and_compiler(tmp_path: Path) -> None:
    shutil.copytree(SOURCES / "cuda", tmp_path / "cuda")
    one = INSTANCES[0]
    key = cuda_jit.key_of(one, "sm_80", (13, 0), tmp_path)
    assert key == cuda_jit.key_of(one, "sm_80", (13, 0), SOURCES)
    others = {cuda_jit.key_of(one, "sm_90", (13, 0)), cuda_jit.key_of(one, "sm_80", (13, 1))}
    others.add(cuda_jit.key_of(INSTANCES[1], "sm_80", (13, 0)))
    with (tmp_path / "cuda" / "decode.cuh").open("a") as file:
        file.write("// changed\n")
    others.add(cuda_jit.key_of(one, "sm_80", (13, 0), tmp_path))
    assert len(others | {key}) == 5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["matquant_decode_bfloat16_8_2", "matquant_dequantize_float16_1"])
def test_a_program_has_one_kernel_and_compiles(name: str, tmp_path: Path) -> None:
    """By nvcc; by NVRTC where CuPy is installed."""
    [instance] = [instance for instance in INSTANCES if instance.name == name]
    try:
        import cupy  # noqa: F401
    except ImportError:
        nvcc = shutil.which("nvcc")
        if nvcc is None:
            pytest.skip("no nvcc and no CuPy")
        import subprocess

        source = tmp_path / "one.cu"
        source.write_text(cuda_jit.source_of(instance))
        command = [nvcc, "-ptx", "-std=c++17", "-arch=sm_80", f"-I{SOURCES}", source, "-o", tmp_path / "one.ptx"]
        subprocess.run(command, check=True)
        entries = [line for line in (tmp_path / "one.ptx").read_text().splitlines() if ".entry" in line]
        assert len(entries) == 1
        assert name in entries[0]
    else:
        assert name.encode() in cuda_jit.compile_kernel(instance, "sm_80", cuda_jit.cuda_headers())
