"""CUDA kernels without a GPU: compiled to PTX and executed by an emulator, with checks of memory, races and copies.

The emulator is a package ``ptxemu`` in the folder that the environment variable MATQUANT_PTX_EMULATOR names.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.cuda.random_layers import Layer
from vllm_matquant.kernels import cuda_launch
from vllm_matquant.kernels.cuda_launch import STEP_COLUMNS, THREADS, Instance

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc"
VARIABLE = "MATQUANT_PTX_EMULATOR"


def skip_without_tools() -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    if not os.environ.get(VARIABLE):
        pytest.skip(f"{VARIABLE} does not name the folder of a PTX emulator")


def compile_ptx(folder: Path, architecture: str, sources: Path = SOURCES) -> str:
    """The PTX of csrc/cuda/kernels.cu."""
    target = folder / f"kernels.{architecture}.ptx"
    flags = ["-std=c++17", "-O3", "-lineinfo", f"-arch={architecture}", f"-I{sources}"]
    subprocess.run(["nvcc", "-ptx", *flags, sources / "cuda" / "kernels.cu", "-o", target], check=True)
    return target.read_text()


class Emulated:
    """Launches the kernels of a piece of PTX; what they write is poisoned before."""

    processors = 1

    def __init__(self, ptx: str, sources: Path = SOURCES) -> None:
        sys.path.insert(0, os.environ[VARIABLE])
        from ptxemu import Emulator, Out

        self.emulator, self.out = Emulator(ptx), Out
        self.instances: Sequence[Instance] = cuda_launch.read_instances(sources)
        self.options: dict[str, Any] = {}

    def launch(
        self,
        instance: Instance,
        grid: tuple[int, ...],
        shared_bytes: int,
        arguments: Sequence[torch.Tensor | bytes | None],
    ) -> None:
        written = range(5, 7) if instance.tokens else range(3, 4)
        arrays = [value if value is None or isinstance(value, bytes) else as_array(value) for value in arguments]
        passed = [self.out(value) if index in written else value for index, value in enumerate(arrays)]
        self.emulator.launch(instance.name, grid, THREADS, passed, shared=shared_bytes, **self.options)
        if instance.tokens:
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
        planes: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """``x`` [tokens, in_features] times the layer at ``widths``."""
        self.options = options
        active = torch.tensor(widths, dtype=torch.int32)
        planes = layer.planes if planes is None else planes
        rest = (active, layer.decoder_widths, layer.output_sizes, layer.group_size, bias, splits)
        return cuda_launch.multiply(self, x, planes, layer.decoders, *rest)

    def dequantize(self, layer: Layer, widths: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The weights at ``widths``, columns padded to whole steps."""
        self.options = {}
        active, columns = torch.tensor(widths, dtype=torch.int32), layer.codes.shape[1]
        groups, shift = cuda_launch.grouping_of(layer.group_size, columns)
        parts = (layer.decoder_widths, layer.output_sizes)
        shape = cuda_launch.describe(layer.planes, layer.decoders, *parts, 0, shift)
        padded = torch.empty(0, columns + -columns % STEP_COLUMNS, dtype=dtype)
        rows = sum(layer.output_sizes)
        return cuda_launch.dequantize(self, layer.planes, layer.decoders, active, shape, groups, rows, padded)


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """The memory of a tensor, 16-bit values as numpy takes them."""
    assert tensor.is_contiguous()
    return (tensor.view(torch.int16) if tensor.element_size() == 2 else tensor).numpy()
