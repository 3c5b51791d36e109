"""What of a checkpoint a job works on: the widths and recipes that were asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vllm_matquant.checkpoint.reader import Checkpoint
from vllm_matquant.checkpoint.recipe import Recipe

RECIPES_HELP = "recipes to {} too: names of the checkpoint's, files, or all (its own, but for those of one width)"


def chosen_slices(checkpoint: Checkpoint, bits: Sequence[int] | None, recipes: str | None) -> list[int | Recipe]:
    """The widths asked for, or all that the folder can serve, and the recipes asked for.

    Args:
        checkpoint: which must be able to serve them.
        bits: widths; None for all that the folder can serve.
        recipes: names of recipes or of files that hold one, separated by commas; "all" for every recipe of the
            checkpoint but those of one width; None for none.

    Raises:
        CheckpointError: the folder cannot serve one of them, or a file is no recipe of this checkpoint.
        ValueError: a name is neither a recipe of the checkpoint nor a file.
    """
    widths = bits or checkpoint.servable_widths
    for width in widths:
        checkpoint.files_for(width)
    return [*widths, *_chosen_recipes(checkpoint, recipes)]


def _chosen_recipes(checkpoint: Checkpoint, asked: str | None) -> list[Recipe]:
    own = {recipe.name: recipe for recipe in checkpoint.recipes}
    chosen = []
    if asked == "all":
        chosen = [recipe for recipe in own.values() if len(set(recipe.widths.values())) > 1]
    elif asked is not None:
        for name in asked.split(","):
            if name in own:
                chosen.append(own[name])
            elif Path(name).is_file():
                chosen.append(checkpoint.read_recipe(Path(name)))
            else:
                raise ValueError(
                    f"--recipes: found {name!r}, expected a file or one of {', '.join(own) or 'no others'}"
                )
    for recipe in chosen:
        checkpoint.files_for(recipe.widths)
    return chosen
