"""The one table of which kernel serves which device, dtype, width, decoder kind and shape."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from vllm_matquant.checkpoint.decoder import KINDS, DecoderKind
from vllm_matquant.checkpoint.spec import WIDTHS
from vllm_matquant.kernels import cpu_layout, cuda_layout, ops, reference
from vllm_matquant.kernels.embedding import reference_embedding
from vllm_matquant.kernels.kernel import Layout, Request
from vllm_matquant.kernels.operators import (
    define_embedding,
    define_embedding_by_row,
    define_embedding_on_device,
    define_linear_by_row,
)
from vllm_matquant.kernels.plane_store import SharedPlanes
from vllm_matquant.kernels.weight import PackedWeight, StoredSegment, pack_segments

logger = logging.getLogger(__name__)

CUPY_INSTALL = "pip install cupy-cuda13x, or cupy-cuda12x for a torch with CUDA 12"
CUDA_BUILD = f"With a CUDA toolkit on the PATH they are built by: {ops.BUILD_COMMAND}"

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class UnsupportedError(ValueError):
    """No kernel serves what was asked for; the message gives the reasons of each."""


@dataclass(frozen=True)
class TableKernel:
    """One row of the table: a :class:`vllm_matquant.kernels.kernel.Kernel`.

    Attributes:
        name: what logs and benchmarks call it.
        device_type: the device it runs on, None for any.
        widths: widths that it decodes.
        dtypes: dtypes of activations that it takes.
        decoder_kinds: that it reads.
        group_multiple: what the group size must be a multiple of, where a row has more than one group.
        choose_layout: the layout of a weight, from its segments.
        multiply: what :meth:`linear` calls; ``torch.compile`` must be able to trace it.
        look_up: what :meth:`embedding` calls; ``torch.compile`` must be able to trace it.
        multiply_by_row: what :meth:`linear_by_row` calls, None for none; ``torch.compile`` must be able to trace it.
        look_up_by_row: what :meth:`embedding_by_row` calls, None for none; ``torch.compile`` must be able to trace it.
        multiply_by_group: what :meth:`grouped_linear` calls; None to multiply one group after the other.
        in_library: whether the C++ library looks its weights up: it is then needed, with CUDA kernels or without.
        is_built: whether it is part of the library, if that was built for the device.
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
    choose_layout: Callable[[Sequence[StoredSegment]], Layout]
    multiply: Callable[[torch.Tensor, torch.Tensor, int, torch.Tensor | None], torch.Tensor]
    look_up: Callable[[torch.Tensor, torch.Tensor, int, torch.dtype], torch.Tensor]
    multiply_by_row: Callable[..., torch.Tensor] | None = None
    look_up_by_row: Callable[..., torch.Tensor] | None = None
    multiply_by_group: Callable[..., torch.Tensor] | None = None
    in_library: bool = False
    is_built: bool = False
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
        """A weight in this kernel's layout, see :meth:`vllm_matquant.kernels.kernel.Kernel.pack`."""
        return pack_segments(
            self, self.choose_layout(segments), segments, in_features, group_size, device, activation_bits, shared
        )

    def linear(
        self, x: torch.Tensor, handle: torch.Tensor, out_features: int, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The product, see :meth:`vllm_matquant.kernels.kernel.Kernel.linear`."""
        return self.multiply(x, handle, out_features, bias)

    def embedding(self, rows: torch.Tensor, handle: torch.Tensor, in_features: int, dtype: torch.dtype) -> torch.Tensor:
        """Rows of a weight, see :meth:`vllm_matquant.kernels.kernel.Kernel.embedding`."""
        return self.look_up(rows, handle, in_features, dtype)

    @property
    def takes_rows(self) -> bool:
        """Whether rows can have weights of their own."""
        return self.multiply_by_row is not None and self.look_up_by_row is not None

    def linear_by_row(
        self,
        x: torch.Tensor,
        handles: torch.Tensor,
        slots: torch.Tensor,
        out_features: int,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The product by rows, see :meth:`vllm_matquant.kernels.kernel.Kernel.linear_by_row`."""
        assert self.multiply_by_row is not None
        return self.multiply_by_row(x, handles, slots, out_features, bias)

    def grouped_linear(
        self,
        x: torch.Tensor,
        handles: torch.Tensor,
        groups: torch.Tensor,
        slots: torch.Tensor | None,
        out_features: int,
    ) -> torch.Tensor:
        """The product by groups, see :meth:`vllm_matquant.kernels.kernel.Kernel.grouped_linear`."""
        if self.multiply_by_group is not None:
            return self.multiply_by_group(x, handles, groups, slots, out_features)
        result = x.new_empty(len(x), out_features)
        for group in groups.unique().tolist():
            own, rows = handles[group], torch.nonzero(groups == group).flatten()
            if slots is None:
                result[rows] = self.linear(x[rows], own[:1], out_features)
            else:
                result[rows] = self.linear_by_row(x[rows], own, slots[rows], out_features)
        return result

    def embedding_by_row(
        self, rows: torch.Tensor, handles: torch.Tensor, slots: torch.Tensor, in_features: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """Rows of weights, see :meth:`vllm_matquant.kernels.kernel.Kernel.embedding_by_row`."""
        assert self.look_up_by_row is not None
        return self.look_up_by_row(rows, handles, slots, in_features, dtype)

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
        if self.in_library:
            try:
                built = ops.is_built_for(self.device_type or "cpu")
            except ops.LibraryError as error:
                return [str(error)]
            if self.is_built and not built:
                return [f"{ops.LIBRARY}: built without kernels for {self.device_type}. {CUDA_BUILD}"]
        if self.min_capability is not None and torch.cuda.is_available():
            found = torch.cuda.get_device_capability()
            if found < self.min_capability:
                return [f"compute capability: found {found}, expected at least {self.min_capability}"]
        return []


def _multiply_jit(x: torch.Tensor, handle: torch.Tensor, rows: int, bias: torch.Tensor | None = None) -> torch.Tensor:
    from vllm_matquant.kernels import cuda_jit

    return cuda_jit.linear(x, handle, rows, bias)


def _multiply_jit_by_row(
    x: torch.Tensor, handles: torch.Tensor, slots: torch.Tensor, rows: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    from vllm_matquant.kernels import cuda_jit

    return cuda_jit.linear_by_row(x, handles, slots, rows, bias)


def _multiply_triton(
    x: torch.Tensor, handle: torch.Tensor, rows: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    from vllm_matquant.kernels import triton_linear

    return triton_linear.linear(x, handle, rows, bias)


def _choose_cpu_layout(segments: Sequence[StoredSegment]) -> Layout:
    return cpu_layout.choose_layout([(segment.resident_width, segment.decoder_widths) for segment in segments])


_KINDS = tuple(KINDS.values())
REFERENCE = TableKernel(
    "reference",
    device_type=None,
    widths=WIDTHS,
    dtypes=DTYPES,
    decoder_kinds=_KINDS,
    group_multiple=1,
    choose_layout=_choose_cpu_layout,
    multiply=reference.reference_linear,
    look_up=reference_embedding,
    multiply_by_row=define_linear_by_row("reference_linear_by_row", reference.reference_linear),
    look_up_by_row=define_embedding_by_row("reference_embedding_by_row", reference_embedding),
)
CPU = TableKernel(
    "cpu",
    device_type="cpu",
    widths=WIDTHS,
    dtypes=DTYPES,
    decoder_kinds=_KINDS,
    group_multiple=cpu_layout.STEP_COLUMNS,
    choose_layout=_choose_cpu_layout,
    multiply=ops.linear,
    look_up=ops.embedding,
    multiply_by_row=ops.linear_by_row,
    look_up_by_row=ops.embedding_by_row,
    multiply_by_group=ops.grouped_linear,
    in_library=True,
    is_built=True,
)
_look_up_cuda = define_embedding("cuda_embedding", cuda_layout.look_up)
CUDA = TableKernel(
    "cuda",
    device_type="cuda",
    widths=WIDTHS,
    dtypes=(torch.bfloat16, torch.float16),
    decoder_kinds=_KINDS,
    group_multiple=32,
    choose_layout=cuda_layout.choose_layout,
    multiply=ops.linear,
    look_up=_look_up_cuda,
    multiply_by_row=ops.linear_by_row,
    look_up_by_row=define_embedding_on_device("cuda_embedding_by_row", _look_up_cuda),
    in_library=True,
    is_built=True,
    group_powers=True,
    min_capability=(8, 0),
)
KERNELS = (
    CPU,
    CUDA,
    replace(
        CUDA,
        name="cuda-jit",
        multiply=_multiply_jit,
        multiply_by_row=_multiply_jit_by_row,
        is_built=False,
        module=("cupy", CUPY_INSTALL),
    ),
    replace(
        CUDA,
        name="triton",
        group_multiple=1,
        multiply=_multiply_triton,
        multiply_by_row=None,
        look_up_by_row=None,
        in_library=False,
        is_built=False,
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
