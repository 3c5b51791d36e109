"""The checks that a folder must pass before it is read: the configuration implies every tensor, its shape and the shard
it lies in; the index and the headers of the shards must say the same.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_matquant.checkpoint.decoder import TensorSpec
from vllm_matquant.checkpoint.errors import (
    ConfigError,
    IndexFileError,
    MissingFileError,
    MissingTensorError,
    TensorDtypeError,
    TensorShapeError,
    UnexpectedTensorError,
    UnsafePathError,
)
from vllm_matquant.checkpoint.files import read_json
from vllm_matquant.checkpoint.names import (
    CONFIG_FILE,
    INDEX_FILE,
    is_plain_name,
    shard_name,
    shard_pattern,
    shard_width,
)
from vllm_matquant.checkpoint.shard import read_header
from vllm_matquant.checkpoint.skeleton import Skeleton
from vllm_matquant.checkpoint.spec import BASE_BITS, UNQUANTIZED_DTYPES, Format


@dataclass(frozen=True)
class ExpectedTensor:
    """What the configuration implies for one tensor."""

    shard_width: int
    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    optional: bool = False


def read_index(folder: Path) -> tuple[dict[str, str], int]:
    """The index: (shard file name of each tensor, bytes of all tensors).

    Raises:
        MissingFileError: there is no index.
        IndexFileError: it is not of the right form, or the folder holds a shard that it does not list.
        UnsafePathError: a file name with a folder in it.
    """
    path = folder / INDEX_FILE
    index = read_json(path)
    weight_map, metadata = index.get("weight_map"), index.get("metadata")
    if not isinstance(weight_map, dict):
        raise IndexFileError(path, "weight_map", weight_map, "an object: tensor name to file name")
    total_size = metadata.get("total_size") if isinstance(metadata, dict) else None
    if type(total_size) is not int:
        raise IndexFileError(path, "metadata.total_size", total_size, "an integer")
    for tensor, file in weight_map.items():
        if not isinstance(file, str):
            raise IndexFileError(path, f"file of {tensor}", repr(file), "a file name")
        # Only the name is judged. The file may be a symbolic link: that is how hub caches lay out a snapshot.
        if not is_plain_name(file):
            raise UnsafePathError(path, f"file of {tensor}", repr(file), "a file name without a folder")
        if shard_width(file) is None:
            raise IndexFileError(path, f"file of {tensor}", repr(file), f"a name like {shard_name(BASE_BITS, 1, 1)}")
    for file in sorted({file.name for file in folder.glob("*.safetensors")} - set(weight_map.values())):
        raise IndexFileError(path, "files in the folder", f"{file}, which is not listed", "the listed shards only")
    return weight_map, total_size


def check_files_are_there(
    folder: Path, files: Sequence[str], subject: str, servable_widths: Callable[[], Sequence[int]]
) -> None:
    """Check that a folder holds some files.

    Args:
        folder: the checkpoint's.
        files: their names in it: shards, and files of decoders that belong to recipes.
        subject: what to call them in an error.
        servable_widths: gives the widths that the folder serves, for an error.

    Raises:
        MissingFileError: some are not there; the message names them and says how to get them.
    """
    missing = [name for name in files if not (folder / name).is_file()]
    if not missing:
        return
    widths = [width for width in map(shard_width, missing) if width is not None]
    patterns = [shard_pattern(max(widths))] if widths else []
    patterns += [name for name in missing if shard_width(name) is None]
    include = " ".join(f"'{pattern}'" for pattern in patterns)
    served = ", ".join(map(str, servable_widths()))
    raise MissingFileError(
        folder,
        subject,
        "no " + ", no ".join(missing),
        "every file that holds some of its tensors",
        f"The folder serves {f'{served} bits' if served else 'no width'}; get the files from where it comes from, such "
        f"as: hf download NAME --local-dir {folder} --include {include}",
    )


def check_layer_count(config: dict[str, Any], tensors: int, where: Path) -> None:
    """Refuse a model of more layers than there are tensors: even without weights, a billion layers take all memory.

    Raises:
        ConfigError: there are more, or their number is no integer.
    """
    parts = {f"{name}.": part for name, part in config.items() if isinstance(part, dict)}
    for prefix, part in {"": config, **parts}.items():
        for field in ("num_hidden_layers", "depth"):  # the second of some vision towers
            count = part.get(field)
            if count is not None and (type(count) is not int or not 0 <= count <= tensors):
                expected = f"an integer up to the {tensors} tensors of the index"
                raise ConfigError(where, f"{prefix}{field}", count, expected)


def expected_tensors(
    format: Format, skeleton: Skeleton, config_path: Path, stored: Collection[str] = ()
) -> dict[str, ExpectedTensor]:
    """Every tensor that a checkpoint of this format and model has, by name.

    Args:
        format: the checkpoint's.
        skeleton: the model's parameters.
        config_path: the file to name in an error.
        stored: the names in the checkpoint, among them those that its source's files had for tensors of the tower.

    Raises:
        ConfigError: the group size does not fit a layer, or the format contradicts the model or names a layer that the
            model does not have or that is not quantized.
    """
    expected: dict[str, ExpectedTensor] = {}
    layers = skeleton.quantized_layers(format, config_path)
    for field, names in (("layer_group_sizes", format.layer_group_sizes), ("layer_widths", format.layer_widths)):
        if unknown := sorted(names.keys() - layers.keys()):
            raise ConfigError(config_path, f"quantization_config.{field}", unknown, "names of quantized layers only")
    for layer, (out_features, in_features) in layers.items():
        format.group_size_of(in_features, layer, config_path)
        for width, tensors in format.tensors_of_layer(out_features, in_features, layer).items():
            for name, spec in tensors.items():
                expected[f"{layer}.{name}"] = ExpectedTensor(width, spec.shape, (spec.dtype,))
    quantized = {f"{layer}.weight" for layer in layers}
    for name, shape in skeleton.parameters.items():
        if skeleton.tied.get(name, name) not in quantized:
            expected[name] = ExpectedTensor(BASE_BITS, shape, UNQUANTIZED_DTYPES, optional=name in skeleton.tied)
    own_names = skeleton.stored_names(stored) if skeleton.tower else {}
    for name, shape in skeleton.tower.items():
        expected[own_names.get(name, name)] = ExpectedTensor(BASE_BITS, shape, UNQUANTIZED_DTYPES)
    return expected


def check_index(path: Path, weight_map: dict[str, str], expected: dict[str, ExpectedTensor]) -> None:
    """Check that the index lists the expected tensors and no others, each in a shard of the right width.

    Raises:
        MissingTensorError: a tensor is not listed.
        UnexpectedTensorError: a tensor that is none of the expected is, or one is in a shard of another width.
    """
    for name, tensor in expected.items():
        if name not in weight_map and not tensor.optional:
            raise MissingTensorError(path, name, "nothing", f"a tensor of shape {list(tensor.shape)}")
    for name, file in weight_map.items():
        if name not in expected:
            raise UnexpectedTensorError(path, name, f"a tensor in {file}", f"no such tensor by {CONFIG_FILE}")
        if shard_width(file) != expected[name].shard_width:
            raise UnexpectedTensorError(path, name, file, f"a shard of width {expected[name].shard_width}")


def check_shard(
    path: Path, weight_map: Mapping[str, str], expected: Mapping[str, ExpectedTensor]
) -> dict[str, TensorSpec]:
    """Check the header of a shard against index and configuration; the tensors that it holds, by name.

    Raises:
        ShardError: the shard is not a sound safetensors file.
        MissingTensorError, UnexpectedTensorError: it holds other tensors than the index says.
        TensorDtypeError, TensorShapeError: a tensor is not as expected.
    """
    header = read_header(path)
    listed = {name for name, file in weight_map.items() if file == path.name}
    for name in sorted(listed - header.keys()):
        raise MissingTensorError(path, name, "nothing", f"the tensor that {INDEX_FILE} lists here")
    for name, tensor in sorted(header.items()):
        if name not in listed:
            elsewhere = f"it in {weight_map[name]} only" if name in weight_map else "no such tensor"
            raise UnexpectedTensorError(path, name, "a tensor", f"{elsewhere} by {INDEX_FILE}")
        _check_tensor(path, name, tensor, expected[name])
    return header


def check_tensors(path: Path, expected: Mapping[str, ExpectedTensor]) -> dict[str, TensorSpec]:
    """Check the header of a file that holds the ``expected`` tensors and no others; these, by name.

    Raises:
        ShardError, MissingTensorError, UnexpectedTensorError, TensorDtypeError, TensorShapeError: it does not.
    """
    header = read_header(path)
    for name, tensor in expected.items():
        if name not in header:
            raise MissingTensorError(path, name, "nothing", f"a tensor of shape {list(tensor.shape)}")
        _check_tensor(path, name, header[name], tensor)
    for name in sorted(header.keys() - expected.keys()):
        raise UnexpectedTensorError(path, name, "a tensor", "decoders of the recipe's widths only")
    return header


def _check_tensor(path: Path, name: str, found: TensorSpec, expected: ExpectedTensor) -> None:
    if found.dtype not in expected.dtypes:
        dtypes = " or ".join(map(str, expected.dtypes))
        raise TensorDtypeError(path, f"dtype of {name}", found.dtype, dtypes)
    if found.shape != expected.shape:
        raise TensorShapeError(path, f"shape of {name}", list(found.shape), f"{list(expected.shape)} by {CONFIG_FILE}")
