"""Models of random weights, of a small shape."""

from __future__ import annotations

from pathlib import Path

import pytest
import random_model
import torch
from transformers import AutoModelForCausalLM

from tests.serve.tiny_models import log_probabilities
from vllm_matquant.checkpoint.decoder import AFFINE_INT8, CODEBOOK, KINDS, DecoderKind
from vllm_matquant.checkpoint.reader import open_checkpoint
from vllm_matquant.jobs.models import load_model

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(random_model.SHAPES, "tinyllama-1.1b", SHAPE)


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_both_models_have_the_shape(tmp_path: Path, kind: DecoderKind) -> None:
    assert random_model.main(["--output", str(tmp_path), "--group-size", "32", "--decoders", kind.name]) == 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16")
    checkpoint = open_checkpoint(tmp_path / "nested")
    assert plain.dtype == torch.bfloat16
    assert plain.config.hidden_size == checkpoint.config["hidden_size"] == 64
    assert checkpoint.servable_widths == tuple(range(2, 9))
    assert checkpoint.format.decoder_kind == kind
    shapes = {name.removesuffix(".weight"): tuple(p.shape) for name, p in plain.named_parameters()}
    assert checkpoint.layers.items() <= shapes.items()
    assert len(checkpoint.layers) == 2 * 7
    for width in (2, 8):
        logs = log_probabilities(load_model(tmp_path / "nested", width), [1, 2, 3])
        assert logs.isfinite().all()
        assert logs.std() > 0.01


def test_a_quantized_head(tmp_path: Path) -> None:
    assert random_model.main(["--output", str(tmp_path), "--group-size", "32", "--head-bits", "6"]) == 0
    checkpoint = open_checkpoint(tmp_path / "nested")
    assert checkpoint.layers["lm_head"] == (96, 64)
    assert {checkpoint.slice(width).widths["lm_head"] for width in range(2, 9)} == {6}
    assert log_probabilities(load_model(tmp_path / "nested", 2), [1, 2, 3]).isfinite().all()


@pytest.mark.parametrize("kind", [AFFINE_INT8, CODEBOOK], ids=lambda kind: kind.name)
def test_slices_agree(kind: DecoderKind) -> None:
    """A slice decodes to the middle of the weights that share it."""
    codes, decoders = random_model.random_layer(32, 64, 32, torch.Generator().manual_seed(0), kind)
    parents = decoders[8].decode(codes)
    for width, decoder in decoders.items():
        weights = decoder.decode(codes >> (8 - width))
        rounding = 0.01 * random_model.LARGEST  # a step is bfloat16
        largest = random_model.LARGEST * (1 if kind == AFFINE_INT8 else 1.5)  # further bits reach past an entry
        assert weights.min() > -largest - rounding
        assert weights.max() < largest + rounding
        assert (weights.mean()).abs() < 0.003
        cell = 2 * random_model.LARGEST / (2**width - 1) if kind == AFFINE_INT8 else 4 * random_model.LARGEST / 2**width
        assert (weights - parents).abs().max() <= cell / 2 + 2 * rounding


def test_a_folder_in_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--output", str(tmp_path), "--group-size", "32"]
    random_model.main(arguments)
    with pytest.raises(SystemExit) as stop:
        random_model.main(arguments)
    assert stop.value.code == 1
    assert "nested" in capsys.readouterr().err
