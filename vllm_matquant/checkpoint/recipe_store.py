"""Recipes and their decoders, put among the files of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch

from vllm_matquant.checkpoint.decoder import Decoder
from vllm_matquant.checkpoint.files import publish, publish_json, read_json, save_tensors
from vllm_matquant.checkpoint.manifest import describe_file
from vllm_matquant.checkpoint.names import (
    CONFIG_FILE,
    MANIFEST_FILE,
    RECIPES_FOLDER,
    is_recipe_decoders_file,
    recipe_decoders_file,
    recipe_file,
)
from vllm_matquant.checkpoint.quantization_config import format_to_config
from vllm_matquant.checkpoint.reader import Checkpoint
from vllm_matquant.checkpoint.recipe import Recipe


def add_recipes(
    checkpoint: Checkpoint, recipes: Iterable[Recipe], decoders: Mapping[str, Mapping[str, Decoder]] | None = None
) -> None:
    """Put recipes into a checkpoint's folder; one of the same name is replaced.

    Each file appears whole: first the recipes, then config.json that lists them, then the manifest. A crash between the
    last two leaves a checkpoint that is served as before, and a manifest that the next call mends.

    Args:
        checkpoint: whose recipes they are.
        recipes: to add.
        decoders: by the recipes' names, the decoder of every layer for those with decoders of their own.

    Raises:
        DecoderValueError: a value is not finite or too large, or a scale or step is negative; nothing of this recipe is
            written.
        OSError: a file cannot be written.
    """
    folder = checkpoint.folder
    (folder / RECIPES_FOLDER).mkdir(exist_ok=True)
    files = list(checkpoint.format.recipes)
    for recipe in recipes:
        file = recipe_file(recipe.name)
        _publish(checkpoint, recipe, (decoders or {}).get(recipe.name))
        checkpoint.recipes[:] = [other for other in checkpoint.recipes if other.name != recipe.name] + [recipe]
        if file not in files:
            files.append(file)
    checkpoint.format = replace(checkpoint.format, recipes=tuple(sorted(files)))
    checkpoint.config = checkpoint.config | {"quantization_config": format_to_config(checkpoint.format)}
    publish_json(folder / CONFIG_FILE, checkpoint.config)
    if (folder / MANIFEST_FILE).is_file():
        manifest = read_json(folder / MANIFEST_FILE)
        own = [recipe_decoders_file(recipe.name) for recipe in checkpoint.recipes if recipe.own_decoders]
        names = [CONFIG_FILE, *checkpoint.format.recipes, *(name for name in own if (folder / name).is_file())]
        kept = {
            name: entry for name, entry in manifest["files"].items() if not is_recipe_decoders_file(name) or name in own
        }
        manifest["files"] = dict(sorted((kept | {name: describe_file(folder / name) for name in names}).items()))
        publish_json(folder / MANIFEST_FILE, manifest)


def _publish(checkpoint: Checkpoint, recipe: Recipe, decoders: Mapping[str, Decoder] | None) -> None:
    """Write a recipe's file and that of its decoders; at no moment does one lie beside another's."""
    if recipe.own_decoders != (decoders is not None):
        raise ValueError(f"{recipe.name}: found own_decoders {recipe.own_decoders}, expected it to tell of decoders")
    path, own = (checkpoint.folder / name(recipe.name) for name in (recipe_file, recipe_decoders_file))
    content = recipe.to_dict(checkpoint.format, checkpoint.layers)
    if decoders is None:
        publish_json(path, content)
        own.unlink(missing_ok=True)
        return
    tensors: dict[str, torch.Tensor] = {}
    for layer, width in recipe.widths.items():
        decoder = decoders[layer].map(lambda part: part.detach().cpu().contiguous())
        form = checkpoint.format.decoder_kind.form(width)
        if (decoder.form, decoder.width) != (form, width):
            found = f"{decoder.form.name} of width {decoder.width}"
            raise ValueError(f"{recipe.name}: decoder of {layer}: found {found}, expected {form.name} of width {width}")
        decoder.check(layer, own)
        tensors |= decoder.named(layer)
    publish_json(path, replace(recipe, own_decoders=False, kl=None).to_dict(checkpoint.format, checkpoint.layers))
    publish(own, lambda temporary: save_tensors(tensors, temporary))
    publish_json(path, content)
