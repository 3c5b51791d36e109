from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.serve.tiny_models import served_at, served_widths, write_checkpoint
from vllm_matquant.checkpoint.errors import ConfigError, WidthError
from vllm_matquant.checkpoint.reader import open_checkpoint
from vllm_matquant.checkpoint.spec import Format
from vllm_matquant.serve.request import Request, given_settings, read_request, without_settings
from vllm_matquant.serve.served import LayerWidths, Served

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
    assert read_request({"matquant": {"bits": bits}}) == Request(budget=bits)


@pytest.mark.parametrize(("memory", "size"), [("90MiB", 90 * 2**20), ("1.5 GB", 1_500_000_000), (7, 7), ("7", 7)])
def test_requested_memory(memory: Any, size: int) -> None:
    assert read_request({"matquant": {"memory": memory}}) == Request(memory=size)


def test_requested_recipes() -> None:
    assert read_request({"matquant": {"recipe": "a.json"}}) == Request(recipe=Path("a.json"))
    assert read_request({"matquant": {"recipe": {"a": 3}}}) == Request(recipe={"a": 3})


def test_requested_resident_widths() -> None:
    assert read_request({"matquant": {"bits": 8, "resident": [2, 4]}}) == Request(8, resident=(2, 4))


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
        ({"resident": 4}, "4"),
        ({"resident": [4, 2]}, "[4, 2]"),
        ({"resident": [4, 9]}, "9"),
        ({"bits": True}, "True"),
        ({"bits": 9}, "9"),
        ({"bits": 1}, "1"),
    ],
)
def test_wrong_settings_are_refused(settings: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=r"additional_config: matquant") as error:
        read_request({"matquant": settings})
    assert named in str(error.value)


def test_a_copy_without_the_settings() -> None:
    config = {"other": 1, "matquant": {"memory": "1GB", "activation_bits": 8}}
    assert without_settings(config) == {"other": 1}
    assert given_settings(config) == {"memory": "1GB", "activation_bits": 8}
    assert config == {"other": 1, "matquant": {"memory": "1GB", "activation_bits": 8}}


def served(request: Request, folder: Path, **options: Any) -> Served:
    said: list[str] = []
    return request.served(open_checkpoint(folder, check_files=False), said.append, **options)


def test_the_widest_width_is_the_default(folder: Path) -> None:
    assert served(Request(), folder).active.width == 6
    assert served(Request(), folder, partial=True).active.width == 6


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_offered_widths(folder: Path, bits: int) -> None:
    found = served(Request(bits, activation_bits=8), folder)
    assert set(found.active.widths.values()) == {bits}
    assert found.resident == (found.active,)
    assert found.activation_bits == 8


def test_resident_widths_stand_beside_the_active_one(folder: Path) -> None:
    found = served(Request(3, resident=(2, 3, 6)), folder)
    assert [each.width for each in found.resident] == [3, 2, 6]
    layer = next(iter(found.active.widths))
    assert found.of_layer([layer, layer]) == LayerWidths((3, 3), ((2, 3, 6), (2, 3, 6)))


def test_what_was_chosen_is_said(folder: Path) -> None:
    checkpoint, said = open_checkpoint(folder, check_files=False), []
    Request(4).served(checkpoint, said.append)
    assert said == []
    Request().served(checkpoint, said.append)
    Request(budget=3.5).served(checkpoint, said.append)
    assert "No --bits given: serving at 6 bits" in said[0]
    assert "uniform-3: 3 bits per weight" in said[1]


@pytest.mark.parametrize("bits", [5, 8])
@pytest.mark.parametrize("partial", [True, False])
def test_widths_that_are_not_offered(folder: Path, bits: int, partial: bool) -> None:
    with pytest.raises(WidthError, match=r"\[2, 3, 4, 6\]"):
        served(Request(bits), folder, partial=partial)


def test_missing_planes(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        if "width5" not in file.name and "width6" not in file.name:
            (tmp_path / file.name).symlink_to(file)
    assert served(Request(), tmp_path).active.width == 4
    assert served(Request(6), tmp_path).active.missing_files


def test_every_partition_of_a_layer_has_a_width() -> None:
    recipe = served_widths({"c": 2, "b": 5, "a": 3, "other": 8})
    assert recipe.of_layer(["a", "b", "c"]) == LayerWidths((3, 5, 2), ((3,), (5,), (2,)))
    assert recipe.of_layer(["tied head"]).active == (8,)
    several = served_at(8, resident=(2, 3)).of_layer(["a", "b"])
    assert several == LayerWidths((8, 8), ((2, 3, 8), (2, 3, 8)))
    assert several.resident_widths == (2, 3, 8)


def test_neighbours_with_the_same_resident_widths_are_a_segment() -> None:
    widths = LayerWidths((3, 3, 5, 3), ((3,), (3,), (5,), (3,)))
    assert list(widths.segments()) == [
        (range(0, 2), LayerWidths((3, 3), ((3,), (3,)))),
        (range(2, 3), LayerWidths((5,), ((5,),))),
        (range(3, 4), LayerWidths((3,), ((3,),))),
    ]
    switched = LayerWidths((3, 8), ((3, 8), (3, 8)))
    assert list(switched.segments()) == [(range(0, 2), switched)]


def test_names_of_layers_are_changed_in_every_slice() -> None:
    renamed = served_widths({"a.b": 3}).renamed(lambda widths: {f"x.{name}": width for name, width in widths.items()})
    assert renamed.active.widths == renamed.resident[0].widths == {"x.a.b": 3}
