"""The one table of which kernel serves which device, dtype, width, decoder kind and shape."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from vllm_matquant.checkpoint.decoder import AFFINE_FLOAT16, KINDS, Decoder, DecoderKind
from vllm_matquant.checkpoint.spec import WIDTHS
from vllm_matquant.kernels import cpu_layout, cuda_layout, ops, reference
from vllm_matquant.kernels.embedding import reference_embedding
from vllm_matquant.kernels.weight import (
    Layout,
    Multiply,
    PackedWeight,
    Request,
    SharedPlanes,
    StoredSegment,
    define_embedding,
    define_linear,
    pack_segments,
)

logger = logging.getLogger(__name__)

CUPY_INSTALL = "pip install cupy-cuda13x, or cupy-cuda12x for a torch with CUDA 12"
CUDA_BUILD = f"With a CUDA toolkit on the PATH they are built by: {ops.BUILD_COMMAND}"

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class UnsupportedError(ValueError):
    """No kernel serves what was asked for; the message gives the reasons of each."""


@dataclass(frozen=True)
class TableKernel:
    """One row of the table: a :class:`vllm_matquant.kernels.weight.Kernel`.

    Attributes:
        name: what logs and benchmarks call it.
        device_type: the device it runs on, None for any.
        widths: widths that it decodes.
        dtypes: dtypes of activations that it takes.
        decoder_kinds: that it reads.
        group_multiple: what the group size must be a multiple of, where a row has more than one group.
        choose_layout: the layout of a weight, from each segment's resident width and widths that have decoders.
        multiply: what :meth:`linear` calls; ``torch.compile`` must be able to trace it.
        look_up: what :meth:`embedding` calls; ``torch.compile`` must be able to trace it.
        in_library: whether the C++ library looks its weights up; it is then needed.
        needs_library: whether it calls an operator of the library.
        group_powers: whether the group size must be a power of two as well.
        min_capability: the oldest CUDA devices that it runs on.
        module: a module that must be installed for it, and how.
    """

    name: str
    device_type: str | None
    widths: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    decoder_kinds: tuple[DecoderKind, ...]
    group_multiple: int
    choose_layout: Callable[[Sequence[tuple[int, Sequence[int]]]], Layout]
    multiply: Callable[[torch.Tensor, torch.Tensor, int, torch.Tensor | None], torch.Tensor]
    look_up: Callable[[torch.Tensor, torch.Tensor, int, torch.dtype], torch.Tensor]
    in_library: bool = False
    needs_library: bool = False
    group_powers: bool = False
    min_capability: tuple[int, int] | None = None
    module: tuple[str, str] | None = None

    def accepts(self, request: Request) -> list[str]:
        """Every reason why this kernel does not serve the request; none if it does."""
        reasons = []
        if self.device_type not in (None, request.device_type):
            reasons.append(f"device: found {request.device_type}, expected {self.device_type}")
        if request.dtype not in self.dtypes:
            reasons.append(f"dtype: found {request.dtype}, expected one of {', '.join(map(str, self.dtypes))}")
        missing = sorted(set(request.widths) - set(self.widths))
        if missing:
            reasons.append(f"widths: found {missing}, expected some of {list(self.widths)}")
        if request.decoder_kind not in self.decoder_kinds:
            kinds = " or ".join(kind.name for kind in self.decoder_kinds)
            reasons.append(f"decoders: found {request.decoder_kind.name}, expected {kinds}")
        if not self._takes_groups(request):
            power = " that is a power of two" if self.group_powers else ""
            reasons.append(
                f"group size: found {request.group_size}, expected a multiple of {self.group_multiple}{power} "
                f"or at least the {request.in_features} input features"
            )
        reasons += self._what_is_missing()
        return reasons

    def pack(
        self,
        segments: Sequence[StoredSegment],
        in_features: int,
        group_size: int,
        device: torch.device | str,
        activation_bits: int | None = None,
        shared: SharedPlanes | None = None,
    ) -> PackedWeight:
        """A weight in this kernel's layout, see :meth:`vllm_matquant.kernels.weight.Kernel.pack`."""
        layout = self.choose_layout([(segment.resident_width, segment.decoder_widths) for segment in segments])
        return pack_segments(self, layout, segments, in_features, group_size, device, activation_bits, shared)

    def linear(
        self, x: torch.Tensor, handle: torch.Tensor, out_features: int, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The product, see :meth:`vllm_matquant.kernels.weight.Kernel.linear`."""
        return self.multiply(x, handle, out_features, bias)

    def embedding(self, rows: torch.Tensor, handle: torch.Tensor, in_features: int, dtype: torch.dtype) -> torch.Tensor:
        """Rows of a weight, see :meth:`vllm_matquant.kernels.weight.Kernel.embedding`."""
        return self.look_up(rows, handle, in_features, dtype)

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
        if self.needs_library:
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


class _CudaLayout:
    """The layout of a GPU's memory."""

    name = "cuda"
    packs_on_cpu = False

    def pack_planes(
        self, base: torch.Tensor, planes: Sequence[torch.Tensor], output_sizes: Sequence[int]
    ) -> torch.Tensor:
        return cuda_layout.repack_codes(base, planes, output_sizes, ())

    def pack_decoders(self, decoders: Sequence[Decoder], output_sizes: Sequence[int]) -> torch.Tensor:
        scales, offsets = ([decoder.parts[part] for decoder in decoders] for part in ("scale", "offset"))
        return cuda_layout.pack_decoders(scales, offsets, output_sizes)


def _by_segment(multiply: Callable[..., torch.Tensor]) -> Multiply:
    """The product of a weight from one that takes the tensors of a segment."""

    def product(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
        outputs = []
        first = 0
        for segment in weight.segments:
            resident = segment.resident
            last = first + sum(resident.output_sizes)
            own_bias = None if bias is None else bias[first:last].contiguous()
            tensors = (resident.planes, resident.decoders, segment.active_width)
            sizes = (resident.decoder_widths, resident.output_sizes, weight.group_size)
            outputs.append(multiply(x, *tensors, *sizes, own_bias, weight.activation_bits))
            first = last
        return torch.cat(outputs, -1)

    return product


def _multiply_cuda(*arguments: Any) -> torch.Tensor:
    ops.load_library()
    result: torch.Tensor = torch.ops.matquant.cuda_linear(*arguments)
    return result


def _multiply_jit(*arguments: Any) -> torch.Tensor:
    from vllm_matquant.kernels import cuda_jit

    return cuda_jit.linear(*arguments)


def _multiply_triton(*arguments: Any) -> torch.Tensor:
    from vllm_matquant.kernels import triton_linear

    return triton_linear.linear(*arguments)


def _look_up_cuda(rows: torch.Tensor, weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    [segment] = weight.segments
    resident = segment.resident
    tensors = (resident.planes, resident.decoders, segment.active_width)
    return cuda_layout.embedding(rows, *tensors, resident.decoder_widths, weight.in_features, weight.group_size, dtype)


_KINDS = tuple(KINDS.values())
REFERENCE = TableKernel(
    "reference",
    device_type=None,
    widths=WIDTHS,
    dtypes=DTYPES,
    decoder_kinds=_KINDS,
    group_multiple=1,
    choose_layout=cpu_layout.choose_layout,
    multiply=reference.reference_linear,
    look_up=reference_embedding,
)
_CPU = TableKernel(
    "cpu",
    device_type="cpu",
    widths=WIDTHS,
    dtypes=DTYPES,
    decoder_kinds=_KINDS,
    group_multiple=cpu_layout.STEP_COLUMNS,
    choose_layout=cpu_layout.choose_layout,
    multiply=ops.linear,
    look_up=reference_embedding,
    in_library=True,
    needs_library=True,
)
_CUDA_LAYOUT = _CudaLayout()
_CUDA = TableKernel(
    "cuda",
    device_type="cuda",
    widths=WIDTHS,
    dtypes=(torch.bfloat16, torch.float16),
    decoder_kinds=(AFFINE_FLOAT16,),
    group_multiple=32,
    choose_layout=lambda resident: _CUDA_LAYOUT,
    multiply=define_linear("library_linear", _by_segment(_multiply_cuda)),
    look_up=define_embedding("cuda_embedding", _look_up_cuda),
    needs_library=True,
    group_powers=True,
    min_capability=(8, 0),
)
KERNELS = (
    _CPU,
    _CUDA,
    replace(
        _CUDA,
        name="cuda-jit",
        multiply=define_linear("jit_product", _by_segment(_multiply_jit)),
        needs_library=False,
        module=("cupy", CUPY_INSTALL),
    ),
    replace(
        _CUDA,
        name="triton",
        group_multiple=1,
        multiply=define_linear("triton_product", _by_segment(_multiply_triton)),
        needs_library=False,
        group_powers=False,
        min_capability=None,
        module=("triton", "pip install triton"),
    ),
)


def select_kernel(request: Request) -> TableKernel:
    """The first kernel that serves a layer, the reference where no other can; a warning tells what kept better ones.

    Args:
        request: what the layer asks for.

    Raises:
        UnsupportedError: not even the reference serves it.
    """
    refusals: list[str] = []
    for kernel in KERNELS:
        reasons = kernel.accepts(request)
        if not reasons:
            if any(kernel.device_type == other.device_type for other in KERNELS[: len(refusals)]):
                logger.warning("The kernel %s serves %s, for:\n%s", kernel.name, request, "\n".join(refusals))
            return kernel
        refusals.append(f"{kernel.name}: {'; '.join(reasons)}")
    reasons = REFERENCE.accepts(request)
    if reasons:
        refusals.append(f"{REFERENCE.name}: {'; '.join(reasons)}")
        raise UnsupportedError("no kernel serves the layer:\n" + "\n".join(refusals))
    logger.warning("The slow reference in PyTorch serves %s, for no kernel does:\n%s", request, "\n".join(refusals))
    return REFERENCE
