"""MANIFEST.json: what the files of a checkpoint are and what they were made from.

Its fields are ``files`` (SHA-256 and size of each file but the manifest), ``versions`` and what the quantizer adds:
``source`` and ``calibration`` (SHA-256 and size of their files too), ``command``. File names stand without their
folders, so that a manifest tells nothing of the machine that it was written on.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from vllm_matquant.checkpoint.errors import ChecksumError, IndexFileError, MissingFileError, UnsafePathError
from vllm_matquant.checkpoint.files import read_json, sha256
from vllm_matquant.checkpoint.names import (
    MANIFEST_FILE,
    is_plain_name,
    is_pooling_file,
    is_recipe_decoders_file,
    is_recipe_file,
    is_template_file,
)

_NAMES = (is_plain_name, is_recipe_file, is_recipe_decoders_file, is_template_file, is_pooling_file)
_PACKAGES = ("vllm_matquant", "torch", "safetensors", "transformers")


def describe_files(
    paths: Iterable[Path], progress: Callable[[int], object] = lambda size: None
) -> dict[str, dict[str, Any]]:
    """``{file name: {"sha256": hex digest, "bytes": size}}``, sorted by name.

    Args:
        progress: called with the bytes of each block read.
    """
    return {path.name: describe_file(path, progress) for path in sorted(paths, key=lambda path: path.name)}


def describe_file(path: Path, progress: Callable[[int], object] = lambda size: None) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"sha256": sha256(path, progress), "bytes": path.stat().st_size}


def versions() -> dict[str, str]:
    """Versions of this package, of Python and of the packages that a checkpoint's bytes depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def command_line(arguments: Sequence[str]) -> list[str]:
    """``sys.argv`` with each absolute path cut to its last part."""

    def shorten(argument: str) -> str:
        option, equals, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
        return option + equals + (Path(value).name if Path(value).is_absolute() else value)

    return [shorten(argument) for argument in arguments]


def build_manifest(folder: Path, origin: dict[str, Any]) -> dict[str, Any]:
    """The manifest of all files that lie in ``folder``; ``origin`` is what to say of where they come from."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    files = {name: describe_file(path) for name, path in sorted(paths.items())}
    return origin | {"versions": versions(), "files": files}


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """The ``files`` of a folder's manifest.

    Raises:
        MissingFileError: there is no manifest.
        IndexFileError: it is not JSON of the right form.
        UnsafePathError: a file name with a folder in it that is none of a checkpoint's.
    """
    path = folder / MANIFEST_FILE
    files = read_json(path).get("files")
    if not isinstance(files, dict):
        raise IndexFileError(path, "files", type(files).__name__, "an object")
    for name, entry in files.items():
        if not any(known(name) for known in _NAMES):
            raise UnsafePathError(
                path, "files", repr(name), "a file name without a folder, a recipe's or a chat template's"
            )
        if not isinstance(entry, dict) or not isinstance(entry.get("sha256"), str):
            raise IndexFileError(path, f"files.{name}", entry, "an object with sha256 and bytes")
    return files


def check_file(folder: Path, name: str, entry: dict[str, Any], progress: Callable[[int], object]) -> None:
    """Compare a file with its entry in the manifest; ``progress`` is called with the bytes of each block read.

    Raises:
        MissingFileError: the file is not there.
        ChecksumError: its size or its SHA-256 is another.
    """
    path = folder / name
    if not path.is_file():
        raise MissingFileError(
            folder,
            name,
            "no such file",
            f"the file that {MANIFEST_FILE} lists",
            "Get it from where the checkpoint comes from",
        )
    size = path.stat().st_size
    if size != entry.get("bytes"):
        raise ChecksumError(path, "size", f"{size} bytes", f"{entry.get('bytes')} bytes by {MANIFEST_FILE}")
    digest = sha256(path, progress)
    if digest != entry["sha256"]:
        raise ChecksumError(path, "SHA-256", digest, f"{entry['sha256']} by {MANIFEST_FILE}")
