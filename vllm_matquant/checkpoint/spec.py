"""The checkpoint format, version 1: the one place that knows its names, shapes, dtypes and limits.

A quantized linear layer ``L`` with ``out_features`` rows and ``in_features`` columns is stored as below; so is a
quantized embedding, with a row for each token.

=====================  =======  =====================================  ==========================================
tensor                 dtype    shape                                  content
=====================  =======  =====================================  ==========================================
``L.weight_base``      uint8    [out_features, in_features / 4]        the two most significant bits of each code
``L.weight_plane{r}``  uint8    [out_features, in_features / 8]        the bit that lifts width r - 1 to width r
``L.weight_scale{r}``  float16  [out_features, groups]                 decoder of width r
``L.weight_offset{r}`` float16  [out_features, groups]                 decoder of width r
=====================  =======  =====================================  ==========================================

Codes are packed along the input dimension, first column in the least significant bits of the first byte; in_features
is a multiple of 8. With the slicing semantic "truncate" the r-bit code of a weight is ``t = q >> (8 - r)`` and the
weight is ``scale_r * t + offset_r``. With "round" (MatQuant, eq. 6) the r-bit code is the parent rounded to r bits and
clamped, so it also needs the plane r + 1. What lifts the checkpoint to width r (plane and decoder) lies in shards of
its own; every tensor that is not quantized lies in the shards of width 2 with the base.

A recipe, which gives each layer its width, may have decoders of its own: ``recipes/NAME.safetensors`` holds, of each
layer, the scale and the offset of its width under the names above, and they take the place of those in the shards.

A layer may have widths of its own. Where the model is served at a width that the layer does not have, the layer is
served at its next wider one, or else at its widest; what that needs then lies in the shards that the model's width
reads.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeGuard

import torch

from vllm_matquant.checkpoint.errors import ConfigError, VersionError, WidthError

QUANT_METHOD = "matquant"
FORMAT_VERSION = 1
PARENT_BITS = 8
BASE_BITS = 2
WIDTHS = tuple(range(BASE_BITS, PARENT_BITS + 1))
GROUP_SIZES = (128, 64, 32)  # largest first: the order in which "auto" tries them

CODE_DTYPE = torch.uint8
DECODER_DTYPE = torch.float16
UNQUANTIZED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_RANGE = f"{WIDTHS[0]}..{WIDTHS[-1]}"
_GROUP_SIZE_VALUES = 'a multiple of 8, "auto" or "channel"'

Slicing = Literal["truncate", "round"]
SLICINGS: tuple[Slicing, ...] = ("truncate", "round")
GroupSize = int | Literal["auto", "channel"]

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
MANIFEST_FILE = "MANIFEST.json"
RECIPES_FOLDER = "recipes"
# What people read about a checkpoint. It lies next to the checkpoint but is no part of it: it comes after the rest is
# published, a model card is edited on a hub, and a report holds seconds, so the manifest lists none of them.
MODEL_CARD_FILE = "README.md"
REPORT_FOLDER = "report"
REPORT_DATA_FILE = f"{REPORT_FOLDER}/report.json"
REPORT_PAGE_FILE = f"{REPORT_FOLDER}/index.html"
DOCUMENT_FILES = (MODEL_CARD_FILE, REPORT_DATA_FILE, REPORT_PAGE_FILE)

WEIGHT_BASE = "weight_base"
_EMBEDDINGS_FIELD = "quantized_embeddings"
_GROUP_SIZES_FIELD = "layer_group_sizes"
_WIDTHS_FIELD = "layer_widths"
_RECIPES_FIELD = "recipes"
_SUFFIX = re.compile(r"weight_(?:base|(?P<kind>plane|scale|offset)(?P<width>\d+))")
_RECIPE_PATH = rf"{RECIPES_FOLDER}/[A-Za-z0-9][A-Za-z0-9._+-]*"  # without its suffix
_RECIPE = re.compile(rf"{_RECIPE_PATH}\.json")
_RECIPE_DECODERS = re.compile(rf"{_RECIPE_PATH}\.safetensors")
_SHARD = re.compile(r"model-width(?P<width>[2-8])-\d{5}-of-\d{5}\.safetensors")


def plane_name(width: int) -> str:
    """Name of the plane whose bit lifts a code of ``width - 1`` bits to ``width`` bits (3..8)."""
    return f"weight_plane{width}"


def scale_name(width: int) -> str:
    return f"weight_scale{width}"


def offset_name(width: int) -> str:
    return f"weight_offset{width}"


def split_tensor_name(name: str) -> tuple[str, str] | None:
    """(layer, suffix) of a tensor that belongs to a quantized layer, None for any other tensor."""
    layer, _, suffix = name.rpartition(".")
    return (layer, suffix) if layer and _SUFFIX.fullmatch(suffix) else None


def shard_name(width: int, number: int, count: int) -> str:
    """File name of a shard of what ``width`` adds; ``number`` counts from 1."""
    return f"model-width{width}-{number:05d}-of-{count:05d}.safetensors"


def shard_width(file_name: str) -> int | None:
    """The width whose data a shard holds, None if the name is not a shard's."""
    match = _SHARD.fullmatch(file_name)
    return int(match["width"]) if match else None


def recipe_file(name: str) -> str:
    """Path in the checkpoint's folder of the recipe of this name."""
    return f"{RECIPES_FOLDER}/{name}.json"


def is_recipe_file(path: str) -> bool:
    """Whether a path in the checkpoint's folder is one of a recipe."""
    return _RECIPE.fullmatch(path) is not None


def recipe_decoders_file(name: str) -> str:
    """Likewise, of the decoders that belong to the recipe alone, if it has any."""
    return f"{RECIPES_FOLDER}/{name}.safetensors"


def is_recipe_decoders_file(path: str) -> bool:
    """Whether a path in the checkpoint's folder is one of a recipe's decoders."""
    return _RECIPE_DECODERS.fullmatch(path) is not None


def is_plain_name(name: str) -> bool:
    """Whether a file name stays in its folder: no separator, no drive, neither "." nor ".."."""
    return name not in ("", ".", "..") and not set(name) & set("/\\:\0")


def served_width(widths: Sequence[int], width: int) -> int:
    """Which of a layer's ``widths``, ascending, serves where the model is at ``width``: the next wider, or the last."""
    return next((own for own in widths if own >= width), widths[-1])


def shard_pattern(stored_width: int) -> str:
    """Glob (also fnmatch) of the shards that hold the widths up to ``stored_width`` and no others."""
    return f"model-width[{BASE_BITS}-{stored_width}]-*.safetensors"


@dataclass(frozen=True)
class TensorSpec:
    """What the format prescribes for one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Format:
    """The ``quantization_config`` of a checkpoint: everything that its tensors' names and shapes follow from.

    Attributes:
        widths: widths that the model is served at, ascending, each in 2..8.
        group_size: columns that share a decoder; "channel" for one group per row; "auto" for the largest of 128, 64, 32
            that divides the layer's in_features.
        ignored_layers: full names of linear layers that are not quantized, as in the source checkpoint.
        slicing: "truncate" (native) or "round" (MatQuant's semantic).
        quantized_embeddings: full name of the input embedding, if it is quantized. An output head that is tied to it is
            quantized exactly if the embedding is, and has no tensors of its own.
        layer_group_sizes: what takes the place of ``group_size`` in single layers, by their full names.
        layer_widths: what takes the place of ``widths`` in single layers, likewise; each serves some of ``widths``.
        recipes: files of the checkpoint's recipes, see :mod:`vllm_matquant.checkpoint.recipe`.
    """

    widths: tuple[int, ...] = WIDTHS
    group_size: GroupSize = "auto"
    ignored_layers: tuple[str, ...] = ("lm_head",)
    slicing: Slicing = "truncate"
    quantized_embeddings: tuple[str, ...] = ()
    layer_group_sizes: Mapping[str, GroupSize] = field(default_factory=dict, hash=False)
    layer_widths: Mapping[str, tuple[int, ...]] = field(default_factory=dict, hash=False)
    recipes: tuple[str, ...] = ()

    @property
    def max_width(self) -> int:
        return self.widths[-1]

    def stored_width(self, width: int) -> int:
        """How many bits of each code must be read to make the ``width``-bit slice."""
        return width if self.slicing == "truncate" else min(width + 1, PARENT_BITS)

    def widths_of(self, layer: str) -> tuple[int, ...]:
        """The widths that a layer has decoders of, ascending."""
        return self.layer_widths.get(layer, self.widths)

    def width_of(self, layer: str, width: int) -> int:
        """The width that a layer is served at where the model is at ``width``."""
        return served_width(self.widths_of(layer), width)

    def planes_of(self, layer: str) -> tuple[int, ...]:
        """The planes that are stored of a layer: none past those that its widest slice reads."""
        return tuple(range(BASE_BITS + 1, self.stored_width(self.widths_of(layer)[-1]) + 1))

    def check_width(self, width: int, where: Path | str) -> None:
        if width not in self.widths:
            raise WidthError(where, "bits", width, f"one of the offered widths {list(self.widths)}")

    def group_size_setting(self, layer: str) -> GroupSize:
        """``group_size``, or what takes its place in this layer."""
        return self.layer_group_sizes.get(layer, self.group_size)

    def group_size_of(self, in_features: int, layer: str, where: Path | str = "group size") -> int:
        """Columns per group in a layer of ``in_features`` columns.

        Raises:
            ConfigError: no such group size divides ``in_features``; the message lists those that would.
        """
        if in_features % 8:
            raise ConfigError(where, f"in_features of {layer}", in_features, "a multiple of 8 (ignore the layer)")
        setting = self.group_size_setting(layer)
        if setting == "channel":
            return in_features
        sizes = GROUP_SIZES if setting == "auto" else (setting,)
        for size in sizes:
            if in_features % size == 0:
                return size
        fitting = [size for size in GROUP_SIZES if in_features % size == 0]
        raise ConfigError(
            where,
            f"group_size for {layer}",
            setting,
            f"a divisor of its {in_features} input features: " + ", ".join(map(str, [*fitting, '"channel"'])),
        )

    def tensors_of_layer(
        self, out_features: int, in_features: int, layer: str = ""
    ) -> dict[int, dict[str, TensorSpec]]:
        """The tensors of one layer by the shards they lie in: ``{shard width: {tensor suffix: spec}}``.

        The decoder of width r lies with the plane of width r, or with what the first width that reads it adds.
        """
        groups = in_features // self.group_size_of(in_features, layer)
        decoder = TensorSpec(DECODER_DTYPE, (out_features, groups))
        plane = TensorSpec(CODE_DTYPE, (out_features, in_features // 8))
        stored: defaultdict[int, dict[str, TensorSpec]] = defaultdict(dict)
        stored[BASE_BITS][WEIGHT_BASE] = TensorSpec(CODE_DTYPE, (out_features, in_features // 4))
        planes, decoders = BASE_BITS, 0  # how far they are placed
        for width in self.widths:
            own = self.width_of(layer, width)
            while planes < self.stored_width(own):
                planes += 1
                stored[min(planes, self.stored_width(width))][plane_name(planes)] = plane
            if decoders < own:
                decoders = own
                stored[min(own, width)] |= {scale_name(own): decoder, offset_name(own): decoder}
        return dict(stored)

    def resident_bytes(self, out_features: int, in_features: int, width: int, layer: str = "") -> int:
        """Bytes of one layer where the model is at ``width``: the codes of its slice, and that slice's decoder."""
        groups = in_features // self.group_size_of(in_features, layer)
        planes = self.width_of(layer, width) - BASE_BITS
        codes = out_features * (in_features // 4 + planes * in_features // 8)
        return codes + 2 * out_features * groups * DECODER_DTYPE.itemsize

    def to_dict(self) -> dict[str, Any]:
        """The value of ``quantization_config`` in config.json."""
        fields: dict[str, Any] = {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "parent_bits": PARENT_BITS,
            "widths": list(self.widths),
            "group_size": self.group_size,
            "ignored_layers": list(self.ignored_layers),
            "slicing": self.slicing,
        }
        # Only where there are some: releases without the field read every checkpoint that has none.
        optional = {
            _EMBEDDINGS_FIELD: list(self.quantized_embeddings),
            _GROUP_SIZES_FIELD: dict(self.layer_group_sizes),
            _WIDTHS_FIELD: {layer: list(widths) for layer, widths in self.layer_widths.items()},
            _RECIPES_FIELD: list(self.recipes),
        }
        return fields | {name: value for name, value in optional.items() if value}

    @classmethod
    def from_dict(cls, config: Any, where: Path | str = CONFIG_FILE) -> Format:
        """Parse and check ``quantization_config``.

        Raises:
            VersionError: another format version.
            ConfigError: a field is missing, unknown, of the wrong type or out of range.
        """

        def fail(field: str, expected: str) -> ConfigError:
            found = repr(config[field]) if field in config else "nothing"
            return ConfigError(where, f"quantization_config.{field}", found, expected)

        if not isinstance(config, dict):
            raise ConfigError(where, "quantization_config", type(config).__name__, "an object")
        if config.get("quant_method") != QUANT_METHOD:
            raise fail("quant_method", repr(QUANT_METHOD))
        version = config.get("format_version")
        if type(version) is not int:
            raise fail("format_version", "an integer")
        if version != FORMAT_VERSION:
            raise VersionError(
                where,
                "quantization_config.format_version",
                version,
                FORMAT_VERSION,
                "A newer release of vllm_matquant may read it." if version > FORMAT_VERSION else "",
            )
        known = {*cls().to_dict(), _EMBEDDINGS_FIELD, _GROUP_SIZES_FIELD, _WIDTHS_FIELD, _RECIPES_FIELD}
        unknown = sorted(set(config) - known)
        if unknown:
            raise ConfigError(where, "quantization_config", f"unknown fields {unknown}", sorted(known))
        if type(config.get("parent_bits")) is not int or config["parent_bits"] != PARENT_BITS:
            raise fail("parent_bits", str(PARENT_BITS))
        widths = config.get("widths")
        if not is_width_list(widths):
            raise fail("widths", f"ascending distinct integers in {_RANGE}")
        group_size = config.get("group_size")
        if not is_group_size(group_size):
            raise fail("group_size", _GROUP_SIZE_VALUES)
        layer_group_sizes = config.get(_GROUP_SIZES_FIELD, {})
        if not isinstance(layer_group_sizes, dict) or not all(map(is_group_size, layer_group_sizes.values())):
            raise fail(_GROUP_SIZES_FIELD, f"an object with {_GROUP_SIZE_VALUES} for each layer")
        layer_widths = config.get(_WIDTHS_FIELD, {})
        if not isinstance(layer_widths, dict) or not all(map(is_width_list, layer_widths.values())):
            raise fail(_WIDTHS_FIELD, f"an object with ascending distinct integers in {_RANGE} for each layer")
        for layer, own in layer_widths.items():
            check_layer_widths(own, widths, f"quantization_config.{_WIDTHS_FIELD} of {layer}", where)
        ignored, embeddings = config.get("ignored_layers"), config.get(_EMBEDDINGS_FIELD, [])
        if not is_name_list(ignored):
            raise fail("ignored_layers", "a list of layer names")
        if not is_name_list(embeddings):
            raise fail(_EMBEDDINGS_FIELD, "a list of layer names")
        recipes = config.get(_RECIPES_FIELD, [])
        if not is_name_list(recipes) or not all(map(is_recipe_file, recipes)) or len(set(recipes)) < len(recipes):
            raise fail(_RECIPES_FIELD, f"a list of files such as {recipe_file('2.5-bits')}, each once")
        if config.get("slicing") not in SLICINGS:
            raise fail("slicing", f"one of {list(SLICINGS)}")
        return cls(
            tuple(widths),
            group_size,
            tuple(ignored),
            config["slicing"],
            tuple(embeddings),
            layer_group_sizes,
            {layer: tuple(own) for layer, own in layer_widths.items()},
            tuple(recipes),
        )


def check_layer_widths(own: Sequence[int], widths: Sequence[int], field: str, where: Path | str) -> None:
    """Refuse widths of a layer that no width of the model reads.

    Raises:
        ConfigError: as said.
    """
    unread = sorted(set(own) - {served_width(own, width) for width in widths})
    if unread:
        raise ConfigError(
            where,
            field,
            f"{list(own)}, of which {unread} would never be served",
            f"widths that serve some of {list(widths)}: each takes the layer's next wider one, or its widest",
        )


def is_width_list(widths: Any) -> TypeGuard[list[int] | tuple[int, ...]]:
    return (
        isinstance(widths, (list, tuple))
        and len(widths) > 0
        and all(type(width) is int and width in WIDTHS for width in widths)
        and list(widths) == sorted(set(widths))
    )


def is_name_list(names: Any) -> TypeGuard[list[str]]:
    return isinstance(names, list) and all(isinstance(name, str) for name in names)


def is_group_size(size: Any) -> TypeGuard[GroupSize]:
    # Groups start on a byte of every plane, so that tensor parallelism can cut between any two of them.
    return size in ("auto", "channel") or (type(size) is int and size > 0 and size % 8 == 0)
