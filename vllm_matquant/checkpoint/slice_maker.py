"""Every way to ask for a slice, turned into a Slice with the files that hold its tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Real
from pathlib import Path

from vllm_matquant.checkpoint.decoder import part_name
from vllm_matquant.checkpoint.errors import RecipeError, WidthError
from vllm_matquant.checkpoint.names import WEIGHT_BASE, plane_name, recipe_decoders_file, shard_width
from vllm_matquant.checkpoint.recipe import Recipe, average_bits, complete_widths, read_recipe, resident_bytes
from vllm_matquant.checkpoint.slice import UNIFORM, Slice
from vllm_matquant.checkpoint.spec import BASE_BITS, Format


@dataclass(frozen=True, eq=False)
class SliceMaker:
    """Makes slices of a checkpoint; it opens none of their files.

    Attributes:
        folder: the checkpoint's.
        format: its format.
        layers: (out_features, in_features) of each quantized layer.
        weight_map: shard file name of each tensor.
        recipes: those that belong to the checkpoint.
    """

    folder: Path
    format: Format
    layers: Mapping[str, tuple[int, int]]
    weight_map: Mapping[str, str]
    recipes: list[Recipe]

    @cached_property
    def shards(self) -> dict[int, list[str]]:
        """File names of the shards that the index lists, by the width whose data they hold."""
        shards: dict[int, list[str]] = defaultdict(list)
        for name in sorted(set(self.weight_map.values())):
            width = shard_width(name)
            if width is not None:
                shards[width].append(name)
        return dict(shards)

    @cached_property
    def unquantized(self) -> list[str]:
        """Names of the tensors that are not part of a quantized layer's codes or decoders."""
        quantized = {
            f"{layer}.{name}"
            for layer, shape in self.layers.items()
            for tensors in self.format.tensors_of_layer(*shape, layer).values()
            for name in tensors
        }
        return sorted(self.weight_map.keys() - quantized)

    def decoder_names(self, layer: str, width: int) -> list[str]:
        """Names of the tensors of a layer's decoder at one of its widths."""
        return [f"{layer}.{part_name(part, width)}" for part in self.format.decoder_kind.form(width).parts(1, 1)]

    def places(self, widths: Mapping[str, int], own_decoders: str | None) -> dict[str, str]:
        """The file of each tensor that serving these widths needs.

        Args:
            widths: of each layer.
            own_decoders: the file of the decoders that belong to just these widths, if they are to be served.
        """
        names = set(self.unquantized)
        decoders: set[str] = set()
        for layer, width in widths.items():
            planes = range(BASE_BITS + 1, self.format.stored_width(width) + 1)
            names |= {f"{layer}.{name}" for name in (WEIGHT_BASE, *map(plane_name, planes))}
            decoders.update(self.decoder_names(layer, width))
        places = {name: self.weight_map[name] for name in names}
        return places | {name: own_decoders or self.weight_map[name] for name in decoders}

    def of(self, which: object) -> Slice:
        """The slice of a width or of a recipe.

        Args:
            which: a whole number, also as a text where no recipe of the checkpoint has it as its name; or a recipe, as
                of :meth:`of_recipe`.

        Raises:
            WidthError: the checkpoint does not offer this width, or it is no whole number.
            MissingFileError, RecipeError: as of :meth:`of_recipe`, or ``which`` is none of these.
        """
        if isinstance(which, str) and which.isdecimal() and all(recipe.name != which for recipe in self.recipes):
            return self.uniform(int(which))
        if isinstance(which, (str, Path, Recipe)):
            return self.of_recipe(which)
        if isinstance(which, Real):
            return self.uniform(self._whole(float(which)))
        raise RecipeError(self.folder, "slice", repr(which), "a width, a recipe, its name or its file's Path")

    def uniform(self, width: int) -> Slice:
        """The slice of a width that the checkpoint offers.

        Raises:
            WidthError: it does not offer this width.
        """
        self.format.check_width(width, self.folder)
        widths = {layer: self.format.width_of(layer, width) for layer in self.layers}
        same = (recipe.kl for recipe in self.recipes if recipe.widths == widths and not recipe.own_decoders)
        return replace(self._slice(Recipe(UNIFORM.format(width), widths, next(same, None)), None), width=width)

    def of_widths(self, widths: Mapping[str, int]) -> Slice:
        """The slice with these widths of all layers: that of a recipe of the checkpoint, if one has just these.

        Raises:
            RecipeError: a layer is not the checkpoint's, is left out, or does not have its width.
        """
        complete = complete_widths(widths, None, self.format, self.layers, self.folder)
        same = (recipe for recipe in self.recipes if recipe.widths == complete)
        return self.of_recipe(next(same, Recipe("widths", complete)))

    def of_recipe(self, which: str | Path | Recipe) -> Slice:
        """The slice of a recipe, which may be given by the name of one of the checkpoint's or by a file.

        Raises:
            MissingFileError: there is no such file.
            RecipeError: there is no such recipe, it does not fit the checkpoint, or it was measured with decoders of
                its own that the checkpoint does not have.
        """
        recipe = which if isinstance(which, Recipe) else self._recipe(which)
        return self._slice(recipe, self._own_decoders(recipe))

    def choices(self, partial: bool) -> list[Slice]:
        """The slices to choose among: the recipes, and the offered widths that no recipe stands for already.

        Args:
            partial: also those whose files are not all in the folder.
        """
        recipes = list(map(self.of_recipe, self.recipes))
        taken = [each.widths for each in recipes]
        uniform = [each for each in map(self.uniform, self.format.widths) if each.widths not in taken]
        return [each for each in (*recipes, *uniform) if partial or not each.missing_files]

    def _whole(self, bits: float) -> int:
        """The width that a number stands for."""
        if not bits.is_integer():
            hint = f"Ask for an average with slice(budget={bits})"
            raise WidthError(self.folder, "bits", bits, f"one of the offered widths {list(self.format.widths)}", hint)
        return int(bits)

    def _recipe(self, which: str | Path) -> Recipe:
        if isinstance(which, str):
            named = {recipe.name: recipe for recipe in self.recipes}
            if which not in named:
                expected = f"one of {sorted(named)}, or of the widths {list(self.format.widths)}"
                raise RecipeError(self.folder, "recipe", repr(which), expected)
            return named[which]
        recipe = read_recipe(which, self.format, self.layers)
        if recipe.own_decoders and self._own_decoders(recipe) is None:
            raise RecipeError(
                which, "own_decoders", "true", "a recipe of the checkpoint with decoders for these widths"
            )
        return recipe

    def _own_decoders(self, recipe: Recipe) -> str | None:
        """The file of decoders that belong to a recipe's widths, if a recipe of the checkpoint has such."""
        same = (other.name for other in self.recipes if other.own_decoders and other.widths == recipe.widths)
        return next(map(recipe_decoders_file, same), None)

    def _slice(self, recipe: Recipe, own_decoders: str | None) -> Slice:
        needed = set(self.places(recipe.widths, own_decoders).values())
        files = [name for _, names in sorted(self.shards.items()) for name in names if name in needed]
        files += sorted(needed - set(files))  # decoders of a recipe
        return Slice(
            recipe.name,
            recipe.widths,
            average_bits(recipe.widths, self.layers),
            resident_bytes(recipe.widths, self.format, self.layers),
            tuple(files),
            tuple(name for name in files if not (self.folder / name).is_file()),
            own_decoders,
            recipe.kl,
        )
