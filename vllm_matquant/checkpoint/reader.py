"""Open a checkpoint: everything is checked before any tensor is allocated, then tensors are read when asked for.

A folder without the last shards opens at the widths that are left.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from vllm_matquant.checkpoint.decoder import Decoder, TensorSpec, part_name
from vllm_matquant.checkpoint.errors import ConfigError, IndexFileError, MissingFileError, RecipeError
from vllm_matquant.checkpoint.files import read_json
from vllm_matquant.checkpoint.names import (
    CONFIG_FILE,
    INDEX_FILE,
    WEIGHT_BASE,
    plane_name,
    recipe_decoders_file,
    shard_width,
)
from vllm_matquant.checkpoint.packing import slice_codes, unpack_codes
from vllm_matquant.checkpoint.quantization_config import format_from_config
from vllm_matquant.checkpoint.recipe import Recipe, average_bits, complete_widths, read_recipe, resident_bytes
from vllm_matquant.checkpoint.skeleton import build_skeleton
from vllm_matquant.checkpoint.slice import UNIFORM, Slice, choose_slice
from vllm_matquant.checkpoint.spec import BASE_BITS, Format
from vllm_matquant.checkpoint.validate import (
    ExpectedTensor,
    check_index,
    check_layer_count,
    check_shard,
    check_tensors,
    expected_tensors,
    read_index,
)


@dataclass
class Checkpoint:
    """A checkpoint folder; files are checked, and tensors read, when they are asked for.

    Attributes:
        folder: where it lies.
        config: the content of config.json.
        format: the parsed ``quantization_config``.
        layers: (out_features, in_features) of each quantized layer.
        weight_map: the index: shard file name of each tensor.
        recipes: those that config.json lists.
        expected: what the configuration implies for each tensor.
    """

    folder: Path
    config: dict[str, Any]
    format: Format
    layers: dict[str, tuple[int, int]]
    weight_map: dict[str, str]
    recipes: list[Recipe]
    expected: Mapping[str, ExpectedTensor] = field(repr=False)
    _headers: dict[str, dict[str, TensorSpec]] = field(default_factory=dict, repr=False)
    _sound_decoders: set[tuple[str, str]] = field(default_factory=set, repr=False)  # (file, layer and width)
    _open_files: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def shards(self) -> dict[int, list[str]]:
        """File names of the shards that the index lists, by the width whose data they hold."""
        shards: dict[int, list[str]] = defaultdict(list)
        for name in sorted(set(self.weight_map.values())):
            width = shard_width(name)
            if width is not None:
                shards[width].append(name)
        return dict(shards)

    @property
    def missing_files(self) -> dict[int, list[str]]:
        """The shards that are not in the folder, by the width whose data they hold, if it misses any."""
        present = {path.name for path in self.folder.iterdir() if path.is_file()}
        missing = {width: [name for name in names if name not in present] for width, names in self.shards.items()}
        return {width: names for width, names in missing.items() if names}

    @property
    def servable_widths(self) -> tuple[int, ...]:
        """The offered widths whose shards are all in the folder."""
        reach = min(self.missing_files, default=math.inf)
        return tuple(width for width in self.format.widths if self.format.stored_width(width) < reach)

    def slice(
        self,
        which: int | str | Path | Recipe | None = None,
        *,
        widths: Mapping[str, int] | None = None,
        budget: float | None = None,
        memory: int | None = None,
        partial: bool = False,
    ) -> Slice:
        """What can be served, by any of the ways to ask for it; none of its files is opened.

        Args:
            which: a width that the checkpoint offers, which each layer takes as far as it has it; or a recipe, also
                given by the name of one of the checkpoint's or by a file. Without any argument the widest width that
                the folder can serve.
            widths: the width of every layer.
            budget: the most that the average width may be: the recipe or width of least loss that the folder can serve.
            memory: the most bytes that all weights may take: the recipe or width of least loss that the folder can
                serve.
            partial: choose for a budget among all recipes and widths: the folder is a download whose other files can
                still come.

        Raises:
            WidthError: the checkpoint does not offer this width.
            RecipeError: a layer is not the checkpoint's, is left out, or does not have its width; there is no such
                recipe, or it was measured with decoders of its own that the checkpoint does not have; or nothing is
                within the budget.
            MissingFileError: there is no such file of a recipe.
            ValueError: more than one of the ways is given.
        """
        given = [
            name
            for name, value in (("which", which), ("widths", widths), ("budget", budget), ("memory", memory))
            if value is not None
        ]
        if len(given) > 1:
            raise ValueError(f"slice: found {' and '.join(given)}, expected one of them")
        if budget is not None:
            return choose_slice(self._choices(partial), lambda each: each.average_bits, budget, "bits", self.folder)
        if memory is not None:
            fixed = self.unquantized_bytes()
            return choose_slice(
                self._choices(partial), lambda each: fixed + each.resident_bytes, memory, "bytes", self.folder
            )
        if widths is not None:
            complete = complete_widths(widths, None, self.format, self.layers, self.folder)
            same = (recipe for recipe in self.recipes if recipe.widths == complete)
            recipe = next(same, Recipe("widths", complete))
            return self._slice(recipe, self._own_decoders(recipe))
        if which is None:
            # With no width on the disk the narrowest is asked for, whose files are then found missing.
            which = max(self.servable_widths, default=self.format.widths[0])
        if isinstance(which, int):
            return self._uniform(which)
        recipe = which if isinstance(which, Recipe) else self._recipe(which)
        return self._slice(recipe, self._own_decoders(recipe))

    def files_for(self, served: Slice) -> list[Path]:
        """The files that serving a slice reads.

        Raises:
            MissingFileError: some are not in the folder.
        """
        missing = [name for name in served.files if not (self.folder / name).is_file()]
        if missing:
            raise MissingFileError(
                self.folder,
                f"files of {served.name}",
                "no " + ", no ".join(missing),
                "every file that holds some of its tensors",
                f"The folder serves {_listed(self.servable_widths)}",
            )
        return [self.folder / name for name in served.files]

    def check(self, *slices: Slice, values: bool = True) -> None:
        """Check the files that serving slices reads; what was checked before is not read again.

        Args:
            slices: those to be served.
            values: read their decoders too, and refuse those that give no weights.

        Raises:
            CheckpointError: one of its subclasses for each fault, naming file, tensor, found and expected.
        """
        for served in slices:
            self._check_slice(served, values)

    def _check_slice(self, served: Slice, values: bool) -> None:
        for path in self.files_for(served):
            if shard_width(path.name) is not None:
                self._check_shard(path.name)
        own = served.decoders_file
        names = {layer: self._decoder_names(layer, width) for layer, width in served.widths.items()}
        if own is not None and own not in self._headers:
            expected = {name: self.expected[name] for of_layer in names.values() for name in of_layer}
            self._headers[own] = check_tensors(self.folder / own, expected)
        for layer, width in served.widths.items() if values else ():
            file = own or self.weight_map[names[layer][0]]
            place = file, names[layer][0]
            if place not in self._sound_decoders:
                decoder = self.decoder(layer, width, own)
                decoder.kind.check(decoder, layer, self.folder / file)
                self._sound_decoders.add(place)

    def tensors(self, *slices: Slice) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of what serving slices side by side needs, each once, file by file.

        These are the tensors that are not quantized, and of each quantized layer the base, the planes that its slices
        read and the decoders of these slices alone.

        Raises:
            MissingFileError: some files are not in the folder.
            RecipeError: slices have other decoders than each other for the same width of a layer.
        """
        places: dict[str, str] = {}
        for served in slices:
            own = self._places(served.widths, served.decoders_file)
            for name in sorted(own.keys() & places.keys()):
                if own[name] != places[name]:
                    raise RecipeError(
                        self.folder, name, f"it in {places[name]} and in {own[name]}", "slices that share decoders"
                    )
            places |= own
        for served in slices:
            self.files_for(served)
        for file in dict.fromkeys(file for served in slices for file in served.files):
            for name in sorted(name for name, place in places.items() if place == file):
                yield name, self._read(name, file)

    def coded_layers(self, served: Slice) -> Iterator[tuple[str, torch.Tensor, Decoder]]:
        """(layer, codes, decoder) of every quantized layer of a slice; codes are uint8 [out_features, in_features]."""
        for layer, width in served.widths.items():
            yield layer, self.codes(layer, width), self.decoder(layer, width, served.decoders_file)

    def weights(self, served: Slice) -> Iterator[tuple[str, torch.Tensor]]:
        """(layer, weight) of every quantized layer of a slice: float32 [out_features, in_features]."""
        for layer, codes, decoder in self.coded_layers(served):
            yield layer, decoder.decode(codes)

    def unquantized(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of every tensor that is not part of a quantized layer's codes or decoders."""
        for name in self._unquantized_names():
            yield name, self._read(name)

    def unquantized_bytes(self) -> int:
        """Bytes of the tensors that are not quantized, as they are stored.

        Raises:
            CheckpointError: a shard that holds some of them is not sound.
        """
        names = set(self._unquantized_names())
        headers = [self._check_shard(file) for file in {self.weight_map[name] for name in names}]
        return sum(spec.nbytes for header in headers for name, spec in header.items() if name in names)

    def codes(self, layer: str, width: int) -> torch.Tensor:
        """The codes of a layer where the model is at ``width``: uint8 [out_features, in_features]."""
        own = self.format.width_of(layer, width)
        stored_width = self.format.stored_width(own)
        return slice_codes(self.stored_codes(layer, stored_width), stored_width, own, self.format.slicing)

    def stored_codes(self, layer: str, bits: int) -> torch.Tensor:
        """The ``bits`` most significant bits of a layer's parent codes: uint8 [out_features, in_features]."""
        base = self._read(f"{layer}.{WEIGHT_BASE}")
        planes = [self._read(f"{layer}.{plane_name(plane)}") for plane in range(BASE_BITS + 1, bits + 1)]
        return unpack_codes(base, planes, self.layers[layer][1])

    def decoder(self, layer: str, width: int, file: str | None = None) -> Decoder:
        """The decoder of a layer where the model is at ``width``.

        Args:
            layer: its name.
            width: of the model.
            file: where to read it; by default the shards. See :attr:`Slice.decoders_file`.
        """
        own = self.format.width_of(layer, width)
        return self.format.decoder_kind.from_tensors(lambda name: self._read(f"{layer}.{name}", file), own)

    def close(self) -> None:
        """Let go of the files that were opened to read tensors; they are opened again when they are needed."""
        self._open_files.clear()

    def _uniform(self, width: int) -> Slice:
        """The slice of a width that the checkpoint offers."""
        self.format.check_width(width, self.folder)
        widths = {layer: self.format.width_of(layer, width) for layer in self.layers}
        same = (recipe.kl for recipe in self.recipes if recipe.widths == widths and not recipe.own_decoders)
        return replace(self._slice(Recipe(UNIFORM.format(width), widths, next(same, None)), None), width=width)

    def _recipe(self, which: str | Path) -> Recipe:
        """The recipe of a name, or in a file."""
        if isinstance(which, str):
            named = {recipe.name: recipe for recipe in self.recipes}
            if which not in named:
                raise RecipeError(self.folder, "recipe", repr(which), f"one of {sorted(named)}")
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
        needed = set(self._places(recipe.widths, own_decoders).values())
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

    def _choices(self, partial: bool) -> list[Slice]:
        """The slices to choose among: the recipes, and the offered widths that no recipe stands for already."""
        recipes = [self.slice(recipe) for recipe in self.recipes]
        taken = [each.widths for each in recipes]
        uniform = [each for each in map(self._uniform, self.format.widths) if each.widths not in taken]
        return [each for each in (*recipes, *uniform) if partial or not each.missing_files]

    def _places(self, widths: Mapping[str, int], own_decoders: str | None) -> dict[str, str]:
        """The file of each tensor that serving ``widths`` needs."""
        names = set(self._unquantized_names())
        decoders: set[str] = set()
        for layer, width in widths.items():
            planes = range(BASE_BITS + 1, self.format.stored_width(width) + 1)
            names |= {f"{layer}.{name}" for name in (WEIGHT_BASE, *map(plane_name, planes))}
            decoders.update(self._decoder_names(layer, width))
        places = {name: self.weight_map[name] for name in names}
        return places | {name: own_decoders or self.weight_map[name] for name in decoders}

    def _decoder_names(self, layer: str, width: int) -> list[str]:
        return [f"{layer}.{part_name(part, width)}" for part in self.format.decoder_kind.parts(1, 1)]

    def _unquantized_names(self) -> list[str]:
        quantized = {
            f"{layer}.{name}"
            for layer, shape in self.layers.items()
            for tensors in self.format.tensors_of_layer(*shape, layer).values()
            for name in tensors
        }
        return sorted(self.weight_map.keys() - quantized)

    def _check_shard(self, file: str) -> dict[str, TensorSpec]:
        """The header of a shard, checked once."""
        if file not in self._headers:
            self._headers[file] = check_shard(self.folder / file, self.weight_map, self.expected)
        return self._headers[file]

    def _check_everything(self, total_size: int, values: bool) -> None:
        """Check every file that is in the folder."""
        self.files_for(self._uniform(self.format.widths[0]))
        present = [file for file in sorted(set(self.weight_map.values())) if (self.folder / file).is_file()]
        found = {name: spec for file in present for name, spec in self._check_shard(file).items()}
        found_size = sum(spec.nbytes for spec in found.values())
        if len(found) == len(self.weight_map) and found_size != total_size:
            raise IndexFileError(
                self.folder / INDEX_FILE, "metadata.total_size", total_size, f"{found_size}, the tensors' bytes"
            )
        for width in self.servable_widths:
            self.check(self._uniform(width), values=values)
        for recipe in self.recipes:
            if recipe.own_decoders and not (each := self.slice(recipe)).missing_files:
                self.check(each, values=values)

    def _read(self, name: str, file: str | None = None) -> torch.Tensor:
        file = file or self.weight_map[name]
        if file not in self._open_files:
            self._open_files[file] = safe_open(self.folder / file, framework="pt")
        return self._open_files[file].get_tensor(name)


def open_checkpoint(folder: Path | str, *, check_files: bool = True, check_values: bool = True) -> Checkpoint:
    """Open a checkpoint folder, checking config.json, the index and the recipes.

    Args:
        folder: a local folder.
        check_files: also check every other file that is there; without it :meth:`Checkpoint.check` is to check those of
            a slice.
        check_values: then also read the decoders of every servable width, and refuse those that give no weights.

    Raises:
        CheckpointError: one of its subclasses for each fault, naming file, tensor, found and expected.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MissingFileError(folder, "checkpoint", "no such folder", "a folder with " + CONFIG_FILE)
    config_path = folder / CONFIG_FILE
    config = read_json(config_path, ConfigError)
    if "quantization_config" not in config:
        raise ConfigError(config_path, "quantization_config", "nothing", "an object: this is no matquant checkpoint")
    format = format_from_config(config["quantization_config"], config_path)

    weight_map, total_size = read_index(folder)
    check_layer_count(config, len(weight_map), config_path)
    skeleton = build_skeleton(config, config_path)
    expected = expected_tensors(format, skeleton, config_path)
    check_index(folder / INDEX_FILE, weight_map, expected)

    layers = skeleton.quantized_layers(format, config_path)
    recipes = [read_recipe(folder / file, format, layers) for file in format.recipes]
    checkpoint = Checkpoint(folder, config, format, layers, weight_map, recipes, expected)
    if check_files:
        checkpoint._check_everything(total_size, check_values)
    return checkpoint


def _listed(widths: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, widths))} bits" if widths else "no width"
