"""Spoilt checkpoints: each fault is refused with its own error, which names file, tensor, found and expected."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoint.samples import open_slice
from vllm_matquant.checkpoint import errors
from vllm_matquant.checkpoint.decoder import AFFINE_FLOAT16, AFFINE_INT8, CODEBOOK, DecoderKind
from vllm_matquant.checkpoint.names import CONFIG_FILE, INDEX_FILE, RECIPES_FOLDER, recipe_file
from vllm_matquant.checkpoint.reader import open_checkpoint

LAYER = "model.layers.0.mlp.up_proj"  # 96 x 64
NORM = "model.norm.weight"
Spoil = Callable[[Path], Any]


def edit_json(folder: Path, file: str, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((folder / file).read_text())
    change(content)
    (folder / file).write_text(json.dumps(content))


def shard_of(folder: Path, tensor: str) -> Path:
    return folder / json.loads((folder / INDEX_FILE).read_text())["weight_map"][tensor]


def in_config(change: Callable[[dict[str, Any]], Any]) -> Spoil:
    return lambda folder: edit_json(folder, CONFIG_FILE, change)


def in_quantization(**fields: Any) -> Spoil:
    return in_config(lambda config: config["quantization_config"].update(fields))


def in_weight_map(change: Callable[[dict[str, str]], Any]) -> Spoil:
    return lambda folder: edit_json(folder, INDEX_FILE, lambda index: change(index["weight_map"]))


def in_shard(tensor: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Spoil:
    """Change the tensors of the shard that holds ``tensor``; the index stays."""

    def spoil(folder: Path) -> None:
        path = shard_of(folder, tensor)
        tensors = {name: value.clone() for name, value in load_file(path).items()}
        change(tensors)
        save_file(tensors, path)

    return spoil


def replace_tensor(tensor: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    return in_shard(tensor, lambda tensors: tensors.update({tensor: change(tensors[tensor]).contiguous()}))


def set_value(tensor: str, value: float, column: int = 0) -> Spoil:
    def change(values: torch.Tensor) -> torch.Tensor:
        values[5, column] = value
        return values

    return replace_tensor(tensor, change)


def full_place(*planes: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A change to a codebook: one place of an entry has 255 in some planes."""

    def change(codebook: torch.Tensor) -> torch.Tensor:
        codebook[list(planes), 17, 2] = 255
        return codebook

    return change


def remove_tensor(tensor: str) -> Spoil:
    """Remove a tensor from its shard and from the index: no trace of it is left."""

    def spoil(folder: Path) -> None:
        in_shard(tensor, lambda tensors: tensors.pop(tensor))(folder)
        in_weight_map(lambda weight_map: weight_map.pop(tensor))(folder)

    return spoil


def add_tensor(tensor: str, beside: str) -> Spoil:
    """Add a tensor to a shard and to the index."""

    def spoil(folder: Path) -> None:
        in_shard(beside, lambda tensors: tensors.update({tensor: torch.zeros(4)}))(folder)
        in_weight_map(lambda weight_map: weight_map.update({tensor: weight_map[beside]}))(folder)

    return spoil


def move_shard_outside(folder: Path) -> None:
    path = shard_of(folder, NORM)
    shutil.move(path, folder.parent / path.name)
    in_weight_map(lambda files: files.update({n: f"../{f}" for n, f in files.items() if f == path.name}))(folder)


def truncate(path: Path, size: int) -> None:
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)


def overwrite(path: Path, content: bytes) -> None:
    with path.open("r+b") as file:
        file.write(content)


def duplicate_in_second_shard(folder: Path) -> None:
    other = next(path for path in sorted(folder.glob("model-width2-*")) if path != shard_of(folder, NORM))
    tensors = load_file(other) | {NORM: load_file(shard_of(folder, NORM))[NORM]}
    save_file(tensors, other)


def add_shard(folder: Path) -> None:
    save_file({"stray": torch.zeros(1)}, folder / "model-width3-00009-of-00009.safetensors")


def with_recipe(change: Callable[[dict[str, Any]], Any]) -> Spoil:
    """Add a recipe of 4 bits for every layer, changed."""

    def spoil(folder: Path) -> None:
        recipe: dict[str, Any] = {"recipe_version": 1, "name": "mine", "default": 4, "widths": {LAYER: 2}}
        change(recipe)
        (folder / RECIPES_FOLDER).mkdir()
        (folder / recipe_file("mine")).write_text(json.dumps(recipe))
        in_quantization(recipes=[recipe_file("mine")])(folder)

    return spoil


def duplicate_key_in_index(folder: Path) -> None:
    text = (folder / INDEX_FILE).read_text()
    line = f'"{NORM}": "{shard_of(folder, NORM).name}"'
    (folder / INDEX_FILE).write_text(text.replace(line, f"{line}, {line}"))


@dataclass
class Fault:
    spoil: Spoil
    error: type[errors.CheckpointError]
    message: tuple[str, ...]  # pieces of the error's text


def fault(spoil: Spoil, error: type[errors.CheckpointError], *message: str) -> Fault:
    return Fault(spoil, error, message)


FAULTS = {
    # config.json
    "no config": fault(
        lambda d: (d / CONFIG_FILE).unlink(), errors.MissingFileError, "config.json: found no such file"
    ),
    "config is a list": fault(
        lambda d: (d / CONFIG_FILE).write_text("[]"), errors.ConfigError, "config.json", "found list, expected a JSON"
    ),
    "config is cut": fault(
        lambda d: truncate(d / CONFIG_FILE, -10), errors.ConfigError, "config.json: content: found no valid JSON"
    ),
    "config is empty": fault(lambda d: truncate(d / CONFIG_FILE, 0), errors.ConfigError, "no valid JSON"),
    "config is no text": fault(
        lambda d: (d / CONFIG_FILE).write_bytes(b"\xff{}"), errors.ConfigError, "config.json", "no valid JSON"
    ),
    "not quantized": fault(
        in_config(lambda config: config.pop("quantization_config")),
        errors.ConfigError,
        "config.json: quantization_config: found nothing",
        "no matquant checkpoint",
    ),
    "another method": fault(
        in_quantization(quant_method="gptq"), errors.ConfigError, "quant_method: found 'gptq', expected 'matquant'"
    ),
    "version 4": fault(
        in_quantization(format_version=4),
        errors.VersionError,
        "format_version: found 4, expected one of [1, 2, 3]",
        "newer release",
    ),
    "version as text": fault(in_quantization(format_version="1"), errors.ConfigError, "found '1', expected an integer"),
    "parent of 4 bits": fault(in_quantization(parent_bits=4), errors.ConfigError, "parent_bits: found 4, expected 8"),
    "width 9": fault(in_quantization(widths=[2, 9]), errors.ConfigError, "widths: found [2, 9]", "in 2..8"),
    "width 1": fault(in_quantization(widths=[1, 2]), errors.ConfigError, "widths: found [1, 2]", "in 2..8"),
    "widths unsorted": fault(in_quantization(widths=[4, 3]), errors.ConfigError, "widths: found [4, 3]", "ascending"),
    "no widths": fault(in_quantization(widths=[]), errors.ConfigError, "widths: found []"),
    "group size 33": fault(in_quantization(group_size=33), errors.ConfigError, "group_size: found 33"),
    "group that does not divide": fault(
        in_quantization(group_size=64),
        errors.ConfigError,
        "group_size for model.layers.0.mlp.down_proj: found 64, expected a divisor of its 96 input features",
        '8, 16, 24, 32, 48, "channel"',
    ),
    "slicing": fault(in_quantization(slicing="nearest"), errors.ConfigError, "slicing: found 'nearest'", "truncate"),
    "unknown field": fault(in_quantization(codebook="e8"), errors.ConfigError, "unknown fields ['codebook']"),
    "ignored layer is quantized": fault(
        in_quantization(ignored_layers=["lm_head", LAYER]),
        errors.MissingTensorError,
        f"{INDEX_FILE}: {LAYER}.weight: found nothing, expected a tensor of shape [96, 64]",
    ),
    "widths of a layer that the model does not have": fault(
        in_quantization(layer_widths={f"{LAYER}s": [2]}),
        errors.ConfigError,
        f"config.json: quantization_config.layer_widths: found ['{LAYER}s'], expected names of quantized layers only",
    ),
    "group size of a layer that is not quantized": fault(
        in_quantization(layer_group_sizes={"lm_head": 32}),
        errors.ConfigError,
        "quantization_config.layer_group_sizes: found ['lm_head'], expected names of quantized layers only",
    ),
    "widths that the layer has no decoders of": fault(
        in_quantization(layer_widths={LAYER: [8]}),
        errors.UnexpectedTensorError,
        "expected no such tensor by config.json",
    ),
    "tied head is quantized without its embedding": fault(
        in_quantization(ignored_layers=[]),
        errors.ConfigError,
        "config.json: quantization_config.quantized_embeddings and ignored_layers",
        "found lm_head quantized and model.embed_tokens, which shares its weight, not",
    ),
    "embedding is quantized without its tied head": fault(
        in_quantization(quantized_embeddings=["model.embed_tokens"]),
        errors.ConfigError,
        "found model.embed_tokens quantized and lm_head, which shares its weight, not",
    ),
    "embedding is not quantized": fault(
        in_quantization(quantized_embeddings=["model.embed_tokens"], ignored_layers=[]),
        errors.MissingTensorError,
        f"{INDEX_FILE}: model.embed_tokens.weight_base: found nothing, expected a tensor of shape [40, 16]",
    ),
    "unknown embedding": fault(
        in_quantization(quantized_embeddings=["model.embeddings"]),
        errors.ConfigError,
        "quantized_embeddings: found ['model.embeddings'], expected no names but ['model.embed_tokens']",
    ),
    "unknown architecture": fault(
        in_config(lambda config: config.update(model_type="nonesuch")), errors.ConfigError, "'nonesuch'", "transformers"
    ),
    "wider than the weights": fault(
        in_config(lambda config: config.update(intermediate_size=128)),
        errors.TensorShapeError,
        "shape of model.layers.0.mlp.down_proj.weight_base: found [64, 24], expected [64, 32] by config.json",
    ),
    "one layer too many": fault(
        in_config(lambda config: config.update(num_hidden_layers=3)), errors.MissingTensorError, "model.layers.2."
    ),
    "one layer too few": fault(
        in_config(lambda config: config.update(num_hidden_layers=1)), errors.UnexpectedTensorError, "model.layers.1."
    ),
    "a billion layers": fault(
        in_config(lambda config: config.update(num_hidden_layers=10**9)),
        errors.ConfigError,
        "num_hidden_layers: found 1000000000",
    ),
    # index
    "no index": fault(
        lambda d: (d / INDEX_FILE).unlink(), errors.MissingFileError, f"{INDEX_FILE}: found no such file"
    ),
    "index is cut": fault(
        lambda d: truncate(d / INDEX_FILE, -10), errors.IndexFileError, INDEX_FILE, "found no valid JSON"
    ),
    "index without a map": fault(
        lambda d: edit_json(d, INDEX_FILE, lambda index: index.pop("weight_map")),
        errors.IndexFileError,
        "weight_map: found None",
    ),
    "index with a number": fault(
        in_weight_map(lambda files: files.update({NORM: 3})), errors.IndexFileError, f"file of {NORM}: found 3"
    ),
    "index without a size": fault(
        lambda d: edit_json(d, INDEX_FILE, lambda index: index.pop("metadata")),
        errors.IndexFileError,
        "metadata.total_size: found None",
    ),
    "index with a wrong size": fault(
        lambda d: edit_json(d, INDEX_FILE, lambda index: index["metadata"].update(total_size=7)),
        errors.IndexFileError,
        "metadata.total_size: found 7",
    ),
    "tensor twice in the index": fault(
        duplicate_key_in_index, errors.IndexFileError, INDEX_FILE, f"the key '{NORM}' twice"
    ),
    "path to the parent": fault(
        move_shard_outside, errors.UnsafePathError, INDEX_FILE, "'../model-width2-", "a file name without a folder"
    ),
    "absolute path": fault(
        in_weight_map(lambda files: files.update({NORM: "/etc/passwd"})),
        errors.UnsafePathError,
        f"file of {NORM}: found '/etc/passwd'",
    ),
    "path into a sub-folder": fault(
        in_weight_map(lambda files: files.update({NORM: f"sub/{files[NORM]}"})), errors.UnsafePathError, "'sub/model"
    ),
    "no shard's name": fault(
        in_weight_map(lambda files: files.update({NORM: "model.safetensors"})),
        errors.IndexFileError,
        "found 'model.safetensors', expected a name like model-width2-00001",
    ),
    "unlisted shard": fault(
        add_shard, errors.IndexFileError, "model-width3-00009-of-00009.safetensors, which is not listed"
    ),
    "tensor only in the index": fault(
        in_weight_map(lambda files: files.update({"model.extra": files[NORM]})),
        errors.UnexpectedTensorError,
        f"{INDEX_FILE}: model.extra",
    ),
    "tensor in the shard of another width": fault(
        in_weight_map(lambda files: files.update({f"{LAYER}.weight_plane5": files[f"{LAYER}.weight_plane4"]})),
        errors.UnexpectedTensorError,
        f"{LAYER}.weight_plane5: found model-width4-",
        "expected a shard of width 5",
    ),
    "tensor in another shard than listed": fault(
        in_shard(NORM, lambda tensors: tensors.pop(NORM)),
        errors.MissingTensorError,
        f"{NORM}: found nothing, expected the tensor that {INDEX_FILE} lists here",
    ),
    # shards
    "no shard": fault(
        lambda d: shard_of(d, NORM).unlink(), errors.MissingFileError, "no model-width2-", "serves no width"
    ),
    "shard is a folder": fault(
        lambda d: (shard_of(d, NORM).unlink(), shard_of(d, NORM).mkdir()), errors.MissingFileError, "no model-width2-"
    ),
    "shard is cut": fault(
        lambda d: truncate(shard_of(d, NORM), -1), errors.ShardError, "model-width2-", "bytes of all tensors"
    ),
    "shard is cut in its header": fault(
        lambda d: truncate(shard_of(d, NORM), 50), errors.ShardError, "header length", "in a file of 50 bytes"
    ),
    "shard is empty": fault(lambda d: truncate(shard_of(d, NORM), 0), errors.ShardError, "size: found 0 bytes"),
    "shard is longer": fault(
        lambda d: truncate(shard_of(d, NORM), 10**6), errors.ShardError, "bytes of all tensors", "in the file"
    ),
    "header length overflows": fault(
        lambda d: overwrite(shard_of(d, NORM), b"\xff" * 8), errors.ShardError, f"header length: found {2**64 - 1}"
    ),
    "header is no JSON": fault(
        lambda d: overwrite(shard_of(d, NORM), (64).to_bytes(8, "little") + b"\x80"),
        errors.ShardError,
        "header",
        "JSON",
    ),
    "wide shard is cut": fault(
        lambda d: truncate(shard_of(d, f"{LAYER}.weight_plane8"), -1), errors.ShardError, "model-width8-"
    ),
    "tensor in two shards": fault(
        duplicate_in_second_shard, errors.UnexpectedTensorError, NORM, "expected it in model-width2-", "only"
    ),
    "unlisted tensor": fault(
        in_shard(NORM, lambda tensors: tensors.update(stray=torch.zeros(1))),
        errors.UnexpectedTensorError,
        "stray: found a tensor, expected no such tensor",
    ),
    "extra tensor": fault(add_tensor("model.extra.weight", NORM), errors.UnexpectedTensorError, "model.extra.weight"),
    "extra plane": fault(
        add_tensor(f"{LAYER}.weight_plane9", f"{LAYER}.weight_plane8"), errors.UnexpectedTensorError, "weight_plane9"
    ),
    "unquantized weight beside its codes": fault(
        add_tensor(f"{LAYER}.weight", NORM), errors.UnexpectedTensorError, f"{LAYER}.weight: found a tensor"
    ),
    "no base": fault(
        remove_tensor(f"{LAYER}.weight_base"), errors.MissingTensorError, f"{LAYER}.weight_base: found no"
    ),
    "no plane": fault(
        remove_tensor(f"{LAYER}.weight_plane5"), errors.MissingTensorError, f"{LAYER}.weight_plane5: found nothing"
    ),
    "no scale": fault(remove_tensor(f"{LAYER}.weight_scale3"), errors.MissingTensorError, f"{LAYER}.weight_scale3"),
    "no norm": fault(remove_tensor(NORM), errors.MissingTensorError, f"{NORM}: found nothing", "shape [64]"),
    "plane of int8": fault(
        replace_tensor(f"{LAYER}.weight_plane4", lambda plane: plane.view(torch.int8)),
        errors.TensorDtypeError,
        "model-width4-",
        f"dtype of {LAYER}.weight_plane4: found torch.int8, expected torch.uint8",
    ),
    "norm of int32": fault(
        replace_tensor(NORM, lambda norm: norm.int()),
        errors.TensorDtypeError,
        f"dtype of {NORM}: found torch.int32, expected torch.bfloat16 or torch.float16 or torch.float32",
    ),
    "narrow plane": fault(
        replace_tensor(f"{LAYER}.weight_plane4", lambda plane: plane[:, :-1]),
        errors.TensorShapeError,
        f"shape of {LAYER}.weight_plane4: found [96, 7], expected [96, 8] by config.json",
    ),
    "transposed base": fault(
        replace_tensor(f"{LAYER}.weight_base", lambda base: base.T),
        errors.TensorShapeError,
        f"shape of {LAYER}.weight_base: found [16, 96], expected [96, 16]",
    ),
    "short norm": fault(
        replace_tensor(NORM, lambda norm: norm[:-1]), errors.TensorShapeError, f"shape of {NORM}: found [63]"
    ),
    # recipes
    "recipe outside of its folder": fault(
        in_quantization(recipes=["../recipes/a.json"]), errors.ConfigError, "recipes", "../recipes/a.json"
    ),
    "recipe listed twice": fault(
        in_quantization(recipes=["recipes/a.json", "recipes/a.json"]), errors.ConfigError, "each once"
    ),
    "recipe that is no JSON": fault(
        lambda folder: (
            with_recipe(lambda recipe: None)(folder),
            (folder / recipe_file("mine")).write_text("{"),
        ),
        errors.RecipeError,
        "mine.json: content",
    ),
    "recipe of another version": fault(
        with_recipe(lambda recipe: recipe.update(recipe_version=2)), errors.RecipeError, "recipe_version: found 2"
    ),
    "recipe with an unknown field": fault(
        with_recipe(lambda recipe: recipe.update(width=2)), errors.RecipeError, "unknown fields ['width']"
    ),
    "recipe with an unknown layer": fault(
        with_recipe(lambda recipe: recipe["widths"].update({"model.layers.9.mlp.up_proj": 4})),
        errors.RecipeError,
        "width of model.layers.9.mlp.up_proj: found no such layer",
    ),
    "recipe with an absent width": fault(
        with_recipe(lambda recipe: recipe["widths"].update({LAYER: 9})),
        errors.RecipeError,
        f"width of {LAYER}: found 9, expected one of its widths [2, 3, 4, 5, 6, 7, 8]",
    ),
    "recipe with a width that is no integer": fault(
        with_recipe(lambda recipe: recipe["widths"].update({LAYER: 4.0})), errors.RecipeError, "found 4.0"
    ),
    "recipe that leaves layers out": fault(
        with_recipe(lambda recipe: recipe.pop("default")),
        errors.RecipeError,
        "width of model.layers.0",
        "found nothing",
    ),
    "recipe with a wrong average": fault(
        with_recipe(lambda recipe: recipe.update(average_bits=4.0)), errors.RecipeError, "average_bits: found 4.0"
    ),
    "recipe with a wrong size": fault(
        with_recipe(lambda recipe: recipe.update(resident_bytes=7)), errors.RecipeError, "resident_bytes: found 7"
    ),
    "recipe with a loss that is no number": fault(
        with_recipe(lambda recipe: recipe.update(kl="low")), errors.RecipeError, "kl: found 'low'"
    ),
    "recipe with a bad name": fault(
        with_recipe(lambda recipe: recipe.update(name="../mine")), errors.RecipeError, "name: found '../mine'"
    ),
}


DECODER_FAULTS = {
    AFFINE_FLOAT16: {
        "another group size": fault(
            in_quantization(group_size=32), errors.TensorShapeError, "weight_offset2", "found [96, 1], expected [96, 2]"
        ),
        "no offset": fault(
            remove_tensor(f"{LAYER}.weight_offset8"), errors.MissingTensorError, f"{LAYER}.weight_offset8"
        ),
        "scale of bfloat16": fault(
            replace_tensor(f"{LAYER}.weight_scale4", lambda scale: scale.bfloat16()),
            errors.TensorDtypeError,
            f"dtype of {LAYER}.weight_scale4: found torch.bfloat16, expected torch.float16",
        ),
        "flat offset": fault(
            replace_tensor(f"{LAYER}.weight_offset2", lambda offset: offset.flatten()),
            errors.TensorShapeError,
            f"shape of {LAYER}.weight_offset2: found [96], expected [96, 1]",
        ),
        "scale of NaN": fault(
            set_value(f"{LAYER}.weight_scale4", float("nan")),
            errors.DecoderValueError,
            "model-width4-",
            f"{LAYER}.weight_scale4: found nan in row 5, column 0",
            "expected finite values from 0 up",
        ),
        "infinite scale": fault(
            set_value(f"{LAYER}.weight_scale2", float("inf")),
            errors.DecoderValueError,
            f"{LAYER}.weight_scale2: found inf",
        ),
        "negative scale": fault(
            set_value(f"{LAYER}.weight_scale8", -0.5), errors.DecoderValueError, f"{LAYER}.weight_scale8: found -0.5"
        ),
        "infinite offset": fault(
            set_value(f"{LAYER}.weight_offset3", float("-inf")),
            errors.DecoderValueError,
            f"{LAYER}.weight_offset3: found -inf in row 5, column 0",
            "expected finite values",
        ),
    },
    AFFINE_INT8: {
        "another kind": fault(
            in_quantization(decoder_kind="affine-float16"),
            errors.MissingTensorError,
            f"{INDEX_FILE}: model.layers.0.self_attn.q_proj.weight_offset2: found nothing, expected a tensor of shape",
        ),
        "unknown kind": fault(
            in_quantization(decoder_kind="codebook"),
            errors.ConfigError,
            "quantization_config.decoder_kind: found 'codebook', expected one of ['affine-float16', 'affine-int8']",
        ),
        "kind of a later version": fault(
            in_quantization(decoder_kind="codebook-4d"),
            errors.ConfigError,
            "quantization_config.decoder_kind: found 'codebook-4d', expected one of ['affine-float16', 'affine-int8']",
        ),
        "no kind": fault(
            in_config(lambda config: config["quantization_config"].pop("decoder_kind")),
            errors.ConfigError,
            "quantization_config.decoder_kind: found nothing",
        ),
        "kind in version 1": fault(
            in_quantization(format_version=1), errors.ConfigError, "unknown fields ['decoder_kind']"
        ),
        "another group size": fault(
            in_quantization(group_size=32), errors.TensorShapeError, "weight_centre2", "found [96, 1], expected [96, 2]"
        ),
        "no centre": fault(
            remove_tensor(f"{LAYER}.weight_centre4"), errors.MissingTensorError, f"{LAYER}.weight_centre4"
        ),
        "no step": fault(remove_tensor(f"{LAYER}.weight_step2"), errors.MissingTensorError, f"{LAYER}.weight_step2"),
        "scale of float16": fault(
            replace_tensor(f"{LAYER}.weight_scale4", lambda scale: scale.half()),
            errors.TensorDtypeError,
            f"dtype of {LAYER}.weight_scale4: found torch.float16, expected torch.uint8",
        ),
        "centre without a sign": fault(
            replace_tensor(f"{LAYER}.weight_centre4", lambda centre: centre.view(torch.uint8)),
            errors.TensorDtypeError,
            f"dtype of {LAYER}.weight_centre4: found torch.uint8, expected torch.int8",
        ),
        "step of float32": fault(
            replace_tensor(f"{LAYER}.weight_step4", lambda step: step.float()),
            errors.TensorDtypeError,
            f"dtype of {LAYER}.weight_step4: found torch.float32, expected torch.bfloat16",
        ),
        "one step": fault(
            replace_tensor(f"{LAYER}.weight_step3", lambda step: step[:, :1]),
            errors.TensorShapeError,
            f"shape of {LAYER}.weight_step3: found [96, 1], expected [96, 2] by config.json",
        ),
        "flat centre": fault(
            replace_tensor(f"{LAYER}.weight_centre2", lambda centre: centre.flatten()),
            errors.TensorShapeError,
            f"shape of {LAYER}.weight_centre2: found [96], expected [96, 1]",
        ),
        "step of NaN": fault(
            set_value(f"{LAYER}.weight_step4", float("nan")),
            errors.DecoderValueError,
            "model-width4-",
            f"{LAYER}.weight_step4: found nan in row 5, column 0",
            "expected finite values from 0 up",
        ),
        "infinite step of the centre": fault(
            set_value(f"{LAYER}.weight_step3", float("inf"), column=1),
            errors.DecoderValueError,
            f"{LAYER}.weight_step3: found inf in row 5, column 1 (as torch.bfloat16)",
        ),
        "negative step": fault(
            set_value(f"{LAYER}.weight_step3", -0.5), errors.DecoderValueError, f"{LAYER}.weight_step3: found -0.5"
        ),
        "no offset of a wide decoder": fault(
            remove_tensor(f"{LAYER}.weight_offset8"), errors.MissingTensorError, f"{LAYER}.weight_offset8"
        ),
        "wide scale in 8 bits": fault(
            replace_tensor(f"{LAYER}.weight_scale5", lambda scale: scale.byte()),
            errors.TensorDtypeError,
            f"dtype of {LAYER}.weight_scale5: found torch.uint8, expected torch.float16",
        ),
        "negative wide scale": fault(
            set_value(f"{LAYER}.weight_scale8", -0.5), errors.DecoderValueError, f"{LAYER}.weight_scale8: found -0.5"
        ),
    },
    CODEBOOK: {
        "another kind": fault(
            in_quantization(decoder_kind="affine-int8"),
            errors.MissingTensorError,
            f"{INDEX_FILE}: model.layers.0.self_attn.q_proj.weight_centre2: found nothing, expected a tensor of shape",
        ),
        "unknown kind": fault(
            in_quantization(decoder_kind="codebook-8d"),
            errors.ConfigError,
            "decoder_kind: found 'codebook-8d', expected one of ['affine-float16', 'affine-int8', 'codebook-4d', ",
        ),
        "kind in version 2": fault(
            in_quantization(format_version=2),
            errors.ConfigError,
            "decoder_kind: found 'codebook-4d', expected one of ['affine-float16', 'affine-int8']",
        ),
        "rounded slices": fault(
            in_quantization(slicing="round"),
            errors.ConfigError,
            "quantization_config.slicing: found 'round', expected 'truncate', as decoder_kind is 'codebook-4d'",
        ),
        "another group size": fault(
            in_quantization(group_size=32), errors.TensorShapeError, "weight_scale2", "found [96, 1], expected [96, 2]"
        ),
        "no codebook": fault(
            remove_tensor(f"{LAYER}.weight_codebook7"), errors.MissingTensorError, f"{LAYER}.weight_codebook7"
        ),
        "no step": fault(remove_tensor(f"{LAYER}.weight_step8"), errors.MissingTensorError, f"{LAYER}.weight_step8"),
        "scale of float16": fault(
            replace_tensor(f"{LAYER}.weight_scale6", lambda scale: scale.half()),
            errors.TensorDtypeError,
            f"dtype of {LAYER}.weight_scale6: found torch.float16, expected torch.uint8",
        ),
        "codebook with signs": fault(
            replace_tensor(f"{LAYER}.weight_codebook4", lambda codebook: codebook.view(torch.int8)),
            errors.TensorDtypeError,
            f"dtype of {LAYER}.weight_codebook4: found torch.int8, expected torch.uint8",
        ),
        "two steps": fault(
            replace_tensor(f"{LAYER}.weight_step3", lambda step: step.repeat(1, 2)),
            errors.TensorShapeError,
            f"shape of {LAYER}.weight_step3: found [96, 2], expected [96, 1] by config.json",
        ),
        "codebook of a narrower width": fault(
            replace_tensor(f"{LAYER}.weight_codebook4", lambda codebook: codebook[:2]),
            errors.TensorShapeError,
            f"shape of {LAYER}.weight_codebook4: found [2, 64, 4], expected [3, 64, 4] by config.json",
        ),
        "wide codebook without sixteenths": fault(
            replace_tensor(f"{LAYER}.weight_codebook5", lambda codebook: codebook[:4]),
            errors.TensorShapeError,
            f"shape of {LAYER}.weight_codebook5: found [4, 64, 4], expected [8, 64, 4] by config.json",
        ),
        "codebook of half the entries": fault(
            replace_tensor(f"{LAYER}.weight_codebook2", lambda codebook: codebook[:, :32]),
            errors.TensorShapeError,
            f"shape of {LAYER}.weight_codebook2: found [1, 32, 4], expected [1, 64, 4]",
        ),
        "step of NaN": fault(
            set_value(f"{LAYER}.weight_step4", float("nan")),
            errors.DecoderValueError,
            "model-width4-",
            f"{LAYER}.weight_step4: found nan in row 5, column 0",
            "expected finite values from 0 up",
        ),
        "infinite wide step": fault(
            set_value(f"{LAYER}.weight_step7", float("inf")),
            errors.DecoderValueError,
            f"{LAYER}.weight_step7: found inf in row 5, column 0 (as torch.bfloat16)",
        ),
        "negative step": fault(
            set_value(f"{LAYER}.weight_step2", -0.5), errors.DecoderValueError, f"{LAYER}.weight_step2: found -0.5"
        ),
        "codebook that adds up to too much": fault(
            replace_tensor(f"{LAYER}.weight_codebook3", full_place(0, 1)),
            errors.DecoderValueError,
            "model-width3-",
            f"{LAYER}.weight_codebook3: found 255 in plane 0, entry 17, place 2 (as torch.uint8)",
            "expected levels from 1 up that with all increments add up to at most 255",
        ),
        "level whose other sign is no byte": fault(
            replace_tensor(f"{LAYER}.weight_codebook2", lambda codebook: codebook.index_fill(1, torch.tensor([9]), 0)),
            errors.DecoderValueError,
            f"{LAYER}.weight_codebook2: found 0 in plane 0, entry 9, place 0 (as torch.uint8)",
        ),
        "sixteenths that add up to too much": fault(
            replace_tensor(f"{LAYER}.weight_codebook6", full_place(5, 9)),
            errors.DecoderValueError,
            f"{LAYER}.weight_codebook6: found 255 in plane 5, entry 17, place 2 (as torch.uint8)",
        ),
    },
}


@pytest.mark.parametrize(
    ("kind", "name"),
    [(AFFINE_INT8.name, name) for name in FAULTS]
    + [(kind.name, name) for kind, faults in DECODER_FAULTS.items() for name in faults],
    indirect=["kind"],
)
def test_fault_is_refused(sample: Any, kind: DecoderKind, name: str) -> None:
    fault = FAULTS.get(name) or DECODER_FAULTS[kind][name]
    fault.spoil(sample.folder)
    with pytest.raises(errors.CheckpointError) as caught:
        open_checkpoint(sample.folder)
    assert type(caught.value) is fault.error
    assert str(sample.folder) in str(caught.value)
    for piece in (*fault.message, "found", "expected"):
        assert piece in str(caught.value)


@pytest.mark.parametrize("faults", DECODER_FAULTS.values())
def test_no_fault_hides_another(faults: dict[str, Fault]) -> None:
    assert not faults.keys() & FAULTS.keys()


def test_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(errors.MissingFileError, match="absent: checkpoint: found no such folder"):
        open_checkpoint(tmp_path / "absent")


@pytest.mark.parametrize("width", [2, 3, 5])
def test_values_of_other_widths_do_not_matter(sample: Any, width: int) -> None:
    part = {AFFINE_FLOAT16: "scale", AFFINE_INT8: "step", CODEBOOK: "step"}[sample.format.decoder_kind]
    set_value(f"{LAYER}.weight_{part}4", float("nan"))(sample.folder)
    assert open_slice(sample.folder, width).layers
    with pytest.raises(errors.DecoderValueError):
        open_slice(sample.folder, 4)
    assert open_slice(sample.folder, 4, values=False).layers
    assert open_checkpoint(sample.folder, check_values=False).layers


def test_every_error_of_the_reader_has_a_fault() -> None:
    of_others = {
        errors.OutputError,
        errors.PointerFileError,
        errors.ChecksumError,
        errors.NestingError,
        errors.WidthError,
        errors.TensorValueError,
    }
    classes = {error for error in vars(errors).values() if isinstance(error, type) and issubclass(error, ValueError)}
    faults = [*FAULTS.values(), *(fault for faults in DECODER_FAULTS.values() for fault in faults.values())]
    assert {fault.error for fault in faults} == classes - of_others - {errors.CheckpointError}
