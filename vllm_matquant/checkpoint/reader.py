"""Open a checkpoint: everything is checked before any tensor is allocated, then tensors are read when asked for.

A folder without the last shards opens at the widths that are left.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from vllm_matquant.checkpoint.decoder import Decoder
from vllm_matquant.checkpoint.errors import ConfigError, IndexFileError, MissingFileError, RecipeError
from vllm_matquant.checkpoint.files import read_json
from vllm_matquant.checkpoint.names import (
    CONFIG_FILE,
    INDEX_FILE,
    WEIGHT_BASE,
    plane_name,
    shard_width,
)
from vllm_matquant.checkpoint.packing import unpack_codes
from vllm_matquant.checkpoint.quantization_config import format_from_config
from vllm_matquant.checkpoint.recipe import Recipe, read_recipe
from vllm_matquant.checkpoint.skeleton import build_skeleton
from vllm_matquant.checkpoint.slice import Slice, choose_slice
from vllm_matquant.checkpoint.slice_maker import SliceMaker
from vllm_matquant.checkpoint.spec import BASE_BITS, Format
from vllm_matquant.checkpoint.tensor_files import TensorFiles
from vllm_matquant.checkpoint.validate import (
    check_files_are_there,
    check_index,
    check_layer_count,
    expected_tensors,
    read_index,
)

_LOGGER = logging.getLogger(__name__)


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
    """

    folder: Path
    config: dict[str, Any]
    format: Format
    layers: dict[str, tuple[int, int]]
    weight_map: dict[str, str]
    recipes: list[Recipe]
    _files: TensorFiles = field(repr=False)
    _maker: SliceMaker | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def shards(self) -> dict[int, list[str]]:
        """File names of the shards that the index lists, by the width whose data they hold."""
        return self._slice_maker.shards

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
        which: float | str | Path | Recipe | None = None,
        *,
        widths: Mapping[str, int] | None = None,
        budget: float | None = None,
        memory: int | None = None,
        partial: bool = False,
    ) -> Slice:
        """What can be served, by any of the ways to ask for it; none of its files is opened.

        Args:
            which: a width that the checkpoint offers, which each layer takes as far as it has it, also written as 4.0
                or "4"; or a recipe, also given by the name of one of the checkpoint's, which may be "4" too, or by a
                file. Without any argument the widest width that the folder can serve.
            widths: the width of every layer.
            budget: the most that the average width may be: the recipe or width of least loss that the folder can serve.
            memory: the most bytes that all weights may take: the recipe or width of least loss that the folder can
                serve.
            partial: choose for a budget among all recipes and widths: the folder is a download whose other files can
                still come.

        Raises:
            WidthError: the checkpoint does not offer this width, or it is no whole number.
            RecipeError: a layer is not the checkpoint's, is left out, or does not have its width; there is no such
                recipe, or it was measured with decoders of its own that the checkpoint does not have; nothing is
                within the budget; or ``which`` is of none of its kinds.
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
        maker = self._slice_maker
        if budget is not None:
            return choose_slice(maker.choices(partial), lambda each: each.average_bits, budget, "bits", self.folder)
        if memory is not None:
            fixed = self.unquantized_bytes()
            return choose_slice(
                maker.choices(partial), lambda each: fixed + each.resident_bytes, memory, "bytes", self.folder
            )
        if widths is not None:
            return maker.of_widths(widths)
        if which is None:
            # With no width on the disk the narrowest is asked for, whose files are then found missing.
            which = max(self.servable_widths, default=self.format.widths[0])
        return maker.of(which)

    def files_for(self, served: Slice) -> list[Path]:
        """The files that serving a slice reads.

        Raises:
            MissingFileError: some are not in the folder.
        """
        check_files_are_there(self.folder, served.files, f"files of {served.name}", lambda: self.servable_widths)
        return [self.folder / name for name in served.files]

    def check(self, *slices: Slice, values: bool = True) -> None:
        """Check the files that serving slices reads; what was checked before is not read again.

        Args:
            slices: those to be served.
            values: read their decoders too, and refuse those that give no weights.

        Raises:
            CheckpointError: one of its subclasses for each fault, naming file, tensor, found and expected.
        """
        maker, kind = self._slice_maker, self.format.decoder_kind
        for served in slices:
            for path in self.files_for(served):
                if shard_width(path.name) is not None:
                    self._files.check_shard(path.name)
            own = served.decoders_file
            if own is not None:
                names = (name for layer, width in served.widths.items() for name in maker.decoder_names(layer, width))
                self._files.check_decoders_file(own, names)
            for layer, width in served.widths.items() if values else ():
                self._files.check_decoder(kind.form(width), layer, width, own)

    def tensors(
        self,
        *slices: Slice,
        suffixes: Mapping[str, str] = MappingProxyType({}),
        reads: Callable[[str], bool] = lambda _: True,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of what serving slices side by side needs, each once, file by file.

        These are the tensors that are not quantized, and of each quantized layer the base, the planes that its slices
        read and the decoders of these slices alone.

        Args:
            slices: those to be served.
            suffixes: by decoders' files of slices: these decoders come with the suffix at the end of their names,
                beside those that other slices have for the same widths.
            reads: whether a tensor is wanted, by its name; by default all are.

        Raises:
            MissingFileError: some files are not in the folder.
            RecipeError: slices have other decoders than each other for the same width of a layer.
        """
        places: dict[str, str] = {}
        maker, beside = self._slice_maker, dict[str, tuple[str, str]]()
        for served in slices:
            decoders = served.decoders_file
            suffix = None if decoders is None else suffixes.get(decoders)
            if decoders is not None and suffix is not None:
                for layer, width in served.widths.items():
                    beside |= {name + suffix: (name, decoders) for name in maker.decoder_names(layer, width)}
                decoders = None
            own = maker.places(served.widths, decoders)
            for name in sorted(own.keys() & places.keys()):
                if own[name] != places[name]:
                    raise RecipeError(
                        self.folder, name, f"it in {places[name]} and in {own[name]}", "slices that share decoders"
                    )
            places |= own
        for served in slices:
            self.files_for(served)
        for file in dict.fromkeys([*(file for served in slices for file in served.files), *places.values()]):
            for name in sorted(name for name, place in places.items() if place == file and reads(name)):
                yield name, self._files.read(name, file)
        for name, (stored, file) in beside.items():
            if reads(name):
                yield name, self._files.read(stored, file)

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
        for name in self._slice_maker.unquantized:
            yield name, self._files.read(name)

    def unquantized_bytes(self) -> int:
        """Bytes of the tensors that are not quantized, as they are stored.

        Raises:
            CheckpointError: a shard that holds some of them is not sound.
        """
        names = set(self._slice_maker.unquantized)
        headers = [self._files.check_shard(file) for file in {self.weight_map[name] for name in names}]
        return sum(spec.nbytes for header in headers for name, spec in header.items() if name in names)

    def codes(self, layer: str, width: int) -> torch.Tensor:
        """The codes of a layer where the model is at ``width``: uint8 [out_features, in_features]."""
        own = self.format.width_of(layer, width)
        stored_width = self.format.stored_width(own)
        return self.format.slice_rule.slice(self.stored_codes(layer, stored_width), stored_width, own)

    def stored_codes(self, layer: str, bits: int) -> torch.Tensor:
        """The ``bits`` most significant bits of a layer's parent codes: uint8 [out_features, in_features]."""
        base = self._files.read(f"{layer}.{WEIGHT_BASE}")
        planes = [self._files.read(f"{layer}.{plane_name(plane)}") for plane in range(BASE_BITS + 1, bits + 1)]
        return unpack_codes(base, planes, self.layers[layer][1])

    def decoder(self, layer: str, width: int, file: str | None = None) -> Decoder:
        """The decoder of a layer where the model is at ``width``.

        Args:
            layer: its name.
            width: of the model.
            file: where to read it; by default the shards. See :attr:`Slice.decoders_file`.
        """
        own = self.format.width_of(layer, width)
        return self._files.decoder(self.format.decoder_kind.form(own), layer, own, file)

    def close(self) -> None:
        """Let go of the files that were opened to read tensors; they are opened again when they are needed."""
        self._files.close()

    @property
    def _slice_maker(self) -> SliceMaker:
        # Kept, for it finds once what all slices share; recipes that are added later come with another format.
        if self._maker is None or self._maker.format is not self.format:
            self._maker = SliceMaker(self.folder, self.format, self.layers, self.weight_map, self.recipes)
        return self._maker

    def _check_everything(self, total_size: int, values: bool) -> None:
        """Check every file that is in the folder."""
        self.files_for(self.slice(self.format.widths[0]))
        present = [file for file in sorted(set(self.weight_map.values())) if (self.folder / file).is_file()]
        found = {name: spec for file in present for name, spec in self._files.check_shard(file).items()}
        found_size = sum(spec.nbytes for spec in found.values())
        if len(found) == len(self.weight_map) and found_size != total_size:
            raise IndexFileError(
                self.folder / INDEX_FILE, "metadata.total_size", total_size, f"{found_size}, the tensors' bytes"
            )
        for width in self.servable_widths:
            self.check(self.slice(width), values=values)
        for recipe in self.recipes:
            if recipe.own_decoders and not (each := self.slice(recipe)).missing_files:
                self.check(each, values=values)


def _without_absent_recipes(format: Format, folder: Path) -> Format:
    """The format without the recipes whose files are not in the folder: widths are served without them."""
    absent = [file for file in format.recipes if not (folder / file).is_file()]
    if absent:
        _LOGGER.warning(
            "%s: found no %s, which config.json lists: copy the folder recipes too, or budgets and recipes are chosen "
            "without them",
            folder,
            " and no ".join(absent),
        )
    return replace(format, recipes=tuple(file for file in format.recipes if file not in absent))


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
    expected = expected_tensors(format, skeleton, config_path, weight_map)
    check_index(folder / INDEX_FILE, weight_map, expected)

    layers = skeleton.quantized_layers(format, config_path)
    format = _without_absent_recipes(format, folder)
    recipes = [read_recipe(folder / file, format, layers) for file in format.recipes]
    files = TensorFiles(folder, weight_map, expected)
    checkpoint = Checkpoint(folder, config, format, layers, weight_map, recipes, files)
    if check_files:
        checkpoint._check_everything(total_size, check_values)
    return checkpoint
