"""Errors of the checkpoint format: each fault is its own class, so that callers and tests can tell them apart."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path


class CheckpointError(ValueError):
    """A matquant checkpoint that cannot be used as asked.

    The message names the file, the field or tensor, what was found and what was expected.
    """

    def __init__(self, where: Path | str, subject: str, found: object, expected: object, hint: str = "") -> None:
        self.where = str(where)
        self.subject = subject
        self.found = found
        self.expected = expected
        message = f"{where}: {subject}: found {found}, expected {expected}"
        super().__init__(f"{message}. {hint}" if hint else message)


class ConfigError(CheckpointError):
    """A field of quantization_config is missing, of the wrong type or out of range."""


class VersionError(CheckpointError):
    """The checkpoint was written in a format version that this software does not read."""


class WidthError(CheckpointError):
    """The checkpoint does not offer the width that was asked for."""


class RecipeError(CheckpointError):
    """A recipe cannot be parsed, or does not fit the checkpoint: an unknown layer, one left out, or an absent width."""


class MissingFileError(CheckpointError):
    """A file that the index lists is not in the folder."""


class PointerFileError(MissingFileError):
    """A file holds Git LFS's note of where its content is, and not the content."""

    def __init__(self, path: Path | str) -> None:
        super().__init__(
            path,
            "content",
            "a Git LFS pointer",
            "the file that it stands for",
            "Fetch it: git lfs pull, or hf download",
        )


class IndexFileError(CheckpointError):
    """The index, or another JSON file of the checkpoint, cannot be parsed or contradicts the shards."""


class UnsafePathError(CheckpointError):
    """A file name leaves the checkpoint's folder."""


class ShardError(CheckpointError):
    """A shard is not a sound safetensors file: truncated, oversized header, overlapping or overflowing tensors."""


class MissingTensorError(CheckpointError):
    """A tensor that the format asks for is in no shard."""


class UnexpectedTensorError(CheckpointError):
    """A shard holds a tensor that the format has no place for, or holds one twice."""


class TensorDtypeError(CheckpointError):
    """A tensor's dtype is not the one that the format prescribes."""


class TensorShapeError(CheckpointError):
    """A tensor's shape contradicts the configuration."""


class TensorValueError(CheckpointError):
    """A weight of the model to quantize is not finite."""


class DecoderValueError(CheckpointError):
    """A stored value of a decoder is not finite or too large, or a scale or step is negative."""


class ChecksumError(CheckpointError):
    """A file's SHA-256 is not the one in the manifest."""


class NestingError(CheckpointError):
    """A served slice is not what its parent's codes say."""


class OutputError(CheckpointError):
    """The folder that a checkpoint shall be written to holds other files, has too little room, or is in use."""


class WriteError(OSError):
    """A file cannot be written; the message names it, what stopped it, and what helps.

    Args:
        path: the file.
        cause: an OSError, or the error of a library that tells the system's number in its text.
        hint: what else helps where the disk is full.
    """

    def __init__(self, path: Path | str, cause: Exception, hint: str = "") -> None:
        number = cause.errno if isinstance(cause, OSError) else _system_number(str(cause))
        found = os.strerror(number) if number else str(cause)
        help = "Write to another folder"
        if number in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(next(each for each in Path(path).absolute().parents if each.exists())).free
            found += f", {free:,} bytes free"
            help = hint or "Free some room, or write to another disk"
        super().__init__(f"{path}: writing: found {found}, expected a file that can be written. {help}")
        self.errno = number


def _system_number(message: str) -> int | None:
    found = re.search(r"\(os error (\d+)\)", message)
    return int(found[1]) if found else None
