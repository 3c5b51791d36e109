"""Quality measured block by block, against a whole model's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.quantize.tiny_sources import ARCHITECTURES, VOCABULARY, write_source
from vllm_matquant.checkpoint.reader import open_checkpoint
from vllm_matquant.measure.evaluate import evaluate
from vllm_matquant.quantize.methods import METHODS
from vllm_matquant.quantize.pipeline import CalibrationSettings, plan_format, quantize
from vllm_matquant.quantize.source import SourceModel

TOKENS = torch.randint(VOCABULARY, (5, 24), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_head(model_type: str, tmp_path: Path) -> None:
    folder = write_source(tmp_path, model_type)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    outputs: list[torch.Tensor] = []
    last = model.get_decoder().layers[-1]
    last.register_forward_hook(lambda _, __, out: outputs.append(out[0] if isinstance(out, tuple) else out))
    logits = model(TOKENS).logits
    torch.testing.assert_close(SourceModel(folder).runner.load_head()(outputs[0]), logits)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_inputs_of_the_head(model_type: str, tmp_path: Path) -> None:
    folder = write_source(tmp_path, model_type)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen: list[torch.Tensor] = []
    last = model.get_decoder().layers[-1]
    last.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
    model.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(TOKENS)
    torch.testing.assert_close(SourceModel(folder).runner.load_final()(seen[0]), seen[1])


# Each model by each method, and each of these with either choice of embeddings and of widths.
BITS_FOR = ([], [("down_proj|layers.0.*k_proj", (4, 8)), ("embed|o_proj", (3,))])
FIGURES = [
    (model_type, method, method != "nested-vq" and (row + column) % 4 >= 2, BITS_FOR[(row + column) % 2])
    for row, model_type in enumerate(["llama", "gemma2", "qwen3"])
    for column, method in enumerate(["nested", "nested-vq", "matgptq", "rtn"])  # codebooks take whole layers only
]


@pytest.mark.parametrize(("model_type", "method", "embeddings", "bits_for"), FIGURES)
def test_same_figures_as_of_the_whole_model(
    model_type: str,
    method: str,
    embeddings: bool,
    bits_for: list[tuple[str, tuple[int, ...]]],
    text_file: Path,
    tmp_path: Path,
) -> None:
    model, widths = write_source(tmp_path / "source", model_type), (2, 3, 8)
    source, chosen = SourceModel(model), METHODS[method](widths)
    settings = CalibrationSettings(str(text_file), samples=8, sequence_length=32)
    if not embeddings:
        bits_for = [(expression.removeprefix("embed|"), own) for expression, own in bits_for]
    format_ = plan_format(source, chosen, 32, [], bits_for=bits_for, quantize_embeddings=embeddings)
    outcome = quantize(source, tmp_path / "output", chosen, format_, settings, held_out=TOKENS)
    checkpoint = open_checkpoint(tmp_path / "output")
    expected = list(evaluate(checkpoint, model, TOKENS, [checkpoint.slice(width) for width in widths]))
    assert [row["bits"] for row in outcome.quality] == list(widths)
    for found, row in zip(outcome.quality, expected, strict=True):
        assert found == pytest.approx(row, rel=1e-3, abs=1e-6)
    trained = {"train"} if method.startswith("nested") else set()
    assert set(outcome.seconds) == {"prepare", "quantize", "evaluate", "write"} | trained
