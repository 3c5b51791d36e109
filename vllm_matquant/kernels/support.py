"""The one table of which kernel serves which device, dtype, width and shape."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from vllm_matquant.checkpoint.spec import WIDTHS
from vllm_matquant.kernels import cuda_layout, layout, ops, reference
from vllm_matquant.kernels.embedding import embedding
from vllm_matquant.kernels.layout import STEP_COLUMNS

logger = logging.getLogger(__name__)

CUPY_INSTALL = "pip install cupy-cuda13x, or cupy-cuda12x for a torch with CUDA 12"
CUDA_BUILD = f"With a CUDA toolkit on the PATH they are built by: {ops.BUILD_COMMAND}"

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class UnsupportedError(ValueError):
    """No kernel serves what was asked for; the message gives the reasons of each."""


@dataclass(frozen=True)
class Request:
    """What a layer asks of a kernel.

    Attributes:
        device_type: "cpu", "cuda", ...
        dtype: of the activations.
        widths: the decoder widths.
        in_features: columns.
        group_size: columns that share a decoder.
    """

    device_type: str
    dtype: torch.dtype
    widths: tuple[int, ...]
    in_features: int
    group_size: int


@dataclass(frozen=True)
class Layout:
    """How codes and decoders lie in memory for a kernel.

    Attributes:
        repacks_on_cpu: whether what is repacked must be on the CPU, whatever the kernel's device.
        repack_codes: see :func:`vllm_matquant.kernels.ops.repack_codes`.
        repack_decoders: see :func:`vllm_matquant.kernels.layout.repack_decoders`.
        embedding: see :func:`vllm_matquant.kernels.embedding.embedding`.
    """

    repacks_on_cpu: bool
    repack_codes: Callable[..., torch.Tensor]
    repack_decoders: Callable[..., torch.Tensor]
    embedding: Callable[..., torch.Tensor]


CPU_LAYOUT = Layout(True, ops.repack_codes, layout.repack_decoders, embedding)
CUDA_LAYOUT = Layout(False, cuda_layout.repack_codes, cuda_layout.pack_decoders, cuda_layout.embedding)


@dataclass(frozen=True)
class Kernel:
    """One row of the table.

    Attributes:
        name: what logs and benchmarks call it.
        device_type: the device it runs on, None for any.
        widths: widths that it decodes.
        dtypes: dtypes of activations that it takes.
        group_multiple: what the group size must be a multiple of, where a row has more than one group.
        group_powers: whether it must then be a power of two as well.
        operator: the C++ operator, as in ``torch.ops.matquant``; None for the reference, which needs no library.
        linear: the function to call, see :func:`vllm_matquant.kernels.ops.linear`.
        layout: of its codes and decoders.
        min_capability: the oldest CUDA devices that it runs on.
        module: a module that must be installed for it, and how.
    """

    name: str
    device_type: str | None
    widths: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    group_multiple: int
    operator: str | None
    linear: Callable[..., torch.Tensor]
    layout: Layout = CPU_LAYOUT
    group_powers: bool = False
    min_capability: tuple[int, int] | None = None
    module: tuple[str, str] | None = None

    def can_implement(self, request: Request) -> tuple[bool, list[str]]:
        """Whether this kernel serves ``request``, and every reason why not."""
        reasons = []
        if self.device_type not in (None, request.device_type):
            reasons.append(f"device: found {request.device_type}, expected {self.device_type}")
        if request.dtype not in self.dtypes:
            reasons.append(f"dtype: found {request.dtype}, expected one of {', '.join(map(str, self.dtypes))}")
        missing = sorted(set(request.widths) - set(self.widths))
        if missing:
            reasons.append(f"widths: found {missing}, expected some of {list(self.widths)}")
        if not self._takes_groups(request):
            power = " that is a power of two" if self.group_powers else ""
            reasons.append(
                f"group size: found {request.group_size}, expected a multiple of {self.group_multiple}{power} "
                f"or at least the {request.in_features} input features"
            )
        reasons += self._what_is_missing()
        return not reasons, reasons

    def _takes_groups(self, request: Request) -> bool:
        size = request.group_size
        if size < 1 or size >= request.in_features:
            return size > 0
        return size % self.group_multiple == 0 and not (self.group_powers and size & (size - 1))

    def _what_is_missing(self) -> list[str]:
        """Of the library and of the machine."""
        if self.module is not None:
            name, how = self.module
            if importlib.util.find_spec(name) is None:
                return [f"{name}: not installed; {how}"]
        if self.operator is not None:
            try:
                built = ops.is_built_for(self.device_type or "cpu")
            except ops.LibraryError as error:
                return [str(error)]
            if not built:
                return [f"{ops.LIBRARY}: built without kernels for {self.device_type}. {CUDA_BUILD}"]
        if self.min_capability is not None and torch.cuda.is_available():
            found = torch.cuda.get_device_capability()
            if found < self.min_capability:
                return [f"compute capability: found {found}, expected at least {self.min_capability}"]
        return []


def _cuda_jit(*arguments: Any) -> torch.Tensor:
    from vllm_matquant.kernels import cuda_jit

    return cuda_jit.linear(*arguments)


def _triton(*arguments: Any) -> torch.Tensor:
    from vllm_matquant.kernels import triton_linear

    return triton_linear.linear(*arguments)


REFERENCE = Kernel("reference", None, WIDTHS, DTYPES, 1, None, reference.reference_linear)
_CUDA = Kernel(
    "cuda",
    "cuda",
    WIDTHS,
    (torch.bfloat16, torch.float16),
    32,
    "linear",
    ops.linear,
    layout=CUDA_LAYOUT,
    group_powers=True,
    min_capability=(8, 0),
)
KERNELS = (
    Kernel("cpu", "cpu", WIDTHS, DTYPES, STEP_COLUMNS, "linear", ops.linear),
    _CUDA,
    replace(_CUDA, name="cuda-jit", operator=None, linear=_cuda_jit, module=("cupy", CUPY_INSTALL)),
    Kernel(
        "triton",
        "cuda",
        WIDTHS,
        _CUDA.dtypes,
        1,
        None,
        _triton,
        layout=CUDA_LAYOUT,
        module=("triton", "pip install triton"),
    ),
)


def select_kernel(
    device: torch.device | str, dtype: torch.dtype, widths: Sequence[int], in_features: int, group_size: int
) -> Kernel:
    """The first kernel that serves a layer, the reference where no other can; a warning tells what kept better ones.

    Args:
        device: where the layer's tensors are.
        dtype: of the activations.
        widths: the decoder widths.
        in_features: columns.
        group_size: columns that share a decoder.

    Raises:
        UnsupportedError: not even the reference serves it.
    """
    request = Request(torch.device(device).type, dtype, tuple(widths), in_features, group_size)
    refusals: list[str] = []
    for kernel in KERNELS:
        served, reasons = kernel.can_implement(request)
        if served:
            if any(kernel.device_type == other.device_type for other in KERNELS[: len(refusals)]):
                logger.warning("The kernel %s serves %s, for:\n%s", kernel.name, request, "\n".join(refusals))
            return kernel
        refusals.append(f"{kernel.name}: {'; '.join(reasons)}")
    served, reasons = REFERENCE.can_implement(request)
    if not served:
        refusals.append(f"{REFERENCE.name}: {'; '.join(reasons)}")
        raise UnsupportedError("no kernel serves the layer:\n" + "\n".join(refusals))
    logger.warning("The slow reference in PyTorch serves %s, for no kernel does:\n%s", request, "\n".join(refusals))
    return REFERENCE
