"""Slice rules: which r-bit code an 8-bit parent code is served as, and what must be read to know it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

PARENT_BITS = 8

Slicing = Literal["truncate", "round", "round-extra"]
"""The name of a rule in config.json."""


class SliceRule(ABC):
    """How codes are cut to fewer bits."""

    name: ClassVar[Slicing]
    fits_width: ClassVar[bool] = True  # whether a slice of r bits has no more than 2^r levels

    @abstractmethod
    def stored_width(self, width: int) -> int:
        """How many bits of each code must be read to make the slice of ``width`` bits."""

    @abstractmethod
    def slice(self, codes: torch.Tensor, stored_width: int, width: int) -> torch.Tensor:
        """Cut codes to ``width`` bits.

        Args:
            codes: uint8, the most significant ``stored_width`` bits of parent codes.
            stored_width: at least what :meth:`stored_width` says of ``width``.
            width: of the result.

        Returns:
            uint8 of the same shape, each at most :meth:`highest`; ``codes`` themselves if there is nothing to cut.
        """

    def highest(self, width: int) -> int:
        """The highest code of a slice of ``width`` bits."""
        return int(2**width - 1)


@dataclass(frozen=True)
class Truncate(SliceRule):
    """The most significant bits: nested codes."""

    name = "truncate"

    def stored_width(self, width: int) -> int:
        return width

    def slice(self, codes: torch.Tensor, stored_width: int, width: int) -> torch.Tensor:
        drop = stored_width - width
        return codes >> drop if drop else codes


@dataclass(frozen=True)
class Round(SliceRule):
    """MatQuant's S(q, r) (arXiv 2502.06786, eq. 6) without its factor 2^(8 - r).

    The parent is divided by 2^(8 - r), rounded half up and clamped to 2^r - 1. One bit past the width decides the
    rounding.
    """

    name: ClassVar[Slicing] = "round"

    def stored_width(self, width: int) -> int:
        return min(width + 1, PARENT_BITS)

    def slice(self, codes: torch.Tensor, stored_width: int, width: int) -> torch.Tensor:
        drop = stored_width - width
        if drop == 0:
            return codes
        return ((codes >> drop) + ((codes >> (drop - 1)) & 1)).clamp_(max=self.highest(width))


@dataclass(frozen=True)
class RoundExtra(Round):
    """MatQuant's slices with extra precision (arXiv 2502.06786): rounded, not clamped.

    What rounds up past the highest code of r bits keeps a level of its own, so that a slice narrower than the parent
    has 2^r + 1 of them, and no r bits hold it.
    """

    name = "round-extra"
    fits_width = False

    def highest(self, width: int) -> int:
        return int(2**width) if width < PARENT_BITS else super().highest(width)


SLICE_RULES: dict[Slicing, SliceRule] = {rule.name: rule for rule in (Truncate(), Round(), RoundExtra())}
"""The rules that the format has, by their names in config.json."""
