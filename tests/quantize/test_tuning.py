"""Training of codes and decoders on a block's outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.quantize.exact_decoders import EXACT, assert_same_decoders, exact
from tests.quantize.test_sequential import first_task
from vllm_matquant.checkpoint.decoder import AFFINE_INT8
from vllm_matquant.quantize.baselines import RoundToNearest
from vllm_matquant.quantize.block import BlockTask
from vllm_matquant.quantize.layer import QuantizedLayer
from vllm_matquant.quantize.nested import Nested
from vllm_matquant.quantize.nested_tuned import NestedTuned
from vllm_matquant.quantize.source import SourceModel
from vllm_matquant.quantize.tuning import TunedLayer, TuningSettings, token_error, tune_block

WIDTHS = (2, 3, 4, 8)
SETTINGS = TuningSettings(iterations=30)


def random_quantized(seed: int, widths: Sequence[int] = WIDTHS) -> tuple[torch.Tensor, QuantizedLayer]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 64, generator=generator)
    method = Nested(tuple(widths))
    return weight, method.quantize(weight, torch.eye(64), 16, EXACT)


def block_errors(task: BlockTask, layers: dict[str, QuantizedLayer], widths: Sequence[int]) -> dict[int, float]:
    expected = task.calibration.outputs(task.block)
    errors = {}
    for width in widths:
        state = {name: tensor.clone() for name, tensor in task.block.state_dict().items()}
        task.block.load_state_dict(state | task.decoded(layers, width, "truncate"))
        output = task.block(task.calibration.slices[width], **task.calibration.arguments)
        output = output[0] if isinstance(output, tuple) else output
        task.block.load_state_dict(state)
        relative = (output - expected).square().sum(-1) / expected.square().sum(-1)
        errors[width] = float(relative.mean())
    return errors


@pytest.mark.parametrize("seed", range(3))
def test_start_is_what_the_solver_found(seed: int) -> None:
    weight, layer = random_quantized(seed)
    tuned = TunedLayer(weight, layer, (2, 3, 4), SETTINGS)
    for width, decoded in zip((2, 3, 4), tuned.weights(), strict=True):
        torch.testing.assert_close(decoded, layer.decode(width, "truncate"))
    codes, decoders = tuned.finish()
    assert torch.equal(codes, layer.codes)
    assert list(decoders) == [2, 3, 4]


@pytest.mark.parametrize("seed", range(3))
def test_codes_nest_after_any_steps(seed: int) -> None:
    weight, layer = random_quantized(seed, (2, 3, 5, 8))
    tuned = TunedLayer(weight, layer, (2, 3, 5), replace(SETTINGS, coupling=0.3))
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, 6):
        tuned.step([torch.randn(6, 64, generator=generator) for _ in range(3)], 0.3, 0.01, step)
    weights = tuned.weights()
    codes, decoders = tuned.finish()
    assert not torch.equal(codes, layer.codes)
    for width, decoded in zip((2, 3, 5), weights, strict=True):
        expected = decoders[width].decode(codes >> (8 - width))
        torch.testing.assert_close(decoded, expected, rtol=2e-3, atol=2e-3)
    unchanged = (codes >> 3) == (layer.codes >> 3)
    assert torch.equal(codes[unchanged], layer.codes[unchanged])


def test_a_position_moves_against_the_gradient_into_the_next_cell() -> None:
    decoder = exact(torch.ones(1, 1), torch.zeros(1, 1), 2)
    layer = QuantizedLayer(torch.full((1, 4), 64, dtype=torch.uint8), {2: decoder})  # code 1 of 4
    tuned = TunedLayer(torch.tensor([[1.4, 1.4, 0.6, 0.6]]), layer, (2,), SETTINGS)
    gradient = torch.tensor([[-1.0, 1.0, 1.0, -1.0]])
    tuned.step([gradient], 0.2, 0.0, 1)
    codes, _ = tuned.finish()
    assert (codes >> 6).tolist() == [[2, 1, 0, 1]]


def test_wider_gradients_move_narrow_codes_as_far_as_they_are_coupled() -> None:
    zero = torch.zeros(1, 1)
    decoders = {2: exact(zero + 1, zero, 2), 3: exact(zero + 0.5, zero, 3)}
    layer = QuantizedLayer(torch.full((1, 8), 96, dtype=torch.uint8), decoders)  # 1 at 2 bits, 3 at 3 bits
    for coupling, expected in ((0.4, 1), (0.6, 2)):
        tuned = TunedLayer(torch.full((1, 8), 1.4), layer, (2, 3), replace(SETTINGS, coupling=coupling))
        tuned.step([torch.full((1, 8), 1.0), torch.full((1, 8), -2.0)], 0.2, 0.0, 1)
        codes, _ = tuned.finish()
        assert ((codes >> 6) == expected).all()


def test_decoders_descend() -> None:
    """Adam finds the scale and offset of a linear regression."""
    weight, layer = random_quantized(0, (3,))
    values = layer.decoders[3].affine
    wrong = {3: exact(values.scale * 0.9, values.offset + 0.05, 3)}
    tuned = TunedLayer(weight, replace(layer, decoders=wrong), (3,), SETTINGS)
    codes = layer.codes >> 5
    best = float((layer.decoders[3].decode(codes) - weight).square().sum())

    def loss() -> float:
        return float((tuned.weights()[0] - weight).square().sum())

    before = loss()
    for step in range(1, 201):
        tuned.step([2 * (tuned.weights()[0] - weight)], 0.0, 0.01 * (1 - step / 200), step)
    assert before > 1.2 * best
    assert loss() < 1.01 * best


@pytest.mark.parametrize("seed", range(3))
def test_token_error(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    outputs, target = torch.randn(3, 5, 8, generator=generator), torch.randn(3, 5, 8, generator=generator)
    expected = [
        float(((a - b) ** 2).sum() / (b**2).sum())
        for a, b in zip(outputs.flatten(0, 1), target.flatten(0, 1), strict=True)
    ]
    assert float(token_error(outputs, target)) == pytest.approx(sum(expected) / 15)


@torch.no_grad()
def test_the_block_gets_better(llama: Path) -> None:
    """From rounded weights, training finds better codes and decoders for every width."""
    task = first_task(SourceModel(llama), (2, 3, 4))
    start = dict(RoundToNearest((2, 3, 4)).quantize_block(replace(task, activations=None)))
    before = block_errors(task, start, (2, 3, 4))
    settings = replace(SETTINGS, iterations=60, sequences=10, position_range=0.5, decoder_rate=1e-2)
    tuned = tune_block(task, start, (2, 3, 4), settings)
    finished = {name: layer.finish() for name, layer in tuned.items()}
    after = block_errors(task, {name: QuantizedLayer(*layer) for name, layer in finished.items()}, (2, 3, 4))
    for width in (2, 3, 4):
        assert after[width] < 0.9 * before[width], width


@torch.no_grad()
def test_wide_widths_follow_what_was_trained(llama: Path) -> None:
    task = first_task(SourceModel(llama), WIDTHS)
    method = NestedTuned(WIDTHS, tuning=replace(SETTINGS, iterations=10))
    assert method.tuned_widths == (2, 3, 4)
    layers = dict(method.quantize_block(task))
    errors = block_errors(task, layers, WIDTHS)
    assert errors[8] < 0.1 * errors[4]
    for layer in layers.values():
        assert tuple(layer.decoders) == tuple(layer.errors) == WIDTHS
        for decoder in layer.decoders.values():
            assert decoder.form is AFFINE_INT8.form(decoder.width)


@torch.no_grad()
def test_same_seed_same_bytes(llama: Path) -> None:
    def run(seed: int) -> dict[str, QuantizedLayer]:
        task = first_task(SourceModel(llama), WIDTHS)
        return dict(NestedTuned(WIDTHS, tuning=replace(SETTINGS, iterations=4, seed=seed)).quantize_block(task))

    first, second, other = run(0), run(0), run(1)
    for name, layer in first.items():
        assert torch.equal(layer.codes, second[name].codes)
        for width in WIDTHS:
            assert_same_decoders(layer.decoders[width], second[name].decoders[width])
    assert any(not torch.equal(layer.codes, other[name].codes) for name, layer in first.items())


@torch.no_grad()
def test_distillation_draws_towards_the_widest_slice(llama: Path) -> None:
    """With the widest slice alone spoilt, narrow slices follow it as far as they are told to."""
    task = first_task(SourceModel(llama), WIDTHS)
    start = dict(Nested(WIDTHS, sequential_up_to=0).quantize_block(task))

    def spoil(layer: QuantizedLayer) -> QuantizedLayer:
        values = layer.decoders[8].affine
        return replace(layer, decoders=layer.decoders | {8: exact(values.scale * 1.2, values.offset * 1.2, 8)})

    spoilt = {name: spoil(layer) for name, layer in start.items()}
    teacher = task.decoded(spoilt, 8, "truncate")
    state = {name: tensor.clone() for name, tensor in task.block.state_dict().items()}
    task.block.load_state_dict(state | teacher)
    expected = task.block(task.calibration.slices[8], **task.calibration.arguments)
    expected = expected[0] if isinstance(expected, tuple) else expected
    task.block.load_state_dict(state)

    def distance(distillation: float) -> float:
        settings = replace(SETTINGS, sequences=10, decoder_rate=1e-2, distillation=distillation)
        tuned = tune_block(task, spoilt, (2, 3, 4), settings)
        layers = {name: replace(spoilt[name], codes=layer.finish()[0]) for name, layer in tuned.items()}
        layers = {
            name: replace(layer, decoders=layer.decoders | tuned[name].finish()[1]) for name, layer in layers.items()
        }
        task.block.load_state_dict(state | task.decoded(layers, 4, "truncate"))
        output = task.block(task.calibration.slices[4], **task.calibration.arguments)
        task.block.load_state_dict(state)
        return float(token_error(output[0] if isinstance(output, tuple) else output, expected))

    assert distance(4.0) < distance(0.0)


@torch.no_grad()
def test_a_block_of_ignored_layers(llama: Path) -> None:
    task = replace(first_task(SourceModel(llama), (2,)), group_sizes={})
    assert dict(NestedTuned((2,), tuning=SETTINGS).quantize_block(task)) == {}
