"""vLLM serving tiny models, against transformers with the dequantized slices as its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tests.quantize.tiny_sources import write_tokenizer
from tests.serve.engine_jobs import run_jobs
from tests.serve.rank_bytes import bytes_of_rank
from tests.serve.tiny_models import (
    EMBEDDINGS,
    VOCABULARY,
    log_probabilities,
    own_decoder,
    reference_model,
    write_checkpoint,
)
from vllm_matquant.checkpoint.names import shard_width
from vllm_matquant.checkpoint.reader import open_checkpoint
from vllm_matquant.checkpoint.recipe import Recipe
from vllm_matquant.checkpoint.recipe_store import add_recipes
from vllm_matquant.checkpoint.spec import Format

pytestmark = pytest.mark.slow

TOKENS = torch.randint(VOCABULARY, (20,), generator=torch.Generator().manual_seed(0)).tolist()
TOLERANCE = 1e-4
MODELS: dict[str, tuple[str, Format, dict[str, Any]]] = {
    # Untied and with biases in every linear layer, so that row-parallel ones have some too.
    "llama": ("llama", Format(group_size=32, **EMBEDDINGS), {"attention_bias": True, "mlp_bias": True}),
    "qwen3": ("qwen3", Format(), {"tie_word_embeddings": True}),  # norms of q and k
    "qwen2": (
        "qwen2",
        Format(
            group_size="channel",
            ignored_layers=("lm_head", "model.layers.0.mlp.down_proj"),
            layer_widths={
                "model.layers.1.mlp.down_proj": (4, 8),
                "model.layers.0.self_attn.o_proj": (3,),
                **dict.fromkeys(("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"), (3, 5, 6)),
            },
        ),
        {},
    ),
    "rounded": ("llama", Format(group_size=64, slicing="round", **EMBEDDINGS), {"tie_word_embeddings": True}),
}

WITH_OWN_DECODERS = ("llama", "rounded")  # whose recipes have such


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for seed, (name, (model_type, checkpoint_format, options)) in enumerate(MODELS.items()):
        write_checkpoint(root / name, model_type, checkpoint_format, seed, **options)
        if not checkpoint_format.layer_widths:
            checkpoint = open_checkpoint(root / name)
            widths = {layer: width for layer in checkpoint.layers for part, width in RECIPE.items() if part in layer}
            recipe = Recipe("mixed", widths, kl=0.5, own_decoders=name in WITH_OWN_DECODERS)
            decoders = {layer: own_decoder(checkpoint.decoder(layer, width)) for layer, width in widths.items()}
            add_recipes(checkpoint, [recipe], {"mixed": decoders} if recipe.own_decoders else None)
    return root


def at(bits: float | None, **llm: Any) -> dict[str, Any]:
    return {"llm": llm | ({} if bits is None else {"additional_config": {"matquant": {"bits": bits}}})}


def assert_served(
    result: dict[str, Any], model: Path, widths: Any, switch: int = 0, own_decoders: bool = False
) -> None:
    """The served log-probabilities are those of the reference at ``widths``."""
    assert "error" not in result, result["error"]
    expected = log_probabilities(reference_model(model, widths, own_decoders), TOKENS)
    torch.testing.assert_close(result["log_probabilities"][switch], expected, rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="session")
def faults(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies of the llama checkpoint with one fault each."""
    root = tmp_path_factory.mktemp("faults")
    for name in ("garbage past 3", "no 4 to 8"):
        (root / name).mkdir()
        for file in (models / "llama").iterdir():
            if (shard_width(file.name) or 0) <= 3:
                (root / name / file.name).symlink_to(file)
            elif name == "garbage past 3":
                (root / name / file.name).write_bytes(b"not a safetensors file")
    return root


# vLLM makes the classifier of the output head's rows.
FROM_TOKENS = {
    "architectures": ["Qwen3ForSequenceClassification"],
    "classifier_from_token": ["b", "d", "e"],
    "method": "no_post_processing",
}


@pytest.fixture(scope="session")
def pooled(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The qwen3 checkpoint as an embedding model: by its files it pools the mean, by default vLLM takes the last."""
    write_tokenizer(models / "qwen3")
    folder = Path(shutil.copytree(models / "qwen3", tmp_path_factory.mktemp("pooled") / "qwen3"))
    kinds = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for kind, path in kinds.items()]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    return folder


# Parts of fused layers at widths of their own.
RECIPE = {"embed": 3, "q_proj": 2, "k_proj": 4, "v_proj": 5, "o_proj": 3, "gate_proj": 3, "up_proj": 2, "down_proj": 4,
          "lm_head": 4}  # fmt: skip
EAGER = [("llama", 2), ("llama", 3), ("llama", 8), ("qwen3", 4), ("qwen3", None), ("qwen2", 5), ("rounded", 3)]
FAULTY = [("garbage past 3", 3), ("no 4 to 8", None), ("no 4 to 8", 8)]
THREE = dict.fromkeys(RECIPE, 3)
MIXED = {"embed": 2, "q_proj": 8, "k_proj": 3, "v_proj": 2, "o_proj": 3, "gate_proj": 2, "up_proj": 8, "down_proj": 8,
         "lm_head": 3}  # fmt: skip


@pytest.fixture(scope="session")
def results(
    models: Path, faults: Path, pooled: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[Any, dict[str, Any]]:
    """What all engines gave; one process runs them, for the start of a process takes longer than that of an engine."""
    jobs: dict[Any, dict[str, Any]] = {(name, bits): at(bits) | {"model": str(models / name)} for name, bits in EAGER}
    jobs |= {(name, bits): at(bits) | {"model": str(faults / name)} for name, bits in FAULTY}
    llama = {"model": str(models / "llama")}
    several = {"matquant": {"bits": 8, "resident": [2, 3, 8]}}
    jobs["compiled"] = llama | {"llm": {"enforce_eager": False, "additional_config": several}, "switch": [THREE, MIXED]}
    jobs["compiled", 5] = llama | at(5, enforce_eager=False)
    # bits = 4.5 is a budget: the checkpoints' one recipe is the best within it.
    for name in ("llama", "qwen3", "rounded"):
        jobs["recipe", name] = at(4.5) | {"model": str(models / name)}
    two = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    jobs["recipe", "parallel"] = llama | at(4.5, **two)
    jobs["recipe", "compiled"] = llama | at(4.5, enforce_eager=False)
    jobs["recipe", "too small"] = llama | {"llm": {"additional_config": {"matquant": {"memory": "1kB"}}}}
    jobs["parallel"] = llama | at(3, tensor_parallel_size=2, distributed_executor_backend="mp")

    jobs["pooling", "embed"] = {"model": str(pooled), "pooling": "embed"} | at(
        4, runner="pooling", skip_tokenizer_init=False
    )
    jobs["pooling", "classify"] = {"model": str(models / "qwen3"), "pooling": "classify"} | at(
        4, runner="pooling", skip_tokenizer_init=False, hf_overrides=FROM_TOKENS
    )

    told = {name: job | {"tokens": TOKENS} for name, job in jobs.items()}
    return run_jobs("engine_runs", told, tmp_path_factory.mktemp("engines"))[0]


@pytest.mark.parametrize(("name", "bits"), EAGER)
def test_log_probabilities(models: Path, results: dict, name: str, bits: int | None) -> None:
    assert_served(results[name, bits], models / name, bits or 8)
    # The test would see a wrong width: the next one is further off than the tolerance by far.
    other = log_probabilities(reference_model(models / name, 7 if bits in (8, None) else bits + 1), TOKENS)
    assert (results[name, bits]["log_probabilities"][0] - other).abs().max() > 20 * TOLERANCE


@pytest.mark.parametrize(("name", "bits"), EAGER)
def test_resident_bytes(models: Path, results: dict, name: str, bits: int | None) -> None:
    expected = open_checkpoint(models / name).slice(bits or 8).resident_bytes
    assert results[name, bits]["resident_bytes"] == results[name, bits]["predicted_bytes"] == [expected]


@pytest.mark.parametrize(
    ("name", "bits", "dense", "looked_up"),
    [
        # Weights in float32 beside the codes, and of the codes those of an embedding that is no head: a row for each
        # token of its codes, and of its decoders two bytes for each group of 32 columns and four, or four each.
        ("llama", 2, 0, lambda rows, columns: rows * (columns * 2 // 8 + columns // 32 * 2 + 4)),
        ("llama", 8, 0, lambda rows, columns: rows * (columns + columns // 32 * 4)),
        ("rounded", 3, 0, None),  # whose embedding is its head
        ("qwen3", 4, "head", None),
        ("qwen2", 5, "head and a layer", None),
    ],
)
def test_step_bytes(models: Path, results: dict, name: str, bits: int, dense: Any, looked_up: Any) -> None:
    config = json.loads((models / name / "config.json").read_text())
    rows, columns, inner = (config[field] for field in ("vocab_size", "hidden_size", "intermediate_size"))
    expected = {0: 0, "head": 4 * rows * columns, "head and a layer": 4 * columns * (rows + inner)}[dense]
    expected -= looked_up(rows, columns) if looked_up else 0
    [resident], [step] = results[name, bits]["resident_bytes"], results[name, bits]["step_bytes"]
    assert step == resident + expected


def test_files_of_wider_widths_are_not_read(models: Path, results: dict) -> None:
    assert_served(results["garbage past 3", 3], models / "llama", 3)


def test_a_folder_without_its_last_planes(models: Path, results: dict) -> None:
    assert_served(results["no 4 to 8", None], models / "llama", 3)
    refusal = results["no 4 to 8", 8]["error"]
    assert refusal.startswith("MissingFileError")
    assert "model-width4" in refusal
    assert "2, 3 bits" in refusal


def test_tensor_parallelism(models: Path, results: dict) -> None:
    assert_served(results["parallel"], models / "llama", 3)
    checkpoint = open_checkpoint(models / "llama")
    share = bytes_of_rank(checkpoint, checkpoint.slice(3).widths, 2)
    assert results["parallel"]["resident_bytes"] == results["parallel"]["predicted_bytes"] == [share, share]


@pytest.mark.parametrize("name", ["llama", "qwen3", "rounded", "parallel", "compiled"])
def test_a_recipe_that_mixes_widths_inside_fused_layers(models: Path, results: dict, name: str) -> None:
    result, model = results["recipe", name], models / (name if name in MODELS else "llama")
    assert_served(result, model, RECIPE, own_decoders=model.name in WITH_OWN_DECODERS)
    checkpoint, ranks = open_checkpoint(model), 2 if name == "parallel" else 1
    mixed = checkpoint.slice("mixed")
    share = bytes_of_rank(checkpoint, mixed.widths, ranks)
    assert result["resident_bytes"] == result["predicted_bytes"] == [share] * ranks
    if ranks == 1:
        assert share == mixed.resident_bytes


@torch.no_grad()
def test_pooling(models: Path, results: dict) -> None:
    states = reference_model(models / "qwen3", 4).model(torch.tensor([TOKENS])).last_hidden_state[0]
    expected = torch.nn.functional.normalize(states.mean(dim=0), dim=0)
    assert "error" not in results["pooling", "embed"], results["pooling", "embed"]
    torch.testing.assert_close(results["pooling", "embed"]["pooled"], expected, rtol=0, atol=1e-5)
    assert (torch.nn.functional.normalize(states[-1], dim=0) - expected).abs().max() > 1e-3


@torch.no_grad()
def test_a_classifier_of_the_output_heads_rows(models: Path, results: dict) -> None:
    rows = AutoTokenizer.from_pretrained(models / "qwen3").convert_tokens_to_ids(FROM_TOKENS["classifier_from_token"])
    logits = reference_model(models / "qwen3", 4)(torch.tensor([TOKENS])).logits[0, -1, rows]
    assert "error" not in results["pooling", "classify"], results["pooling", "classify"]
    torch.testing.assert_close(results["pooling", "classify"]["pooled"], logits.softmax(-1), rtol=0, atol=1e-5)


def test_a_budget_that_nothing_fits_is_refused(results: dict) -> None:
    assert results["recipe", "too small"]["error"].startswith("RecipeError")
    assert "uniform-2" in results["recipe", "too small"]["error"]


def test_a_compiled_graph_serves_other_widths_without_a_reload(models: Path, results: dict) -> None:
    for switch, widths in enumerate([8, THREE, MIXED]):
        assert_served(results["compiled"], models / "llama", widths, switch)


def test_several_resident_widths_take_their_planes_once_and_their_decoders(models: Path, results: dict) -> None:
    checkpoint = open_checkpoint(models / "llama")
    kind, shapes = checkpoint.format.decoder_kind, checkpoint.layers.values()
    narrower = [kind.form(width) for width in (2, 3)]
    decoders = sum(form.nbytes(rows, columns // 32) for form in narrower for rows, columns in shapes)
    expected = checkpoint.slice(8).resident_bytes + decoders
    assert results["compiled"]["resident_bytes"] == results["compiled"]["predicted_bytes"] == [expected]


@pytest.mark.parametrize("other", [("compiled", 5), ("recipe", "compiled")])
def test_a_start_at_another_width_compiles_nothing(models: Path, results: dict, other: Any) -> None:
    assert results["compiled"]["generated"] > 0
    assert results[other]["generated"] == 0
    if other == ("compiled", 5):
        assert_served(results[other], models / "llama", 5)
