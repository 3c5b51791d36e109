"""Perplexity and KL divergence against a direct computation."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.checkpoint.samples import decoder_bytes
from tests.quantize.tiny_sources import VOCABULARY, write_source
from tests.serve.tiny_models import requantize
from vllm_matquant.checkpoint.decoder import CODEBOOK, Affine
from vllm_matquant.checkpoint.reader import Checkpoint, open_checkpoint
from vllm_matquant.kernels.reference import Rounding, default_rounding
from vllm_matquant.measure import model as model_module
from vllm_matquant.measure.evaluate import compare, evaluate
from vllm_matquant.measure.model import LayerModel
from vllm_matquant.quantize.baselines import RoundToNearest
from vllm_matquant.quantize.pipeline import CalibrationSettings, plan_format, quantize
from vllm_matquant.quantize.source import SourceModel

TOKENS = torch.randint(VOCABULARY, (5, 24), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def checkpoint(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("quantized") / "llama"
    source, method = SourceModel(llama), RoundToNearest((2, 3, 8))
    quantize(source, folder, method, plan_format(source, method, 32, []), CalibrationSettings())
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def codebooks(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(requantize(checkpoint, CODEBOOK, tmp_path_factory.mktemp("codebooks") / "llama"))


def test_activations_are_rounded_for_the_slices_alone(llama: Path, checkpoint: Checkpoint) -> None:
    exact, near, coarse = (
        next(evaluate(checkpoint, llama, TOKENS, [checkpoint.slice(8)], rounding_of))
        for rounding_of in (None, lambda _: Rounding(16), lambda _: Rounding(8))
    )
    assert exact["reference_perplexity"] == near["reference_perplexity"] == coarse["reference_perplexity"]
    assert 0 < abs(near["perplexity"] - exact["perplexity"]) < abs(coarse["perplexity"] - exact["perplexity"])
    assert near["perplexity"] == pytest.approx(exact["perplexity"], rel=1e-4)


def test_activations_are_rounded_as_the_width_of_each_slice_asks_for(llama: Path, checkpoint: Checkpoint) -> None:
    slices = [checkpoint.slice(8), checkpoint.slice(2), checkpoint.slice(8)]
    served = list(evaluate(checkpoint, llama, TOKENS, slices, default_rounding))
    for row, each, bits in zip(served, slices, (16, 8, 16), strict=True):
        [alone] = evaluate(checkpoint, llama, TOKENS, [each], lambda _, bits=bits: Rounding(bits))  # type: ignore[misc]
        assert row["kl"] == alone["kl"]


@torch.no_grad()
@pytest.mark.parametrize("decoders", ["checkpoint", "codebooks"])
def test_rows(llama: Path, decoders: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    checkpoint: Checkpoint = request.getfixturevalue(decoders)
    monkeypatch.setattr(model_module, "_BATCH_TOKENS", 50)  # two windows at a time
    rows = list(evaluate(checkpoint, llama, TOKENS, [checkpoint.slice(width) for width in (8, 2)]))
    assert [row["bits"] for row in rows] == [8, 2]
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float64).eval()
    expected = model(TOKENS).logits[:, :-1].log_softmax(-1)
    for row in rows:
        changed = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float64).eval()
        for layer in checkpoint.layers:
            values, codes = checkpoint.decoder(layer, row["bits"]).values, checkpoint.codes(layer, row["bits"])
            if isinstance(values, Affine):
                scale, offset = values.scale.double(), values.offset.double()
                weight = (scale[..., None] * codes.double().unflatten(1, (-1, 32)) + offset[..., None]).flatten(1)
            else:
                weight = values.decode(codes, 32).double()
            changed.get_parameter(f"{layer}.weight").copy_(weight)
        logs = changed(TOKENS).logits[:, :-1].log_softmax(-1)
        divergence, loss, reference_loss = 0.0, 0.0, 0.0
        for window in range(5):
            for place in range(23):
                divergence += float((expected[window, place].exp() * (expected - logs)[window, place]).sum())
                loss -= float(logs[window, place, TOKENS[window, place + 1]])
                reference_loss -= float(expected[window, place, TOKENS[window, place + 1]])
        assert row["tokens"] == 5 * 23
        assert row["kl"] == pytest.approx(divergence / (5 * 23), rel=1e-3, abs=1e-6)
        assert row["perplexity"] == pytest.approx(math.exp(loss / (5 * 23)), rel=1e-4)
        assert row["reference_perplexity"] == pytest.approx(math.exp(reference_loss / (5 * 23)), rel=1e-4)
        shapes, form = checkpoint.layers.values(), checkpoint.format.decoder_kind.form(row["bits"])
        bits = sum(
            rows * columns * row["bits"] + 8 * decoder_bytes(form, rows, columns // 32) for rows, columns in shapes
        )
        assert row["bits_per_weight"] == pytest.approx(bits / sum(rows * columns for rows, columns in shapes))
    assert rows[0]["kl"] < rows[1]["kl"]


def test_weights_of_a_slice_change_the_quantized_layers_alone(llama: Path, checkpoint: Checkpoint) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    LayerModel(model, checkpoint.layers).load(checkpoint.weights(checkpoint.slice(3)))
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {f"{layer}.weight" for layer in checkpoint.layers}


def test_the_temporary_file_has_no_name(
    llama: Path, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    rows = evaluate(checkpoint, llama, TOKENS, [checkpoint.slice(width) for width in (8, 3)])
    next(rows)
    assert list(tmp_path.iterdir()) == []  # its name is gone as soon as it is mapped
    rows.close()


def test_another_model(checkpoint: Checkpoint, tmp_path: Path) -> None:
    other = write_source(tmp_path / "other", intermediate_size=96)
    message = (
        r"other: model\.layers\.0\.mlp\.gate_proj: found \(96, 64\), expected \(128, 64\) as in the quantized model"
    )
    with pytest.raises(ValueError, match=message):
        next(evaluate(checkpoint, other, TOKENS, [checkpoint.slice(8)]))
    deeper = write_source(tmp_path / "shallower", num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.q_proj: found no such layer"):
        next(evaluate(checkpoint, deeper, TOKENS, [checkpoint.slice(8)]))


def test_any_weights_can_be_compared(llama: Path, checkpoint: Checkpoint) -> None:
    own = dict(checkpoint.weights(checkpoint.slice(2)))
    source = SourceModel(llama)
    candidates = [
        ("two bits", iter(own.items())),
        ("unchanged", ((layer, source.tensors.read(f"{layer}.weight")) for layer in own)),
        ("two bits in another order", reversed(own.items())),
    ]
    first, unchanged, again = compare(llama, TOKENS, checkpoint.layers, candidates)
    (row,) = evaluate(checkpoint, llama, TOKENS, [checkpoint.slice(2)])
    assert first == again == {name: row[name] for name in first}
    assert first["kl"] > 0.01
    assert unchanged["kl"] == 0
    assert unchanged["perplexity"] == unchanged["reference_perplexity"] == first["reference_perplexity"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda weights: weights.popitem(),
            r"rival: model\.layers\.1\.\S+: found no such layer, expected \(\d+, \d+\)",
        ),
        (
            lambda weights: weights.update(lm_head=torch.zeros(2, 2)),
            r"rival: lm_head: found \(2, 2\), expected no such",
        ),
        (
            lambda weights: weights.update({"model.layers.0.mlp.up_proj": torch.zeros(64, 128)}),
            r"rival: model\.layers\.0\.mlp\.up_proj: found \(64, 128\), expected \(128, 64\)",
        ),
    ],
)
def test_weights_of_other_layers(
    llama: Path, checkpoint: Checkpoint, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    weights = dict(checkpoint.weights(checkpoint.slice(2)))
    change(weights)
    with pytest.raises(ValueError, match=message):
        next(compare(llama, TOKENS, checkpoint.layers, [("rival", iter(weights.items()))]))
