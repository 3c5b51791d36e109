"""Where tensors are computed with."""

from __future__ import annotations

from typing import Any

import torch

from vllm_matquant.kernels import ops


def has_fast_bfloat16(device: str) -> bool:
    """Whether products of bfloat16 are faster than float32's there: on a GPU, and on a CPU with AMX."""
    return torch.device(device).type != "cpu" or "amx" in ops.cpu_isas()


def to_device(value: Any, device: str) -> Any:
    """``value`` with the tensors in it, also in tuples, lists and dicts, on ``device``."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(to_device(item, device) for item in value)
    return value
