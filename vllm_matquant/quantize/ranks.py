"""Several processes that quantize one model together, as ``torchrun`` starts them.

Each process, a *rank*, holds some windows of the calibration text and solves some rows of every layer. Sums over
windows are added up over the ranks, and rows are gathered, so that all ranks know the same Hessians and the same
quantized layers. Only the first rank writes files. Without ``torchrun`` there is one rank, and nothing here costs time.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

# The others wait while the first rank reads the whole source. One that has ended is noticed at once all the same.
_TIMEOUT = timedelta(days=1)

Windows = TypeVar("Windows", torch.Tensor, range)


class LostRankError(ConnectionError):
    """Another rank has ended, or cannot be reached."""


def launched_rank() -> int:
    """The rank that ``torchrun`` gave this process; 0 without it."""
    return int(os.environ.get("RANK", 0)) if _launched_count() > 1 else 0


@contextmanager
def started(backend: str = "gloo") -> Iterator[None]:
    """Join the ranks that ``torchrun`` started, if there are several, for the ``with`` statement.

    Args:
        backend: of torch.distributed. What this module exchanges lies on the CPU, where gloo is needed.

    Raises:
        LostRankError: another rank ended before it joined.
    """
    if _launched_count() == 1:
        yield
        return
    # By this signal torchrun ends the ranks when one has failed: they shall clean up as after any other error.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with _together():
        dist.init_process_group(backend, timeout=_TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def count() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def own_rank() -> int:
    """Which rank this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this rank is the one that writes files and shows progress."""
    return own_rank() == 0


def wait() -> None:
    """Until every rank has come here."""
    if count() > 1:
        with _together():
            dist.barrier()


def from_first(number: int) -> int:
    """The first rank's ``number``."""
    if count() == 1:
        return number
    shared = torch.tensor(number)
    with _together():
        dist.broadcast(shared, src=0)
    return int(shared)


def check_windows(windows: int, option: str) -> None:
    """Check that no rank would be left without a window.

    Raises:
        ValueError: there are fewer windows than ranks.
    """
    if windows < count():
        raise ValueError(f"{option}: found {windows}, expected at least one for each of {count()} ranks")


def spread(windows: Windows) -> Windows:
    """This rank's windows: every ``count()``-th, so that of the first few each rank has as many as any other."""
    return windows[own_rank() :: count()]


def sum_(*tensors: torch.Tensor) -> None:
    """Replace tensors, contiguous and of the same shape on every rank, by their sums over the ranks."""
    if count() == 1:
        return
    with _together():
        for tensor in tensors:
            dist.all_reduce(tensor)


def totals(values: Sequence[float]) -> list[float]:
    """The sums over the ranks of as many ``values`` on each."""
    summed = torch.tensor(values, dtype=torch.float64)
    sum_(summed)
    return summed.tolist()


def means(tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """The means over the ranks of tensors of the same shapes on each."""
    if count() == 1:
        return tensors
    summed = [tensor.cpu().contiguous() for tensor in tensors]
    sum_(*summed)
    return [(total / count()).to(tensor.device) for total, tensor in zip(summed, tensors, strict=True)]


def check_same(value: object, message: str) -> None:
    """Check that every rank has a value of the same ``repr``.

    Raises:
        ValueError: with ``message``; one has not.
    """
    if count() == 1:
        return
    digest = int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:7], "big")
    extremes = torch.tensor([digest, -digest])
    with _together():
        dist.all_reduce(extremes, dist.ReduceOp.MAX)
    if extremes.sum() != 0:
        raise ValueError(message)


def own_rows(rows: int) -> slice:
    """Which of a layer's ``rows`` this rank solves; some ranks may have none."""
    return _rows_of(own_rank(), rows)


def gather_rows(part: torch.Tensor, rows: int) -> torch.Tensor:
    """A whole tensor of ``rows`` rows, of which ``part`` is :func:`own_rows`."""
    if count() == 1:
        return part
    whole = part.new_empty(rows, *part.shape[1:])
    whole[own_rows(rows)] = part
    with _together():
        for rank in range(count()):
            # As bytes: gloo does not know every dtype.
            dist.broadcast(whole[_rows_of(rank, rows)].view(torch.uint8), src=rank)
    return whole


def own_device(device: str) -> str:
    """``device``, but of the machine's GPUs the one that is this rank's where it is "cuda" without a number."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and count() > 1 else device


def _launched_count() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def _rows_of(rank: int, rows: int) -> slice:
    return slice(rows * rank // count(), rows * (rank + 1) // count())


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as cause:  # all that gloo tells of a closed connection
        reason = str(cause).split("\n")[0].split(". ")[0]
        raise LostRankError(f"rank {launched_rank()} lost another, whose own message says more ({reason})") from cause
