"""Recipes: round trips, what they cost, and which one a budget gets."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoint.samples import decoder_names, open_slice, random_decoder, same_decoder
from vllm_matquant.checkpoint.decoder import CODEBOOK, Decoder
from vllm_matquant.checkpoint.errors import (
    CheckpointError,
    DecoderValueError,
    MissingFileError,
    MissingTensorError,
    RecipeError,
    ShardError,
    TensorDtypeError,
    TensorShapeError,
    UnexpectedTensorError,
)
from vllm_matquant.checkpoint.names import CONFIG_FILE, MANIFEST_FILE, recipe_decoders_file, recipe_file
from vllm_matquant.checkpoint.reader import Checkpoint, open_checkpoint
from vllm_matquant.checkpoint.recipe import Recipe, average_bits, parse_recipe, read_recipe
from vllm_matquant.checkpoint.recipe_store import add_recipes
from vllm_matquant.checkpoint.spec import WIDTHS, Format
from vllm_matquant.checkpoint.verify import verify


def random_recipe(checkpoint: Checkpoint, seed: int, **fields: Any) -> Recipe:
    draw = random.Random(seed)
    widths = {layer: draw.choice(checkpoint.format.widths_of(layer)) for layer in checkpoint.layers}
    return Recipe(f"random-{seed}", widths, **fields)


def opened(folder: Path) -> Checkpoint:
    return open_checkpoint(folder)


@pytest.mark.parametrize("seed", range(3))
def test_a_recipe_goes_to_the_disk_and_back(sample: Any, seed: int) -> None:
    checkpoint = opened(sample.folder)
    recipe = random_recipe(checkpoint, seed, kl=0.25, origin={"budget": "3"})
    add_recipes(checkpoint, [recipe])
    assert opened(sample.folder).recipes == checkpoint.recipes == [recipe]
    path = sample.folder / recipe_file(recipe.name)
    assert read_recipe(path, checkpoint.format, checkpoint.layers) == recipe
    written = json.loads(path.read_text())
    assert written["average_bits"] == pytest.approx(average_bits(recipe.widths, checkpoint.layers))
    assert written["resident_bytes"] == checkpoint.slice(recipe).resident_bytes
    assert all(result.passed for result in verify(sample.folder))


def test_more_recipes_replace_those_of_the_same_name(sample: Any) -> None:
    first, second = (random_recipe(opened(sample.folder), seed) for seed in (1, 2))
    add_recipes(opened(sample.folder), [first])
    changed = Recipe(first.name, second.widths, kl=0.5)
    add_recipes(opened(sample.folder), [second, changed])
    assert opened(sample.folder).recipes == [changed, second]
    assert all(result.passed for result in verify(sample.folder))


def test_a_recipe_that_no_manifest_lists_is_told(sample: Any) -> None:
    add_recipes(opened(sample.folder), [random_recipe(opened(sample.folder), 1)])
    (sample.folder / recipe_file("stray")).write_text("{}")
    assert [result.text for result in verify(sample.folder) if not result.passed] == [
        f"{sample.folder / recipe_file('stray')}: not in MANIFEST.json"
    ]


def test_another_checkpoint_takes_no_recipes_over(sample: Any, write: Any) -> None:
    add_recipes(opened(sample.folder), [random_recipe(opened(sample.folder), 1)])
    write(sample.folder, overwrite=True)
    assert opened(sample.folder).recipes == []
    assert not (sample.folder / recipe_file("random-1")).exists()


@pytest.mark.parametrize("seed", range(3))
def test_what_a_recipe_reads_and_costs(sample: Any, seed: int) -> None:
    checkpoint = opened(sample.folder)
    recipe = random_recipe(checkpoint, seed)
    served, kind = checkpoint.slice(recipe), checkpoint.format.decoder_kind
    tensors = dict(checkpoint.tensors(served))
    by_hand = 0
    for layer, (rows, columns) in checkpoint.layers.items():
        width = recipe.widths[layer]
        own = {name.removeprefix(f"{layer}.") for name in tensors if name.startswith(f"{layer}.weight")}
        planes = {f"weight_plane{plane}" for plane in range(3, width + 1)}
        assert own == {"weight_base"} | decoder_names(kind, width) | planes
        for name, part in sample.decoders[layer][width].named(layer).items():
            assert torch.equal(tensors[name], part)
            by_hand += part.nbytes
        by_hand += rows * columns * width // 8
    assert served.resident_bytes == by_hand
    unquantized = sum(tensor.nbytes for tensor in sample.unquantized.values())
    assert checkpoint.unquantized_bytes() == unquantized


@pytest.mark.parametrize("width", WIDTHS)
def test_a_recipe_of_one_width_is_that_width(shared_sample: Any, width: int) -> None:
    checkpoint = opened(shared_sample.folder)
    plain = checkpoint.slice(width)
    assert set(plain.widths.values()) == {width}
    uniform = checkpoint.slice(widths=plain.widths)
    assert checkpoint.files_for(uniform) == checkpoint.files_for(plain)
    assert uniform.resident_bytes == plain.resident_bytes
    for (name, tensor), (other, expected) in zip(checkpoint.tensors(uniform), checkpoint.tensors(plain), strict=True):
        assert name == other
        assert torch.equal(tensor, expected)


def test_a_default_is_served_as_a_model_of_that_width() -> None:
    layers = {"a": (8, 64), "b": (8, 64), "c": (8, 64)}
    format = Format(widths=(2, 4, 8), group_size=32, layer_widths={"b": (4, 8)})
    content = {"recipe_version": 1, "name": "x", "default": 2, "widths": {"c": 8}}
    assert parse_recipe(content, format, layers, "here").widths == {"a": 2, "b": 4, "c": 8}
    with pytest.raises(RecipeError, match=r"here: width of b: found 2, expected one of its widths \[4, 8\]"):
        parse_recipe(content | {"widths": {"b": 2}}, format, layers, "here")


def test_files_of_wider_layers_are_needed_and_no_others(sample: Any) -> None:
    checkpoint = opened(sample.folder)
    layers = list(checkpoint.layers)
    narrow = dict.fromkeys(layers, 3)
    for file in sample.folder.glob("model-width[4-8]-*"):
        file.unlink()
    partial = opened(sample.folder)
    served = partial.slice(widths=narrow)
    assert dict(partial.tensors(served)).keys() == dict(partial.tensors(partial.slice(3))).keys()
    with pytest.raises(MissingFileError, match="files of widths: found no model-width4"):
        partial.files_for(partial.slice(widths=narrow | {layers[0]: 4}))
    add_recipes(partial, [Recipe("wide", narrow | {layers[0]: 4}, kl=0.1), Recipe("narrow", narrow, kl=0.2)])
    assert opened(sample.folder).slice(budget=8.0).name == "narrow"
    assert opened(sample.folder).slice(budget=8.0, partial=True).name == "wide"


def test_the_best_recipe_within_a_budget(sample: Any) -> None:
    checkpoint = opened(sample.folder)
    layers = list(checkpoint.layers)
    uniform = {width: Recipe(f"uniform-{width}", checkpoint.slice(width).widths, kl=1 / width) for width in WIDTHS}
    half = dict.fromkeys(layers, 2) | dict.fromkeys(layers[: len(layers) // 2], 3)
    bad, good = Recipe("bad", half, kl=0.6), Recipe("good", half, kl=0.4)
    add_recipes(checkpoint, [*uniform.values(), bad, good])
    cost = average_bits(half, checkpoint.layers)
    assert checkpoint.slice(budget=cost).name == "good"
    assert checkpoint.slice(budget=cost - 1e-6).name == "uniform-2"
    assert checkpoint.slice(budget=2.999).name == "good"
    assert checkpoint.slice(budget=3.0).name == "uniform-3"
    unquantized = checkpoint.unquantized_bytes()
    size = checkpoint.slice(good).resident_bytes + unquantized
    assert checkpoint.slice(memory=size).name == "good"
    assert checkpoint.slice(memory=size - 1).name == "uniform-2"
    least = checkpoint.slice(2).resident_bytes + unquantized
    with pytest.raises(RecipeError, match=rf"at least {least:,} bytes \(uniform-2\)"):
        checkpoint.slice(memory=least - 1)
    with pytest.raises(RecipeError, match=r"at least 2 bits \(uniform-2\)"):
        checkpoint.slice(budget=1.5)


def test_without_recipes_the_widest_width_that_fits(shared_sample: Any) -> None:
    checkpoint = opened(shared_sample.folder)
    for bits in (2.0, 2.7, 3.0, 7.5, 8.0):
        assert checkpoint.slice(budget=bits).name == f"uniform-{int(bits)}"


def test_a_crash_between_the_files_leaves_a_checkpoint_that_is_served(
    sample: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_matquant.checkpoint import recipe_store

    checkpoint, publish = opened(sample.folder), recipe_store.publish_json
    recipe = random_recipe(checkpoint, 1)
    for last in (recipe_file(recipe.name), CONFIG_FILE):

        def crash(path: Path, content: Any, last: str = last) -> None:
            publish(path, content)
            if path == sample.folder / last:
                raise KeyboardInterrupt

        monkeypatch.setattr(recipe_store, "publish_json", crash)
        with pytest.raises(KeyboardInterrupt):
            add_recipes(checkpoint, [recipe])
        assert opened(sample.folder).recipes == ([] if last != CONFIG_FILE else [recipe])
        checkpoint = opened(sample.folder)
    monkeypatch.setattr(recipe_store, "publish_json", publish)
    add_recipes(checkpoint, [recipe])
    assert all(result.passed for result in verify(sample.folder))


def own_decoders(checkpoint: Checkpoint, recipe: Recipe, seed: int = 0) -> dict[str, Decoder]:
    """Decoders that are not the plain widths'."""
    generator, kind = torch.Generator().manual_seed(1000 + seed), checkpoint.format.decoder_kind
    return {
        layer: random_decoder(kind, width, *checkpoint.decoder(layer, width).parts["scale"].shape, generator)
        for layer, width in recipe.widths.items()
    }


def with_own_decoders(folder: Path, seed: int = 1) -> tuple[Recipe, dict[str, Decoder]]:
    """A recipe with decoders of its own, put into a checkpoint."""
    checkpoint = opened(folder)
    recipe = random_recipe(checkpoint, seed, kl=0.1, own_decoders=True)
    decoders = own_decoders(checkpoint, recipe)
    add_recipes(checkpoint, [recipe], {recipe.name: decoders})
    return recipe, decoders


@pytest.mark.parametrize("seed", range(3))
def test_decoders_of_a_recipe_serve_its_widths_and_no_others(sample: Any, seed: int) -> None:
    recipe, decoders = with_own_decoders(sample.folder, seed)
    checkpoint = opened(sample.folder)
    assert checkpoint.recipes == [recipe]
    served = checkpoint.slice(recipe)
    assert served.decoders_file == f"recipes/{recipe.name}.safetensors"
    tensors = dict(checkpoint.tensors(served))
    for layer, codes, decoder in checkpoint.coded_layers(served):
        width = recipe.widths[layer]
        assert torch.equal(codes, sample.codes[layer] >> (8 - width))
        assert same_decoder(decoder, decoders[layer])
        assert not same_decoder(decoder, sample.decoders[layer][width])
        for name, part in decoder.named(layer).items():
            assert torch.equal(tensors[name], part)
    layer = next(iter(checkpoint.layers))
    other = dict(recipe.widths) | {layer: recipe.widths[layer] % 7 + 2}
    for plain in (*map(checkpoint.slice, WIDTHS), checkpoint.slice(widths=other)):
        assert plain.decoders_file is None
        tensors = dict(checkpoint.tensors(plain))
        for layer, width in plain.widths.items():
            for name, part in sample.decoders[layer][width].named(layer).items():
                assert torch.equal(tensors[name], part)
    assert all(result.passed for result in verify(sample.folder))
    manifest = json.loads((sample.folder / MANIFEST_FILE).read_text())["files"]
    assert f"recipes/{recipe.name}.safetensors" in manifest


@pytest.mark.parametrize("seed", range(3))
def test_decoders_of_a_recipe_beside_those_of_plain_widths(sample: Any, seed: int) -> None:
    recipe, decoders = with_own_decoders(sample.folder, seed)
    checkpoint = opened(sample.folder)
    served = [*map(checkpoint.slice, WIDTHS), checkpoint.slice(recipe)]
    with pytest.raises(RecipeError, match="slices that share decoders"):
        dict(checkpoint.tensors(*served))
    given = list(checkpoint.tensors(*served, suffixes={served[-1].decoders_file: "_mine"}))
    tensors = dict(given)
    assert len(tensors) == len(given)
    for layer, width in recipe.widths.items():
        for name, part in decoders[layer].named(layer).items():
            assert torch.equal(tensors[f"{name}_mine"], part)
        for name, part in sample.decoders[layer][width].named(layer).items():
            assert torch.equal(tensors[name], part)
    without = dict(checkpoint.tensors(*served[:-1]))
    assert {name for name in tensors if not name.endswith("_mine")} == without.keys()


def test_a_recipe_without_its_decoders_is_not_served(sample: Any) -> None:
    recipe, _ = with_own_decoders(sample.folder)
    (sample.folder / recipe_decoders_file(recipe.name)).unlink()
    checkpoint = opened(sample.folder)
    assert checkpoint.slice(budget=8.0).name != recipe.name
    served = checkpoint.slice(recipe)
    assert served.missing_files == (f"recipes/{recipe.name}.safetensors",)
    with pytest.raises(MissingFileError, match=f"{recipe.name}: found no recipes/{recipe.name}.safetensors"):
        checkpoint.files_for(served)
    with pytest.raises(MissingFileError):
        next(checkpoint.tensors(served))
    with pytest.raises(MissingFileError):
        open_slice(sample.folder, recipe)
    assert dict(checkpoint.tensors(checkpoint.slice(3)))
    assert all(result.passed for result in verify(sample.folder))


def test_a_recipe_that_loses_its_decoders(sample: Any) -> None:
    """Replaced by one of the same name, whose decoders are the plain widths'."""
    recipe, _ = with_own_decoders(sample.folder)
    add_recipes(opened(sample.folder), [replace(recipe, own_decoders=False)])
    checkpoint = opened(sample.folder)
    assert checkpoint.slice(recipe.name).decoders_file is None
    assert not (sample.folder / recipe_decoders_file(recipe.name)).exists()
    assert all(result.passed for result in verify(sample.folder))


def test_a_file_elsewhere_may_not_claim_decoders(sample: Any, tmp_path: Path) -> None:
    recipe, _ = with_own_decoders(sample.folder)
    path = tmp_path / "mine.json"
    content = json.loads((sample.folder / recipe_file(recipe.name)).read_text())
    path.write_text(json.dumps(content))
    found, expected = (opened(sample.folder).slice(which) for which in (path, recipe.name))
    assert found == expected
    assert found.decoders_file == recipe_decoders_file(recipe.name)
    layer = next(iter(recipe.widths))
    changed = {"widths": dict(recipe.widths) | {layer: recipe.widths[layer] % 7 + 2}}
    del content["average_bits"], content["resident_bytes"]
    path.write_text(json.dumps(content | changed))
    with pytest.raises(RecipeError, match=r"mine\.json: own_decoders: found true, expected a recipe of the checkpoint"):
        opened(sample.folder).slice(path)


@pytest.mark.parametrize("fault", ["absent", "more", "shape", "dtype", "nan", "negative", "cut"])
def test_faulty_decoders_of_a_recipe_are_refused(sample: Any, fault: str) -> None:
    recipe, _ = with_own_decoders(sample.folder)
    path = sample.folder / recipe_decoders_file(recipe.name)
    tensors = load_file(path)
    # A wide affine decoder has no steps.
    scales = {name for name in tensors if ".weight_scale" in name and name.replace("scale", "offset") in tensors}
    name = min(scales | {name for name in tensors if ".weight_step" in name})
    changes: dict[str, tuple[Any, type[CheckpointError]]] = {
        "absent": (lambda: tensors.pop(name), MissingTensorError),
        "more": (lambda: tensors.update(other=torch.zeros(1)), UnexpectedTensorError),
        "shape": (lambda: tensors.update({name: tensors[name][:-1].clone()}), TensorShapeError),
        "dtype": (lambda: tensors.update({name: tensors[name].float()}), TensorDtypeError),
        "nan": (lambda: tensors[name][0].fill_(math.nan), DecoderValueError),
        "negative": (lambda: tensors[name][0].fill_(-1), DecoderValueError),
        "cut": (lambda: None, ShardError),
    }
    change, error = changes[fault]
    change()
    save_file(tensors, path)
    if fault == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    for open_it in (lambda: opened(sample.folder), lambda: open_slice(sample.folder, recipe.name)):
        with pytest.raises(error, match=rf"recipes/{recipe.name}\.safetensors"):
            open_it()
    assert open_slice(sample.folder, 3)  # which reads none of it
    assert not all(result.passed for result in verify(sample.folder))


@pytest.mark.parametrize("kind", [CODEBOOK.name], indirect=True)
def test_a_recipes_codebook_that_adds_up_to_too_much_is_refused(sample: Any) -> None:
    recipe, _ = with_own_decoders(sample.folder)
    path = sample.folder / recipe_decoders_file(recipe.name)
    tensors = load_file(path)
    name = max(name for name in tensors if ".weight_codebook" in name)
    tensors[name][:, 20, 3] = 255
    save_file(tensors, path)
    for open_it in (lambda: opened(sample.folder), lambda: open_slice(sample.folder, recipe.name)):
        with pytest.raises(DecoderValueError, match=rf"{name}: found 255 in plane 0, entry 20, place 3 .* at most 255"):
            open_it()
    assert open_slice(sample.folder, 3)  # which reads none of it


def test_decoders_that_give_no_weights_are_not_written(sample: Any) -> None:
    checkpoint = opened(sample.folder)
    recipe = random_recipe(checkpoint, 1, own_decoders=True)
    decoders = own_decoders(checkpoint, recipe)
    layer = next(iter(decoders))
    decoder = decoders[layer]
    values: Any = decoder.values
    spoilt = replace(values, scale=torch.full_like(values.scale, math.inf))
    decoders[layer] = decoder.form.encode(spoilt, decoder.width)
    with pytest.raises(DecoderValueError, match="finite values"):
        add_recipes(checkpoint, [recipe], {recipe.name: decoders})
    assert not (sample.folder / recipe_file(recipe.name)).exists()
    decoders[layer] = Decoder(decoder.form, decoder.width % 7 + 2, decoder.parts)
    with pytest.raises(ValueError, match=rf"{recipe.name}: decoder of {layer}: found .*, expected .* of width"):
        add_recipes(checkpoint, [recipe], {recipe.name: decoders})
    assert not (sample.folder / recipe_file(recipe.name)).exists()
    with pytest.raises(ValueError, match="expected it to tell of decoders"):
        add_recipes(checkpoint, [recipe])


@pytest.mark.parametrize("writes", range(1, 6))
def test_a_crash_never_pairs_a_recipe_with_the_decoders_of_another(
    sample: Any, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    """A recipe is replaced by one of the same name with other widths and decoders, and the process dies on the way."""
    from vllm_matquant.checkpoint import files

    before, _ = with_own_decoders(sample.folder)
    checkpoint = opened(sample.folder)
    after = replace(random_recipe(checkpoint, 2, kl=0.2, own_decoders=True), name=before.name)
    done, real = 0, files.os.replace

    def crash(*paths: Any) -> None:
        nonlocal done
        real(*paths)
        done += 1
        if done == writes:
            raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        add_recipes(checkpoint, [after], {after.name: own_decoders(checkpoint, after, 7)})
    monkeypatch.undo()
    [recipe] = opened(sample.folder).recipes
    assert recipe == (after if writes >= 3 else replace(after, own_decoders=False, kl=None))
    checkpoint = opened(sample.folder)
    assert dict(checkpoint.tensors(checkpoint.slice(recipe)))


def test_another_checkpoint_takes_no_decoders_over(sample: Any, write: Any) -> None:
    recipe, _ = with_own_decoders(sample.folder)
    write(sample.folder, overwrite=True)
    assert not (sample.folder / recipe_decoders_file(recipe.name)).exists()
