"""The most memory that tensors take at a time."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made inside the ``with`` statement take at a time.

    Attributes:
        peak: in bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live = 0

    def __torch_dispatch__(
        self, operation: Callable[..., Any], types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        given = {id(t.untyped_storage()) for t in tree_leaves((arguments, keywords)) if isinstance(t, torch.Tensor)}
        made = operation(*arguments, **(keywords or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and id(tensor.untyped_storage()) not in given:
                self._add(tensor.untyped_storage())
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self._live += size
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._remove, size)

    def _remove(self, size: int) -> None:
        self._live -= size
