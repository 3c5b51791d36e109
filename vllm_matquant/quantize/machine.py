"""What the last digits of floating-point results depend on besides the software."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import torch


def describe_machine() -> dict[str, str | int]:
    """``processor``, ``instructions`` (the vector extension that torch uses) and ``threads``."""
    return {
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    match = re.search(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.is_file() else None
    return match[1] if match else platform.processor() or platform.machine()
