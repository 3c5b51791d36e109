"""CUDA kernels without a GPU: compiled to PTX and executed by an emulator, with checks of memory, races and copies.

What starts them is the code that starts them on a GPU where they are compiled at run time; what it asks the library's
plan for is what the library's own launch asks it for. emulator_protocol.py says what an emulator must be.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from tests.cuda.emulator_protocol import EmulatorModule
from tests.cuda.random_layers import Layer
from vllm_matquant.kernels import cuda_jit, cuda_launch
from vllm_matquant.kernels.cuda_launch import Plan

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


class Emulated:
    """Launches the kernels of a piece of PTX; what they write is poisoned before."""

    processors = 1

    def __init__(self, ptx: str) -> None:
        module = emulator_module()
        self.emulator, self.out = module.Emulator(ptx), module.Out
        self.options: dict[str, Any] = {}

    def launch(self, plan: Plan, arguments: Sequence[torch.Tensor | bytes | None]) -> None:
        # The output of a segment has columns of those before it, which must stay.
        written = [3] if plan.dequantizes else [5, 6] if plan.first_output == 0 else [6]
        arrays = [value if value is None or isinstance(value, bytes) else as_array(value) for value in arguments]
        passed = [self.out(value) if index in written else value for index, value in enumerate(arrays)]
        self.emulator.launch(plan.kernel, plan.grid, plan.threads, passed, shared=plan.shared_bytes, **self.options)
        if not plan.dequantizes:
            arrivals = arguments[7]
            assert isinstance(arrivals, torch.Tensor)
            assert not arrivals.any()

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
        self.options = options
        layer.activate(widths)
        return cuda_launch.multiply(self, x, layer.weight, bias, splits)

    def dequantize(self, layer: Layer, widths: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The weights at ``widths``, columns padded to whole steps."""
        self.options = {}
        layer.activate(widths)
        x = torch.zeros(100, layer.codes.shape[1], dtype=dtype)
        plans = list(cuda_launch.plans_of(x, layer.weight, None, self.processors))
        return cuda_launch.dequantize(self, layer.weight, plans, x)


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """The memory of a tensor, 16-bit values as numpy takes them."""
    assert tensor.is_contiguous()
    return (tensor.view(torch.int16) if tensor.element_size() == 2 else tensor).numpy()
