"""Checkpoints in transformers: what its models compute with packed layers, beside those with the decoded weights."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.serve.tiny_models import EMBEDDINGS, VOCABULARY, write_checkpoint
from vllm_matquant.checkpoint.decoder import AFFINE_FLOAT16, CODEBOOK
from vllm_matquant.checkpoint.errors import CheckpointError
from vllm_matquant.checkpoint.reader import open_checkpoint
from vllm_matquant.checkpoint.spec import Format
from vllm_matquant.jobs.models import load_model
from vllm_matquant.transformers import MatquantConfig
from vllm_matquant.transformers.layers import PackedLayer

EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
BASE = Format((2, 4, 8))
FORMATS: dict[str, tuple[str, Format, dict[str, Any]]] = {
    "llama": ("llama", BASE, {"attention_bias": True, "mlp_bias": True}),
    "tied": ("llama", replace(BASE, group_size=32, **EMBEDDINGS), {"tie_word_embeddings": True}),
    "untied": ("qwen3", replace(BASE, decoder_kind=AFFINE_FLOAT16, **EMBEDDINGS), {}),
    "codebooks": ("qwen2", replace(BASE, decoder_kind=CODEBOOK), {}),
    "rounded": ("llama", replace(BASE, slicing="round"), {}),
    "mixtral": ("mixtral", BASE, EXPERTS),
    "qwen3_moe": ("qwen3_moe", BASE, EXPERTS),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each kind; not to be changed."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        name: write_checkpoint(root / name, model_type, format_, seed, **fields)
        for seed, (name, (model_type, format_, fields)) in enumerate(FORMATS.items())
    }


def load(folder: Path, **how: Any) -> torch.nn.Module:
    config = MatquantConfig(activation_bits=16, **how)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", FORMATS)
def test_a_slice_computes_what_its_weights_do(name: str, folders: dict[str, Path]) -> None:
    tokens = torch.randint(VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(1))
    told = set()
    for bits in BASE.widths:
        model = load(folders[name], bits=bits)
        expected = load_model(folders[name], bits, torch.float32)(tokens).logits
        found = model(tokens).logits.float()
        # bfloat16 rounds each activation of a layer by up to 2^-9; a plain model in bfloat16 is as far off.
        plain = load_model(folders[name], bits)(tokens).logits.float()
        error, usual = ((each - expected).norm() / expected.norm() for each in (found, plain))
        assert error < max(1.5 * usual, 0.01)
        layers = [module for module in model.modules() if isinstance(module, PackedLayer)]
        assert len(layers) == len(open_checkpoint(folders[name]).layers)
        assert all(module.packed.active_widths == [bits] for module in layers)
        assert not [key for key in model.state_dict() if "weight_" in key]
        told.add(sum(module.packed.resident_bytes for module in layers))
    assert len(told) == len(BASE.widths)  # bytes in memory follow the width


def test_it_generates_at_the_widest_width_by_default(folders: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["tied"], dtype=torch.float32)
    plain = load_model(folders["tied"], 8, torch.float32)
    start = torch.tensor([[3, 14, 15]])
    answers = [each.generate(start, max_new_tokens=8, do_sample=False) for each in (model, plain)]
    assert answers[0].tolist() == answers[1].tolist()
    assert "bits=8" in str(model)
    assert model.config.quantization_config.to_dict()["widths"] == list(BASE.widths)


def test_only_the_files_of_the_slice_are_needed(folders: dict[str, Path], tmp_path: Path, caplog: Any) -> None:
    shutil.copytree(folders["llama"], tmp_path / "part", ignore=shutil.ignore_patterns("model-width[5-8]-*"))
    with caplog.at_level(logging.WARNING, logger="transformers"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "part")
    assert "bits=4" in str(model)
    assert not [record for record in caplog.records if "UNEXPECTED" in record.message or "MISSING" in record.message]
    with pytest.raises(CheckpointError, match="model-width8"):
        load(tmp_path / "part", bits=8)


def test_recipes(folders: dict[str, Path], tmp_path: Path) -> None:
    layers = open_checkpoint(folders["llama"]).layers
    widths = {layer: 8 if "down" in layer else 2 for layer in layers}
    recipe = tmp_path / "mine.json"
    recipe.write_text(f'{{"recipe_version": 1, "name": "mine", "widths": {widths}}}'.replace("'", '"'))
    model = load(folders["llama"], recipe=recipe)
    assert {layer: model.get_submodule(layer).packed.active_widths for layer in layers} == {
        layer: [width] for layer, width in widths.items()
    }
    assert "bits=2" in str(load(folders["llama"], bits=3.5).get_submodule("model.layers.0.mlp.up_proj"))


def test_what_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"bits: found 3, expected one of the offered widths \[2, 4, 8\]"):
        load(folders["llama"], bits=3)
    with pytest.raises(ValueError, match="found bits 4 and recipe mine, expected one of them"):
        MatquantConfig(bits=4, recipe="mine")
    plain = load_model(folders["llama"], 8)
    plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="matquant does require the model to be pre-quantized"):
        load(tmp_path / "plain", bits=4)
    scaled = write_checkpoint(tmp_path / "scaled", "gemma3_text", replace(BASE, **EMBEDDINGS), tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match="embed_tokens, of transformers' class Gemma3TextScaledWordEmbedding"):
        load(scaled)
