"""CUDA kernels without a GPU: compiled to PTX and executed by an emulator, with checks of memory, races and copies.

The library's host code is what runs on a GPU too, but for the CUDA runtime's calls (csrc/cuda/device.cu), in the place
of which is the emulator. emulator_protocol.py says what an emulator must be.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from tests.cuda.emulator_protocol import Emulator, EmulatorModule
from tests.cuda.random_layers import Layer
from vllm_matquant.kernels import cuda_jit, cuda_launch
from vllm_matquant.kernels.cuda_launch import Launch, Memory

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc"
VARIABLE = "MATQUANT_PTX_EMULATOR"


def skip_without_tools() -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    if not os.environ.get(VARIABLE):
        pytest.skip(f"{VARIABLE} does not name the folder of a PTX emulator")


def emulator_module() -> EmulatorModule:
    folder = os.environ[VARIABLE]
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return cast(EmulatorModule, importlib.import_module("ptxemu"))


def compile_ptx(folder: Path, architecture: str, kernels: Collection[str], sources: Path = SOURCES) -> str:
    """The PTX of some kernels."""
    definitions = cuda_launch.kernel_definitions()
    source, target = folder / "program.cu", folder / f"program.{architecture}.ptx"
    source.write_text(cuda_jit.source_of([definitions[name] for name in kernels]))
    flags = ["-std=c++17", "-O3", "-lineinfo", f"-arch={architecture}", f"-I{sources}"]
    subprocess.run(["nvcc", "-ptx", *flags, source, "-o", target], check=True)
    return target.read_text()


class Recorder:
    """Starts nothing and remembers what it was asked for."""

    def __init__(self, processors: int = 1) -> None:
        self.processors = processors
        self.launched: list[Launch] = []

    def launch(self, launch: Launch) -> None:
        self.launched.append(launch)


class Emulated:
    """Launches the kernels of a piece of PTX; what they write is poisoned before."""

    processors = 1

    def __init__(self, ptx: str) -> None:
        module = emulator_module()
        self.out = module.Out
        self.emulators: dict[str, Emulator] = dict.fromkeys(re.findall(r"\.entry (\w+)", ptx), module.Emulator(ptx))
        self.options: dict[str, Any] = {}
        self.written: list[np.ndarray] = []  # by kernels that dequantize

    def launch(self, launch: Launch) -> None:
        # The output of a segment has columns of those before it, which must stay.
        written = [3] if launch.dequantizes else [6] if self.written else [5, 6]
        arrays = [None if memory is None else as_array(memory) for memory in launch.pointers]
        passed = [
            self.out(value) if index in written and value is not None else value for index, value in enumerate(arrays)
        ]
        arguments = [*passed, launch.shape]
        options = {"shared": launch.shared_bytes, **self.options}
        self.emulators[launch.kernel].launch(launch.kernel, launch.grid, launch.threads, arguments, **options)
        if launch.dequantizes:
            self.written.append(arrays[3].copy())
        else:
            self.written.append(arrays[5])
            assert arrays[7] is None or not arrays[7].any()

    def multiply(
        self,
        layer: Layer,
        x: torch.Tensor,
        widths: Sequence[int],
        bias: torch.Tensor | None = None,
        splits: int | None = 1,
        **options: Any,
    ) -> torch.Tensor:
        """``x`` [tokens, in_features] times the layer at ``widths``."""
        self.options, self.written = options, []
        layer.activate(widths)
        return cuda_launch.multiply(self, x, layer.weight, bias, splits)

    def multiply_by_row(
        self,
        layer: Layer,
        x: torch.Tensor,
        widths: Sequence[Sequence[int]],
        slots: torch.Tensor,
        bias: torch.Tensor | None = None,
        splits: int | None = 1,
        **options: Any,
    ) -> torch.Tensor:
        """Each row of ``x`` [tokens, in_features] times the layer at the ``widths`` of its slot."""
        self.options, self.written = options, []
        readers = layer.weight.readers(widths)
        handles = torch.cat([*(reader.handle for reader in readers), torch.zeros(2, dtype=torch.int64)])
        return cuda_launch.multiply_by_row(self, x, handles, slots, layer.weight.out_features, bias, splits)

    def dequantize(self, layer: Layer, widths: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The weights at ``widths``, columns padded to whole steps."""
        self.multiply(layer, torch.zeros(100, layer.codes.shape[1], dtype=dtype), widths)
        sizes = [sum(segment.resident.output_sizes) for segment in layer.weight.segments]
        parts = zip(self.written, sizes, strict=True)
        return torch.cat([torch.from_numpy(array).view(dtype).view(size, -1) for array, size in parts])


def as_array(memory: Memory) -> np.ndarray:
    """The bytes that a pointer points to."""
    content = (ctypes.c_uint8 * memory.size).from_address(memory.address)
    return np.frombuffer(content, np.uint8)
