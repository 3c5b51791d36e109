"""vLLM serving tiny models that are given pictures too, against transformers with the dequantized slices as weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModelForImageTextToText

from tests.serve import python_torchvision
from tests.serve.engine_jobs import run_jobs
from tests.serve.tiny_models import quantize
from tests.tiny_multimodal import BEGIN, CONFIGS, END, IMAGE, PICTURES, write_multimodal
from vllm_matquant.checkpoint.reader import open_checkpoint
from vllm_matquant.checkpoint.writer import CheckpointWriter
from vllm_matquant.quantize.choice import plan_format
from vllm_matquant.quantize.methods import METHODS
from vllm_matquant.quantize.selection import Selection
from vllm_matquant.quantize.source import SourceModel

pytestmark = pytest.mark.slow

WIDTHS = (2, 4, 8)
TOLERANCE = 1e-4
TOKENS = torch.randint(280, (14,), generator=torch.Generator().manual_seed(0)).tolist()
PLACES = {"llava": [IMAGE], "gemma3": [BEGIN], "qwen2_5_vl": [BEGIN, IMAGE, END], "qwen3_vl": [BEGIN, IMAGE, END]}
ELASTIC = ("llava", "qwen3_vl")
EMBEDDINGS = ("gemma3", "qwen2_5_vl")  # whose embedding and output head are quantized too


def picture(model_type: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (*PICTURES[model_type], 3), generator=generator, dtype=torch.uint8)


def write_quantized(folder: Path, source: Path, model_type: str) -> Path:
    """A checkpoint whose layers are rounded to the nearest."""
    model = SourceModel(source)
    method, bits_for = METHODS["nested"](WIDTHS), [("down_proj", (4, 8))] if model_type == "qwen3_vl" else []
    format_ = plan_format(model, method, 32, [], (), bits_for, quantize_embeddings=model_type in EMBEDDINGS)
    selection = Selection(model, format_)
    with CheckpointWriter(folder, format_) as writer:
        for layer in selection.shapes:
            weight = model.tensors.read(model.matrices[layer].parameter)
            writer.add_layer(layer, *quantize(weight, 32, format_, layer))
        for name in selection.unquantized:
            writer.add_tensor(name, model.tensors.read(name))
        writer.finish(model.config, copy_from=source)
    return folder


def write_plain(folder: Path, quantized: Path, width: int) -> Path:
    """A model that is not quantized, of the dequantized weights of a slice."""
    checkpoint = open_checkpoint(quantized)
    weights = {f"{layer}.weight": weight for layer, weight in checkpoint.weights(checkpoint.slice(width))}
    shutil.copytree(quantized, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(weights | dict(checkpoint.unquantized()), folder / "model.safetensors", {"format": "pt"})
    config = {name: value for name, value in checkpoint.config.items() if name != "quantization_config"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@torch.no_grad()
def by_transformers(folder: Path, model_type: str, tokens: list[int], seen: bool) -> torch.Tensor:
    """Log-probabilities after each token but the last: [len(tokens) - 1, vocabulary]."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    given: dict[str, Any] = {"input_ids": torch.tensor([tokens])}
    if seen:
        processor = AutoImageProcessor.from_pretrained(folder)
        given |= processor(Image.fromarray(picture(model_type).numpy()), return_tensors="pt")
        # Gemma 3's, without it, looks from no token of a picture at a later one, as vLLM's does on a CPU.
        if model_type.startswith("qwen"):
            given["mm_token_type_ids"] = (given["input_ids"] == IMAGE).int()
    return model(**given).logits[0, :-1].log_softmax(-1)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("multimodal")
    for seed, model_type in enumerate(CONFIGS):
        quantized = write_quantized(root / model_type, write_multimodal(root / "source", model_type, seed), model_type)
        shutil.rmtree(root / "source")
        for width in WIDTHS:
            write_plain(root / f"{model_type}-{width}", quantized, width)
    return root


@pytest.fixture(scope="module")
def results(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    jobs: dict[str, dict[str, Any]] = {}
    for model_type in CONFIGS:
        seeing = [*TOKENS[:5], *PLACES[model_type], *TOKENS[5:]]
        limits = {"image": 1, "video": 0} if model_type.startswith("qwen") else {"image": 1}
        prompts = [[TOKENS, None], [seeing, picture(model_type).tolist()]]
        settings = {"elastic": list(WIDTHS)} if model_type in ELASTIC else {"resident": [2, 4]}
        llm = {"limit_mm_per_prompt": limits, "additional_config": {"matquant": {"bits": 8} | settings}}
        jobs[model_type] = {"model": str(models / model_type), "llm": llm, "prompts": prompts, "bits": WIDTHS}
    # Kept, for in it vLLM notes what it has found of its classes, each in a process of its own.
    environment = {**python_torchvision.environment(), "VLLM_CACHE_ROOT": str(python_torchvision.CACHE.parent / "vllm")}
    found, logs = run_jobs("multimodal_runs", jobs, tmp_path_factory.mktemp("results"), **environment)
    assert not {name: logs[name][-3000:] for name, each in found.items() if "error" in each}
    return found


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("model_type", CONFIGS)
def test_text_and_pictures(models: Path, results: dict[str, dict[str, Any]], model_type: str, width: int) -> None:
    text, seeing = results[model_type]["runs"][WIDTHS.index(width)]
    prompts, plain = results[model_type]["prompts"], models / f"{model_type}-{width}"
    expected = by_transformers(plain, model_type, prompts[0], seen=False)
    torch.testing.assert_close(text, expected, rtol=0, atol=TOLERANCE)
    assert IMAGE in prompts[1]
    expected = by_transformers(plain, model_type, prompts[1], seen=True)
    torch.testing.assert_close(seeing, expected, rtol=0, atol=TOLERANCE)
    assert (seeing[-1] - text[-1]).abs().max() > 100 * TOLERANCE  # the picture is seen
