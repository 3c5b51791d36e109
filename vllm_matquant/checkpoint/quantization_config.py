"""``quantization_config``, the part of config.json that says what a checkpoint's format is: written and parsed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeGuard

from vllm_matquant.checkpoint.decoder import AFFINE_FLOAT16, EVERY_KIND, DecoderKind
from vllm_matquant.checkpoint.errors import ConfigError, VersionError
from vllm_matquant.checkpoint.names import CONFIG_FILE, is_recipe_file, recipe_file
from vllm_matquant.checkpoint.slicing import SLICE_RULES, Truncate
from vllm_matquant.checkpoint.spec import PARENT_BITS, QUANT_METHOD, WIDTHS, Format, GroupSize, served_width

FORMAT_VERSIONS = tuple(sorted({kind.format_version for kind in EVERY_KIND.values()}))

_EMBEDDINGS_FIELD = "quantized_embeddings"
_GROUP_SIZES_FIELD = "layer_group_sizes"
_WIDTHS_FIELD = "layer_widths"
_RECIPES_FIELD = "recipes"
_KIND_FIELD = "decoder_kind"  # since version 2
_FIELDS = (
    "quant_method",
    "format_version",
    "parent_bits",
    "widths",
    "group_size",
    "ignored_layers",
    "slicing",
    _EMBEDDINGS_FIELD,
    _GROUP_SIZES_FIELD,
    _WIDTHS_FIELD,
    _RECIPES_FIELD,
)
_RANGE = f"{WIDTHS[0]}..{WIDTHS[-1]}"
_GROUP_SIZE_VALUES = 'a multiple of 8, "auto" or "channel"'


def format_to_config(format: Format) -> dict[str, Any]:
    """The value of ``quantization_config`` in config.json, in the lowest version of the format that can say it."""
    fields: dict[str, Any] = {
        "quant_method": QUANT_METHOD,
        "format_version": format.decoder_kind.format_version,
        "parent_bits": PARENT_BITS,
        "widths": list(format.widths),
        "group_size": format.group_size,
        "ignored_layers": list(format.ignored_layers),
        "slicing": format.slicing,
    }
    if format.decoder_kind.format_version > 1:
        fields[_KIND_FIELD] = format.decoder_kind.name
    # Only where there are some: releases without the field read every checkpoint that has none.
    optional = {
        _EMBEDDINGS_FIELD: list(format.quantized_embeddings),
        _GROUP_SIZES_FIELD: dict(format.layer_group_sizes),
        _WIDTHS_FIELD: {layer: list(widths) for layer, widths in format.layer_widths.items()},
        _RECIPES_FIELD: list(format.recipes),
    }
    return fields | {name: value for name, value in optional.items() if value}


def format_from_config(config: Any, where: Path | str = CONFIG_FILE) -> Format:
    """Parse and check the value of ``quantization_config`` in config.json.

    Args:
        config: the value.
        where: the file to name in an error.

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
    if version not in FORMAT_VERSIONS:
        raise VersionError(
            where,
            "quantization_config.format_version",
            version,
            f"one of {list(FORMAT_VERSIONS)}",
            "A newer release of vllm_matquant may read it." if version > FORMAT_VERSIONS[-1] else "",
        )
    kinds = [name for name, kind in EVERY_KIND.items() if kind.format_version <= version]
    known = {*_FIELDS, *([_KIND_FIELD] if version > 1 else [])}
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
    if config.get("slicing") not in list(SLICE_RULES):  # a list, for the value may be of a type that has no hash
        raise fail("slicing", f"one of {list(SLICE_RULES)}")
    kind = AFFINE_FLOAT16.name if version == 1 else config.get(_KIND_FIELD)
    if kind not in kinds:
        raise fail(_KIND_FIELD, f"one of {kinds}")
    if not EVERY_KIND[kind].affine and config["slicing"] != Truncate.name:
        raise fail("slicing", f"{Truncate.name!r}, as decoder_kind is {kind!r}")
    check_kind_widths(EVERY_KIND[kind], widths, "quantization_config.widths", where)
    for layer, own in layer_widths.items():
        check_kind_widths(EVERY_KIND[kind], own, f"quantization_config.{_WIDTHS_FIELD} of {layer}", where)
    return Format(
        tuple(widths),
        group_size,
        tuple(ignored),
        config["slicing"],
        tuple(embeddings),
        layer_group_sizes,
        {layer: tuple(own) for layer, own in layer_widths.items()},
        tuple(recipes),
        EVERY_KIND[kind],
    )


def check_layer_widths(own: Sequence[int], widths: Sequence[int], field: str, where: Path | str) -> None:
    """Refuse widths of a layer that no width of the model reads.

    Raises:
        ConfigError: there are some.
    """
    unread = sorted(set(own) - {served_width(own, width) for width in widths})
    if unread:
        raise ConfigError(
            where,
            field,
            f"{list(own)}, of which {unread} would never be served",
            f"widths that serve some of {list(widths)}: each takes the layer's next wider one, or its widest",
        )


def check_kind_widths(kind: DecoderKind, widths: Sequence[int], field: str, where: Path | str, hint: str = "") -> None:
    """Refuse widths that decoders of a kind do not have.

    Args:
        kind: of the decoders.
        widths: of the model or of a layer.
        field, where, hint: what to name in an error, and what may cure it.

    Raises:
        ConfigError: there are some, or several where the kind has one.
    """
    if set(widths) <= set(kind.widths) and not (kind.one_width and len(widths) > 1):
        return
    expected = f"{'one' if kind.one_width else 'some'} of {list(kind.widths)}"
    raise ConfigError(where, field, f"{list(widths)} with decoder_kind {kind.name!r}", expected, hint)


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
