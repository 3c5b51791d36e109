"""The tensors of a Hugging Face checkpoint, read from its safetensors files one at a time."""

from __future__ import annotations

from collections.abc import Iterator
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
    UnsafePathError,
)
from vllm_matquant.checkpoint.files import read_json
from vllm_matquant.checkpoint.names import CONFIG_FILE, INDEX_FILE, is_plain_name
from vllm_matquant.checkpoint.shard import read_header
from vllm_matquant.checkpoint.skeleton import Skeleton
from vllm_matquant.checkpoint.spec import UNQUANTIZED_DTYPES

_SINGLE_FILE = "model.safetensors"
_SINGLE_SHARD = "model-00001-of-00001.safetensors"
_DTYPES = (*UNQUANTIZED_DTYPES, torch.float64)
_OTHER_FORMATS = ("pytorch_model*.bin", "consolidated*", "tf_model.h5", "flax_model.msgpack", "*.gguf")


class SafetensorsFolder:
    """The parameters of a model, in model.safetensors, in a single shard, or in shards with their index.

    They bear the names of transformers' model, but those of a multimodal model's tower, which keep the files' names.
    Tensors of the files that are no parameter of the model are left aside.

    Args:
        folder: where the files are.
        skeleton: the model's parameters; one that is tied to another may be absent.

    Raises:
        MissingFileError: the folder has neither the file nor the index, or lacks a shard that the index lists.
        UnsafePathError, IndexFileError: the index names a file outside of the folder, is none, or is one of other files
            than the model.safetensors beside it.
        ShardError: a file is damaged.
        MissingTensorError, TensorShapeError, TensorDtypeError: a parameter is absent, or not what the model has.
    """

    def __init__(self, folder: Path, skeleton: Skeleton) -> None:
        self._folder = folder
        located = locate_tensors(folder)
        stored_names, shapes = skeleton.stored_names(located), {**skeleton.parameters, **skeleton.tower}
        places = {name: (located[stored], stored) for name, stored in stored_names.items()}
        headers = {file: read_header(folder / file) for file in sorted(set(located.values()))}
        self._stored = {file: frozenset(header) for file, header in headers.items()}
        specs = {name: headers[file][stored] for name, (file, stored) in places.items() if stored in headers[file]}
        for name, shape in shapes.items():
            if name not in places:
                if name in skeleton.tied:
                    continue
                raise MissingTensorError(folder, name, "in no file", "each of the model's parameters")
            path, found = folder / places[name][0], specs.get(name)
            if found is None:
                raise MissingTensorError(path, name, "no such tensor", f"the one that {INDEX_FILE} lists")
            if found.shape != shape:
                raise TensorShapeError(path, f"shape of {name}", list(found.shape), f"{list(shape)} by {CONFIG_FILE}")
            if found.dtype not in _DTYPES:
                raise TensorDtypeError(path, name, found.dtype, " or ".join(map(str, _DTYPES)))
        # Of the tower nothing is changed, its names neither.
        names = {name: stored_names[name] if name in skeleton.tower else name for name in places}
        self._places = {names[name]: place for name, place in places.items()}
        self._specs = {names[name]: spec for name, spec in specs.items()}

    @property
    def files(self) -> list[Path]:
        """The files that hold tensors."""
        return [self._folder / name for name in self._stored]

    @property
    def stored(self) -> dict[Path, frozenset[str]]:
        """The names of all tensors in each file, those of no parameter too."""
        return {self._folder / name: names for name, names in self._stored.items()}

    @property
    def names(self) -> list[str]:
        """The parameters that have a tensor of their own, sorted."""
        return sorted(self._places)

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape of a tensor as :meth:`read` gives it."""
        found = self._specs[name]
        return TensorSpec(torch.float32, found.shape) if found.dtype == torch.float64 else found

    def read(self, name: str) -> torch.Tensor:
        """A tensor as it is stored, but float64 as float32, as every model computes it."""
        file_name, stored = self._places[name]
        with safe_open(self._folder / file_name, framework="pt") as file:
            return _narrowed(file.get_tensor(stored))

    def read_rows(self, name: str, rows: slice) -> torch.Tensor:
        """Rows of a tensor, see :meth:`read`; the others are not read."""
        file_name, stored = self._places[name]
        with safe_open(self._folder / file_name, framework="pt") as file:
            return _narrowed(file.get_slice(stored)[rows])

    def each(self) -> Iterator[tuple[Path, str, torch.Tensor]]:
        """The file, the name and the content of every tensor, file by file."""
        for path in self.files:
            # Opened once for all of its tensors: each opening reads the header anew.
            with safe_open(path, framework="pt") as file:
                for name in self.names:
                    file_name, stored = self._places[name]
                    if file_name == path.name:
                        yield path, name, _narrowed(file.get_tensor(stored))


def _narrowed(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in a dtype that a checkpoint may hold."""
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def locate_tensors(folder: Path) -> dict[str, str]:
    """The file of each tensor."""
    index = folder / INDEX_FILE
    if not index.is_file():
        file = _only_file(folder)
        return dict.fromkeys(read_header(folder / file), file)
    located = read_json(index).get("weight_map")
    if not isinstance(located, dict):
        raise IndexFileError(index, "weight_map", type(located).__name__, "an object")
    names = sorted(set(map(str, located.values())))
    for name in names:
        if not is_plain_name(name):
            raise UnsafePathError(index, "weight_map", repr(name), "a file name without a folder")
    if _SINGLE_FILE not in names and (folder / _SINGLE_FILE).is_file():
        found = f"shards, and {_SINGLE_FILE} beside them, which it does not list"
        expected = "the one or the other: transformers reads the file, vLLM the shards"
        raise IndexFileError(index, "weight_map", found, expected, f"Remove either {INDEX_FILE} or {_SINGLE_FILE}")
    for name in names:
        if not (folder / name).is_file():
            raise MissingFileError(folder, name, "no such file", f"a shard that {INDEX_FILE} lists")
    # Who serves the model reads all that the shards hold, whether it is listed or not.
    unlisted = {tensor: name for name in names for tensor in read_header(folder / name) if tensor not in located}
    return located | unlisted


def _only_file(folder: Path) -> str:
    """The file that holds all tensors of a model without an index."""
    for name in (_SINGLE_FILE, _SINGLE_SHARD):
        if (folder / name).is_file():
            return name
    expected, hint = f"{_SINGLE_FILE} or {INDEX_FILE}", ""
    if shards := sorted(path.name for path in folder.glob("model-*-of-*.safetensors")):
        found, hint = f"{shards[0]} without an index", f"Fetch {INDEX_FILE} too, as hf download does"
    elif others := sorted(path.name for pattern in _OTHER_FORMATS for path in folder.glob(pattern)):
        found, hint = others[0], "Load the model with transformers and write it with save_pretrained"
    else:
        found = "no such file"
    raise MissingFileError(folder, "weights", found, expected, hint)
