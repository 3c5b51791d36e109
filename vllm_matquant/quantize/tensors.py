"""The tensors of a Hugging Face checkpoint, read from its safetensors files one at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open

from vllm_matquant.checkpoint.decoder import TensorSpec
from vllm_matquant.checkpoint.errors import (
    IndexFileError,
    MissingFileError,
    MissingTensorError,
    TensorDtypeError,
    TensorShapeError,
    TensorValueError,
    UnsafePathError,
)
from vllm_matquant.checkpoint.files import read_json
from vllm_matquant.checkpoint.names import CONFIG_FILE, INDEX_FILE, is_plain_name
from vllm_matquant.checkpoint.shard import read_header
from vllm_matquant.checkpoint.skeleton import Skeleton
from vllm_matquant.checkpoint.spec import UNQUANTIZED_DTYPES

_SINGLE_FILE = "model.safetensors"
_CHECKED_VALUES = 2**24  # at a time


class SafetensorsFolder:
    """The parameters of a model, in model.safetensors or in shards with their index.

    Tensors of the files that are no parameter of the model are left aside.

    Args:
        folder: where the files are.
        skeleton: the model's parameters; one that is tied to another may be absent.

    Raises:
        MissingFileError: the folder has neither the file nor the index, or lacks a shard that the index lists.
        UnsafePathError, IndexFileError: the index names a file outside of the folder, or is none.
        ShardError: a file is damaged.
        MissingTensorError, TensorShapeError, TensorDtypeError: a parameter is absent, or not what the model has.
    """

    def __init__(self, folder: Path, skeleton: Skeleton) -> None:
        self._folder = folder
        located = _locate(folder)
        self._file_of = {name: located[name] for name in skeleton.parameters if name in located}
        headers = {file: read_header(folder / file) for file in sorted(set(located.values()))}
        self._files = list(headers)
        self._specs = {name: headers[file][name] for name, file in self._file_of.items() if name in headers[file]}
        for name, shape in skeleton.parameters.items():
            if name not in self._file_of:
                if name in skeleton.tied:
                    continue
                raise MissingTensorError(folder, name, "in no file", "each of the model's parameters")
            path, found = folder / self._file_of[name], self._specs.get(name)
            if found is None:
                raise MissingTensorError(path, name, "no such tensor", f"the one that {INDEX_FILE} lists")
            if found.shape != shape:
                raise TensorShapeError(path, f"shape of {name}", list(found.shape), f"{list(shape)} by {CONFIG_FILE}")
            if found.dtype not in UNQUANTIZED_DTYPES:
                raise TensorDtypeError(path, name, found.dtype, " or ".join(map(str, UNQUANTIZED_DTYPES)))

    @property
    def files(self) -> list[Path]:
        """The files that hold tensors."""
        return [self._folder / name for name in self._files]

    @property
    def names(self) -> list[str]:
        """The parameters that have a tensor of their own, sorted."""
        return sorted(self._file_of)

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape of a tensor as it is stored."""
        return self._specs[name]

    def read(self, name: str) -> torch.Tensor:
        """A tensor as it is stored."""
        with safe_open(self._folder / self._file_of[name], framework="pt") as file:
            return file.get_tensor(name)

    def read_rows(self, name: str, rows: slice) -> torch.Tensor:
        """Rows of a tensor as it is stored; the others are not read."""
        with safe_open(self._folder / self._file_of[name], framework="pt") as file:
            return file.get_slice(name)[rows]

    def check_values(self, progress: Callable[[int], object] = lambda size: None) -> None:
        """Read every tensor once.

        Args:
            progress: called with the bytes of each.

        Raises:
            TensorValueError: a tensor holds NaN or infinity.
        """
        for path in self.files:
            # Opened once for all of its tensors: each opening reads the header anew.
            with safe_open(path, framework="pt") as file:
                for name in self.names:
                    if self._file_of[name] != path.name:
                        continue
                    tensor = file.get_tensor(name)
                    if not all(part.isfinite().all() for part in tensor.flatten().split(_CHECKED_VALUES)):
                        raise TensorValueError(path, name, "NaN or infinity", "finite weights")
                    progress(tensor.nbytes)


def _locate(folder: Path) -> dict[str, str]:
    """The file of each tensor."""
    index = folder / INDEX_FILE
    if not index.is_file():
        if not (folder / _SINGLE_FILE).is_file():
            raise MissingFileError(folder, "weights", "no such file", f"{_SINGLE_FILE} or {INDEX_FILE}")
        return dict.fromkeys(read_header(folder / _SINGLE_FILE), _SINGLE_FILE)
    located = read_json(index).get("weight_map")
    if not isinstance(located, dict):
        raise IndexFileError(index, "weight_map", type(located).__name__, "an object")
    for name in sorted(set(map(str, located.values()))):
        if not is_plain_name(name):
            raise UnsafePathError(index, "weight_map", repr(name), "a file name without a folder")
        if not (folder / name).is_file():
            raise MissingFileError(folder, name, "no such file", f"a shard that {INDEX_FILE} lists")
    return located
