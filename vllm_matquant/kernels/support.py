"""The one table of which kernel serves which device, dtype, width and shape."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from vllm_matquant.checkpoint.spec import WIDTHS
from vllm_matquant.kernels import ops, reference
from vllm_matquant.kernels.layout import STEP_COLUMNS

logger = logging.getLogger(__name__)

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
class Kernel:
    """One row of the table.

    Attributes:
        name: what logs and benchmarks call it.
        device_type: the device it runs on, None for any.
        widths: widths that it decodes.
        dtypes: dtypes of activations that it takes.
        group_multiple: what the group size must be a multiple of, where a row has more than one group.
        operator: the C++ operator, as in ``torch.ops.matquant``; None for the reference, which needs no library.
        linear: the function to call, see :func:`vllm_matquant.kernels.ops.linear`.
    """

    name: str
    device_type: str | None
    widths: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    group_multiple: int
    operator: str | None
    linear: Callable[..., torch.Tensor]

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
        one_group = request.group_size >= request.in_features
        if request.group_size < 1 or (request.group_size % self.group_multiple and not one_group):
            reasons.append(
                f"group size: found {request.group_size}, expected a multiple of {self.group_multiple} "
                f"or at least the {request.in_features} input features"
            )
        if self.operator is not None:
            try:
                ops.load_library()
            except ops.LibraryError as error:
                reasons.append(str(error))
        return not reasons, reasons


REFERENCE = Kernel("reference", None, WIDTHS, DTYPES, 1, None, reference.reference_linear)
KERNELS = (Kernel("cpu", "cpu", WIDTHS, DTYPES, STEP_COLUMNS, "linear", ops.linear),)


def select_kernel(
    device: torch.device | str, dtype: torch.dtype, widths: Sequence[int], in_features: int, group_size: int
) -> Kernel:
    """The kernel that serves a layer, the reference (with a warning) where no other can.

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
    refusals = []
    for kernel in KERNELS:
        served, reasons = kernel.can_implement(request)
        if served:
            return kernel
        refusals.append(f"{kernel.name}: {'; '.join(reasons)}")
    served, reasons = REFERENCE.can_implement(request)
    if not served:
        refusals.append(f"{REFERENCE.name}: {'; '.join(reasons)}")
        raise UnsupportedError("no kernel serves the layer:\n" + "\n".join(refusals))
    logger.warning("The slow reference in PyTorch serves %s, for no kernel does:\n%s", request, "\n".join(refusals))
    return REFERENCE
