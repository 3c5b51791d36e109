"""Figures and facts as page and model card word them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from vllm_matquant.quantize.report.data import finite

MISSING = "–"


def figure(value: float | None) -> str:
    """Two decimals of a large figure, three significant digits of a small one."""
    value = finite(value)
    if value is None:
        return MISSING
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:#.3g}"


def nats(value: float | None) -> str:
    """A difference of log-probabilities, to the digits that a few thousand tokens can tell."""
    value = finite(value)
    return MISSING if value is None else f"{value:.4f}"


def size(count: int | None) -> str:
    """Bytes in megabytes or gigabytes of a power of ten."""
    if count is None:
        return MISSING
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """Seconds in the units of a clock."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def text_source(source: dict[str, Any] | None) -> str:
    """A text that was measured on: its name and, where known, windows, how they begin, seed and SHA-256."""
    if source is None:
        return "none: the method needs no text"
    parts = [str(source["name"])]
    if "samples" in source:
        parts.append(f"{source['samples']} × {source['sequence_length']} tokens")
    if source.get("beginning_of_text"):
        parts.append("each window begun with the beginning-of-text token")
    parts += [f"{label} {source[key]}" for key, label in (("seed", "seed"), ("sha256", "SHA-256")) if key in source]
    return ", ".join(parts)


def command(arguments: Sequence[str]) -> str:
    """A command line that a shell takes as it was."""
    return shlex.join(arguments)
