"""Experts: separate layers that compute what transformers' joined ones do, and the inputs that they are fitted to."""

from __future__ import annotations

import copy
import itertools
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.quantize.tiny_sources import MIXTURES, VOCABULARY, random_model, write_source
from vllm_matquant.checkpoint.experts import Experts, gate_layers, separate_experts
from vllm_matquant.checkpoint.reader import open_checkpoint
from vllm_matquant.jobs.evaluate import Evaluate
from vllm_matquant.jobs.quantize import Quantize
from vllm_matquant.measure.model import LayerModel
from vllm_matquant.quantize import device
from vllm_matquant.quantize.activations import Activations
from vllm_matquant.quantize.block import BlockTask
from vllm_matquant.quantize.hessian import HessianCollector
from vllm_matquant.quantize.methods import METHODS
from vllm_matquant.quantize.sensitivity import SensitivitySettings, token_weights
from vllm_matquant.quantize.sequential import measure_drift
from vllm_matquant.quantize.source import SourceModel

TOKENS = torch.randint(VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(1))
TEXT = "the cat sat on the mat and the other cat thought that it had " * 60


def experts_of(model: torch.nn.Module) -> Experts:
    """The last block's."""
    return [module for module in model.modules() if isinstance(module, Experts)][-1]


@torch.no_grad()
@pytest.mark.parametrize("model_type", MIXTURES)
@pytest.mark.parametrize("seed", range(2))
def test_separate_experts_are_the_files_and_compute_the_same(model_type: str, seed: int, tmp_path: Path) -> None:
    model = random_model(model_type, seed)
    model.save_pretrained(tmp_path)
    expected = model(TOKENS).logits
    separate = separate_experts(copy.deepcopy(model))
    torch.testing.assert_close(separate(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)
    stored = load_file(tmp_path / "model.safetensors")
    found = separate.state_dict()
    assert found.keys() == stored.keys()
    for name, tensor in stored.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
    # They share the memory of what was loaded.
    experts_of(separate)[1].linears[0].weight.zero_()
    assert not torch.allclose(separate(TOKENS).logits, expected)
    assert sum(each.numel() for each in separate.parameters()) == sum(each.numel() for each in model.parameters())


def test_routers_and_gates_are_not_quantized(tmp_path: Path) -> None:
    source = SourceModel(write_source(tmp_path, "qwen2_moe"))
    names = set(source.matrices)
    assert "model.layers.0.mlp.experts.3.down_proj" in names
    assert "model.layers.0.mlp.shared_expert.down_proj" in names
    assert not {name for name in names if name.endswith(("mlp.gate", "shared_expert_gate"))}
    assert gate_layers(source.runner.load_block(0)) == {"mlp.shared_expert_gate"}


class Routing:
    """What the last mixture of a model is given, and an expert's inputs in float64 by the joined parameters."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.calls: list[tuple[torch.Tensor, ...]] = []
        self.joined = [module for module in model.modules() if hasattr(module, "gate_up_proj")][-1]
        self.joined.register_forward_pre_hook(lambda _, given: self.calls.append(given))
        model(TOKENS)
        [(self.hidden, self.index, self.scales)] = self.calls

    def weights(self, expert: int) -> torch.Tensor:
        """float64 [tokens], what the expert's output is multiplied with, 0 for tokens that do not reach it."""
        return (self.scales * (self.index == expert)).sum(1).double()

    def inner(self, expert: int) -> torch.Tensor:
        """float64 [tokens, intermediate]."""
        gate, up = (self.hidden.double() @ self.joined.gate_up_proj[expert].double().T).chunk(2, -1)
        return gate * gate.sigmoid() * up


def moments(rows: torch.Tensor, weights: torch.Tensor, count: int) -> torch.Tensor:
    return (rows.T * weights) @ rows / count


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "deepseek_v3"])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("weighed", [False, True])
def test_hessians_of_experts(model_type: str, seed: int, weighed: bool) -> None:
    model = random_model(model_type, seed)
    routing = Routing(model)
    separate = separate_experts(copy.deepcopy(model))
    layers = {
        f"{index}.{place}": linear
        for index, expert in enumerate(experts_of(separate))
        for place, linear in enumerate(expert.linears)
    }
    own = torch.rand(3, 20, generator=torch.Generator().manual_seed(seed)) if weighed else None
    weights = {} if own is None else dict.fromkeys(layers, own)
    collector = HessianCollector(layers, weights)
    # Batches of two and one windows: places in the text are told apart from places in a batch.
    with collector.collecting():
        separate(TOKENS[:2])
        separate(TOKENS[2:])
    assert [len(stage) for stage in collector.stages()] == [2, 1] * 4
    for index in range(4):
        scales = routing.weights(index)
        reached = scales != 0
        counts = scales.square() if own is None else own.flatten().double() * reached
        for place, rows in enumerate([routing.hidden.double()] * 2 + [routing.inner(index)]):
            name = f"{index}.{place}"
            assert collector.tokens(name) == int(reached.sum())
            expected = moments(rows, counts, int(reached.sum()))
            torch.testing.assert_close(collector.hessian(name).double(), expected, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_experts_that_few_tokens_reach_are_shown_all() -> None:
    model = random_model("qwen3_moe", 3)
    routing = Routing(model)
    block = separate_experts(copy.deepcopy(model))
    layers = {
        f"{index}.{place}": linear
        for index, expert in enumerate(experts_of(block))
        for place, linear in enumerate(expert.linears)
    }
    collector = HessianCollector(layers)
    with collector.collecting():
        expected = block(TOKENS).logits
    counts = [int((routing.index == index).sum()) for index in range(4)]
    least = max(counts)
    few = [index for index in range(4) if counts[index] < least]
    assert few
    assert collector.starved(least / 64) == [f"{index}.{place}" for index in few for place in range(3)]
    assert collector.starved(0) == []
    before = {name: collector.hessian(name) for name in layers}
    starved = ["1.0", "1.1", "1.2", "2.2"]
    with collector.showing(block, starved):
        assert torch.equal(block(TOKENS).logits, expected)
    ones = torch.ones(60).double()
    for index, place, rows in (
        *((1, place, routing.hidden.double()) for place in range(2)),
        *((index, 2, routing.inner(index)) for index in (1, 2)),
    ):
        found = collector.hessian(f"{index}.{place}").double()
        torch.testing.assert_close(found, moments(rows, ones, 60), rtol=1e-4, atol=1e-6)
    assert all(torch.equal(collector.hessian(name), before[name]) for name in layers if name not in starved)
    assert collector.shown == set(starved)


def test_an_expert_that_no_token_reaches(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    eight: dict[str, Any] = {**dict.fromkeys(["num_experts", "num_local_experts"], 8), "num_experts_per_tok": 1}
    model = random_model("qwen3_moe", **eight)
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            parameter.data[5] = -100 * parameter.data[0]  # as unlikely as the first is likely
            parameter.data[0] *= 100
    folder = write_source(tmp_path / "source", "qwen3_moe", **eight)
    model.save_pretrained(folder)
    (tmp_path / "text.txt").write_text(TEXT)
    with caplog.at_level(logging.WARNING):
        outcome = Quantize(
            folder, tmp_path / "out", calibration=tmp_path / "text.txt", method="gptq", bits=[4], samples=2,
            sequence_length=16, group_size=32, held_out_samples=1,
        ).run()  # fmt: skip
    idle = {f"model.layers.1.mlp.experts.{index}.{part}_proj" for index in (1, 7) for part in ("gate", "up", "down")}
    assert idle <= outcome.shown
    layers = json.loads((tmp_path / "out" / "report" / "report.json").read_text())["layers"]
    assert {layer["name"] for layer in layers if layer["shown"]} == outcome.shown < outcome.errors.keys()
    assert "layers of experts were reached by fewer tokens than 0.25 of their input features" in caplog.text
    assert set(outcome.errors) == set(open_checkpoint(tmp_path / "out").layers)


@torch.no_grad()
def test_a_layer_that_no_token_reaches_is_starved_in_any_case() -> None:
    experts = experts_of(separate_experts(random_model("qwen3_moe")))
    layers = {f"{index}.{place}": linear for index in range(4) for place, linear in enumerate(experts[index].linears)}
    collector = HessianCollector(layers)
    with collector.collecting():
        experts(torch.randn(6, 64), torch.tensor([[0, 2]] * 6), torch.ones(6, 2))
    assert collector.starved(0) == [f"{index}.{place}" for index in (1, 3) for place in range(3)]
    with pytest.raises(ValueError, match=r"1\.0: the calibration text never reached this layer"):
        collector.hessian("1.0")


@pytest.mark.parametrize("seed", range(2))
def test_tokens_of_an_expert_are_weighed_in_their_places(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "_bfloat16_is_faster", lambda: False)
    source = SourceModel(write_source(tmp_path, "mixtral", seed))
    with torch.no_grad():
        routing = Routing(random_model("mixtral", seed))
    names = [f"model.layers.1.block_sparse_moe.experts.{index}.w2" for index in range(4)]
    found = token_weights(source, names, TOKENS, SensitivitySettings())
    scales = {name: routing.weights(index) for index, name in enumerate(names)}
    ratios = {name: found[name].flatten().double() / scales[name].square() for name in names}
    for name in names:
        assert torch.equal(found[name].flatten() > 0, scales[name] > 0)
    # An expert's output reaches the block's by the router's weight: where a token reaches two, all else is the same.
    for one, other in itertools.combinations(names, 2):
        both = (scales[one] > 0) & (scales[other] > 0)
        quotients = ratios[one][both] / ratios[other][both]
        torch.testing.assert_close(quotients, quotients[:1].expand(len(quotients)), rtol=1e-3, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("weighed", [False, True])
def test_drift_of_experts(weighed: bool, tmp_path: Path) -> None:
    source = SourceModel(write_source(tmp_path, "qwen3_moe"))
    sizes = {name: 32 for name, matrix in source.matrices.items() if matrix.block == 0}
    activations = Activations(source.runner, TOKENS, (2,), exact=True)
    activations.slices[2] += 0.3 * torch.randn(3, 20, 64, generator=torch.Generator().manual_seed(1))
    names = [f"model.layers.0.mlp.experts.1.{part}" for part in ("gate_proj", "down_proj")]
    own = torch.rand(3, 20, generator=torch.Generator().manual_seed(2))
    weights = dict.fromkeys(names, own) if weighed else {}
    task = BlockTask("model.layers.0", source.runner.load_block(0), sizes, activations, token_weights=weights)
    experts, calls = experts_of(task.block), list[tuple[torch.Tensor, ...]]()
    hook = experts.register_forward_pre_hook(lambda _, given: calls.append(given))
    for hidden in (activations.reference, activations.slices[2]):
        task.block(hidden, **activations.arguments)
    hook.remove()
    (before, index, scales), (after, moved, _) = calls
    both = (index == 1).any(1) & (moved == 1).any(1)
    assert 0 < int(both.sum()) < min(int((index == 1).sum()), int((moved == 1).sum()))
    counts = own.flatten() if weighed else (scales * (index == 1)).sum(1).square()
    for name, x, drifted in zip(
        names, (before, experts[1].inner(before)), (after, experts[1].inner(after)), strict=True
    ):
        drift = measure_drift(task, name, {2: {}}, TOKENS.numel())[2]
        rows, off, weight = drifted[both].double(), (x - drifted)[both].double(), counts[both].double()
        torch.testing.assert_close(drift.hessian.double(), moments(rows, weight, len(rows)), rtol=1e-4, atol=1e-6)
        cross = (off.T * weight) @ rows / len(rows)
        torch.testing.assert_close(drift.cross.double(), cross, rtol=1e-4, atol=1e-6)
    assert measure_drift(task, names[0], {2: {}}, TOKENS.numel(), share=1.0) == {}  # fewer than 64 tokens


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MIXTURES)
def test_quantized_mixtures_are_close_and_measured(model_type: str, tmp_path: Path) -> None:
    folder = write_source(tmp_path / "source", model_type)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    plain = {"sensitivity.tokens": False, "end_to_end.up_to": 0}
    group_size = "channel" if "deepseek" in model_type else 32
    Quantize(
        folder, tmp_path / "out", calibration=text, bits=[8, 4, 2], samples=4, sequence_length=32,
        group_size=group_size, no_report=True, setting=plain,
    ).run()  # fmt: skip
    checkpoint = open_checkpoint(tmp_path / "out")
    assert any(".experts.3." in name for name in checkpoint.layers)
    rows = {
        row["bits"]: row["kl"] for row in Evaluate(tmp_path / "out", folder, text, samples=4, sequence_length=32).run()
    }
    assert rows[8] < 3e-3 < rows[2]
    assert rows[8] < rows[4] < rows[2]
    # As transformers computes it with its own module of joined parameters.
    expected = separate_experts(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)).eval()
    LayerModel(expected, checkpoint.layers).load(checkpoint.weights(checkpoint.slice(4)))
    own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    own.load_state_dict(joined_state(own, dict(checkpoint.weights(checkpoint.slice(4)))), strict=False)
    with torch.no_grad():
        torch.testing.assert_close(expected(TOKENS).logits, own(TOKENS).logits, rtol=1e-4, atol=1e-4)


def joined_state(model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of layers by the names of transformers' own parameters."""
    state = {f"{name}.weight": weight for name, weight in weights.items() if ".experts." not in name}
    for name, parameter in model.named_parameters():
        path, _, own = name.rpartition(".")
        stored = path.replace(".mlp.", ".block_sparse_moe.") if model.config.model_type == "mixtral" else path
        parts = {
            "gate_up_proj": ("w1", "w3") if "sparse" in stored else ("gate_proj", "up_proj"),
            "down_proj": ("w2",) if "sparse" in stored else ("down_proj",),
        }
        if path.endswith(".experts"):
            state[name] = torch.stack(
                [
                    torch.cat([weights[f"{stored}.{index}.{part}"] for part in parts[own]])
                    for index in range(len(parameter))
                ]
            )
    return state


@pytest.mark.slow
@pytest.mark.parametrize("method", [method for method in METHODS if method != "rtn"])
def test_every_method(method: str, tmp_path: Path) -> None:
    folder = write_source(tmp_path / "source", "qwen2_moe", num_hidden_layers=1)
    (tmp_path / "text.txt").write_text(TEXT)
    widths = [4, 2] if "nested" in method or "mat" in method else [4]
    short = {"tuning.iterations": 2, "end_to_end.epochs": 0.5, "clipping.iterations": 2, "sequential_up_to": 4}
    known = {name for name in short if hasattr(METHODS[method]((4,)), name.partition(".")[0])}
    outcome = Quantize(
        folder, tmp_path / "out", calibration=tmp_path / "text.txt", method=method, bits=widths, samples=4,
        sequence_length=16, group_size=32, no_report=True, setting={name: short[name] for name in known},
    ).run()  # fmt: skip
    assert outcome.errors
    assert all(0 <= error < 1 for errors in outcome.errors.values() for error in errors.values())


@pytest.mark.parametrize(
    ("model_type", "ignore", "message"),
    [
        ("mixtral", r"experts\.1\.w1", r"ignore: found for .*experts\.1 w1 ignored, w3 quantized"),
        ("qwen3_moe", r"0\.mlp\.experts\.1\.", r"ignore: found 3 of the 12 layers of model\.layers\.0\.mlp\.experts"),
    ],
)
def test_experts_are_ignored_together(model_type: str, ignore: str, message: str, tmp_path: Path) -> None:
    folder = write_source(tmp_path / "source", model_type)
    with pytest.raises(ValueError, match=message):
        Quantize(folder, tmp_path / "out", method="rtn", bits=[4], group_size=32, ignore=[ignore]).run()
