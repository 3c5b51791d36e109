"""Calibration on the slices' own activations, against plain least squares."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.quantize.tiny_sources import VOCABULARY
from vllm_matquant.quantize import sequential
from vllm_matquant.quantize.activations import Activations
from vllm_matquant.quantize.block import BlockTask
from vllm_matquant.quantize.hessian import HessianCollector
from vllm_matquant.quantize.layer import QuantizedLayer
from vllm_matquant.quantize.nested import Nested
from vllm_matquant.quantize.sequential import measure_drift
from vllm_matquant.quantize.source import SourceModel

TOKENS = torch.randint(VOCABULARY, (20, 128), generator=torch.Generator().manual_seed(3))
WIDTHS = (2, 3, 8)


@pytest.fixture(autouse=True)
def _exact_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without factors in bfloat16, which round more than these tests allow where the processor has them."""
    monkeypatch.setattr(sequential, "fast_moments", contextlib.nullcontext)


def first_task(source: SourceModel, widths: tuple[int, ...] = WIDTHS) -> BlockTask:
    prefix = source.runner.block_names[0]
    sizes = {name: 32 for name, matrix in source.matrices.items() if matrix.block == 0}
    activations = Activations(source.runner, TOKENS, widths, exact=True)
    return BlockTask(prefix, source.runner.load_block(0), sizes, activations)


def inputs_of(task: BlockTask, layer: str, hidden: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a layer is given, from a run of the whole block with other weights in it: [tokens, in_features]."""
    state = {name: tensor.clone() for name, tensor in task.block.state_dict().items()}
    task.block.load_state_dict(state | weights)
    seen: list[torch.Tensor] = []
    hook = task.linears[layer].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, -2)))
    task.block(hidden, **task.calibration.arguments)
    hook.remove()
    task.block.load_state_dict(state)
    return seen[0]


@torch.no_grad()
@pytest.mark.parametrize("layer", ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"])
def test_drift(llama: Path, layer: str) -> None:
    task = first_task(SourceModel(llama))
    generator = torch.Generator().manual_seed(len(layer))
    for hidden in task.calibration.slices.values():
        hidden += 0.1 * torch.randn(hidden.shape, generator=generator)
    name = f"{task.name}.{layer}"
    before = ["self_attn.q_proj.weight", "self_attn.v_proj.weight", "mlp.gate_proj.weight"]
    decoded = {
        width: {key: task.block.state_dict()[key] * (1 + 0.1 * width) for key in before if not key.startswith(layer)}
        for width in (2, 8)
    }
    drifts = measure_drift(task, name, decoded, TOKENS.numel())
    assert list(drifts) == [2, 8]
    source_inputs = inputs_of(task, name, task.calibration.reference, {}).double()
    weight = task.linears[name].weight
    for width, drift in drifts.items():
        inputs = inputs_of(task, name, task.calibration.slices[width], decoded[width]).double()
        torch.testing.assert_close(drift.hessian.double(), inputs.T @ inputs / len(inputs), rtol=1e-4, atol=1e-5)
        expected = torch.linalg.lstsq(inputs, source_inputs @ weight.double().T).solution.T
        torch.testing.assert_close((weight + weight @ drift.correction(1e-7)).double(), expected, rtol=1e-2, atol=1e-3)


@torch.no_grad()
def test_drift_counts_tokens_by_their_weights(llama: Path) -> None:
    task = first_task(SourceModel(llama))
    name = f"{task.name}.mlp.down_proj"
    weights = torch.rand(TOKENS.shape, generator=torch.Generator().manual_seed(1))
    task = replace(task, token_weights={name: weights})
    task.calibration.slices[3].add_(
        0.1 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(2))[..., None]
    )
    found = measure_drift(task, name, {3: {}}, TOKENS.numel())[3]
    before = inputs_of(task, name, task.calibration.reference, {}).double()
    inputs = inputs_of(task, name, task.calibration.slices[3], {}).double()
    weighed = inputs * weights.reshape(-1, 1) / len(inputs)
    torch.testing.assert_close(found.hessian.double(), inputs.T @ weighed, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.cross.double(), (before - inputs).T @ weighed, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("tokens", "windows"), [(1, 1), (128, 1), (129, 2), (17 * 128, 17), (10**9, 20)])
def test_drift_is_measured_on_the_tokens_asked_for(llama: Path, tokens: int, windows: int) -> None:
    task = first_task(SourceModel(llama))
    name = f"{task.name}.mlp.down_proj"
    found = measure_drift(task, name, {3: {}}, tokens)[3].hessian
    inputs = inputs_of(task, name, task.calibration.slices[3][:windows], {})
    torch.testing.assert_close(found, inputs.T @ inputs / len(inputs), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_nothing_drifts_in_front_of_the_first_quantized_layer(llama: Path) -> None:
    task = first_task(SourceModel(llama))
    name = f"{task.name}.self_attn.q_proj"
    drift = measure_drift(task, name, {2: {}}, 1)[2]
    assert not drift.cross.any()
    weight = task.linears[name].weight
    torch.testing.assert_close(weight + weight @ drift.correction(0.01), weight)


@torch.no_grad()
def test_stages(llama: Path) -> None:
    task = first_task(SourceModel(llama))
    collector = HessianCollector(task.linears)
    with collector.collecting():
        task.calibration.outputs(task.block)
    stages = [[name.rpartition(".")[2] for name in stage] for stage in collector.stages()]
    assert stages == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


@torch.no_grad()
def test_slices_make_up_for_the_layers_before(llama: Path) -> None:
    """With it, the block's outputs at 2 and 3 bits are closer to the source's than without."""
    source = SourceModel(llama)

    def error(sequential_up_to: int) -> dict[int, float]:
        task = first_task(source)
        method = Nested(WIDTHS, sequential_up_to=sequential_up_to)
        assert method.followed_widths == tuple(width for width in WIDTHS if width <= sequential_up_to)
        layers: dict[str, QuantizedLayer] = dict(method.quantize_block(task))
        assert all(set(layer.errors) == set(WIDTHS) for layer in layers.values())
        expected = task.calibration.outputs(task.block).clone()
        task.calibration.advance(task.block, lambda width: task.decoded(layers, width, method.slicing))
        return {width: float((task.calibration.slices[width] - expected).square().mean()) for width in WIDTHS}

    without, with_it = error(0), error(3)
    for width in (2, 3):
        assert with_it[width] < without[width], width
