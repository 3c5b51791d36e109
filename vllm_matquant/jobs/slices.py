"""What of a checkpoint a job works on: the widths and recipes that were asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vllm_matquant.checkpoint.reader import Checkpoint
from vllm_matquant.checkpoint.slice import Slice

RECIPES_HELP = "recipes to {} too: names of the checkpoint's, files, or all (its own, but for those of one width)"


def chosen_slices(checkpoint: Checkpoint, bits: Sequence[int] | None, recipes: str | None) -> list[Slice]:
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
    slices = [*map(checkpoint.slice, widths), *map(checkpoint.slice, _chosen_recipes(checkpoint, recipes))]
    for each in slices:
        checkpoint.files_for(each)
    return slices


def _chosen_recipes(checkpoint: Checkpoint, asked: str | None) -> list[str | Path]:
    own = {recipe.name: recipe for recipe in checkpoint.recipes}
    if asked is None:
        return []
    if asked == "all":
        return [name for name, recipe in own.items() if len(set(recipe.widths.values())) > 1]
    chosen: list[str | Path] = []
    for name in asked.split(","):
        if name not in own and not Path(name).is_file():
            raise ValueError(f"--recipes: found {name!r}, expected a file or one of {', '.join(own) or 'no others'}")
        chosen.append(name if name in own else Path(name))
    return chosen
