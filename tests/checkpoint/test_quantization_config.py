"""quantization_config is written as every release reads it, and parsed strictly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from vllm_matquant.checkpoint.decoder import AFFINE_FLOAT16, AFFINE_INT8, AFFINE_KINDS, CODEBOOK, DecoderKind
from vllm_matquant.checkpoint.errors import ConfigError, VersionError
from vllm_matquant.checkpoint.quantization_config import format_from_config, format_to_config
from vllm_matquant.checkpoint.spec import Format


@pytest.mark.parametrize(
    "format",
    [
        Format(),
        Format((3,), 32),
        Format((2, 8), "channel", ("lm_head", "a.b")),
        Format(group_size=24),
        Format(ignored_layers=(), quantized_embeddings=("model.embed_tokens",)),
        Format(layer_group_sizes={"a.b": 32, "a.c": "channel", "a.d": "auto"}),
        Format((2, 4, 6), layer_widths={"a.b": (3, 5), "a.c": (8,)}),
    ],
)
def test_config_round_trip(format: Format, kind: DecoderKind) -> None:
    format = replace(format, decoder_kind=kind)
    assert format_from_config(format_to_config(format)) == format


@pytest.mark.parametrize("kind", AFFINE_KINDS, ids=lambda kind: kind.name)
def test_config_round_trip_of_rounded_slices(kind: DecoderKind) -> None:
    format = Format((3,), 32, (), "round", decoder_kind=kind)
    assert format_from_config(format_to_config(format)) == format


def test_codebooks_have_no_rounded_slices() -> None:
    config = format_to_config(Format(slicing="round", decoder_kind=CODEBOOK))
    with pytest.raises(ConfigError, match=r"slicing: found 'round', expected 'truncate', as decoder_kind is 'codebook"):
        format_from_config(config)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("quant_method", "gptq", "'matquant'"),
        ("format_version", "1", "an integer"),
        ("format_version", True, "an integer"),
        ("format_version", None, "an integer"),
        ("parent_bits", 4, "expected 8"),
        ("parent_bits", 8.0, "expected 8"),
        ("widths", [], "ascending distinct integers in 2..8"),
        ("widths", [1, 2], "ascending distinct integers in 2..8"),
        ("widths", [8, 9], "ascending distinct integers in 2..8"),
        ("widths", [4, 2], "ascending distinct integers in 2..8"),
        ("widths", [2, 2], "ascending distinct integers in 2..8"),
        ("widths", ["2"], "ascending distinct integers in 2..8"),
        ("widths", 4, "ascending distinct integers in 2..8"),
        ("group_size", 0, "a multiple of 8"),
        ("group_size", -32, "a multiple of 8"),
        ("group_size", 20, "a multiple of 8"),
        ("group_size", 64.0, "a multiple of 8"),
        ("group_size", "row", "a multiple of 8"),
        ("ignored_layers", "lm_head", "a list of layer names"),
        ("ignored_layers", [1], "a list of layer names"),
        ("quantized_embeddings", None, "a list of layer names"),
        ("quantized_embeddings", True, "a list of layer names"),
        ("quantized_embeddings", [[]], "a list of layer names"),
        ("layer_group_sizes", ["a"], "an object with a multiple of 8"),
        ("layer_group_sizes", {"a": 20}, "an object with a multiple of 8"),
        ("layer_group_sizes", {"a": None}, "an object with a multiple of 8"),
        ("layer_widths", [], "an object with ascending distinct integers in 2..8"),
        ("layer_widths", {"a": 4}, "an object with ascending distinct integers in 2..8"),
        ("layer_widths", {"a": [4, 3]}, "an object with ascending distinct integers in 2..8"),
        ("layer_widths", {"a": []}, "an object with ascending distinct integers in 2..8"),
        ("slicing", "floor", r"one of \['truncate', 'round', 'round-extra'\]"),
        ("slicing", ["truncate"], r"one of \['truncate', 'round', 'round-extra'\]"),
        ("decoder_kind", "affine-int4", r"one of \['affine-float16', 'affine-int8'\]"),
        ("decoder_kind", ["affine-int8"], r"one of \['affine-float16', 'affine-int8'\]"),
        ("decoder_kind", None, r"one of \['affine-float16', 'affine-int8'\]"),
    ],
)
def test_bad_field(field: str, value: Any, expected: str) -> None:
    with pytest.raises(ConfigError, match=rf"there: quantization_config\.{field}: found .*{expected}"):
        format_from_config(format_to_config(Format()) | {field: value}, "there")


@pytest.mark.parametrize("field", format_to_config(Format()))
def test_missing_field(field: str) -> None:
    config = format_to_config(Format())
    del config[field]
    with pytest.raises(ConfigError, match=rf"quantization_config\.{field}: found nothing"):
        format_from_config(config)


FIRST_FIELDS = {"quant_method", "format_version", "parent_bits", "widths", "group_size", "ignored_layers", "slicing"}


def test_without_optional_fields_the_config_is_what_it_was_before_there_were_any() -> None:
    config = format_to_config(Format(decoder_kind=AFFINE_FLOAT16))
    assert config.keys() == FIRST_FIELDS
    assert config["format_version"] == 1


def test_a_kind_of_decoders_that_version_1_does_not_have_is_named_in_version_2() -> None:
    config = format_to_config(Format(decoder_kind=AFFINE_INT8))
    assert config.keys() == FIRST_FIELDS | {"decoder_kind"}
    assert (config["format_version"], config["decoder_kind"]) == (2, "affine-int8")


def test_codebooks_are_of_version_3() -> None:
    config = format_to_config(Format(decoder_kind=CODEBOOK))
    assert config.keys() == FIRST_FIELDS | {"decoder_kind"}
    assert (config["format_version"], config["decoder_kind"]) == (3, "codebook-4d")
    with pytest.raises(
        ConfigError, match=r"decoder_kind: found 'codebook-4d', expected one of \['affine-float16', 'aff"
    ):
        format_from_config(config | {"format_version": 2})


def test_version_1_knows_no_kinds_of_decoders() -> None:
    config = format_to_config(Format(decoder_kind=AFFINE_FLOAT16)) | {"decoder_kind": "affine-float16"}
    with pytest.raises(ConfigError, match=r"unknown fields \['decoder_kind'\]"):
        format_from_config(config)


@pytest.mark.parametrize(
    ("version", "kind"), [(2, AFFINE_FLOAT16), (3, AFFINE_FLOAT16), (3, AFFINE_INT8)], ids=lambda value: str(value)[:40]
)
def test_a_version_may_name_the_kinds_of_earlier_ones(version: int, kind: DecoderKind) -> None:
    config = format_to_config(Format()) | {"format_version": version, "decoder_kind": kind.name}
    assert format_from_config(config) == Format(decoder_kind=kind)


def test_version_3_names_its_kind() -> None:
    config = format_to_config(Format(decoder_kind=CODEBOOK))
    del config["decoder_kind"]
    with pytest.raises(ConfigError, match=r"decoder_kind: found nothing, expected one of \[.*'codebook-4d', .*-4d'\]"):
        format_from_config(config)


@pytest.mark.parametrize("config", [None, [], "matquant"])
def test_config_that_is_no_object(config: Any) -> None:
    with pytest.raises(ConfigError, match="expected an object"):
        format_from_config(config)


@pytest.mark.parametrize(("version", "hint"), [(4, "A newer release"), (0, r"expected one of \[1, 2, 3\]$")])
def test_other_version(version: int, hint: str) -> None:
    with pytest.raises(VersionError, match=hint):
        format_from_config(format_to_config(Format()) | {"format_version": version, "a field of that version": 1})


def test_unknown_field() -> None:
    with pytest.raises(ConfigError, match=r"unknown fields \['codebook'\]"):
        format_from_config(format_to_config(Format()) | {"codebook": 1})


@pytest.mark.parametrize(("own", "unread"), [([3, 4, 5], r"\[4\]"), ([2, 7, 8], r"\[7\]")])
def test_width_of_a_layer_that_is_never_served(own: list[int], unread: str) -> None:
    config = format_to_config(Format((2, 8))) | {"layer_widths": {"a": own}}
    with pytest.raises(ConfigError, match=f"layer_widths of a: found .*, of which {unread} would never be served"):
        format_from_config(config)
