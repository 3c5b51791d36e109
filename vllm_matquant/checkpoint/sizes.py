"""Sizes as people write them: ``90MiB``, ``1.2GB``."""

from __future__ import annotations

import re

UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_AMOUNT = re.compile(r"(\d+(?:\.\d*)?|\.\d+) ?([A-Za-z]*)")


def split_amount(text: str) -> tuple[float, str] | None:
    """The number and the unit ("" without one) of an amount, None if it is none."""
    match = _AMOUNT.fullmatch(text.strip())
    return (float(match[1]), match[2]) if match else None


def parse_bytes(text: str) -> int:
    """Read a size; a number without a unit is one of bytes.

    Raises:
        ValueError: anything else.
    """
    amount = split_amount(text)
    if amount is None or (amount[1] or "B") not in UNITS:
        raise ValueError(f"found {text!r}, expected a size such as 90MiB (units: {', '.join(UNITS)})")
    return int(amount[0] * UNITS[amount[1] or "B"])
