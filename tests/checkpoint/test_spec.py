"""Group sizes, shards and bytes of a layer follow from the format."""

from __future__ import annotations

from typing import Any

import pytest

from tests.checkpoint.samples import decoder_bytes, decoder_names
from vllm_matquant.checkpoint.decoder import AFFINE_FLOAT16, AFFINE_INT8, CODEBOOK, DecoderKind
from vllm_matquant.checkpoint.errors import ConfigError, WidthError
from vllm_matquant.checkpoint.slicing import SLICE_RULES, Slicing
from vllm_matquant.checkpoint.spec import WIDTHS, Format


@pytest.mark.parametrize(("in_features", "size"), [(384, 128), (192, 64), (96, 32)])
def test_auto_takes_the_largest_group_that_fits(in_features: int, size: int) -> None:
    assert Format(group_size="auto").group_size_of(in_features, "layer") == size
    assert Format(group_size="channel").group_size_of(in_features, "layer") == in_features


@pytest.mark.parametrize(
    ("group_size", "in_features", "fitting"),
    [
        (128, 192, '8, 16, 24, 32, 48, 64, 96, "channel"'),
        (64, 40, '8, "channel"'),
        ("auto", 120, '8, 24, 40, "channel"'),
        ("auto", 8, '"channel"'),
    ],
)
def test_group_that_does_not_divide_names_those_that_would(group_size: Any, in_features: int, fitting: str) -> None:
    with pytest.raises(
        ConfigError, match=f"some.layer: found {group_size}, .* {in_features} input features: {fitting}$"
    ):
        Format(group_size=group_size).group_size_of(in_features, "some.layer")


@pytest.mark.parametrize(
    ("group_size", "in_features", "message"),
    [
        (24, 96, 'found 24, expected a divisor of its 96 input features and multiple of 16: 16, 32, 48, "channel"'),
        (8, 64, 'found 8, expected a divisor of its 64 input features and multiple of 16: 16, 32, "channel"'),
        ("channel", 40, "in_features of some.layer: found 40, expected a multiple of 16"),
        (8, 24, "in_features of some.layer: found 24, expected a multiple of 16"),
    ],
)
def test_groups_that_part_fours_of_columns_are_refused(group_size: Any, in_features: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Format(group_size=group_size, decoder_kind=CODEBOOK).group_size_of(in_features, "some.layer")


def test_group_sizes_of_single_layers(kind: DecoderKind) -> None:
    own = {"a": 32, "b": "channel", "c": "auto", "d": 48}
    format = Format(group_size=64, layer_group_sizes=own, decoder_kind=kind)
    sizes = {layer: format.group_size_of(256, layer) for layer in ("a", "b", "c", "other")}
    assert sizes == {"a": 32, "b": 256, "c": 128, "other": 64}
    with pytest.raises(ConfigError, match=r"group_size for d: found 48, expected a divisor of its 256"):
        format.group_size_of(256, "d")
    for layer, size in sizes.items():
        (scale,) = (spec for name, spec in format.tensors_of_layer(16, 256, layer)[4].items() if "scale" in name)
        assert scale.shape == (16, 256 // size)
        assert format.resident_bytes(16, 256, 4, layer) == 16 * 256 // 2 + decoder_bytes(kind.form(4), 16, 256 // size)


LAYER_WIDTHS = [((2, 4, 8), (4, 8)), ((2, 8), (3, 5)), (WIDTHS, (2, 3)), (WIDTHS, (8,)), ((3, 6), (2,)), ((2,), (7,))]


@pytest.mark.parametrize("slicing", SLICE_RULES)
@pytest.mark.parametrize(("widths", "own"), LAYER_WIDTHS)
def test_shards_hold_what_a_width_reads_of_a_layer_with_others(
    widths: tuple[int, ...], own: tuple[int, ...], slicing: Slicing, kind: DecoderKind
) -> None:
    format = Format(widths, 32, (), slicing, layer_widths={"a": own}, decoder_kind=kind)
    shards = format.tensors_of_layer(48, 96, "a")
    everything = [name for tensors in shards.values() for name in tensors]
    stored = own[-1] if slicing == "truncate" else min(own[-1] + 1, 8)
    planes = [f"weight_plane{plane}" for plane in range(3, stored + 1)]
    decoders = [name for width in own for name in decoder_names(kind, width)]
    assert sorted(everything) == sorted(["weight_base", *planes, *decoders])
    for width in widths:
        served = min((each for each in own if each >= width), default=max(own))
        assert format.width_of("a", width) == served
        read = format.stored_width(width)
        names = {name for shard, tensors in shards.items() if shard <= read for name in tensors}
        reads = served if slicing == "truncate" else min(served + 1, 8)
        needed = {"weight_base", *decoder_names(kind, served)}
        needed |= {f"weight_plane{plane}" for plane in range(3, reads + 1)}
        assert needed <= names
        # Nothing more but decoders next to these planes: a narrow slice pays for no wide one.
        assert {name for name in names - needed if "plane" in name} == set()
        assert {int(name[-1]) for name in names - needed} <= {each for each in own if each <= max(served, read)}
        decoders = decoder_bytes(kind.form(served), 48, 96 // 32)
        assert format.resident_bytes(48, 96, width, "a") == 48 * 96 * served // 8 + decoders


def test_columns_must_fill_bytes() -> None:
    with pytest.raises(ConfigError, match=r"in_features of some\.layer: found 36, expected a multiple of 8"):
        Format(group_size="channel").group_size_of(36, "some.layer")


@pytest.mark.parametrize("width", [1, 3, 9])
def test_width_that_is_not_offered(width: int) -> None:
    with pytest.raises(WidthError, match=rf"found {width}, expected one of the offered widths \[2, 4\]"):
        Format((2, 4)).check_width(width, "here")


@pytest.mark.parametrize("width", WIDTHS)
def test_bytes_of_the_tensors_that_a_width_reads(width: int, kind: DecoderKind) -> None:
    format = Format(group_size=32, decoder_kind=kind)
    tensors = {name: spec for part in format.tensors_of_layer(48, 96).values() for name, spec in part.items()}
    wanted = ["weight_base", *decoder_names(kind, width)]
    wanted += [f"weight_plane{plane}" for plane in range(3, width + 1)]
    assert format.resident_bytes(48, 96, width) == sum(tensors[name].nbytes for name in wanted)


def test_quarter_of_a_bit_less_for_each_weight_in_groups_of_64() -> None:
    """What the 8-bit decoders are for; the two steps of a row take a 32-bit word."""
    rows, columns = 512, 1024
    two, eight = (
        Format(group_size=64, decoder_kind=kind).resident_bytes(rows, columns, 2)
        for kind in (AFFINE_FLOAT16, AFFINE_INT8)
    )
    assert (two - eight) * 8 == rows * columns * 0.25 - 32 * rows
