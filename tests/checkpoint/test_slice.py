"""A slice by every way to ask for it: what it is, what it costs, which files it reads and how often."""

from __future__ import annotations

import functools
import json
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.checkpoint.samples import decoder_bytes, decoder_names, random_decoder
from vllm_matquant.checkpoint import tensor_files, validate
from vllm_matquant.checkpoint.decoder import DecoderKind
from vllm_matquant.checkpoint.errors import MissingFileError, RecipeError, WidthError
from vllm_matquant.checkpoint.names import CONFIG_FILE, INDEX_FILE, recipe_decoders_file, recipe_file, shard_width
from vllm_matquant.checkpoint.reader import Checkpoint, open_checkpoint
from vllm_matquant.checkpoint.recipe import Recipe
from vllm_matquant.checkpoint.recipe_store import add_recipes
from vllm_matquant.checkpoint.slice import Slice
from vllm_matquant.checkpoint.spec import WIDTHS, Format

WIDE_LAYER = "model.layers.1.mlp.down_proj"


def mixed(checkpoint: Checkpoint, seed: int) -> dict[str, int]:
    """A width for each layer, drawn from those that it has."""
    draw = random.Random(seed)
    return {layer: draw.choice(checkpoint.format.widths_of(layer)) for layer in checkpoint.layers}


def add(folder: Path, *recipes: Recipe) -> Checkpoint:
    """The checkpoint with some recipes more, those with decoders of their own with random ones."""
    checkpoint = open_checkpoint(folder)
    decoders = {
        recipe.name: {
            layer: random_decoder(
                checkpoint.format.decoder_kind,
                width,
                *checkpoint.decoder(layer, width).parts["scale"].shape,
                torch.Generator().manual_seed(99),
            )
            for layer, width in recipe.widths.items()
        }
        for recipe in recipes
        if recipe.own_decoders
    }
    add_recipes(checkpoint, recipes, decoders)
    return open_checkpoint(folder)


def served_tensors(checkpoint: Checkpoint, served: Slice) -> dict[str, torch.Tensor]:
    """The tensors of a slice's quantized layers."""
    return {
        name: tensor
        for name, tensor in checkpoint.tensors(served)
        if name.rpartition(".")[0] in served.widths and ".weight_" in name
    }


@pytest.mark.parametrize("width", WIDTHS)
def test_a_width(shared_sample: Any, width: int) -> None:
    checkpoint = open_checkpoint(shared_sample.folder)
    served = checkpoint.slice(width)
    assert (served.name, served.width, served.kl, served.decoders_file) == (f"uniform-{width}", width, None, None)
    assert list(served.widths) == list(checkpoint.layers)
    assert set(served.widths.values()) == {width}
    assert served.average_bits == width
    assert served.missing_files == ()
    assert [shard_width(file) for file in served.files] == sorted(shard_width(file) for file in served.files)
    assert {shard_width(file) for file in served.files} == set(range(2, width + 1))
    read = {"weight_base", *decoder_names(checkpoint.format.decoder_kind, width)}
    read |= {f"weight_plane{plane}" for plane in range(3, width + 1)}
    # Where shards are as small as here, one may hold decoders of another width alone: it is not read.
    assert set(served.files) == {
        file
        for name, file in checkpoint.weight_map.items()
        if name in shared_sample.unquantized or name.rpartition(".")[2] in read
    }
    assert served.resident_bytes == sum(tensor.nbytes for tensor in served_tensors(checkpoint, served).values())
    assert (served.narrowest, served.widest, served.label) == (width, width, {"bits": width})
    assert str(served).startswith(f"uniform-{width}: {width} bits per weight, {served.resident_bytes:,} bytes")


def test_a_width_where_layers_have_their_own(write: Callable[..., Any], tmp_path: Path, kind: DecoderKind) -> None:
    format = Format((2, 4, 6), layer_widths={WIDE_LAYER: (3, 5, 8)}, decoder_kind=kind)
    sample = write(tmp_path / "out", format)
    checkpoint = open_checkpoint(tmp_path / "out")
    for width, own in ((2, 3), (4, 5), (6, 8)):
        served = checkpoint.slice(width)
        assert served.widths == dict.fromkeys(sample.codes, width) | {WIDE_LAYER: own}
        bits = {layer: codes.numel() * served.widths[layer] for layer, codes in sample.codes.items()}
        weights = sum(codes.numel() for codes in sample.codes.values())
        assert served.average_bits == pytest.approx(sum(bits.values()) / weights)
        groups = {layer: 1 if codes.shape[1] == 64 else 3 for layer, codes in sample.codes.items()}
        decoders = sum(
            decoder_bytes(kind.form(served.widths[layer]), len(codes), groups[layer])
            for layer, codes in sample.codes.items()
        )
        assert served.resident_bytes == sum(bits.values()) // 8 + decoders
        assert (served.narrowest, served.widest, served.width) == (width, own, width)
        assert {shard_width(file) for file in served.files} == set(range(2, width + 1))
        checkpoint.check(served)
        for layer, weight in checkpoint.weights(served):
            codes = sample.codes[layer] >> (8 - served.widths[layer])
            assert torch.equal(weight, sample.decoders[layer][served.widths[layer]].decode(codes))


@pytest.mark.parametrize("seed", range(3))
def test_every_way_to_ask_for_a_recipe_gives_the_same(sample: Any, seed: int) -> None:
    checkpoint = open_checkpoint(sample.folder)
    recipe = Recipe("mine", mixed(checkpoint, seed), kl=0.01)
    checkpoint = add(sample.folder, recipe, Recipe("other", mixed(checkpoint, seed + 10), kl=0.02))
    served = checkpoint.slice("mine")
    assert served.widths == recipe.widths
    assert list(served.widths) == list(checkpoint.layers)
    assert (served.name, served.kl, served.width) == ("mine", 0.01, None)
    assert served.label == {"bits": served.average_bits, "recipe": "mine"}
    same = [
        checkpoint.slice(recipe),
        checkpoint.slice(sample.folder / recipe_file("mine")),
        checkpoint.slice(widths=recipe.widths),
        checkpoint.slice(widths=dict(reversed(recipe.widths.items()))),
        checkpoint.slice(budget=9.0),
        checkpoint.slice(memory=2**40),
        Slice.from_dict(served.to_dict()),
    ]
    for each in same:
        assert each == served
        assert hash(each) == hash(served)
    assert served.resident_bytes == sum(tensor.nbytes for tensor in served_tensors(checkpoint, served).values())


def test_every_way_to_ask_for_a_width_gives_the_same(shared_sample: Any) -> None:
    checkpoint = open_checkpoint(shared_sample.folder)
    fixed = checkpoint.unquantized_bytes()
    for width in WIDTHS:
        served = checkpoint.slice(width)
        assert checkpoint.slice(budget=width) == checkpoint.slice(budget=width + 0.99) == served
        assert checkpoint.slice(memory=fixed + served.resident_bytes) == served
        by_hand = checkpoint.slice(widths=served.widths)
        assert by_hand == replace(served, name="widths", width=None)  # it has the widths, but is not the offered one
    assert checkpoint.slice() == checkpoint.slice(8)


def test_without_a_wish_the_widest_that_the_folder_can_serve(sample: Any) -> None:
    for path in sample.folder.glob("model-width[5-8]-*"):
        path.unlink()
    checkpoint = open_checkpoint(sample.folder)
    assert checkpoint.slice() == checkpoint.slice(4)
    for path in sample.folder.glob("model-width[2-8]-*"):
        path.unlink()
    served = open_checkpoint(sample.folder, check_files=False).slice()
    assert (served.width, served.missing_files) == (2, served.files)


def test_widths_by_hand(shared_sample: Any) -> None:
    checkpoint = open_checkpoint(shared_sample.folder)
    widths = mixed(checkpoint, seed=5)
    served = checkpoint.slice(widths=widths)
    assert (served.name, served.widths, served.kl, served.decoders_file) == ("widths", widths, None, None)
    read = checkpoint.format.stored_width(max(widths.values()))
    assert {shard_width(file) for file in served.files} <= set(range(2, read + 1))


def test_loss_of_a_width_is_that_of_the_recipe_with_the_same_widths(sample: Any) -> None:
    uniform = open_checkpoint(sample.folder).slice(3).widths
    checkpoint = add(sample.folder, Recipe("three", uniform, kl=0.5))
    assert checkpoint.slice(3).kl == 0.5
    assert checkpoint.slice(4).kl is None
    checkpoint = add(sample.folder, Recipe("three", uniform, kl=0.25, own_decoders=True))
    assert checkpoint.slice(3).kl is None  # which was measured with the recipe's decoders
    assert checkpoint.slice(3).decoders_file is None
    assert checkpoint.slice("three").decoders_file == recipe_decoders_file("three")
    assert checkpoint.slice(budget=3.5).name == "three"


def test_decoders_of_its_own(sample: Any) -> None:
    widths = mixed(open_checkpoint(sample.folder), seed=1)
    checkpoint = add(sample.folder, Recipe("mine", widths, kl=0.1, own_decoders=True))
    served = checkpoint.slice("mine")
    assert served.decoders_file == "recipes/mine.safetensors"
    assert served.files[-1] == served.decoders_file
    assert "with decoders of its own" in str(served)
    for way in (checkpoint.slice(widths=widths), checkpoint.slice(sample.folder / recipe_file("mine"))):
        assert way == served
    assert checkpoint.files_for(served)[-1] == sample.folder / "recipes" / "mine.safetensors"
    plain = checkpoint.slice(widths=dict.fromkeys(widths, 2))
    assert not set(plain.files) & {served.decoders_file}
    (sample.folder / served.decoders_file).unlink()
    absent = open_checkpoint(sample.folder).slice("mine")
    assert absent.missing_files == (served.decoders_file,)
    assert replace(absent, missing_files=()) == served
    with pytest.raises(MissingFileError, match=r"--include 'recipes/mine\.safetensors'$"):
        checkpoint.files_for(absent)


def test_missing_files(sample: Any) -> None:
    checkpoint = add(sample.folder, Recipe("mine", dict.fromkeys(sample.codes, 5), kl=0.1))
    gone = sorted(path.name for path in sample.folder.glob("model-width[35]-*"))
    for name in gone:
        (sample.folder / name).unlink()
    assert checkpoint.slice(2).missing_files == ()
    assert checkpoint.slice(4).missing_files == tuple(name for name in gone if shard_width(name) == 3)
    served = checkpoint.slice("mine")
    assert served.missing_files == tuple(gone)
    for read in (checkpoint.check, checkpoint.files_for, lambda served: next(checkpoint.tensors(served))):
        with pytest.raises(MissingFileError) as caught:
            read(served)
        assert all(f"no {name}" in str(caught.value) for name in gone)
        assert "files of mine: found" in str(caught.value)
        assert "The folder serves 2 bits" in str(caught.value)
        assert f"hf download NAME --local-dir {sample.folder} --include 'model-width[2-5]-*.saf" in str(caught.value)
    assert checkpoint.slice(budget=8).name == "uniform-2"
    assert checkpoint.slice(budget=8, partial=True).name == "mine"
    assert checkpoint.slice(memory=2**40, partial=True).name == "mine"


@pytest.mark.parametrize("which", [4, "mine", "own"])
def test_json_and_back(sample: Any, which: Any) -> None:
    widths = mixed(open_checkpoint(sample.folder), seed=2)
    other = mixed(open_checkpoint(sample.folder), seed=3)
    checkpoint = add(sample.folder, Recipe("mine", widths, kl=0.3), Recipe("own", other, own_decoders=True))
    (sample.folder / "recipes" / "own.safetensors").unlink()
    served = checkpoint.slice(which)
    found = Slice.from_dict(json.loads(json.dumps(served.to_dict())))
    assert found == served
    assert isinstance(found.files, tuple)
    with pytest.raises(FrozenInstanceError):
        found.name = "other"  # type: ignore[misc]
    for wrong in (served.to_dict() | {"bits": 4}, {"name": "x"}):
        with pytest.raises(TypeError):
            Slice.from_dict(wrong)


def test_wishes_that_cannot_be_met(shared_sample: Any, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(shared_sample.folder)
    widths = mixed(checkpoint, seed=4)
    layer = next(iter(widths))
    for ways, named in (
        ({"which": 4, "budget": 3.0}, "which and budget"),
        ({"widths": widths, "memory": 10}, "widths and memory"),
    ):
        with pytest.raises(ValueError, match=f"slice: found {named}, expected one of them"):
            checkpoint.slice(**ways)
    with pytest.raises(WidthError, match=r"bits: found 9, expected one of the offered widths \[2, 3"):
        checkpoint.slice(9)
    with pytest.raises(RecipeError, match=r"recipe: found 'none', expected one of \[\], or of the widths \[2, 3"):
        checkpoint.slice("none")
    with pytest.raises(MissingFileError, match=r"none\.json: found no such file"):
        checkpoint.slice(tmp_path / "none.json")
    with pytest.raises(RecipeError, match=f"width of {layer}: found nothing"):
        checkpoint.slice(widths={name: width for name, width in widths.items() if name != layer})
    with pytest.raises(RecipeError, match=f"width of {layer}: found 9, expected one of its widths"):
        checkpoint.slice(widths=widths | {layer: 9})
    with pytest.raises(RecipeError, match=r"width of other: found no such layer"):
        checkpoint.slice(widths=widths | {"other": 4})
    with pytest.raises(RecipeError, match=r"budget: found 1\.9 bits, expected at least 2 bits \(uniform-2\)"):
        checkpoint.slice(budget=1.9)
    least = checkpoint.slice(2).resident_bytes + checkpoint.unquantized_bytes()
    with pytest.raises(RecipeError, match=rf"found 10 bytes, expected at least {least:,} bytes \(uniform-2\)"):
        checkpoint.slice(memory=10)


@pytest.mark.parametrize("which", [4.0, "4", np.int64(4), np.float32(4)])
def test_a_width_in_other_words(shared_sample: Any, which: Any) -> None:
    checkpoint = open_checkpoint(shared_sample.folder)
    assert checkpoint.slice(which) == checkpoint.slice(4)


def test_a_recipe_may_have_a_number_as_its_name(sample: Any) -> None:
    checkpoint = add(sample.folder, Recipe("4", mixed(open_checkpoint(sample.folder), seed=1)))
    assert checkpoint.slice("4").name == "4"
    assert checkpoint.slice(4).width == 4
    assert checkpoint.slice("5").width == 5


@pytest.mark.parametrize(
    ("which", "error", "message"),
    [
        (
            3.5,
            WidthError,
            r"bits: found 3\.5, expected one of the offered widths .*\. Ask for .* slice\(budget=3\.5\)$",
        ),
        (float("nan"), WidthError, r"bits: found nan, expected one of the offered widths"),
        (9.0, WidthError, r"bits: found 9, expected one of the offered widths \[2, 3"),
        ("9", WidthError, r"bits: found 9, expected one of the offered widths \[2, 3"),
        ("3.5", RecipeError, r"recipe: found '3\.5', expected one of \[\], or of the widths \[2, 3"),
        ({"layer": 4}, RecipeError, r"slice: found \{'layer': 4\}, expected a width, a recipe, its name or its file's"),
    ],
)
def test_what_is_neither_width_nor_recipe(
    shared_sample: Any, which: Any, error: type[ValueError], message: str
) -> None:
    checkpoint = open_checkpoint(shared_sample.folder)
    with pytest.raises(error, match=message):
        checkpoint.slice(which)


# What a process opens

_opened: list[str] = []
_listening = False


def _listen(event: str, arguments: Any) -> None:
    if _listening and event == "open" and isinstance(arguments[0], (str, bytes, Path)):
        _opened.append(str(arguments[0]))


@functools.cache  # a hook stays for ever
def _hear_of_opened_files() -> None:
    sys.addaudithook(_listen)


@contextmanager
def opens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Counter[str]]]:
    """How often each file in a folder is opened: by ``python``, by ``safetensors``, and its header read."""
    global _listening
    found: dict[str, Counter[str]] = {"python": Counter(), "header": Counter(), "safetensors": Counter()}

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Path, **options: Any) -> Any:
            found[name][path.relative_to(folder).as_posix()] += 1
            return real(path, **options)

        return call

    _hear_of_opened_files()
    _opened.clear()
    with monkeypatch.context() as patch:
        patch.setattr(validate, "read_header", counted("header", validate.read_header))
        patch.setattr(tensor_files, "safe_open", counted("safetensors", tensor_files.safe_open))
        _listening = True
        try:
            yield found
        finally:
            _listening = False
    inside = [path for path in _opened if path.startswith(f"{folder}/")]
    found["python"].update(Path(path).relative_to(folder).as_posix() for path in inside)


@pytest.mark.parametrize(
    "ways", [{"which": 3}, {"which": "mine"}, {"budget": 2.5}, {"memory": 2**40}], ids=lambda ways: next(iter(ways))
)
@pytest.mark.parametrize("own", [False, True])
def test_each_file_is_opened_once(
    sample: Any, ways: dict[str, Any], own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = {layer: 2 + (number == 3) for number, layer in enumerate(sample.codes)}
    add(sample.folder, Recipe("mine", narrow, kl=0.1, own_decoders=own))
    with opens(sample.folder, monkeypatch) as counts:
        checkpoint = open_checkpoint(sample.folder, check_files=False)
        served = checkpoint.slice(**ways)
        checkpoint.check(served)
        assert dict(checkpoint.tensors(served))
        assert len(list(checkpoint.weights(served))) == len(sample.codes)
    once = dict.fromkeys(served.files, 1)
    assert counts["safetensors"] == once
    # To count the bytes of a budget, the shards of what is not quantized are looked at, which every slice reads.
    assert counts["header"] == once
    texts = dict.fromkeys([CONFIG_FILE, INDEX_FILE, recipe_file("mine")], 1)
    assert counts["python"] == once | texts
    with opens(sample.folder, monkeypatch) as counts:
        checkpoint.check(served)
        checkpoint.check(checkpoint.slice(**ways))
        assert dict(checkpoint.tensors(served))
    assert not any(counts.values())


def test_a_second_slice_opens_only_what_the_first_did_not(sample: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(sample.folder, check_files=False)
    checkpoint.check(checkpoint.slice(3))
    with opens(sample.folder, monkeypatch) as counts:
        checkpoint.check(checkpoint.slice(4))
    more = {file: 1 for file in checkpoint.slice(4).files if shard_width(file) == 4}
    assert counts["header"] == counts["safetensors"] == more


def test_slices_side_by_side(sample: Any) -> None:
    widths, others = (mixed(open_checkpoint(sample.folder), seed) for seed in (6, 7))
    checkpoint = add(sample.folder, Recipe("mine", widths), Recipe("own", others, own_decoders=True))
    slices = [checkpoint.slice("mine"), checkpoint.slice(5), checkpoint.slice(2)]
    found = list(checkpoint.tensors(*slices))
    assert len({name for name, _ in found}) == len(found)
    expected = {name: tensor for each in slices for name, tensor in checkpoint.tensors(each)}
    assert {name for name, _ in found} == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found)
    layer, width = next(iter(others.items()))
    plain = checkpoint.slice(widths={other: others[other] % 7 + 2 for other in others} | {layer: width})
    message = rf"{layer}\.weight_\w+{width}: found it in model-\S+ and in recipes/own\.safetensors"
    with pytest.raises(RecipeError, match=message):
        list(checkpoint.tensors(plain, checkpoint.slice("own")))


def test_closed_files_are_opened_again(sample: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with opens(sample.folder, monkeypatch) as counts:
        checkpoint = open_checkpoint(sample.folder, check_files=False)
        for _ in range(3):
            checkpoint.check(checkpoint.slice(3), checkpoint.slice(2))
            assert dict(checkpoint.tensors(checkpoint.slice(2)))
            checkpoint.close()
    assert set(counts["header"].values()) == {1}
    assert {shard_width(file): count for file, count in counts["safetensors"].items()} == {2: 3, 3: 1}


def test_an_opening_that_checks_everything_reads_each_file_once(sample: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    add(sample.folder, Recipe("mine", mixed(open_checkpoint(sample.folder), 1), own_decoders=True))
    with opens(sample.folder, monkeypatch) as counts:
        checkpoint = open_checkpoint(sample.folder)
        for which in (*WIDTHS, "mine"):
            checkpoint.check(checkpoint.slice(which))
    files = {file for which in (*WIDTHS, "mine") for file in checkpoint.slice(which).files}
    assert counts["header"] == dict.fromkeys(files, 1)
    of_decoders = set().union(*(decoder_names(checkpoint.format.decoder_kind, width) for width in WIDTHS))
    with_values = {file for name, file in checkpoint.weight_map.items() if name.rpartition(".")[2] in of_decoders}
    assert counts["safetensors"] == dict.fromkeys(with_values | {recipe_decoders_file("mine")}, 1)


def test_a_copy_without_the_folder_of_recipes(sample: Any, caplog: pytest.LogCaptureFixture) -> None:
    widths = dict.fromkeys(open_checkpoint(sample.folder).layers, 3)
    add(sample.folder, Recipe("three", widths, kl=0.25, own_decoders=True), Recipe("other", widths, kl=0.5))
    (sample.folder / "recipes" / "three.json").unlink()
    checkpoint = open_checkpoint(sample.folder)
    assert "found no recipes/three.json, which config.json lists: copy the folder recipes too" in caplog.text
    assert [recipe.name for recipe in checkpoint.recipes] == ["other"]
    shutil.rmtree(sample.folder / "recipes")
    checkpoint = open_checkpoint(sample.folder)
    assert checkpoint.slice(3).name == "uniform-3"
    add(sample.folder, Recipe("third", widths, kl=0.5))  # those that are not there are listed no more
    caplog.clear()
    assert [recipe.name for recipe in open_checkpoint(sample.folder).recipes] == ["third"]
    assert not caplog.records
