"""Tensors of layers in memory, found by every user of the same layer."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_matquant.kernels.weight import ResidentSegment


class PlaneStore:
    """The tensors of the layers in memory, so that a second user of a layer shares them.

    It keeps nothing alive: memory goes when the last user does.
    """

    def __init__(self) -> None:
        self._segments: weakref.WeakValueDictionary[Hashable, ResidentSegment] = weakref.WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._segments)

    def share(self, key: Hashable, make: Callable[[], ResidentSegment]) -> ResidentSegment:
        """The tensors with this key, made by ``make`` if nobody has them."""
        segment = self._segments.get(key)
        if segment is None:
            self._segments[key] = segment = make()
        return segment


@dataclass(frozen=True)
class SharedPlanes:
    """Where the tensors of one layer are found by all of its users.

    Attributes:
        store: what has them.
        checkpoint: what the layer is of, such as a folder and its revision.
        layer: the layer's name.
        cut: which part of the layer, such as the rank and number of ranks.
    """

    store: PlaneStore
    checkpoint: Hashable
    layer: str
    cut: Hashable = ()
