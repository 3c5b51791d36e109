"""Where tensors are computed with."""

from __future__ import annotations

from typing import Any

import torch


def fast_products(device: str = "cpu") -> torch.autocast:
    """A context in which a block runs in bfloat16 if products of that are faster than float32's on the device.

    They are on a GPU, and on a CPU that has instructions for them.
    """
    kind = torch.device(device).type
    # Not mkldnn's own answer, which is yes for any AVX-512, where bfloat16 is emulated.
    capabilities = torch.cpu.get_capabilities() if kind == "cpu" else {}
    fast = kind != "cpu" or capabilities.get("amx_bf16", False) or capabilities.get("avx512_bf16", False)
    return torch.autocast(kind, torch.bfloat16, fast)


def to_device(value: Any, device: str) -> Any:
    """``value`` with the tensors in it, also in tuples, lists and dicts, on ``device``."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(to_device(item, device) for item in value)
    return value
