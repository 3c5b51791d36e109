"""Open a checkpoint: everything is checked before any tensor is allocated, then tensors are read when asked for.

A folder without the last shards opens at the widths that are left.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from vllm_matquant.checkpoint.errors import ConfigError, IndexFileError, MissingFileError, RecipeError
from vllm_matquant.checkpoint.files import read_json
from vllm_matquant.checkpoint.packing import slice_codes, unpack_codes
from vllm_matquant.checkpoint.recipe import Recipe, complete_widths, read_recipe, resident_bytes
from vllm_matquant.checkpoint.shard import read_header
from vllm_matquant.checkpoint.skeleton import build_skeleton
from vllm_matquant.checkpoint.spec import (
    BASE_BITS,
    CONFIG_FILE,
    INDEX_FILE,
    WEIGHT_BASE,
    Format,
    offset_name,
    plane_name,
    recipe_decoders_file,
    scale_name,
    shard_width,
)
from vllm_matquant.checkpoint.validate import (
    ExpectedTensor,
    check_decoder,
    check_index,
    check_layer_count,
    check_shards,
    check_tensors,
    expected_tensors,
    read_index,
)

Widths = int | Mapping[str, int]


@dataclass
class Checkpoint:
    """A checked checkpoint folder; tensors are read when asked for.

    What is served is given as one width for all layers, each of which then takes the width that serves it, or as the
    width of every layer. Widths that a recipe with decoders of its own has are served with these decoders.

    Attributes:
        folder: where it lies.
        config: the content of config.json.
        format: the parsed ``quantization_config``.
        layers: (out_features, in_features) of each quantized layer.
        weight_map: the index: shard file name of each tensor.
        recipes: those that config.json lists.
    """

    folder: Path
    config: dict[str, Any]
    format: Format
    layers: dict[str, tuple[int, int]]
    weight_map: dict[str, str]
    recipes: list[Recipe] = field(default_factory=list)
    _open_shards: dict[str, Any] = field(default_factory=dict, repr=False)

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
        """Likewise, of the shards that are not in the folder; a width that misses none has no entry."""
        present = {path.name for path in self.folder.iterdir() if path.is_file()}
        missing = {width: [name for name in names if name not in present] for width, names in self.shards.items()}
        return {width: names for width, names in missing.items() if names}

    @property
    def servable_widths(self) -> tuple[int, ...]:
        """The offered widths whose shards are all in the folder."""
        reach = min(self.missing_files, default=math.inf)
        return tuple(width for width in self.format.widths if self.format.stored_width(width) < reach)

    def layer_widths(self, widths: Widths) -> dict[str, int]:
        """The width that each layer is served at."""
        if isinstance(widths, int):
            return {layer: self.format.width_of(layer, widths) for layer in self.layers}
        return complete_widths(widths, None, self.format, self.layers, self.folder)

    def files_for(self, widths: Widths) -> list[Path]:
        """The shards that serving at ``widths`` reads.

        Raises:
            WidthError: the checkpoint does not offer this width.
            RecipeError: a layer is not the checkpoint's, is left out, or does not have its width.
            MissingFileError: files of it are not in the folder.
        """
        if isinstance(widths, int):
            self.format.check_width(widths, self.folder)
            stored_width = self.format.stored_width(widths)
            needed = [name for of, names in sorted(self.shards.items()) if of <= stored_width for name in names]
            what, expected = f"{widths} bits", f"every shard of the widths up to {stored_width} that {INDEX_FILE} lists"
        else:
            read = self.file_names(widths)
            needed = [name for _, names in sorted(self.shards.items()) for name in names if name in read]
            needed += sorted(read - set(needed))  # decoders of a recipe
            what, expected = "these widths", "every file that holds some of their tensors"
        missing = [name for name in needed if not (self.folder / name).is_file()]
        if missing:
            raise MissingFileError(
                self.folder,
                f"files of {what}",
                "no " + ", no ".join(missing),
                expected,
                f"The folder serves {_listed(self.servable_widths)}",
            )
        return [self.folder / name for name in needed]

    def file_names(self, widths: Widths) -> set[str]:
        """Names of the files that hold what serving at ``widths`` needs, whether they are in the folder or not."""
        return set(self._places(widths).values())

    def decoders_file(self, widths: Widths) -> str | None:
        """Name of the file of the decoders that were trained for these widths of all layers, if a recipe has such."""
        if isinstance(widths, int):
            return None
        complete = self.layer_widths(widths)
        names = (recipe.name for recipe in self.recipes if recipe.own_decoders and recipe.widths == complete)
        return next(map(recipe_decoders_file, names), None)

    def read_recipe(self, path: Path) -> Recipe:
        """A recipe in any file.

        Raises:
            MissingFileError, RecipeError: as :func:`vllm_matquant.checkpoint.recipe.read_recipe`; or the recipe was
                measured with decoders of its own, which the checkpoint does not have.
        """
        recipe = read_recipe(path, self.format, self.layers)
        if recipe.own_decoders and self.decoders_file(recipe.widths) is None:
            raise RecipeError(path, "own_decoders", "true", "a recipe of the checkpoint with decoders for these widths")
        return recipe

    def tensors(self, widths: Widths) -> Iterator[tuple[str, torch.Tensor]]:
        """What serving at ``widths`` needs, shard by shard.

        These are the tensors that are not quantized, and of each quantized layer the base, the planes that its slice
        reads and the decoder of this slice alone.

        Raises:
            WidthError, RecipeError, MissingFileError: as :meth:`files_for`.
        """
        places = self._places(widths)
        for path in self.files_for(widths):
            file = path.relative_to(self.folder).as_posix()
            for name in sorted(name for name, place in places.items() if place == file):
                yield name, self._read(name, file)

    def slices(self, widths: Widths) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """(layer, codes, scale, offset) of every quantized layer, as served at ``widths``."""
        decoders = self.decoders_file(widths)
        for layer, width in self.layer_widths(widths).items():
            yield layer, self.codes(layer, width), *self.decoder(layer, width, decoders)

    def _places(self, widths: Widths) -> dict[str, str]:
        """The file of each tensor that serving at ``widths`` needs."""
        names = set(self._unquantized_names())
        decoders: set[str] = set()
        for layer, width in self.layer_widths(widths).items():
            planes = range(BASE_BITS + 1, self.format.stored_width(width) + 1)
            names |= {f"{layer}.{name}" for name in (WEIGHT_BASE, *map(plane_name, planes))}
            decoders |= {f"{layer}.{scale_name(width)}", f"{layer}.{offset_name(width)}"}
        own = self.decoders_file(widths)
        return {name: own if own and name in decoders else self.weight_map[name] for name in names | decoders}

    def _unquantized_names(self) -> list[str]:
        quantized = {
            f"{layer}.{name}"
            for layer, shape in self.layers.items()
            for tensors in self.format.tensors_of_layer(*shape, layer).values()
            for name in tensors
        }
        return sorted(self.weight_map.keys() - quantized)

    def unquantized(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of every tensor that is not part of a quantized layer's codes or decoders."""
        for name in self._unquantized_names():
            yield name, self._read(name)

    def unquantized_bytes(self) -> int:
        """Bytes of these tensors as they are stored."""
        names = set(self._unquantized_names())
        headers = (read_header(self.folder / file) for file in {self.weight_map[name] for name in names})
        return sum(spec.nbytes for header in headers for name, spec in header.items() if name in names)

    def codes(self, layer: str, width: int) -> torch.Tensor:
        """The codes of a layer, as served at ``width``: uint8 [out_features, in_features]."""
        own = self.format.width_of(layer, width)
        stored_width = self.format.stored_width(own)
        return slice_codes(self.stored_codes(layer, stored_width), stored_width, own, self.format.slicing)

    def stored_codes(self, layer: str, bits: int) -> torch.Tensor:
        """The ``bits`` most significant bits of a layer's parent codes: uint8 [out_features, in_features]."""
        base = self._read(f"{layer}.{WEIGHT_BASE}")
        planes = [self._read(f"{layer}.{plane_name(plane)}") for plane in range(BASE_BITS + 1, bits + 1)]
        return unpack_codes(base, planes, self.layers[layer][1])

    def decoder(self, layer: str, width: int, file: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(scale, offset) of a layer, as served at ``width``: float16 [out_features, groups] each.

        Args:
            file: see :meth:`decoders_file`; by default the shards.
        """
        own = self.format.width_of(layer, width)
        names = f"{layer}.{scale_name(own)}", f"{layer}.{offset_name(own)}"
        scale, offset = (self._read(name, file) for name in names)
        return scale, offset

    def resident_bytes(self, widths: Widths) -> int:
        """Bytes of the codes and decoders of all quantized layers at ``widths``."""
        return resident_bytes(self.layer_widths(widths), self.format, self.layers)

    def _read(self, name: str, file: str | None = None) -> torch.Tensor:
        file = file or self.weight_map[name]
        if file not in self._open_shards:
            self._open_shards[file] = safe_open(self.folder / file, framework="pt")
        return self._open_shards[file].get_tensor(name)


def open_checkpoint(folder: Path | str, widths: Widths | None = None, *, check_values: bool = True) -> Checkpoint:
    """Check a checkpoint folder and open it.

    Args:
        folder: a local folder.
        widths: open only the files that serving at these reads; None for every file that is there.
        check_values: also read the decoders (of ``widths``, or of every servable width) and refuse those that are not
            finite or have a negative scale.

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
    format = Format.from_dict(config["quantization_config"], config_path)
    if isinstance(widths, int):
        format.check_width(widths, config_path)

    weight_map, total_size = read_index(folder)
    check_layer_count(config, len(weight_map), config_path)
    skeleton = build_skeleton(config, config_path)
    expected = expected_tensors(format, skeleton, config_path)
    check_index(folder / INDEX_FILE, weight_map, expected)

    layers = skeleton.quantized_layers(format, config_path)
    recipes = [read_recipe(folder / file, format, layers) for file in format.recipes]
    checkpoint = Checkpoint(folder, config, format, layers, weight_map, recipes)
    paths = checkpoint.files_for(format.widths[0] if widths is None else widths)
    if widths is None:
        paths = [folder / name for name in sorted(set(weight_map.values())) if (folder / name).is_file()]
    found = check_shards([path for path in paths if shard_width(path.name)], weight_map, expected)
    found_size = sum(spec.nbytes for spec in found.values())
    if len(found) == len(weight_map) and found_size != total_size:
        raise IndexFileError(
            folder / INDEX_FILE, "metadata.total_size", total_size, f"{found_size}, the tensors' bytes"
        )
    checked: list[Widths] = [*checkpoint.servable_widths] if widths is None else [widths]
    if widths is None:
        checked += [recipe.widths for recipe in recipes if recipe.own_decoders]
    for each in checked:
        if not (file := checkpoint.decoders_file(each)) or (folder / file).is_file():
            _check_decoders(checkpoint, each, expected, check_values)
    return checkpoint


def _check_decoders(
    checkpoint: Checkpoint, widths: Widths, expected: Mapping[str, ExpectedTensor], check_values: bool
) -> None:
    """Check the decoders that serving at ``widths`` reads; those of a recipe wholly, for no index lists them."""
    layers = checkpoint.layer_widths(widths)
    own = checkpoint.decoders_file(widths)
    if own is not None:
        names = [f"{layer}.{name(width)}" for layer, width in layers.items() for name in (scale_name, offset_name)]
        check_tensors(checkpoint.folder / own, {name: expected[name] for name in names})
    for layer, width in layers.items() if check_values else ():
        file = own or checkpoint.weight_map[f"{layer}.{scale_name(width)}"]
        check_decoder(*checkpoint.decoder(layer, width, own), layer, width, checkpoint.folder / file)


def _listed(widths: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, widths))} bits" if widths else "no width"
