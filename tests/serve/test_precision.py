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
    requested_activation_bits,
    requested_bits,
    resolve,
    with_bits,
)

OFFERED = Format(widths=(2, 3, 4, 6), group_size=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model", "llama", OFFERED)


@pytest.mark.parametrize(
    "config", [{}, {"other": {"bits": 9}}, {"matquant": {}}, {"matquant": {"bits": None}}, object()]
)
def test_no_bits_requested(config: Any) -> None:
    assert requested_bits(config) is None


@pytest.mark.parametrize("bits", range(2, 9))
def test_requested_bits(bits: int) -> None:
    assert requested_bits({"matquant": {"bits": bits}, "other": 1}) == bits


@pytest.mark.parametrize("settings", [{}, {"bits": 4}, {"activation_bits": 8}, {"bits": 3, "activation_bits": 16}])
def test_requested_activation_bits(settings: dict[str, int]) -> None:
    assert requested_activation_bits({"matquant": settings}) == settings.get("activation_bits")


@pytest.mark.parametrize("value", [4, 24, "8", 8.0, True])
def test_wrong_activation_bits_are_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"matquant.activation_bits") as error:
        requested_activation_bits({"matquant": {"activation_bits": value}})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (4, "4"),
        ([("bits", 4)], "bits"),
        ({"bit": 4}, "'bit'"),
        ({"bits": 4, "recipe": "x"}, "'recipe'"),
        ({"bits": "4"}, "'4'"),
        ({"bits": 4.0}, "4.0"),
        ({"bits": True}, "True"),
        ({"bits": 9}, "9"),
        ({"bits": 1}, "1"),
    ],
)
def test_wrong_settings_are_refused(settings: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=r"additional_config: matquant") as error:
        requested_bits({"matquant": settings})
    assert named in str(error.value)


def test_with_bits_copies() -> None:
    config = {"other": 1, "matquant": {}}
    assert with_bits(config, 3) == {"other": 1, "matquant": {"bits": 3}}
    assert config == {"other": 1, "matquant": {}}


def test_every_partition_of_a_layer_has_a_width() -> None:
    assert Precision(3).of_layer([WIDTHS, (2, 4, 8), (2,)]) == LayerPrecision((3, 4, 2))
    mixed = LayerPrecision((3, 8, 3))
    assert mixed.resident_width == 8
    assert mixed.decoder_widths == (3, 8)


def test_the_widest_width_is_the_default(folder: Path) -> None:
    assert resolve(None, OFFERED, folder) == Precision(6)
    assert resolve(None, OFFERED, None) == Precision(6)


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_offered_widths(folder: Path, bits: int) -> None:
    assert resolve(bits, OFFERED, folder) == resolve(bits, OFFERED, None) == Precision(bits)


@pytest.mark.parametrize("bits", [5, 8])
@pytest.mark.parametrize("on_disk", [True, False])
def test_widths_that_are_not_offered(folder: Path, bits: int, on_disk: bool) -> None:
    with pytest.raises(WidthError, match=r"\[2, 3, 4, 6\]"):
        resolve(bits, OFFERED, folder if on_disk else None)


def test_missing_planes(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        if "width5" not in file.name and "width6" not in file.name:
            (tmp_path / file.name).symlink_to(file)
    assert resolve(None, OFFERED, tmp_path) == Precision(4)
    assert resolve(3, OFFERED, tmp_path) == Precision(3)
    with pytest.raises(MissingFileError, match="2, 3, 4"):
        resolve(6, OFFERED, tmp_path)


def test_no_width_on_disk(folder: Path, tmp_path: Path) -> None:
    for file in folder.glob("*.json"):
        (tmp_path / file.name).symlink_to(file)
    with pytest.raises(MissingFileError):
        resolve(None, OFFERED, tmp_path)
