"""quantization_config is parsed strictly; group sizes and names follow from it."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_matquant.checkpoint.errors import ConfigError, VersionError, WidthError
from vllm_matquant.checkpoint.names import is_plain_name, shard_name, shard_pattern, shard_width
from vllm_matquant.checkpoint.spec import SLICINGS, WIDTHS, Format, Slicing


@pytest.mark.parametrize(
    "format",
    [
        Format(),
        Format((3,), 32, (), "round"),
        Format((2, 8), "channel", ("lm_head", "a.b")),
        Format(group_size=24),
        Format(ignored_layers=(), quantized_embeddings=("model.embed_tokens",)),
        Format(layer_group_sizes={"a.b": 32, "a.c": "channel", "a.d": "auto"}),
        Format((2, 4, 6), layer_widths={"a.b": (3, 5), "a.c": (8,)}),
    ],
)
def test_config_round_trip(format: Format) -> None:
    assert Format.from_dict(format.to_dict()) == format


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
        ("slicing", "floor", r"one of \['truncate', 'round'\]"),
        ("slicing", ["truncate"], r"one of \['truncate', 'round'\]"),
    ],
)
def test_bad_field(field: str, value: Any, expected: str) -> None:
    with pytest.raises(ConfigError, match=rf"there: quantization_config\.{field}: found .*{expected}"):
        Format.from_dict(Format().to_dict() | {field: value}, "there")


@pytest.mark.parametrize("field", Format().to_dict())
def test_missing_field(field: str) -> None:
    config = Format().to_dict()
    del config[field]
    with pytest.raises(ConfigError, match=rf"quantization_config\.{field}: found nothing"):
        Format.from_dict(config)


def test_without_optional_fields_the_config_is_what_it_was_before_there_were_any() -> None:
    fields = {"quant_method", "format_version", "parent_bits", "widths", "group_size", "ignored_layers", "slicing"}
    assert Format().to_dict().keys() == fields


@pytest.mark.parametrize("config", [None, [], "matquant"])
def test_config_that_is_no_object(config: Any) -> None:
    with pytest.raises(ConfigError, match="expected an object"):
        Format.from_dict(config)


@pytest.mark.parametrize(("version", "hint"), [(2, "A newer release"), (0, "expected 1$")])
def test_other_version(version: int, hint: str) -> None:
    with pytest.raises(VersionError, match=hint):
        Format.from_dict(Format().to_dict() | {"format_version": version, "a field of that version": 1})


def test_unknown_field() -> None:
    with pytest.raises(ConfigError, match=r"unknown fields \['codebook'\]"):
        Format.from_dict(Format().to_dict() | {"codebook": 1})


@pytest.mark.parametrize(("in_features", "size"), [(384, 128), (192, 64), (96, 32)])
def test_auto_takes_the_largest_group_that_fits(in_features: int, size: int) -> None:
    assert Format(group_size="auto").group_size_of(in_features, "layer") == size
    assert Format(group_size="channel").group_size_of(in_features, "layer") == in_features


@pytest.mark.parametrize(
    ("group_size", "in_features", "fitting"),
    [(128, 192, '64, 32, "channel"'), (64, 40, '"channel"'), ("auto", 40, '"channel"')],
)
def test_group_that_does_not_divide_names_those_that_would(group_size: Any, in_features: int, fitting: str) -> None:
    with pytest.raises(
        ConfigError, match=f"some.layer: found {group_size}, .* {in_features} input features: {fitting}$"
    ):
        Format(group_size=group_size).group_size_of(in_features, "some.layer")


def test_group_sizes_of_single_layers() -> None:
    format = Format(group_size=64, layer_group_sizes={"a": 32, "b": "channel", "c": "auto", "d": 48})
    sizes = {layer: format.group_size_of(256, layer) for layer in ("a", "b", "c", "other")}
    assert sizes == {"a": 32, "b": 256, "c": 128, "other": 64}
    with pytest.raises(ConfigError, match=r"group_size for d: found 48, expected a divisor of its 256"):
        format.group_size_of(256, "d")
    for layer, size in sizes.items():
        (scale,) = (spec for name, spec in format.tensors_of_layer(16, 256, layer)[4].items() if "scale" in name)
        assert scale.shape == (16, 256 // size)
        assert format.resident_bytes(16, 256, 4, layer) == 16 * 256 // 2 + 2 * 2 * 16 * 256 // size


LAYER_WIDTHS = [((2, 4, 8), (4, 8)), ((2, 8), (3, 5)), (WIDTHS, (2, 3)), (WIDTHS, (8,)), ((3, 6), (2,)), ((2,), (7,))]


@pytest.mark.parametrize("slicing", SLICINGS)
@pytest.mark.parametrize(("widths", "own"), LAYER_WIDTHS)
def test_shards_hold_what_a_width_reads_of_a_layer_with_others(
    widths: tuple[int, ...], own: tuple[int, ...], slicing: Slicing
) -> None:
    format = Format(widths, 32, (), slicing, layer_widths={"a": own})
    shards = format.tensors_of_layer(48, 96, "a")
    everything = [name for tensors in shards.values() for name in tensors]
    stored = own[-1] if slicing == "truncate" else min(own[-1] + 1, 8)
    planes = [f"weight_plane{plane}" for plane in range(3, stored + 1)]
    assert sorted(everything) == sorted(
        ["weight_base", *planes, *(f"weight_{part}{width}" for width in own for part in ("scale", "offset"))]
    )
    for width in widths:
        served = min((each for each in own if each >= width), default=max(own))
        assert format.width_of("a", width) == served
        read = format.stored_width(width)
        names = {name for shard, tensors in shards.items() if shard <= read for name in tensors}
        reads = served if slicing == "truncate" else min(served + 1, 8)
        needed = {"weight_base", f"weight_scale{served}", f"weight_offset{served}"}
        needed |= {f"weight_plane{plane}" for plane in range(3, reads + 1)}
        assert needed <= names
        # Nothing more but decoders next to these planes: a narrow slice pays for no wide one.
        assert {name for name in names - needed if "plane" in name} == set()
        assert {int(name[-1]) for name in names - needed} <= {each for each in own if each <= max(served, read)}
        assert format.resident_bytes(48, 96, width, "a") == 48 * 96 * served // 8 + 2 * 2 * 48 * 96 // 32


@pytest.mark.parametrize(("own", "unread"), [([3, 4, 5], r"\[4\]"), ([2, 7, 8], r"\[7\]")])
def test_width_of_a_layer_that_is_never_served(own: list[int], unread: str) -> None:
    config = Format((2, 8)).to_dict() | {"layer_widths": {"a": own}}
    with pytest.raises(ConfigError, match=f"layer_widths of a: found .*, of which {unread} would never be served"):
        Format.from_dict(config)


def test_columns_must_fill_bytes() -> None:
    with pytest.raises(ConfigError, match=r"in_features of some\.layer: found 36, expected a multiple of 8"):
        Format(group_size="channel").group_size_of(36, "some.layer")


@pytest.mark.parametrize("width", [1, 3, 9])
def test_width_that_is_not_offered(width: int) -> None:
    with pytest.raises(WidthError, match=rf"found {width}, expected one of the offered widths \[2, 4\]"):
        Format((2, 4)).check_width(width, "here")


@pytest.mark.parametrize("width", WIDTHS)
def test_bytes_of_the_tensors_that_a_width_reads(width: int) -> None:
    format = Format(group_size=32)
    tensors = {name: spec for part in format.tensors_of_layer(48, 96).values() for name, spec in part.items()}
    wanted = ["weight_base", f"weight_scale{width}", f"weight_offset{width}"]
    wanted += [f"weight_plane{plane}" for plane in range(3, width + 1)]
    assert format.resident_bytes(48, 96, width) == sum(tensors[name].nbytes for name in wanted)


def test_shard_names() -> None:
    assert shard_name(3, 1, 12) == "model-width3-00001-of-00012.safetensors"
    assert shard_width(shard_name(3, 1, 12)) == 3
    for name in ("model-width9-00001-of-00001.safetensors", "../" + shard_name(3, 1, 1), shard_name(3, 1, 1) + "\n"):
        assert shard_width(name) is None
    assert shard_pattern(4) == "model-width[2-4]-*.safetensors"


def test_plain_names() -> None:
    assert is_plain_name("model-width2-00001-of-00001.safetensors")
    for name in ("", ".", "..", "../a", "/a", "a/b", "a\\b", "C:a", "a\0"):
        assert not is_plain_name(name)
