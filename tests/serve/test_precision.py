from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.serve.tiny_models import write_checkpoint
from vllm_matquant.checkpoint.errors import ConfigError, MissingFileError, WidthError
from vllm_matquant.checkpoint.spec import WIDTHS, Format
from vllm_matquant.serve.precision import (
    LayerPrecision,
    Precision,
    Request,
    read_request,
    resolve,
    with_precision,
)

OFFERED = Format(widths=(2, 3, 4, 6), group_size=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model", "llama", OFFERED)


@pytest.mark.parametrize(
    "config", [{}, {"other": {"bits": 9}}, {"matquant": {}}, {"matquant": {"bits": None}}, object()]
)
def test_nothing_requested(config: Any) -> None:
    assert read_request(config) == Request()


@pytest.mark.parametrize("bits", range(2, 9))
def test_requested_bits(bits: int) -> None:
    assert read_request({"matquant": {"bits": bits}, "other": 1}) == Request(bits=bits)


@pytest.mark.parametrize("bits", [2.0, 2.5, 3.0, 8.0])
def test_a_number_with_a_fraction_is_a_budget(bits: float) -> None:
    request = read_request({"matquant": {"bits": bits}})
    assert request == Request(budget=bits)
    assert request.needs_recipes


@pytest.mark.parametrize(("memory", "size"), [("90MiB", 90 * 2**20), ("1.5 GB", 1_500_000_000), (7, 7), ("7", 7)])
def test_requested_memory(memory: Any, size: int) -> None:
    assert read_request({"matquant": {"memory": memory}}) == Request(memory=size)


def test_requested_recipes() -> None:
    assert read_request({"matquant": {"recipe": "a.json"}}) == Request(recipe=Path("a.json"))
    assert read_request({"matquant": {"recipe": {"a": 3}}}) == Request(recipe={"a": 3})
    assert not read_request({"matquant": {"recipe": {"a": 3}}}).needs_recipes


@pytest.mark.parametrize("settings", [{}, {"bits": 4}, {"activation_bits": 8}, {"bits": 3, "activation_bits": 16}])
def test_requested_activation_bits(settings: dict[str, int]) -> None:
    assert read_request({"matquant": settings}).activation_bits == settings.get("activation_bits")


@pytest.mark.parametrize("value", [4, 24, "8", 8.0, True])
def test_wrong_activation_bits_are_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"matquant.activation_bits") as error:
        read_request({"matquant": {"activation_bits": value}})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (4, "4"),
        ([("bits", 4)], "bits"),
        ({"bit": 4}, "'bit'"),
        ({"bits": 4, "recipe": "x"}, "bits and recipe"),
        ({"bits": 4, "memory": "90MiB"}, "bits and memory"),
        ({"bits": "4"}, "'4'"),
        ({"bits": 1.9}, "1.9"),
        ({"bits": 8.5}, "8.5"),
        ({"bits": float("nan")}, "nan"),
        ({"memory": "90 bits"}, "90 bits"),
        ({"memory": 1.5}, "1.5"),
        ({"memory": 0}, "0"),
        ({"memory": True}, "True"),
        ({"recipe": 3}, "3"),
        ({"recipe": {"a": 9}}, "{'a': 9}"),
        ({"recipe": {"a": 4.0}}, "4.0"),
        ({"bits": True}, "True"),
        ({"bits": 9}, "9"),
        ({"bits": 1}, "1"),
    ],
)
def test_wrong_settings_are_refused(settings: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=r"additional_config: matquant") as error:
        read_request({"matquant": settings})
    assert named in str(error.value)


def test_the_settled_precision_stands_in_a_copy() -> None:
    config = {"other": 1, "matquant": {"memory": "1GB", "activation_bits": 8}}
    settled = {"other": 1, "matquant": {"bits": 3, "activation_bits": 8}}
    assert with_precision(config, Precision(3, 8)) == settled
    by_recipe = with_precision(config, Precision(4, recipe={"a": 4, "b": 2}))
    assert by_recipe == {"other": 1, "matquant": {"recipe": {"a": 4, "b": 2}, "activation_bits": 8}}
    assert read_request(by_recipe) == Request(recipe={"a": 4, "b": 2}, activation_bits=8)
    assert config == {"other": 1, "matquant": {"memory": "1GB", "activation_bits": 8}}


def test_every_partition_of_a_layer_has_a_width() -> None:
    assert Precision(3).of_layer(["a", "b", "c"], [WIDTHS, (2, 4, 8), (2,)]) == LayerPrecision((3, 4, 2))
    recipe = {"c": 2, "b": 5, "a": 3, "other": 8}
    assert Precision(8, recipe=recipe).of_layer(["a", "b", "c"], [WIDTHS] * 3) == LayerPrecision((3, 5, 2))
    mixed = LayerPrecision((3, 8, 3))
    assert mixed.resident_width == 8
    assert mixed.decoder_widths == (3, 8)


def test_neighbours_of_the_same_width_are_a_segment() -> None:
    runs = [(range(0, 2), (3, 3)), (range(2, 3), (5,)), (range(3, 4), (3,))]
    assert list(LayerPrecision((3, 3, 5, 3)).segments()) == [(run, LayerPrecision(own)) for run, own in runs]


def test_the_widest_width_is_the_default(folder: Path) -> None:
    assert resolve(Request(), OFFERED, folder) == Precision(6)
    assert resolve(Request(), OFFERED, None) == Precision(6)


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_offered_widths(folder: Path, bits: int) -> None:
    assert resolve(Request(bits), OFFERED, folder) == resolve(Request(bits), OFFERED, None) == Precision(bits)


@pytest.mark.parametrize("bits", [5, 8])
@pytest.mark.parametrize("on_disk", [True, False])
def test_widths_that_are_not_offered(folder: Path, bits: int, on_disk: bool) -> None:
    with pytest.raises(WidthError, match=r"\[2, 3, 4, 6\]"):
        resolve(Request(bits), OFFERED, folder if on_disk else None)


def test_missing_planes(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        if "width5" not in file.name and "width6" not in file.name:
            (tmp_path / file.name).symlink_to(file)
    assert resolve(Request(), OFFERED, tmp_path) == Precision(4)
    assert resolve(Request(3), OFFERED, tmp_path) == Precision(3)
    with pytest.raises(MissingFileError, match="2, 3, 4"):
        resolve(Request(6), OFFERED, tmp_path)


def test_no_width_on_disk(folder: Path, tmp_path: Path) -> None:
    for file in folder.glob("*.json"):
        (tmp_path / file.name).symlink_to(file)
    with pytest.raises(MissingFileError):
        resolve(Request(), OFFERED, tmp_path)
