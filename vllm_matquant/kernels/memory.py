"""Memory for weights that are read from end to end for every token: on huge pages, where the system has them.

With pages of four kilobytes a fifth to a third of the time to read weights goes into finding pages. Layers of small
models are smaller than a huge page, so they share chunks.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Sequence

import torch

CHUNK_BYTES = 64 * 2**20
_libc = ctypes.CDLL(None)
_LINE = 64  # bytes of a cache line, where each tensor begins


class WeightMemory:
    """Hands out tensors on the CPU; a chunk lives as long as a tensor in it does."""

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor, all bytes zero."""
        size = torch.Size(shape).numel() * dtype.itemsize
        if size > CHUNK_BYTES // 2:
            return _map(size).view(dtype).view(*shape)
        if self._used + size > len(self._chunk):
            self._chunk, self._used = _map(CHUNK_BYTES), 0
        taken = self._chunk[self._used : self._used + size]
        self._used += -(-size // _LINE) * _LINE
        return taken.view(dtype).view(*shape)

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a tensor."""
        return self.take(tensor.shape, tensor.dtype).copy_(tensor)


def _map(size: int) -> torch.Tensor:
    """Bytes in a mapping of their own, zero; pages that are never written take no memory."""
    if size == 0:
        return torch.empty(0, dtype=torch.uint8)
    # What the weights were repacked from is freed by now, but glibc keeps it for itself: a second copy of the model.
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)
    # Not shared, as it would be by default: such mappings get no huge pages.
    mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel that has none
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(mapping, dtype=torch.uint8)
