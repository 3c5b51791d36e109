"""The work folder of a training: the state after some step, from which it goes on bit for bit.

It lies inside the output folder until the checkpoint is published:

    settings.json                        what the training depends on; one with other settings must not go on from here
    step-<n>/<layer>.<rank>.safetensors  of each layer: shift and changes, with their moments, in float32
    publishing                           there once the checkpoint's own files may lie in the output folder

A state appears whole, by the renaming of its folder, and only then the former one goes. What is not kept follows from
the settings: the order of the windows, and the rates of every step.
"""

from __future__ import annotations

import os
import re
import shutil
from collections import defaultdict
from functools import partial
from pathlib import Path

from safetensors import safe_open

from vllm_matquant.checkpoint.files import publish, save_tensors, sync_folder
from vllm_matquant.checkpoint.shard import read_header
from vllm_matquant.quantize import ranks
from vllm_matquant.quantize.resume import UnfinishedWork
from vllm_matquant.train.optimizer import Optimizer

WORK_FOLDER = ".matquant-training"
_STATE = re.compile(r"step-(\d+)")
_PART = re.compile(r"(?P<layer>.+)\.(?P<own>shift|changes\.\d)")


class TrainingFolder(UnfinishedWork):
    """The work folder of a training.

    Args:
        output: the output folder.
    """

    def __init__(self, output: Path) -> None:
        super().__init__(output / WORK_FOLDER)

    @property
    def steps(self) -> int:
        """After how many steps the kept state is; 0 without one."""
        return max(self._states(), default=0)

    def save(self, optimizer: Optimizer, steps: int, sharded: bool) -> None:
        """Keep the state, in place of an older one; every rank must call this.

        Args:
            optimizer: with what is trained.
            steps: that were taken.
            sharded: whether each rank has a part of everything, or all of it.
        """
        temporary = self.path / f"step-{steps}.tmp"
        if ranks.is_first():
            for leftover in self.path.glob("*.tmp"):
                shutil.rmtree(leftover)
            temporary.mkdir()
        ranks.wait()
        if sharded or ranks.is_first():
            for layer, names in _by_layer(optimizer).items():
                tensors = {
                    f"{own}.{key}": tensor.detach().cpu().contiguous()
                    for own, name in names.items()
                    for key, tensor in optimizer.tensors(name).items()
                }
                publish(temporary / self._file(layer, sharded), partial(save_tensors, tensors))
        ranks.wait()
        if ranks.is_first():
            former = self._states()
            os.rename(temporary, self.path / f"step-{steps}")
            sync_folder(self.path)
            for number in former:
                shutil.rmtree(self.path / f"step-{number}")
        ranks.wait()

    def load(self, optimizer: Optimizer, sharded: bool) -> int:
        """Take over the kept state.

        Args:
            optimizer, sharded: as of :meth:`save`.

        Returns:
            After how many steps it is.

        Raises:
            ShardError: a file is damaged.
        """
        steps = self.steps
        for layer, names in _by_layer(optimizer).items() if steps else ():
            path = self.path / f"step-{steps}" / self._file(layer, sharded)
            read_header(path)
            with safe_open(path, framework="pt") as file:
                for own, name in names.items():
                    kept = {key: file.get_tensor(f"{own}.{key}") for key in optimizer.tensors(name)}
                    optimizer.restore(name, kept, steps)
        return steps

    def _states(self) -> list[int]:
        folders = self.path.iterdir() if self.path.is_dir() else ()
        return [int(found[1]) for path in folders if (found := _STATE.fullmatch(path.name))]

    def _file(self, layer: str, sharded: bool) -> str:
        return f"{layer}.{ranks.own_rank() if sharded else 0}.safetensors"


def _by_layer(optimizer: Optimizer) -> dict[str, dict[str, str]]:
    """For each layer its parameters: their names within it, and in all."""
    layers: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for name in optimizer.parameters:
        found = _PART.fullmatch(name)
        assert found
        layers[found["layer"]][found["own"]] = name
    return layers
