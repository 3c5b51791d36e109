"""Files as the checkpoint needs them: bounded JSON, durable writes that say why they fail, SHA-256."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from vllm_matquant.checkpoint.errors import (
    CheckpointError,
    IndexFileError,
    MissingFileError,
    PointerFileError,
    WriteError,
)

# What a file system says of a call that it does not know; EINVAL is how some name it for fsync.
NOT_SUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
_POINTER = b"version https://git-lfs.github.com/spec/"
POINTER_BYTES = len(_POINTER)
JSON_LIMIT = 100 * 2**20  # bytes; as safetensors limits its headers
HASH_BLOCK = 2**20


def parse_json(
    text: bytes, where: Path, subject: str, error: type[CheckpointError], *, any_float: bool = False
) -> dict[str, Any]:
    """Parse one JSON object strictly: UTF-8, no key twice, no NaN or Infinity.

    Args:
        text: the object.
        where: the file to name in an error.
        subject: the part of it to name in an error.
        error: what is raised.
        any_float: let NaN and Infinity pass, which are no JSON.

    Raises:
        CheckpointError: of the class ``error``, if ``text`` is anything else.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise error(where, subject, f"the key {twice!r} twice", "each key once")
        return content

    def refuse_constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        content = json.loads(
            text.decode("utf-8"), object_pairs_hook=unique, parse_constant=float if any_float else refuse_constant
        )
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as cause:
        raise error(where, subject, f"no valid JSON ({cause})", "a JSON object") from cause
    if not isinstance(content, dict):
        raise error(where, subject, type(content).__name__, "a JSON object")
    return content


def check_content(path: Path) -> None:
    """Check that a file holds its own content.

    Raises:
        PointerFileError: it is what Git leaves in the place of a large file that it has not fetched.
    """
    with path.open("rb") as file:
        check_beginning(file.read(POINTER_BYTES), path)


def check_beginning(content: bytes, path: Path) -> None:
    """Check that what a file begins with is its own content.

    Args:
        content: the first bytes of the file, or all of them.
        path: the file to name in an error.

    Raises:
        PointerFileError: it is what Git leaves in the place of a large file that it has not fetched.
    """
    if content.startswith(_POINTER):
        raise PointerFileError(path)


def read_json(path: Path, error: type[CheckpointError] = IndexFileError, *, any_float: bool = False) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        path: the file.
        error: what is raised if it is none.
        any_float: let NaN and Infinity pass, see :func:`parse_json`.

    Raises:
        MissingFileError: there is no such file, or Git has not fetched its content.
        CheckpointError: of the class ``error``, if it is too large or not a JSON object.
    """
    if not path.is_file():
        raise MissingFileError(path.parent, path.name, "no such file", "a JSON file")
    size = path.stat().st_size
    if size > JSON_LIMIT:
        raise error(path, "size", f"{size} bytes", f"at most {JSON_LIMIT}")
    content = path.read_bytes()
    check_beginning(content, path)
    return parse_json(content, path, "content", error, any_float=any_float)


@contextmanager
def writing(path: Path | str, hint: str = "") -> Iterator[None]:
    """A context in which the file ``path`` is written.

    Args:
        path: the file, as a message shall name it.
        hint: what helps where the disk is full.

    Raises:
        WriteError: in place of the error of the system, or of safetensors, that ended it.
    """
    try:
        yield
    except (OSError, SafetensorError) as cause:
        raise WriteError(path, cause, hint) from cause


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` and wait until the file is on the disk; :func:`sync_folder` makes its name durable.

    Raises:
        WriteError: the file cannot be written.
    """
    with writing(path):
        path.write_text(_to_json(content), encoding="utf-8")
        sync_file(path)


def publish_json(path: Path, content: Any) -> None:
    """Write a JSON file of any content in one step: it is there whole or as it was before."""
    publish_text(path, _to_json(content))


def publish_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 in one step: it is there whole or as it was before."""
    publish_bytes(path, text.encode())


def publish_bytes(path: Path, content: bytes) -> None:
    """Write a file in one step: it is there whole or as it was before."""
    publish(path, lambda temporary: temporary.write_bytes(content))


def publish(path: Path, write: Callable[[Path], object]) -> None:
    """Replace a file in one step: it is there whole or as it was before.

    Args:
        path: the file.
        write: writes it, to the temporary name that it is given.

    Raises:
        WriteError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            write(temporary)
            sync_file(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.absolute().parent)


def _to_json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file with the permissions that the umask gives: safetensors' own are for the owner alone.

    Raises:
        WriteError: the file cannot be written.
    """
    with writing(path):
        path.touch()
        mode = stat.S_IMODE(path.stat().st_mode)
        save_file(dict(tensors), path, metadata=metadata)
        if stat.S_IMODE(path.stat().st_mode) != mode:  # some file systems have one mode for all files
            path.chmod(mode)


def sync_file(path: Path) -> None:
    """Wait until the file's content is on the disk, see :func:`sync`."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def sync(descriptor: int) -> None:
    """Wait until the content of an open file or folder is on the disk.

    A file system that knows no such call, as some of networks and of user space do for folders, is not waited for: it
    promises nothing, and what is written is good as long as the machine runs.

    Raises:
        OSError: the content cannot be written.
    """
    try:
        os.fsync(descriptor)
    except OSError as cause:
        if cause.errno not in (*NOT_SUPPORTED, errno.EINVAL):
            raise


def move(path: Path, target: Path) -> None:
    """Move a file in place of another one, in one step: ``target`` is there whole or as it was before.

    Raises:
        OSError: it cannot be moved.
    """
    try:
        os.replace(path, target)
    except OSError as cause:
        if cause.errno != errno.EXDEV:  # another mount, or another branch of a union of file systems
            raise
        publish(target, lambda temporary: shutil.copyfile(path, temporary))
        path.unlink()


sync_folder: Callable[[Path], None] = sync_file  # fsync of a folder makes the names in it durable


def sha256(path: Path, progress: Callable[[int], object] = lambda size: None) -> str:
    """SHA-256 of a file, read block by block; ``progress`` is called with the bytes of each block."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()
