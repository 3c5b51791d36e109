"""Large tensors in files that are mapped into memory, where memory shall not hold them."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from vllm_matquant.checkpoint.errors import WriteError
from vllm_matquant.checkpoint.files import writing


def mapped(shape: Sequence[int], folder: Path, hint: str = "") -> torch.Tensor:
    """A float32 tensor in a file without a name, which goes with the process, however it ends.

    Args:
        shape: of the tensor.
        folder: on whose disk the file lies.
        hint: what helps where the disk has no room for it.

    Raises:
        WriteError: the disk has no room, or the folder cannot be written to.
    """
    size, path = math.prod(shape), folder / "a file of activations"
    with writing(path, hint), tempfile.NamedTemporaryFile(dir=folder) as file:
        # All of it now: a disk that turns out full while the mapping is written to would kill the process.
        os.posix_fallocate(file.fileno(), 0, size * torch.float32.itemsize)
        try:
            return torch.from_file(file.name, shared=True, size=size, dtype=torch.float32).view(*shape)
        except RuntimeError as cause:  # a file system whose files cannot be mapped
            raise WriteError(path, cause) from cause
