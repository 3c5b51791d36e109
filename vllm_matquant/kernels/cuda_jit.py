"""CUDA kernels compiled at first use, by NVRTC through CuPy: for a machine with a GPU and CuPy but no CUDA toolkit."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vllm_matquant.checkpoint.files import publish_bytes
from vllm_matquant.kernels import cuda_launch
from vllm_matquant.kernels.cuda_launch import SOURCES, THREADS, Instance
from vllm_matquant.kernels.reference import linear_shape

CACHE_VARIABLE = "MATQUANT_KERNEL_CACHE"


def cache_folder() -> Path:
    """Where compiled kernels are kept: what MATQUANT_KERNEL_CACHE in the environment names, else below ~/.cache."""
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named) if named else Path.home() / ".cache" / "vllm_matquant" / "kernels"


def source_of(instance: Instance) -> str:
    """A program with this kernel alone."""
    lists = {"MATQUANT_CUDA_INSTANCES": "", "MATQUANT_CUDA_DEQUANTIZERS": ""}
    lists["MATQUANT_CUDA_INSTANCES" if instance.tokens else "MATQUANT_CUDA_DEQUANTIZERS"] = f"INSTANCE{instance.line}"
    defined = "".join(f"#define {name}(INSTANCE) {content}\n" for name, content in lists.items())
    return f'{defined}#include "cuda/kernels.cu"\n'


def key_of(instance: Instance, architecture: str, version: Sequence[int], sources: Path = SOURCES) -> str:
    """What the compiled kernel depends on, as a name for its file."""
    digest = hashlib.sha256()
    for file in [*sorted((sources / "cuda").glob("*.cuh")), sources / "cuda" / "kernels.cu"]:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    digest.update(f"{instance} {architecture} {list(version)}".encode())
    return f"{instance.name}.{architecture}.{digest.hexdigest()[:16]}"


def compile_kernel(instance: Instance, architecture: str, include: Sequence[Path], sources: Path = SOURCES) -> bytes:
    """The kernel's machine code.

    Args:
        instance: the kernel.
        architecture: such as ``sm_80``.
        include: folders with CUDA's headers.
        sources: the folder csrc.

    Raises:
        RuntimeError: NVRTC refuses the program; the message is its log.
    """
    from cupy_backends.cuda.libs import nvrtc

    program = nvrtc.createProgram(source_of(instance), f"{instance.name}.cu", (), ())
    folders = [f"-I{folder}" for folder in (sources, *include)]
    try:
        nvrtc.compileProgram(program, ["-std=c++17", f"--gpu-architecture={architecture}", *folders])
        return bytes(nvrtc.getCUBIN(program))
    except nvrtc.NVRTCError as error:
        raise RuntimeError(f"{instance.name}: {error}\n{nvrtc.getProgramLog(program)}") from error
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


def load_kernel(instance: Instance, device: int) -> Any:
    """CuPy's function for a kernel, from the cache or compiled now."""
    import cupy
    from cupy_backends.cuda.libs import nvrtc

    architecture = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    file = cache_folder() / f"{key_of(instance, architecture, nvrtc.getVersion())}.cubin"
    if not file.is_file():
        code = compile_kernel(instance, architecture, cuda_headers())
        file.parent.mkdir(parents=True, exist_ok=True)
        publish_bytes(file, code)
    with cupy.cuda.Device(device):
        function = cupy.RawModule(path=str(file)).get_function(instance.name)
        function.max_dynamic_shared_size_bytes = instance.shared_bytes(8)
    return function


class CupyLauncher:
    """Starts kernels on one device, on the stream that torch works on."""

    def __init__(self, device: int) -> None:
        self.device = device
        self.instances: Sequence[Instance] = cuda_launch.read_instances()
        self.processors = torch.cuda.get_device_properties(device).multi_processor_count
        self.functions: dict[str, Any] = {}

    def launch(
        self,
        instance: Instance,
        grid: tuple[int, ...],
        shared_bytes: int,
        arguments: Sequence[torch.Tensor | bytes | None],
    ) -> None:
        import cupy
        import numpy as np

        if instance.name not in self.functions:
            self.functions[instance.name] = load_kernel(instance, self.device)

        def as_argument(value: torch.Tensor | bytes | None) -> Any:
            if isinstance(value, bytes):
                return np.frombuffer(value, np.uint8)  # CuPy passes what an array holds by value
            return np.uint64(0 if value is None else value.data_ptr())

        stream = torch.cuda.current_stream(self.device).cuda_stream
        with cupy.cuda.Device(self.device), cupy.cuda.ExternalStream(stream):
            values = tuple(as_argument(value) for value in arguments)
            self.functions[instance.name](grid, (THREADS,), values, shared_mem=shared_bytes)


@functools.cache
def launcher_of(device: int) -> CupyLauncher:
    return CupyLauncher(device)


@torch.library.custom_op("matquant::jit_linear", mutates_args=())
def linear(
    x: torch.Tensor,
    planes: torch.Tensor,
    decoders: torch.Tensor,
    active_width: torch.Tensor,
    decoder_widths: Sequence[int],
    output_sizes: Sequence[int],
    group_size: int,
    bias: torch.Tensor | None = None,
    activation_bits: int | None = None,
) -> torch.Tensor:
    """The same as :func:`vllm_matquant.kernels.ops.linear` on a CUDA device; kernels are compiled when first used.

    Raises:
        RuntimeError: NVRTC refuses a kernel.
    """
    launcher = launcher_of(x.device.index or 0)
    return cuda_launch.multiply(
        launcher, x, planes, decoders, active_width, decoder_widths, output_sizes, group_size, bias
    )


linear.register_fake(linear_shape)
