"""CUDA kernels without a GPU: compiled to PTX and executed by an emulator, with checks of memory, races and copies.

The emulator is a package ``ptxemu`` in the folder that the environment variable MATQUANT_PTX_EMULATOR names.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.cuda.random_layers import Layer
from vllm_matquant.kernels import cuda_layout

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc"
THREADS, WARPS, STEP_COLUMNS, MAX_PARTITIONS = 128, 4, 128, 8
TOKENS = (8, 16, 24)  # the most of a kernel
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


def kernel_name(dtype: torch.dtype, tokens: int, group_size: int) -> str:
    """The kernel for as many tokens at once; there is none for more than 16 and groups of 32."""
    groups = max(1, STEP_COLUMNS // group_size)
    most = TOKENS if groups < 4 else TOKENS[:2]
    taken = next((size for size in most if tokens <= size), most[-1])
    return f"matquant_decode_{str(dtype).removeprefix('torch.')}_{taken}_{groups}"


def shared_bytes(tokens: int, groups: int, width: int) -> int:
    """Dynamic shared memory of a block, counted from what a warp holds."""
    narrow = 3 * (min(width, 4) * 1024 + groups * 256)
    wide = 2 * (width * 1024 + groups * 256) if width > 4 else 0
    return WARPS * max(narrow, wide, 64 * tokens * 4)


class Emulated:
    """The kernels of a piece of PTX."""

    def __init__(self, ptx: str) -> None:
        sys.path.insert(0, os.environ[VARIABLE])
        from ptxemu import Emulator, Out

        self.emulator, self.out = Emulator(ptx), Out

    def multiply(
        self,
        layer: Layer,
        x: torch.Tensor,
        widths: Sequence[int],
        bias: torch.Tensor | None = None,
        splits: int = 1,
        planes: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """``x`` [tokens, in_features] times the layer at ``widths``; what is written is poisoned before."""
        tokens, rows = len(x), sum(layer.output_sizes)
        planes = layer.planes if planes is None else planes
        tile_rows, _, resident_width, _ = planes.shape
        shape = describe(layer, planes, tokens)

        name = kernel_name(x.dtype, tokens, layer.kernel_group_size)
        at_once = int(name.split("_")[-2])
        passes = -(-tokens // at_once)
        padded = torch.nn.functional.pad(x, (0, -x.shape[1] % STEP_COLUMNS))
        output = np.empty((tokens, rows), np.int16)
        partial_sums = np.empty(splits * tile_rows * tokens * 64, np.float32)
        arrivals = np.zeros(passes * tile_rows, np.uint32)
        arguments = [
            as_array(padded),
            planes.numpy(),
            as_array(layer.decoders),
            np.array(widths, np.int32),
            None if bias is None else as_array(bias),
            self.out(output),
            self.out(partial_sums),
            arrivals,
            shape,
        ]
        shared = shared_bytes(at_once, int(name.split("_")[-1]), resident_width)
        self.emulator.launch(name, (tile_rows, splits, passes), THREADS, arguments, shared=shared, **options)
        assert not arrivals.any()
        return torch.from_numpy(output).view(x.dtype)

    def dequantize(self, layer: Layer, widths: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The weights at ``widths``, columns padded to whole steps."""
        tile_rows, tile_columns, *_ = layer.planes.shape
        steps = -(-tile_columns // 2)
        output = np.empty((sum(layer.output_sizes), steps * STEP_COLUMNS), np.int16)
        groups = max(1, STEP_COLUMNS // layer.kernel_group_size)
        name = f"matquant_dequantize_{str(dtype).removeprefix('torch.')}_{groups}"
        arguments = [layer.planes.numpy(), as_array(layer.decoders), np.array(widths, np.int32), self.out(output)]
        grid = (tile_rows, -(-2 * steps // WARPS))
        self.emulator.launch(name, grid, THREADS, [*arguments, describe(layer, layer.planes, 0)])
        return torch.from_numpy(output).view(dtype)


def describe(layer: Layer, planes: torch.Tensor, tokens: int) -> bytes:
    """The kernels' Shape."""
    tile_rows, tile_columns, resident_width, _ = planes.shape
    per_channel = layer.group_size >= layer.codes.shape[1]
    shift = 31 if per_channel else max(0, (layer.group_size // STEP_COLUMNS).bit_length() - 1)
    by_width = sum(
        (layer.decoder_widths.index(width) if width in layer.decoder_widths else 255) << 8 * (width - 2)
        for width in range(2, 9)
    )
    partitions = len(layer.output_sizes)
    numbers = [tokens, sum(layer.output_sizes), tile_rows, tile_columns, resident_width, layer.decoders.shape[2]]
    numbers += [shift, partitions]
    for starts in cuda_layout.partition_starts(layer.output_sizes):
        numbers += [*starts, *[0] * (MAX_PARTITIONS - partitions)]
    return struct.pack(f"{len(numbers)}iQ", *numbers, by_width)


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """16-bit values as numpy takes them."""
    return tensor.contiguous().view(torch.int16).numpy()
