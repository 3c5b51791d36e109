"""Models that are given pictures too: the language model is quantized, all else is kept as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from tests.quantize.tiny_architectures import TOKENS
from tests.tiny_multimodal import CONFIGS, random_model, write_multimodal
from vllm_matquant.checkpoint.errors import ConfigError, MissingTensorError, UnexpectedTensorError
from vllm_matquant.checkpoint.language_model import load_language_model
from vllm_matquant.checkpoint.reader import open_checkpoint
from vllm_matquant.checkpoint.skeleton import build_skeleton
from vllm_matquant.checkpoint.verify import verify
from vllm_matquant.cli import main
from vllm_matquant.quantize.runner import run_block
from vllm_matquant.quantize.source import SourceModel, head_weight

OPTIONS = ["--bits", "2,4,8", "--method", "rtn", "--group-size", "32", "--quantize-embeddings"]
PARTS = ("gate", "up", "down")
HEADS: dict[str, set[str]] = {name: set() if name == "gemma3" else {"lm_head"} for name in CONFIGS}
WINDOWS = ["--samples", "2", "--sequence-length", "24"]


@pytest.fixture(scope="module", params=CONFIGS)
def model_type(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def source(model_type: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source with the names of files on a hub; not to be changed."""
    return write_multimodal(tmp_path_factory.mktemp("multimodal") / model_type, model_type, seed=3)


@torch.no_grad()
def logits_by_blocks(model: SourceModel) -> torch.Tensor:
    hidden = torch.empty(*TOKENS.shape, model.runner.hidden_size)
    arguments = model.runner.embed(TOKENS, hidden)
    for index in range(len(model.runner.block_names)):
        run_block(model.runner.load_block(index), hidden, hidden, arguments[index], 40)
    return model.runner.load_head()(hidden)


@torch.no_grad()
def test_blocks_compute_what_transformers_does(model_type: str, source: Path, tmp_path: Path) -> None:
    model = random_model(model_type, seed=3)
    expected = model(input_ids=TOKENS).logits
    torch.testing.assert_close(logits_by_blocks(SourceModel(source)), expected, rtol=0, atol=1e-5)
    # By the names that transformers writes of a model it has not loaded.
    model.save_pretrained(tmp_path / "own names")
    torch.testing.assert_close(logits_by_blocks(SourceModel(tmp_path / "own names")), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_language_model_is_what_transformers_computes_with_text(model_type: str, source: Path) -> None:
    expected = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32).eval()
    found = load_language_model(source, dtype=torch.float32).eval()
    assert not [name for name, _ in found.named_parameters() if "vis" in name or "projector" in name]
    torch.testing.assert_close(found(TOKENS).logits, expected(input_ids=TOKENS).logits, rtol=0, atol=0)


def test_a_checkpoint(model_type: str, source: Path, tmp_path: Path) -> None:
    """From the command line and back: names, bytes, model card, and what each width computes."""
    folder = tmp_path / "nested"
    given = ["quantize", str(source), "--output", str(folder), *OPTIONS, *WINDOWS]
    assert main([*given, "--dry-run"]) == 0
    assert not folder.exists()
    assert main(given) == 0
    assert verify(folder)
    checkpoint, stored = open_checkpoint(folder), load_file(source / "model.safetensors")
    quantized = {name for name in checkpoint.layers if ".layers." in name}
    assert quantized == {
        f"model.language_model.layers.{block}.{part}"
        for block in range(2)
        for part in (*(f"self_attn.{name}_proj" for name in "qkvo"), *(f"mlp.{name}_proj" for name in PARTS))
    }
    assert set(checkpoint.layers) - quantized == {"model.language_model.embed_tokens", *HEADS[model_type]}
    plain = dict(checkpoint.unquantized())
    tower = [name for name in stored if "vis" in name or "projector" in name]
    assert len(tower) > 20
    for name in tower:
        assert torch.equal(plain[name], stored[name])
    config = checkpoint.config
    assert config.pop("quantization_config")["quant_method"] == "matquant"
    assert config == json.loads((source / "config.json").read_text())
    assert (folder / "processor_config.json").is_file()
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card
    assert "which take pictures in, are as in the source" in card

    rows_file, text = tmp_path / "rows.json", tmp_path / "text.txt"
    text.write_text("The cat sat on the mat and the other cat thought that it had. " * 4)
    given = ["evaluate", str(folder), "--reference", str(source), "--text", str(text), "--json", str(rows_file)]
    assert main([*given, *WINDOWS]) == 0
    rows = {row["bits"]: row["kl"] for row in json.loads(rows_file.read_text())}
    assert 0 <= rows[8] < rows[4] < rows[2]

    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    lost = sorted(tower)[0]
    file = content["weight_map"].pop(lost)
    index.write_text(json.dumps(content))
    with pytest.raises(MissingTensorError, match=r"(visual|vision_tower|projector)\S+: found nothing"):
        open_checkpoint(folder)
    content["weight_map"] |= {lost: file, f"{lost}.other": file}
    index.write_text(json.dumps(content))
    with pytest.raises(UnexpectedTensorError, match=r"\.other: found a tensor in"):
        open_checkpoint(folder)


def without(folder: Path, source: Path, name: str) -> Path:
    """A copy of a source that lacks a tensor."""
    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_tower_that_is_not_whole(model_type: str, source: Path, tmp_path: Path) -> None:
    lost = sorted(name for name in load_file(source / "model.safetensors") if "vis" in name)[-1]
    with pytest.raises(MissingTensorError, match=r"(visual|vision_tower)\S+: found in no file"):
        SourceModel(without(tmp_path / "source", source, lost))


def test_the_configuration_of_the_first_qwen2_5_vl() -> None:
    """What later came to be ``text_config`` stands beside all else."""
    nested = AutoConfig.for_model("qwen2_5_vl", **CONFIGS["qwen2_5_vl"]).to_dict()
    fields = dict(CONFIGS["qwen2_5_vl"])
    text = {name: value for name, value in fields.pop("text_config").items() if value is not None}
    flat = build_skeleton({"model_type": "qwen2_5_vl", **text, **fields})
    expected = build_skeleton(nested)
    assert (flat.parameters, flat.tower, flat.linears) == (expected.parameters, expected.tower, expected.linears)


def test_a_head_of_its_own_that_the_configuration_ties(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_multimodal(tmp_path / "gemma3", "gemma3")
    tensors = load_file(folder / "model.safetensors")
    head = 2 * tensors["language_model.model.embed_tokens.weight"]
    save_file(tensors | {"language_model.lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
    model = SourceModel(folder)
    assert "it is kept" in caplog.text
    assert model.config["tie_word_embeddings"] is model.config["text_config"]["tie_word_embeddings"] is False
    assert torch.equal(head_weight(model), head)


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("blip-2", "whose language model is no part of its own beside a vision tower"),
        ("florence2", "whose blocks are in no list named layers"),
        ("voxtral", "builds no causal language model"),
    ],
)
def test_what_is_refused_by_name(model_type: str, message: str, tmp_path: Path) -> None:
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=rf"config\.json: \S+: found .*'{model_type}'.*{message}"):
        SourceModel(tmp_path)
