"""The files of a served checkpoint: fetched from a hub where they are not local, opened once in a process."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from pathlib import Path

import huggingface_hub.constants
from vllm.model_executor.model_loader.weight_utils import get_lock, maybe_download_from_modelscope
from vllm.transformers_utils.repo_utils import hf_api

from vllm_matquant.checkpoint.names import CONFIG_FILE, INDEX_FILE
from vllm_matquant.checkpoint.reader import Checkpoint, open_checkpoint


def fetch(model: str, revision: str | None, cache: str | None, patterns: Iterable[str]) -> Path:
    """The checkpoint's folder; from a hub, with the files that match these globs only.

    Args:
        model: a folder, or a name on a hub.
        revision: on the hub.
        cache: the folder for downloads, None for the hub's default.
        patterns: globs of file names; those that were fetched before stay.
    """
    globs = list(patterns)
    model = maybe_download_from_modelscope(model, revision, cache, allow_patterns=globs) or model
    if os.path.isdir(model):
        return Path(model)
    with get_lock(model, cache):
        folder = hf_api().snapshot_download(
            model,
            revision=revision,
            allow_patterns=globs,
            cache_dir=cache,
            local_files_only=huggingface_hub.constants.HF_HUB_OFFLINE,
        )
    return Path(folder)


def opened(folder: Path) -> Checkpoint:
    """The checkpoint in a folder, opened once in this process as long as its config.json and its index stay.

    Files of slices are still to be checked: :meth:`Checkpoint.check` does that, each once.

    Raises:
        CheckpointError: config.json, the index or a recipe is at fault.
    """
    return _opened(*identity(folder))


def identity(folder: Path) -> tuple[Path, tuple[int, int], tuple[int, int]]:
    """What tells the checkpoint that a folder holds now from any other, and from what may take its place there."""
    return folder.resolve(), _version(folder / CONFIG_FILE), _version(folder / INDEX_FILE)


@functools.lru_cache(maxsize=4)
def _opened(folder: Path, config: tuple[int, int], index: tuple[int, int]) -> Checkpoint:
    return open_checkpoint(folder, check_files=False)


def _version(path: Path) -> tuple[int, int]:
    """Time and size of a file, zeros where there is none."""
    if not path.is_file():
        return 0, 0
    status = path.stat()
    return status.st_mtime_ns, status.st_size
