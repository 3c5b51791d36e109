"""A folder of models that commands make: another run makes only what is not there yet."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vllm_matquant.checkpoint.files import sync_file, sync_folder, write_json
from vllm_matquant.checkpoint.reader import Checkpoint
from vllm_matquant.checkpoint.slice import Slice

RECORD_FILE = "record.json"  # in a model's folder: how it was made
_LOG_LINES = 15  # of a failed command's log, to be shown


class MakeError(Exception):
    """A model could not be made."""


def fill(
    name: str,
    command_for: Callable[[Path], list[str]],
    output: Path,
    facts: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Make a folder in ``output`` by a process of its own. The folder appears once it is complete.

    Args:
        name: of the folder.
        command_for: the command that fills a folder.
        output: the folder of all results.
        facts: to keep in its record, as JSON values, besides the command and the seconds that it took.

    Raises:
        MakeError: the process failed.
    """
    finished, unfinished = output / name, output / f".{name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
    unfinished.mkdir()
    command = command_for(unfinished)
    log = output / f"{name}.log"
    print(f"{name}: started, see {log}", flush=True)
    start = time.perf_counter()
    with log.open("wb") as file:
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    seconds = time.perf_counter() - start
    if status != 0:
        shutil.rmtree(unfinished)
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        end = "\n".join([line for line in lines if line.strip()][-_LOG_LINES:])
        raise MakeError(f"{name}: {command[:3]} ended with status {status}; the end of {log}:\n{end}")
    for path in filter(Path.is_file, unfinished.iterdir()):
        sync_file(path)
    write_json(unfinished / RECORD_FILE, {"command": command, "seconds": seconds, **facts})
    os.replace(unfinished, finished)
    sync_folder(output)
    print(f"{name}: {seconds:.0f} s", flush=True)


def stored_bits(checkpoint: Checkpoint, served: Slice) -> float:
    """Bits that must be read for each quantized weight of a slice, what decodes the codes included."""
    weights = sum(rows * columns for rows, columns in checkpoint.layers.values())
    stored = sum(tensor.nbytes for _, tensor in checkpoint.tensors(served))
    return 8 * (stored - checkpoint.unquantized_bytes()) / weights
