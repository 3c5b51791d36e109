"""The launch on a GPU (csrc/cuda/device.cu) without one: compiled as C++ against a stand-in of the CUDA runtime."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.cuda.emulation import ROOT, SOURCES

STAND_IN = Path(__file__).parent / "stand_in"
RUNS = Path(__file__).with_name("device_runs.py")
COMPILED = ["cuda/plan.cpp", "cuda/linear.cpp", "cuda/callback.cpp", "weight.cpp", "torch_bindings.cpp"]
# Lines of device.cu broken, each of which must be noticed.
MUTATIONS = {
    "the next kernel": ("kKernels[plan.instance];", "kKernels[(plan.instance + 1) % std::size(kKernels)];"),
    "another grid": ("dim3 grid(plan.grid[0], plan.grid[1],", "dim3 grid(plan.grid[1], plan.grid[0],"),
    "half the threads": ("dim3(kThreads)", "dim3(kThreads / 2)"),
    "no dynamic shared memory": ("arguments, plan.shared_bytes, stream_", "arguments, 0, stream_"),
    "the default shared memory": ("if (plan.shared_bytes > 0) {", "if (plan.shared_bytes > 1 << 20) {"),
    "another stream": ("plan.shared_bytes, stream_)", "plan.shared_bytes, nullptr)"),
    "no shape": ("Shape shape = plan.shape;", "Shape shape = {};"),
    "pointers in another order": ("arguments[index] = &data[index];", "arguments[index] = &data[index ^ 1];"),
    "an error ignored": (
        "check_cuda(cudaLaunchKernel(kernel, grid, dim3(kThreads), arguments, plan.shared_bytes, stream_), name);",
        "cudaLaunchKernel(kernel, grid, dim3(kThreads), arguments, plan.shared_bytes, stream_);",
    ),
    "one multiprocessor": (
        "processors() const override { return processors_; }",
        "processors() const override { return 1; }",
    ),
}

pytestmark = pytest.mark.slow


def compile_objects(folder: Path, sources: list[Path]) -> list[Path]:
    torch_folder = Path(torch.__file__).parent
    flags = ["-std=c++20", "-O0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-x", "c++"]
    includes = [f"-I{STAND_IN}", f"-I{SOURCES}", "-isystem", str(torch_folder / "include")]
    objects = []
    for source in sources:
        objects.append(folder / f"{source.stem}.o")
        command = ["g++", *flags, *includes, "-DTORCH_TARGET_VERSION=0x020a000000000000", "-c", source]
        subprocess.run([*command, "-o", objects[-1]], check=True)
    return objects


def link(folder: Path, objects: list[Path]) -> Path:
    library = folder / "stand_in.so"
    torch_libraries = Path(torch.__file__).parent / "lib"
    command = ["g++", "-shared", *objects, f"-L{torch_libraries}", "-ltorch_cpu", "-ldl", "-o", library]
    subprocess.run(command, check=True)
    return library


def run(library: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, RUNS, library]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The objects of all that is not device.cu."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    sources = [*(SOURCES / name for name in COMPILED), STAND_IN / "device_stand_in.cpp"]
    return compile_objects(tmp_path_factory.mktemp("stand_in"), sources)


def test_the_runtime_is_asked_for_what_the_emulator_runs(others: list[Path], tmp_path: Path) -> None:
    done = run(link(tmp_path, [*others, *compile_objects(tmp_path, [SOURCES / "cuda" / "device.cu"])]))
    assert done.returncode == 0, done.stderr[-3000:]


def changed_source(name: str) -> str:
    source = (SOURCES / "cuda" / "device.cu").read_text()
    before, after = MUTATIONS[name]
    assert source.count(before) == 1
    return source.replace(before, after)


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_source_has_what_is_to_be_changed(name: str) -> None:
    changed_source(name)


@pytest.mark.mutation
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_line_is_noticed(name: str, others: list[Path], tmp_path: Path) -> None:
    (tmp_path / "device.cu").write_text("#include <iterator>\n" + changed_source(name))
    done = run(link(tmp_path, [*others, *compile_objects(tmp_path, [tmp_path / "device.cu"])]))
    assert done.returncode
    assert "AssertionError" in done.stderr
