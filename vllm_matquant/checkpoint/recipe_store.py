"""Recipes of a checkpoint: put among its files, and chosen among for a budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from safetensors.torch import save_file

from vllm_matquant.checkpoint.errors import RecipeError
from vllm_matquant.checkpoint.files import publish, publish_json, read_json
from vllm_matquant.checkpoint.manifest import describe_file
from vllm_matquant.checkpoint.reader import Checkpoint
from vllm_matquant.checkpoint.recipe import Recipe, average_bits
from vllm_matquant.checkpoint.spec import (
    CONFIG_FILE,
    DECODER_DTYPE,
    MANIFEST_FILE,
    RECIPES_FOLDER,
    is_recipe_decoders_file,
    offset_name,
    recipe_decoders_file,
    recipe_file,
    scale_name,
)
from vllm_matquant.checkpoint.validate import check_decoder

Decoder = tuple[torch.Tensor, torch.Tensor]
"""(scale, offset) of a layer, floating point [out_features, groups] each."""

UNIFORM = "uniform-{}"  # names of the recipes that tell what the plain widths lose


def add_recipes(
    checkpoint: Checkpoint, recipes: Iterable[Recipe], decoders: Mapping[str, Mapping[str, Decoder]] | None = None
) -> None:
    """Put recipes into a checkpoint's folder; one of the same name is replaced.

    Each file appears whole: first the recipes, then config.json that lists them, then the manifest. A crash between the
    last two leaves a checkpoint that is served as before, and a manifest that the next call mends.

    Args:
        checkpoint: whose recipes they are.
        recipes: to add.
        decoders: by their names, (scale, offset) of every layer for those with decoders of their own.

    Raises:
        DecoderValueError: a value is not finite in float16, or a scale is negative; nothing of this recipe is written.
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
    checkpoint.config = checkpoint.config | {"quantization_config": checkpoint.format.to_dict()}
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
        scale, offset = (values.detach().to("cpu", DECODER_DTYPE).contiguous() for values in decoders[layer])
        check_decoder(scale, offset, layer, width, own)
        tensors |= {f"{layer}.{scale_name(width)}": scale, f"{layer}.{offset_name(width)}": offset}
    publish_json(path, replace(recipe, own_decoders=False, kl=None).to_dict(checkpoint.format, checkpoint.layers))
    publish(own, lambda temporary: save_file(tensors, temporary))
    publish_json(path, content)


def weight_bytes(checkpoint: Checkpoint, recipe: Recipe) -> int:
    """Bytes of all weights: codes and decoders at the recipe's widths, and the tensors that are not quantized."""
    return checkpoint.resident_bytes(recipe.widths) + checkpoint.unquantized_bytes()


def choose_recipe(
    checkpoint: Checkpoint, *, bits: float | None = None, memory: int | None = None, partial: bool = False
) -> Recipe:
    """The best recipe of a checkpoint that its folder can serve within a budget.

    The offered widths count as recipes too. The best is the one of least divergence; those whose divergence nobody has
    measured come after all others, and among them the one with the most bits is the best.

    Args:
        checkpoint: the checkpoint.
        bits: the most that the average width may be.
        memory: the most bytes that all weights may take.
        partial: the folder is a download whose other files can still come.

    Raises:
        RecipeError: none is within the budget; the message names the least.
    """
    candidates = [*checkpoint.recipes, *_uniform_recipes(checkpoint)]

    def is_there(recipe: Recipe) -> bool:
        return all((checkpoint.folder / name).is_file() for name in checkpoint.file_names(recipe.widths))

    servable = [recipe for recipe in candidates if partial or is_there(recipe)]
    limit = bits if bits is not None else memory
    if limit is None:
        raise ValueError("choose_recipe: found neither bits nor memory, expected one of them")
    fixed = checkpoint.unquantized_bytes() if bits is None else 0  # read from the disk, once for all

    def cost(recipe: Recipe) -> float:
        if bits is not None:
            return average_bits(recipe.widths, checkpoint.layers)
        return fixed + checkpoint.resident_bytes(recipe.widths)

    fitting = [recipe for recipe in servable if cost(recipe) <= limit]
    if not fitting:
        unit = "bits" if bits is not None else "bytes"
        least = min(servable, key=cost, default=None)
        smallest = f"{cost(least):,.10g} {unit} ({least.name})" if least else "nothing that this folder can serve"
        raise RecipeError(checkpoint.folder, "budget", f"{limit:,.10g} {unit}", f"at least {smallest}")
    return min(
        fitting, key=lambda recipe: (_loss(recipe), -average_bits(recipe.widths, checkpoint.layers), recipe.name)
    )


def _loss(recipe: Recipe) -> float:
    return float("inf") if recipe.kl is None else recipe.kl


def _uniform_recipes(checkpoint: Checkpoint) -> list[Recipe]:
    """The offered widths, but for those that recipes of the checkpoint stand for already."""
    taken = {tuple(recipe.widths.items()) for recipe in checkpoint.recipes}
    uniform = [Recipe(UNIFORM.format(width), checkpoint.layer_widths(width)) for width in checkpoint.format.widths]
    return [recipe for recipe in uniform if tuple(recipe.widths.items()) not in taken]
