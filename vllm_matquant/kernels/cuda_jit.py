"""CUDA kernels compiled at first use, by NVRTC through CuPy: for a machine with a GPU and CuPy but no CUDA toolkit."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from vllm_matquant.checkpoint.files import publish_bytes
from vllm_matquant.kernels import cuda_launch, ops
from vllm_matquant.kernels.cuda_launch import Launch
from vllm_matquant.kernels.operators import define_linear
from vllm_matquant.kernels.weight import PackedWeight

SOURCES = Path(__file__).parents[1] / "csrc"
CACHE_VARIABLE = "MATQUANT_KERNEL_CACHE"


def cache_folder() -> Path:
    """Where compiled kernels are kept: what MATQUANT_KERNEL_CACHE in the environment names, else below ~/.cache."""
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named) if named else Path.home() / ".cache" / "vllm_matquant" / "kernels"


def source_of(definitions: Iterable[str]) -> str:
    """A program with kernels: of those of :func:`vllm_matquant.kernels.cuda_launch.kernel_definitions`."""
    return "\n".join(['#include "cuda/kernels.cuh"', *definitions, ""])


def key_of(kernel: str, definition: str, architecture: str, version: Sequence[int], sources: Path = SOURCES) -> str:
    """What the compiled kernel depends on, as a name for its file."""
    digest = hashlib.sha256()
    for file in [
        *sorted((sources / "cuda").glob("*.cuh")),
        *sorted((sources / "cuda").glob("*.h")),
        sources / "decoder.h",
    ]:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    digest.update(f"{definition} {architecture} {list(version)}".encode())
    return f"{kernel}.{architecture}.{digest.hexdigest()[:16]}"


def compile_kernel(
    kernel: str, definition: str, architecture: str, include: Sequence[Path], sources: Path = SOURCES
) -> bytes:
    """The kernel's machine code.

    Args:
        kernel: its name.
        definition: what defines it.
        architecture: such as ``sm_80``.
        include: folders with CUDA's headers.
        sources: the folder csrc.

    Raises:
        RuntimeError: NVRTC refuses the program; the message is its log.
    """
    from cupy_backends.cuda.libs import nvrtc

    program = nvrtc.createProgram(source_of([definition]), f"{kernel}.cu", (), ())
    folders = [f"-I{folder}" for folder in (sources, *include)]
    try:
        nvrtc.compileProgram(program, ["-std=c++17", f"--gpu-architecture={architecture}", *folders])
        return bytes(nvrtc.getCUBIN(program))
    except nvrtc.NVRTCError as error:
        raise RuntimeError(f"{kernel}: {error}\n{nvrtc.getProgramLog(program)}") from error
    finally:
        nvrtc.destroyProgram(program)


def cuda_headers() -> list[Path]:
    """Folders with CUDA's headers: those of pip's packages, which come with their NVRTC, then the toolkit's."""
    folders = []
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations or [] if spec else []:
        folders += sorted(Path(root).glob("*/include"))
    folders.append(Path(os.environ.get("CUDA_PATH", "/usr/local/cuda")) / "include")
    return [folder for folder in folders if (folder / "cuda_fp16.h").is_file()]


def load_kernel(kernel: str, device: int) -> Any:
    """CuPy's function for a kernel, from the cache or compiled now."""
    import cupy
    from cupy_backends.cuda.libs import nvrtc

    definition = cuda_launch.kernel_definitions()[kernel]
    architecture = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    file = cache_folder() / f"{key_of(kernel, definition, architecture, nvrtc.getVersion())}.cubin"
    if not file.is_file():
        code = compile_kernel(kernel, definition, architecture, cuda_headers())
        file.parent.mkdir(parents=True, exist_ok=True)
        publish_bytes(file, code)
    with cupy.cuda.Device(device):
        return cupy.RawModule(path=str(file)).get_function(kernel)


class CupyLauncher:
    """Starts kernels on one device, on the stream that torch works on."""

    def __init__(self, device: int) -> None:
        self.device = device
        self.processors: int = torch.cuda.get_device_properties(device).multi_processor_count
        self.functions: dict[str, Any] = {}

    def launch(self, launch: Launch) -> None:
        """Start a kernel, which is compiled if it was never used before."""
        import cupy
        import numpy as np

        if launch.kernel not in self.functions:
            self.functions[launch.kernel] = load_kernel(launch.kernel, self.device)
        function = self.functions[launch.kernel]
        pointers = [np.uint64(0 if memory is None else memory.address) for memory in launch.pointers]
        shape = np.frombuffer(launch.shape, np.uint8)  # CuPy passes what an array holds by value
        stream = torch.cuda.current_stream(self.device).cuda_stream
        with cupy.cuda.Device(self.device), cupy.cuda.ExternalStream(stream):
            # What there is without asking may count the kernel's own variables or not.
            if launch.shared_bytes >= function.max_dynamic_shared_size_bytes:
                function.max_dynamic_shared_size_bytes = launch.shared_bytes
            function(launch.grid, (launch.threads,), (*pointers, shape), shared_mem=launch.shared_bytes)


@functools.cache
def launcher_of(device: int) -> CupyLauncher:
    """The launcher of the device with this index."""
    return CupyLauncher(device)


def _multiply(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    return cuda_launch.multiply(launcher_of(x.device.index or 0), x, weight, bias)


linear = define_linear("jit_linear", _multiply)
"""The product on a CUDA device, see :meth:`vllm_matquant.kernels.kernel.Kernel.linear`; a kernel is compiled when it is
first used, and a RuntimeError says why NVRTC refuses one."""


@torch.library.custom_op("matquant::jit_linear_by_row", mutates_args=())
def linear_by_row(
    x: torch.Tensor, weights: torch.Tensor, slots: torch.Tensor, out_features: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The product by rows on a CUDA device, see :meth:`vllm_matquant.kernels.kernel.Kernel.linear_by_row`."""
    launcher = launcher_of(x.device.index or 0)
    return cuda_launch.multiply_by_row(launcher, x, weights, slots, out_features, bias)


linear_by_row.register_fake(ops.linear_by_row_fake)
