"""Where tensors are computed with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def _bfloat16_is_faster() -> bool:
    # Not mkldnn's own answer, which is yes for any AVX-512, where bfloat16 is emulated. Intel's AVX-512 does no more
    # products of bfloat16 in a cycle than of float32 and converts besides: such a Xeon whose AMX was hidden from a
    # virtual machine had 0.6 to 0.75 of float32's speed. By the processor and not by a trial, so that bytes stay the
    # same from run to run.
    capabilities = torch.cpu.get_capabilities()
    if capabilities.get("amx_bf16", False):
        return True
    return bool(capabilities.get("avx512_bf16", False)) and "Intel" not in capabilities.get("cpu_name", "")


def check_device(name: str, device: str) -> None:
    """Check that torch can compute on a device here, before any work.

    Args:
        name: of the setting or option, to name in an error.
        device: such as "cpu", "cuda" or "cuda:1".

    Raises:
        ValueError: it cannot.
    """
    reason = ""
    try:
        wanted = torch.device(device)
    except RuntimeError as cause:
        reason = str(cause).split("\n")[0]
    else:
        if wanted.type == "cuda":
            count = torch.cuda.device_count()
            reason = "" if (wanted.index or 0) < count else f"torch finds {count} CUDA devices"
        elif wanted.type != "cpu":
            reason = "quantizing is not made for it"
    if reason:
        raise ValueError(f"{name}: found {device!r} ({reason}), expected cpu, or cuda on a machine with such a GPU")


def fast_products(device: str = "cpu") -> torch.autocast:
    """A context in which a block runs in bfloat16 if products of that are faster than float32's on the device.

    They are on a GPU, and on a CPU with AMX, or with AVX-512 for bfloat16 that is not Intel's.
    """
    return torch.autocast(torch.device(device).type, torch.bfloat16, products_dtype(device) == torch.bfloat16)


def products_dtype(device: str = "cpu") -> torch.dtype:
    """Of the factors that :func:`fast_products` multiplies: bfloat16 where that is faster than float32."""
    fast = torch.device(device).type != "cpu" or _bfloat16_is_faster()
    return torch.bfloat16 if fast else torch.float32


@contextmanager
def fast_moments() -> Iterator[None]:
    """A context in which float32 products on the CPU take factors rounded to bfloat16 where that is faster.

    Sums are float32 still. Made for second moments of a layer's inputs: where :func:`fast_products` is on, the layer
    itself sees them rounded so.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    if _bfloat16_is_faster():
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def to_device(value: Any, device: str) -> Any:
    """``value`` with the tensors in it, also in tuples, lists and dicts, on ``device``."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(to_device(item, device) for item in value)
    return value
