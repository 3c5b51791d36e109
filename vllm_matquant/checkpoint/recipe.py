"""Recipes: a width for each layer, so that a checkpoint is served at any average width or size.

A recipe is a JSON file. Those that belong to a checkpoint lie in its folder ``recipes`` and are listed in config.json;
any other file can be named where the checkpoint is served. Its fields:

====================  =========================================================================================
``recipe_version``    1
``name``              what logs and pictures call it
``widths``            the width of each quantized layer, by its full name
``default``           optional: the width of every layer that ``widths`` does not name
``average_bits``      optional: the mean of the widths, weighted by the layers' numbers of weights
``resident_bytes``    optional: bytes of codes and decoders
``own_decoders``      optional: whether decoders of its own lie beside it, see :mod:`vllm_matquant.checkpoint.spec`;
                      they serve whoever asks for just these widths
``kl``                optional: KL divergence from the source model, or from the widest slice, in nats per token
``origin``            optional: an object that says how the recipe was found
====================  =========================================================================================

What the widths imply, ``average_bits`` and ``resident_bytes``, is computed anew and compared where it is given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_matquant.checkpoint.errors import RecipeError
from vllm_matquant.checkpoint.files import read_json
from vllm_matquant.checkpoint.names import is_recipe_file, recipe_file
from vllm_matquant.checkpoint.spec import WIDTHS, Format

RECIPE_VERSION = 1
_OPTIONAL = ("default", "average_bits", "resident_bytes", "own_decoders", "kl", "origin")
_FIELDS = ("recipe_version", "name", "widths", *_OPTIONAL)

Shapes = Mapping[str, tuple[int, int]]
"""(out_features, in_features) of each quantized layer."""


@dataclass(frozen=True)
class Recipe:
    """A width for each layer of a checkpoint.

    Attributes:
        name: letters, digits, ``.``, ``_``, ``+`` and ``-``.
        widths: the width of every quantized layer, one of those that it has.
        kl: KL divergence, in nats per token, measured when the recipe was found; None if it is not known.
        origin: how the recipe was found.
        own_decoders: whether the checkpoint holds decoders that were trained for just these widths.
    """

    name: str
    widths: Mapping[str, int]
    kl: float | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)
    own_decoders: bool = False

    def to_dict(self, format: Format, layers: Shapes) -> dict[str, Any]:
        """The content of the recipe's file."""
        optional = {"own_decoders": self.own_decoders or None, "kl": self.kl, "origin": dict(self.origin) or None}
        return {
            "recipe_version": RECIPE_VERSION,
            "name": self.name,
            "average_bits": average_bits(self.widths, layers),
            "resident_bytes": resident_bytes(self.widths, format, layers),
            **{name: value for name, value in optional.items() if value is not None},
            "widths": dict(self.widths),
        }


def average_bits(widths: Mapping[str, int], layers: Shapes) -> float:
    """The mean width of a weight, decoders not counted."""
    weights = {layer: rows * columns for layer, (rows, columns) in layers.items()}
    return sum(weights[layer] * widths[layer] for layer in weights) / max(1, sum(weights.values()))


def resident_bytes(widths: Mapping[str, int], format: Format, layers: Shapes) -> int:
    """Bytes of the codes and decoders that serving these widths keeps in memory."""
    return sum(format.resident_bytes(*shape, widths[layer], layer) for layer, shape in layers.items())


def read_recipe(path: Path, format: Format, layers: Shapes) -> Recipe:
    """Read a recipe and check it against the checkpoint that it is for; whether its decoders are there is not checked.

    Raises:
        MissingFileError: there is no such file.
        RecipeError: it is no JSON, a field is wrong, or it names a layer or a width that the checkpoint does not have.
    """
    return parse_recipe(read_json(path, RecipeError), format, layers, path)


def parse_recipe(content: dict[str, Any], format: Format, layers: Shapes, where: Path | str) -> Recipe:
    """Check a recipe's content against the checkpoint that it is for; whether its decoders are there is not checked.

    Args:
        content: the JSON object of its file.
        format: of the checkpoint.
        layers: shapes of its quantized layers.
        where: the file to name in an error.

    Raises:
        RecipeError: a field is wrong, or it names a layer or a width that the checkpoint does not have.
    """

    def fail(field: str, expected: object) -> RecipeError:
        return RecipeError(where, field, repr(content[field]) if field in content else "nothing", expected)

    unknown = sorted(set(content) - set(_FIELDS))
    if unknown:
        raise RecipeError(where, "recipe", f"unknown fields {unknown}", list(_FIELDS))
    if type(content.get("recipe_version")) is not int or content["recipe_version"] != RECIPE_VERSION:
        raise fail("recipe_version", RECIPE_VERSION)
    name, kl, origin = content.get("name"), content.get("kl"), content.get("origin", {})
    if not isinstance(name, str) or not is_recipe_file(recipe_file(name)):
        raise fail("name", "letters, digits and any of . _ + -")
    if kl is not None and (type(kl) not in (int, float) or not math.isfinite(kl)):
        raise fail("kl", "a finite number")
    own_decoders = content.get("own_decoders", False)
    if not isinstance(own_decoders, bool):
        raise fail("own_decoders", "true or false")
    if not isinstance(origin, dict):
        raise fail("origin", "an object")
    if not isinstance(content.get("widths"), dict):
        raise fail("widths", "an object with a width for each layer")
    if "default" in content and (type(content["default"]) is not int or content["default"] not in WIDTHS):
        raise fail("default", f"an integer in {WIDTHS[0]}..{WIDTHS[-1]}")
    widths = complete_widths(content["widths"], content.get("default"), format, layers, where)
    average, size = average_bits(widths, layers), resident_bytes(widths, format, layers)
    if "average_bits" in content and not _is_close(content["average_bits"], average):
        raise fail("average_bits", f"{average}, by its widths")
    if "resident_bytes" in content and content["resident_bytes"] != size:
        raise fail("resident_bytes", f"{size}, by its widths")
    return Recipe(name, widths, kl, origin, own_decoders)


def complete_widths(
    widths: Mapping[str, Any], default: int | None, format: Format, layers: Shapes, where: Path | str
) -> dict[str, int]:
    """The width of every layer, in the model's order.

    Args:
        widths: of single layers.
        default: of all others, served as a model of this width serves each; None where all must be named.
        format: of the checkpoint.
        layers: its quantized layers.
        where: what to name in an error.

    Raises:
        RecipeError: a layer is not the checkpoint's or not named, or does not have its width.
    """
    unknown = sorted(set(widths) - set(layers))
    if unknown:
        raise RecipeError(where, f"width of {unknown[0]}", "no such layer in the checkpoint", "its quantized layers")
    complete = {}
    for layer in layers:
        if layer in widths:
            width = widths[layer]
        elif default is not None:
            width = format.width_of(layer, default)
        else:
            raise RecipeError(where, f"width of {layer}", "nothing", 'a width, or a "default" for layers without one')
        if type(width) is not int or width not in format.widths_of(layer):
            raise RecipeError(
                where, f"width of {layer}", repr(width), f"one of its widths {list(format.widths_of(layer))}"
            )
        complete[layer] = width
    return complete


def _is_close(found: Any, expected: float) -> bool:
    return type(found) in (int, float) and math.isclose(found, expected, rel_tol=1e-9)
