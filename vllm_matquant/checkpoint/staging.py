"""Publish a folder's files so that a crash, whenever it comes, never leaves a folder that looks complete and is not.

The files are first written to a hidden sub-folder of the output. Once all of them are on the disk they move to their
places: the old config.json goes first and the new one comes last, so that at no moment does a config.json lie beside
files that it does not describe.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from pathlib import Path

from vllm_matquant.checkpoint.copied import copy_files, is_copied
from vllm_matquant.checkpoint.errors import OutputError, WriteError
from vllm_matquant.checkpoint.files import NOT_SUPPORTED, move, sync_folder
from vllm_matquant.checkpoint.names import (
    CONFIG_FILE,
    DOCUMENT_FILES,
    INDEX_FILE,
    MANIFEST_FILE,
    POOLING_FOLDERS,
    RECIPES_FOLDER,
    REPORT_FOLDER,
    TEMPLATES_FOLDER,
    shard_width,
)

STAGING_FOLDER = ".matquant-unfinished"
_BELOW = (
    f"{RECIPES_FOLDER}/*.json",
    f"{RECIPES_FOLDER}/*.safetensors",
    f"{TEMPLATES_FOLDER}/*.jinja",
    f"{POOLING_FOLDERS}/{CONFIG_FILE}",
)
_MOVE_AWAY = "Move it away, or write to another folder"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


class Staging:
    """The files of a checkpoint on their way into its folder.

    Attributes:
        folder: the output; made if absent.
        path: the hidden folder to write the files to, under their final names.

    Args:
        overwrite: whether the folder may hold a checkpoint already, which then stays whole until :meth:`publish`.

    Raises:
        OutputError: the folder holds files of a model, another process is writing to it, or it is no folder.
        OSError: the folder cannot be written to.
    """

    def __init__(self, folder: Path, *, overwrite: bool) -> None:
        check_output(folder, overwrite)
        self.folder = folder
        self._made_folder = not folder.exists()
        self.path = folder / STAGING_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        made = _make(self.path)
        self._lock = os.open(self.path, os.O_RDONLY)
        try:
            _lock(self._lock, self.path, made)
        except (OSError, OutputError) as cause:
            os.close(self._lock)
            if isinstance(cause, OSError) and made:
                self.path.rmdir()
                self._remove_made_folder()
            raise
        for leftover in self.path.iterdir():  # of a process that was killed: the lock shows that it is gone
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()

    def copy_from(self, source: Path) -> None:
        """Copy the files of the source model that have nothing to do with its weights."""
        copy_files(source, self.path)

    def publish(self) -> None:
        """Move the files, each already on the disk, to the output folder in place of those of an older checkpoint.

        Manifest, index and config.json must be among them. An older checkpoint's model card, report and recipes go
        too: they would tell of another checkpoint.
        """
        sync_folder(self.path)
        config = self.folder / CONFIG_FILE
        if config.exists():
            config.unlink()
            sync_folder(self.folder)
        for path in list(self.folder.iterdir()):
            if is_checkpoint_file(path.name):
                path.unlink()
        for name in DOCUMENT_FILES:
            (self.folder / name).unlink(missing_ok=True)
        for pattern in _BELOW:
            for path in self.folder.glob(pattern):
                path.unlink()
        last = (MANIFEST_FILE, INDEX_FILE, CONFIG_FILE)
        for path in sorted(self.path.rglob("*")):
            place = path.relative_to(self.path)
            if path.is_dir():
                (self.folder / place).mkdir(exist_ok=True)
            elif str(place) not in last:
                move(path, self.folder / place)
        for path in self.path.iterdir():
            if path.is_dir():
                sync_folder(self.folder / path.name)
        for name in last:
            sync_folder(self.folder)  # the files that this one speaks of
            move(self.path / name, self.folder / name)
        sync_folder(self.folder)

    def close(self) -> None:
        """Remove what was not published."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)
        self._remove_made_folder()

    def _remove_made_folder(self) -> None:
        if self._made_folder:
            with contextlib.suppress(OSError):  # it holds what was published
                self.folder.rmdir()


def _make(path: Path) -> bool:
    """Make a folder, in one step; returns whether it was not there."""
    try:
        path.mkdir()
    except FileExistsError:
        return False
    return True


def _lock(descriptor: int, path: Path, made: bool) -> None:
    """Keep other writers away from the output until this process ends.

    Where the file system has no locks the hidden folder is one: whoever has made it may write, and one that is there
    belongs to another process, or to one that was killed, which cannot be told apart.

    Args:
        descriptor: of the hidden folder.
        path: of the hidden folder.
        made: whether this process has made it.

    Raises:
        OutputError: another process is writing, or may be.
        OSError: the lock cannot be taken for another reason.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as cause:
        raise OutputError(
            path.parent,
            "output folder",
            "another process writing to it",
            "one at a time",
            "Wait until it has ended, or write to another folder",
        ) from cause
    except OSError as cause:
        if cause.errno not in (*NOT_SUPPORTED, errno.ENOLCK, errno.EINVAL):
            raise WriteError(path, cause) from cause
        if not made:
            hint = f"Remove {path} if no process is writing, or write to another folder"
            found = "the files of another process, or of one that was killed"
            expected = "no such folder on a file system without locks"
            raise OutputError(path.parent, STAGING_FOLDER, found, expected, hint) from cause


def check_output(folder: Path, overwrite: bool) -> None:
    """Check that a checkpoint may be written to ``folder``, without touching it.

    Raises:
        OutputError: it holds files of a model, or it is no folder.
    """
    check_writable(folder)
    if not folder.exists():
        return
    pooling = [path.name for path in folder.glob(POOLING_FOLDERS)]
    for name in (REPORT_FOLDER, RECIPES_FOLDER, TEMPLATES_FOLDER, *pooling):
        if (folder / name).exists() and not (folder / name).is_dir():
            raise OutputError(folder, name, "a file", "a folder, or nothing", _MOVE_AWAY)
    names = sorted(path.name for path in folder.iterdir())
    for name in names:
        if (is_checkpoint_file(name) or name in DOCUMENT_FILES) and (folder / name).is_dir():
            # A file cannot take its place, and that would show only when the old checkpoint is half gone.
            raise OutputError(folder, name, "a folder", "a file, or nothing", _MOVE_AWAY)
    own = [name for name in names if is_checkpoint_file(name)]
    own += [name for name in DOCUMENT_FILES if (folder / name).exists()]
    own += [path.relative_to(folder).as_posix() for pattern in _BELOW for path in sorted(folder.glob(pattern))]
    if own and not overwrite:
        raise OutputError(folder, "output folder", own[0], "no files of a checkpoint", "Use --overwrite to replace it")
    for name in names:
        if name not in own and name.endswith(_WEIGHT_SUFFIXES):
            # An ordinary model, perhaps the very source: a loader would take its weights for part of the checkpoint.
            raise OutputError(
                folder, "output folder", name, "no weights but those of a matquant checkpoint", _MOVE_AWAY
            )


def check_writable(folder: Path) -> None:
    """Check that files can be written to ``folder``, which need not be there, without touching it.

    Raises:
        OutputError: it or a folder above it is no folder, or none that this user may write to.
    """
    place = folder.absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        found = "a file" if place.exists() else "a link to nothing"
        found += "" if place == folder.absolute() else f" in its place, {place}"
        hint = f"Name another folder, or remove {place}"
        raise OutputError(folder, "output folder", found, "a folder, or nothing", hint)
    if not os.access(place, os.W_OK | os.X_OK):
        raise OutputError(
            folder,
            "output folder",
            f"no permission to write to {place}, or a file system that nobody may write to",
            "one that can be written to",
            "Name another folder, or change the permissions",
        )


def is_checkpoint_file(name: str) -> bool:
    """Whether a file of this name in a checkpoint's folder is the checkpoint's own."""
    return name in (CONFIG_FILE, INDEX_FILE, MANIFEST_FILE) or shard_width(name) is not None or is_copied(name)
