"""The methods on random layers with correlated inputs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from tests.quantize.conftest import Layer
from tests.quantize.exact_decoders import assert_same_decoders, exact
from tests.quantize.tiny_sources import ONE_WIDTH
from vllm_matquant.checkpoint.decoder import AFFINE_FLOAT16, AFFINE_INT8, AFFINE_KINDS, CODEBOOK, DecoderKind
from vllm_matquant.checkpoint.packing import slice_codes
from vllm_matquant.checkpoint.spec import WIDTHS
from vllm_matquant.quantize.columns import LayerInputs
from vllm_matquant.quantize.decoders import cell_centres, parent_grid
from vllm_matquant.quantize.layer import QuantizedLayer, relative_error
from vllm_matquant.quantize.method import LayerMethod
from vllm_matquant.quantize.methods import METHODS, check_devices, settings_of, with_settings
from vllm_matquant.quantize.nested import Nested
from vllm_matquant.quantize.nested_tuned import NestedTuned
from vllm_matquant.quantize.nested_vq import NestedVQ

LAYER_METHODS = [name for name, method in METHODS.items() if issubclass(method, LayerMethod)]


def kind_of(name: str) -> DecoderKind:
    """What a method's decoders are stored as where nothing else is asked for."""
    kinds = METHODS[name].decoder_kinds
    return AFFINE_INT8 if AFFINE_INT8 in kinds else kinds[0]


def errors(name: str, layer: Layer, widths: Sequence[int] = WIDTHS, group_size: int = 32) -> dict[int, float]:
    weight, hessian = layer
    method = METHODS[name](tuple(widths))
    quantized = method.quantize(weight, hessian, group_size, kind_of(name))
    return relative_error([weight] * len(widths), quantized, method.slices(quantized.codes), [hessian] * len(widths))


@pytest.mark.parametrize("group_size", [16, 32, 96])
@pytest.mark.parametrize("name", LAYER_METHODS)
def test_form(random_layer: Callable[..., Layer], name: str, group_size: int) -> None:
    weight, hessian = random_layer(19, 96, seed=group_size)
    widths = (4,) if name in ONE_WIDTH else (2, 3, 6)
    method = METHODS[name](widths)
    layer = method.quantize(weight, hessian, group_size, kind_of(name))
    assert (layer.codes.shape, layer.codes.dtype) == (weight.shape, torch.uint8)
    assert tuple(layer.decoders) == widths
    for decoder in layer.decoders.values():
        assert decoder.form is kind_of(name).form(decoder.width)
        expected = decoder.form.parts(19, 96 // group_size)
        found = {name: (part.dtype, tuple(part.shape)) for name, part in decoder.parts.items()}
        assert found == {name: (spec.dtype, spec.shape) for name, spec in expected.items()}
        assert not any(bad.any() for _, bad, _ in decoder.form.faults(decoder.parts))
        decoded = decoder.decode(slice_codes(layer.codes, 8, decoder.width, method.slicing))
        assert decoded.std() > 0.5 * weight.std()


@pytest.mark.parametrize("name", LAYER_METHODS)
def test_slices_nest(random_layer: Callable[..., Layer], name: str) -> None:
    weight, hessian = random_layer(5, 64, seed=1)
    widths = {"gptq": (8,), "gptvq": (4,)}.get(name, WIDTHS)
    method = METHODS[name](widths)
    codes = method.quantize(weight, hessian, 32, kind_of(name)).codes
    slicing = "round" if name == "matgptq" else "truncate"
    assert method.slicing == slicing
    for width, sliced in zip(widths, method.slices(codes), strict=True):
        assert torch.equal(sliced, slice_codes(codes, 8, width, slicing))
        if slicing == "truncate":
            assert torch.equal(sliced, codes >> (8 - width))


@pytest.mark.parametrize("seed", range(3))
def test_nested_is_better(random_layer: Callable[..., Layer], seed: int) -> None:
    layer = random_layer(48, 128, seed)
    nested = errors("nested", layer)
    assert list(nested) == list(WIDTHS)
    assert sorted(nested.values(), reverse=True) == list(nested.values())
    for width, error in errors("matgptq", layer).items():
        assert nested[width] < error, width
    # Rounding serves no width but the widest; a parent that also serves narrow ones pays with some of its last bits.
    for width, error in errors("rtn", layer, range(2, 7)).items():
        assert nested[width] < error, width
    assert nested[2] < errors("gptq", layer, (2,))[2]


@pytest.mark.parametrize("name", ["nested", "nested-tuned"])
@pytest.mark.parametrize("seed", range(2))
def test_decoders_in_8_bits_cost_little(random_layer: Callable[..., Layer], name: str, seed: int) -> None:
    weight, hessian = random_layer(64, 256, seed)
    method = METHODS[name](WIDTHS)
    fine, coarse = (
        relative_error([weight] * 7, layer, method.slices(layer.codes), [hessian] * 7)
        for layer in (method.quantize(weight, hessian, 32, kind) for kind in (AFFINE_FLOAT16, AFFINE_INT8))
    )
    for width in WIDTHS:
        assert coarse[width] < 1.03 * fine[width], width


@pytest.mark.parametrize("width", WIDTHS)
def test_nested_for_one_width_is_better_than_gptq(random_layer: Callable[..., Layer], width: int) -> None:
    layer = random_layer(48, 128, seed=0)
    assert errors("nested", layer, (width,))[width] < errors("gptq", layer, (width,))[width]


@pytest.mark.parametrize("seed", range(3))
def test_codebooks_are_better_at_two_bits(random_layer: Callable[..., Layer], seed: int) -> None:
    layer = random_layer(64, 256, seed)
    assert errors("nested-vq", layer, (2,))[2] < errors("nested", layer, (2,))[2]


@pytest.mark.parametrize("seed", range(2))
def test_codebooks_of_all_widths(random_layer: Callable[..., Layer], seed: int) -> None:
    """Each further bit tells, and at 2 and 3 bits a parent of all widths is better than one of nested codes."""
    layer = random_layer(64, 256, seed)
    found = errors("nested-vq", layer)
    assert list(found) == list(WIDTHS)
    for narrow, wide in itertools.pairwise(found.values()):
        assert wide < 0.7 * narrow
    nested = errors("nested", layer)
    for width in (2, 3):
        assert found[width] < 0.96 * nested[width]
    assert errors("nested-vq", layer, (2,))[2] < found[2]


@pytest.mark.parametrize("width", [2, 4, 8])
def test_sweeps_and_refits_of_codebooks_help(random_layer: Callable[..., Layer], width: int) -> None:
    weight, hessian = random_layer(64, 128, seed=0)
    found = []
    for sweeps in range(3):
        layer = NestedVQ((width,), sweeps=sweeps).quantize(weight, hessian, 32, CODEBOOK)
        found.append(relative_error([weight], layer, [layer.codes >> (8 - width)], [hessian])[width])
    assert found[0] > found[1] > found[2]


def test_codebooks_are_the_same_twice(random_layer: Callable[..., Layer]) -> None:
    layer = random_layer(24, 96, seed=4)
    first, second = (NestedVQ((2, 5)).quantize(*layer, 32, CODEBOOK) for _ in range(2))
    assert torch.equal(first.codes, second.codes)
    for width in (2, 5):
        assert_same_decoders(first.decoders[width], second.decoders[width])


def test_gptq_is_better_than_rounding(random_layer: Callable[..., Layer]) -> None:
    layer = random_layer(48, 128, seed=0)
    for width in WIDTHS:
        assert errors("gptq", layer, (width,))[width] < errors("rtn", layer, (width,))[width]


@pytest.mark.parametrize("name", LAYER_METHODS)
def test_layers_out_of_the_ordinary(random_layer: Callable[..., Layer], name: str) -> None:
    """Groups and rows of one value, columns that no token reaches, fewer tokens than columns."""
    weight, hessian = random_layer(18, 64, seed=0, tokens=10)
    weight[0], weight[1], weight[2, :32] = 0, 0.5, -0.25
    hessian[5], hessian[:, 5] = 0, 0
    for moments in (hessian, torch.zeros(64, 64)):
        for widths in {"gptq": [(8,)], "gptvq": [(2,), (4,)]}.get(name, [(2,), (8,), (2, 8)]):
            kind = METHODS[name].decoder_kinds[0]  # float16, where the method has it
            layer = METHODS[name](widths).quantize(weight, moments, 32, kind)
            for width, decoder in layer.decoders.items():
                sliced = slice_codes(layer.codes, 8, width, METHODS[name].slicing)
                decoded = decoder.decode(sliced)
                assert torch.isfinite(decoded).all()
                if name == "gptvq":  # a row has no scale of its own
                    continue
                torch.testing.assert_close(decoded[0], weight[0], rtol=0, atol=1e-4)
                # A codebook's levels and scales have 8 bits.
                torch.testing.assert_close(decoded[1], weight[1], rtol=2e-3 if kind.affine else 0.02, atol=0)


def test_rounding_to_nearest(random_layer: Callable[..., Layer]) -> None:
    weight, hessian = random_layer(7, 64, seed=0)
    layer = METHODS["rtn"]((2, 8)).quantize(weight, hessian, 16, AFFINE_FLOAT16)
    span = (weight.unflatten(1, (-1, 16)).amax(2) - weight.unflatten(1, (-1, 16)).amin(2)).repeat_interleave(16, dim=1)
    for width, rounding in ((8, 1.1 / 510), (2, 1.02 / 8)):
        error = (layer.decoders[width].decode(layer.codes >> (8 - width)) - weight).abs()
        assert (error <= span * rounding + 1e-4).all()


@pytest.mark.parametrize("widths", [(2, 3), WIDTHS])
def test_gptq_knows_one_width(widths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"method gptq: found widths \[2, 3.*\], expected one width"):
        METHODS["gptq"](widths)


def test_relative_error(random_layer: Callable[..., Layer]) -> None:
    """It is the mean squared error of the layer's outputs, relative to their mean square."""
    generator = torch.Generator().manual_seed(0)
    inputs, weight = torch.randn(50, 16, generator=generator), torch.randn(3, 16, generator=generator)
    codes = torch.randint(256, (3, 16), dtype=torch.uint8, generator=generator)
    decoders = {width: exact(torch.rand(3, 2) / 2**width, torch.randn(3, 2), width) for width in (3, 8)}
    layer = QuantizedLayer(codes, decoders)
    found = relative_error([weight] * 2, layer, [codes >> 5, codes], [inputs.T @ inputs / 50] * 2)
    assert list(found) == [3, 8]
    for width, sliced in ((3, codes >> 5), (8, codes)):
        outputs = inputs @ decoders[width].decode(sliced).T
        expected = (outputs - inputs @ weight.T).square().sum() / (inputs @ weight.T).square().sum()
        assert found[width] == pytest.approx(float(expected), rel=1e-4)


def test_relative_error_of_a_layer_of_zeros() -> None:
    layer = QuantizedLayer(torch.zeros(2, 8, dtype=torch.uint8), {8: exact(torch.zeros(2, 1), torch.zeros(2, 1), 8)})
    assert relative_error([torch.zeros(2, 8)], layer, [layer.codes], [torch.eye(8)]) == {8: 0.0}


def test_settings() -> None:
    changed = with_settings(Nested((2, 8)), ["growth=3", "sweeps=0", "sequential_up_to=0"])
    assert changed == Nested((2, 8), growth=3.0, sweeps=0, sequential_up_to=0)
    assert with_settings(changed, ["refit=False", "activation_order=0"]) == replace(
        changed, refit=False, activation_order=False
    )
    assert with_settings(replace(changed, refit=False), ["refit=true"]) == changed
    tuned = with_settings(
        NestedTuned((2, 8)), ["tuning.iterations=7", "tuning.device=cuda:1", "tuning.distillation=0.5"]
    )
    assert isinstance(tuned, NestedTuned)
    assert (tuned.tuning.iterations, tuned.tuning.device, tuned.tuning.distillation) == (7, "cuda:1", 0.5)
    assert dict(settings_of(tuned))["tuning.iterations"] == 7
    assert tuned.tuning.seed == NestedTuned((2, 8)).tuning.seed


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("growht=3", r"setting: found 'growht=3', expected NAME=VALUE with one of least_tokens, damping, .*"),
        ("widths=2", "found 'widths=2'"),
        ("growth", "setting growth: found '', expected one such as 2.5"),
        ("sweeps=1.5", "setting sweeps: found '1.5', expected one such as 2"),
        ("refit=maybe", "setting refit: found 'maybe', expected true or false"),
        ("end_to_end.up_to=x", "setting end_to_end.up_to: found 'x', expected one such as 3"),
    ],
)
def test_settings_that_are_none(setting: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_settings(Nested((2, 8)), [setting])


@pytest.mark.parametrize("seed", range(3))
def test_decoders_without_refit_are_the_grid(seed: int, random_layer: Callable[..., Layer]) -> None:
    weight, hessian = random_layer(8, 64, seed)
    grid = parent_grid(weight, 32)
    for kind in AFFINE_KINDS:
        layer = Nested((2, 3, 8), refit=False).quantize(weight, hessian, 32, kind)
        for width, decoder in layer.decoders.items():
            assert_same_decoders(decoder, kind.encode(cell_centres(grid, width), width))


def test_columns_from_left_to_right(random_layer: Callable[..., Layer]) -> None:
    _, hessian = random_layer(8, 64, 0)
    assert LayerInputs.of([hessian], 0.01, activation_order=False).order.tolist() == list(range(64))
    diagonal = hessian.diagonal()[LayerInputs.of([hessian], 0.01).order]
    assert (diagonal.diff() <= 0).all()
    ordered, unordered = (
        Nested((2,), activation_order=on).quantize(*random_layer(8, 64, 0), 32, AFFINE_INT8).codes
        for on in (True, False)
    )
    assert not torch.equal(ordered, unordered)


def test_rounding_to_nearest_has_no_settings_of_its_own() -> None:
    assert [name for name, _ in settings_of(METHODS["rtn"]((2, 8)))] == ["least_tokens", "damping"]


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    check_devices(with_settings(NestedTuned((2, 8)), ["tuning.device=cuda:0", "end_to_end.device=cuda"]))
    for setting, reason in (
        ("tuning.device=cuda:1", "torch finds 1 CUDA devices"),
        ("end_to_end.device=gpu", "Expected one of cpu, cuda"),
        ("end_to_end.device=meta", "quantizing is not made for it"),
    ):
        name, _, device = setting.partition("=")
        with pytest.raises(ValueError, match=rf"setting {name}: found '{device}' \({reason}.*expected cpu, or cuda on"):
            check_devices(with_settings(NestedTuned((2, 8)), [setting]))
