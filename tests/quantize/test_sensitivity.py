"""How tokens are weighed, against the curvature of the KL divergence by torch's derivatives of the whole model."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch.func import functional_call, hessian
from transformers import AutoModelForCausalLM

from tests.quantize.tiny_sources import ONE_WIDTH, VOCABULARY, random_model, write_source, write_tokenizer
from vllm_matquant.checkpoint.reader import open_checkpoint
from vllm_matquant.quantize import device, run, sensitivity
from vllm_matquant.quantize.method import TrainedMethod, WeighedMethod
from vllm_matquant.quantize.methods import METHODS, with_settings
from vllm_matquant.quantize.pipeline import CalibrationSettings, plan_format, quantize
from vllm_matquant.quantize.sensitivity import SensitivitySettings, random_change, random_signs, token_weights
from vllm_matquant.quantize.source import SourceModel


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in float32 whatever the processor."""
    monkeypatch.setattr(device, "_bfloat16_is_faster", lambda: False)


def layers_of(source: SourceModel) -> list[str]:
    return [name for name, matrix in source.matrices.items() if matrix.block is not None]


def tokens_of(seed: int, windows: int = 3, length: int = 7) -> torch.Tensor:
    return torch.randint(VOCABULARY, (windows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(3))
def test_a_random_change_has_the_covariance_of_a_drawn_word(seed: int) -> None:
    probabilities = torch.randn(8, generator=torch.Generator().manual_seed(seed)).double().softmax(-1)
    signs = torch.tensor(list(itertools.product((-1, 1), repeat=8)))
    changes = random_change(probabilities.expand(256, -1), signs)
    torch.testing.assert_close(changes.mean(0), torch.zeros(8).double())
    covariance = changes.T @ changes / 256
    torch.testing.assert_close(covariance, probabilities.diag() - torch.outer(probabilities, probabilities))


@pytest.mark.parametrize("shape", [(64, 500), (3, 7), (1, 1)])
def test_random_signs_are_independent_of_each_other(shape: tuple[int, int]) -> None:
    drawn = [random_signs(shape, torch.Generator().manual_seed(seed)) for seed in range(400)]
    assert {float(value) for value in torch.stack(drawn).unique()} == {-1.0, 1.0}
    torch.testing.assert_close(random_signs(shape, torch.Generator().manual_seed(3)), drawn[3], rtol=0, atol=0)
    some = torch.stack(drawn).flatten(1)[:, :24]  # signs of one byte, and of the next ones
    torch.testing.assert_close(some.T @ some / 400, torch.eye(some.shape[1]), rtol=0, atol=0.25)
    torch.testing.assert_close(some.mean(0), torch.zeros(some.shape[1]), rtol=0, atol=0.25)


def curvature(folder: Path, layer: str, tokens: torch.Tensor) -> torch.Tensor:
    """The trace, for each token, of the KL divergence's second derivatives by the layer's output: [windows, length]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
    module = model.get_submodule(layer)
    parameters = dict(model.named_parameters())
    traces = torch.zeros(tokens.shape, dtype=torch.float64)
    for window, ids in enumerate(tokens):
        with torch.no_grad():
            logs = model(ids[None]).logits.log_softmax(-1)
        for place in range(len(ids)):

            def divergence(
                error: torch.Tensor, ids: torch.Tensor = ids, place: int = place, expected: torch.Tensor = logs
            ) -> torch.Tensor:
                def add(_: torch.nn.Module, __: object, output: torch.Tensor) -> torch.Tensor:
                    rows = [row + error if index == place else row for index, row in enumerate(output[0])]
                    return torch.stack(rows)[None]

                hook = module.register_forward_hook(add)
                try:
                    logits = functional_call(model, parameters, (ids[None],)).logits
                finally:
                    hook.remove()
                return (expected.exp() * (expected - logits.log_softmax(-1))).sum()

            traces[window, place] = hessian(divergence)(torch.zeros(module.out_features, dtype=torch.float64)).trace()
    return traces


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_weights_are_the_curvature_of_the_divergence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    folder = write_source(tmp_path / "model", architecture, num_hidden_layers=2)
    source, tokens = SourceModel(folder), tokens_of(5, 2, 5)
    monkeypatch.setattr(sensitivity, "tqdm", lambda batches, *_, **__: batches)
    for layer in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        expected = curvature(folder, layer, tokens)
        draws = [
            token_weights(source, [layer], tokens, SensitivitySettings(seed=1000 * seed))[layer] for seed in range(200)
        ]
        found = torch.stack(draws).double()
        error = found.std(0) / len(draws) ** 0.5
        assert ((found.mean(0) - expected / expected.mean()).abs() < 5 * error + 0.02).all()


def test_layers_with_one_input_have_one_weight(tmp_path: Path) -> None:
    source, tokens = SourceModel(write_source(tmp_path / "model", "qwen3")), tokens_of(1)
    layers = layers_of(source)
    found = token_weights(source, layers, tokens, SensitivitySettings())
    assert set(found) == set(layers)
    stages = [{name.rpartition(".")[2] for name in layers if found[name] is each} for each in set(found.values())]
    assert sorted(map(sorted, stages)) == sorted(
        [["k_proj", "q_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]] * 2
    )
    for weights in found.values():
        assert weights.shape == tokens.shape
        torch.testing.assert_close(weights.mean(), torch.tensor(1.0))
        assert weights.std() > 0.1
    # The mean of what each has alone.
    alone = [token_weights(source, [layers[place]], tokens, SensitivitySettings())[layers[place]] for place in range(3)]
    torch.testing.assert_close(found[layers[0]], torch.stack(alone).mean(0))


def test_a_window_has_the_same_weights_in_any_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, tokens = SourceModel(write_source(tmp_path / "model")), tokens_of(2, 5)
    layers = layers_of(source)
    whole = token_weights(source, layers, tokens, SensitivitySettings())
    monkeypatch.setattr(sensitivity, "BATCH_TOKENS", 2 * tokens.shape[1])
    monkeypatch.setattr(sensitivity, "HEAD_TOKENS", 3)
    for name, weights in token_weights(source, layers, tokens, SensitivitySettings(), tmp_path).items():
        torch.testing.assert_close(weights, whole[name])
    other = token_weights(source, layers, tokens, SensitivitySettings(seed=1))
    assert not torch.allclose(other[layers[0]], whole[layers[0]], rtol=0.01)


def test_where_nothing_changes_the_predictions_all_tokens_count(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model = random_model("llama")
    model.get_output_embeddings().weight.data.zero_()
    model.save_pretrained(folder)
    write_tokenizer(folder)
    source = SourceModel(folder)
    for weights in token_weights(source, layers_of(source), tokens_of(3), SensitivitySettings()).values():
        assert (weights == 1).all()


def test_gradients_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model = random_model("llama")
    model.get_decoder().norm.weight.data.fill_(3e38)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    source = SourceModel(folder)
    with pytest.raises(ValueError, match=r"layers\.\d.*: the gradients .* not finite"):
        token_weights(source, layers_of(source), tokens_of(4), SensitivitySettings())


def test_each_window_has_random_numbers_of_its_own(tmp_path: Path) -> None:
    source = SourceModel(write_source(tmp_path / "model"))
    tokens = tokens_of(6, 1).expand(2, -1)
    layer = layers_of(source)[0]
    first, second = token_weights(source, [layer], tokens, SensitivitySettings())[layer]
    assert not torch.allclose(first, second, rtol=0.01)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if issubclass(method, WeighedMethod)])
def test_a_method_counts_tokens_by_their_weights(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    source = SourceModel(write_source(tmp_path / "model"))
    method = METHODS[name]((4,) if name in ONE_WIDTH else (2, 4, 8))
    if isinstance(method, TrainedMethod):
        method = with_settings(method, ["end_to_end.up_to=0", "sweeps=0"])
    text = CalibrationSettings(str(text_file), samples=4, sequence_length=32)

    def codes(output: str, weighed: str) -> torch.Tensor:
        own = with_settings(method, [f"sensitivity.tokens={weighed}"])
        quantize(source, tmp_path / output, own, plan_format(source, own, 32, []), text)
        checkpoint = open_checkpoint(tmp_path / output)
        return torch.cat([checkpoint.codes(layer, 8).flatten() for layer in checkpoint.layers])

    weighed, same = codes("weighed", "true"), codes("same", "false")
    assert (weighed != same).float().mean() > 0.01
    ones = {layer: torch.ones(4, 32) for layer in layers_of(source)}
    monkeypatch.setattr(run, "token_weights", lambda *_: ones)
    assert torch.equal(codes("ones", "true"), same)
