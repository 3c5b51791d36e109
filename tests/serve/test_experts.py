"""vLLM serving tiny mixtures of experts, against transformers with the dequantized slices as its weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.serve.engine_jobs import run_jobs
from tests.serve.rank_bytes import bytes_of_rank
from tests.serve.tiny_models import VOCABULARY, log_probabilities, reference_model, write_checkpoint
from vllm_matquant.checkpoint.reader import open_checkpoint
from vllm_matquant.checkpoint.recipe import Recipe
from vllm_matquant.checkpoint.recipe_store import add_recipes
from vllm_matquant.checkpoint.spec import Format

pytestmark = pytest.mark.slow

TOKENS = torch.randint(VOCABULARY, (20,), generator=torch.Generator().manual_seed(0)).tolist()
TOLERANCE = 1e-4
EXPERTS: dict[str, Any] = {
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts"], 4),
    **{"num_experts_per_tok": 2, "moe_intermediate_size": 64},
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": EXPERTS,
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 64},  # a shared expert with a gate
    "mixtral": EXPERTS,
    "olmoe": EXPERTS,
}
# Experts, and their matrices, at widths of their own.
BUDGET = 4.9
RECIPE = {"experts.0.": 2, "experts.1.gate": 3, "experts.1.up": 8, "experts.1.down": 4, "experts.2.": 5, "": 4}


def width_in(recipe: dict[str, int], layer: str) -> int:
    return next(width for part, width in recipe.items() if part in layer)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mixtures")
    for seed, (model_type, options) in enumerate(MODELS.items()):
        write_checkpoint(root / model_type, model_type, Format(group_size=32), seed, **options)
    checkpoint = open_checkpoint(root / "qwen3_moe")
    widths = {layer: width_in(RECIPE, layer) for layer in checkpoint.layers}
    add_recipes(checkpoint, [Recipe("mixed", widths, kl=0.5)], None)
    return root


def at(bits: float, **llm: Any) -> dict[str, Any]:
    return {"llm": llm | {"additional_config": {"matquant": {"bits": bits}}}}


SERVED: list[tuple[str, Any]] = [*((name, bits) for name in MODELS for bits in (8, 4, 2)), ("qwen3_moe", "mixed")]


@pytest.fixture(scope="module")
def results(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, dict[str, Any]]:
    jobs: dict[Any, dict[str, Any]] = {
        # A number between the widths is a budget: the checkpoint's one recipe is the best within it.
        (name, bits): at(BUDGET if bits == "mixed" else bits) | {"model": str(models / name)}
        for name, bits in SERVED
    }
    qwen = {"model": str(models / "qwen3_moe")}
    several = {"matquant": {"bits": 8, "resident": [2, 8]}}
    two = {"": 2}
    ranks = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    jobs["parallel"] = qwen | at(3, **ranks)
    # Experts of one rank have other widths, and so other tensors, than those of the other.
    jobs["expert parallel"] = qwen | at(BUDGET, **ranks, enable_expert_parallel=True)
    jobs["compiled"] = qwen | {"llm": {"enforce_eager": False, "additional_config": several}, "switch": [two]}
    told = {name: job | {"tokens": TOKENS} for name, job in jobs.items()}
    return run_jobs("engine_runs", told, tmp_path_factory.mktemp("results"))[0]


def assert_served(result: dict[str, Any], model: Path, widths: Any, switch: int = 0) -> None:
    assert "error" not in result, result["error"]
    expected = log_probabilities(reference_model(model, widths), TOKENS)
    torch.testing.assert_close(result["log_probabilities"][switch], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("name", "bits"), SERVED)
def test_served(results: dict[Any, dict[str, Any]], models: Path, name: str, bits: Any) -> None:
    assert_served(results[name, bits], models / name, RECIPE if bits == "mixed" else bits)
    assert results[name, bits]["resident_bytes"] == results[name, bits]["predicted_bytes"]


def test_compiled_and_switched(results: dict[Any, dict[str, Any]], models: Path) -> None:
    assert_served(results["compiled"], models / "qwen3_moe", 8)
    assert_served(results["compiled"], models / "qwen3_moe", 2, switch=1)


def test_tensor_parallel(results: dict[Any, dict[str, Any]], models: Path) -> None:
    assert_served(results["parallel"], models / "qwen3_moe", 3)


def test_expert_parallel(results: dict[Any, dict[str, Any]], models: Path) -> None:
    result, checkpoint = results["expert parallel"], open_checkpoint(models / "qwen3_moe")
    assert_served(result, models / "qwen3_moe", RECIPE)
    widths = checkpoint.slice("mixed").widths
    experts = [{name: width for name, width in widths.items() if owner(name) == rank} for rank in range(2)]
    others = bytes_of_rank(checkpoint, {name: width for name, width in widths.items() if owner(name) is None}, 2)
    expected = [others + bytes_of_rank(checkpoint, own, 1) for own in experts]
    assert result["resident_bytes"] == result["predicted_bytes"] == expected
    assert expected[0] != expected[1]


def owner(layer: str) -> int | None:
    """The rank that computes a layer of an expert; None of other layers, which ranks share."""
    expert = re.search(r"experts\.(\d)", layer)
    return None if expert is None else int(expert[1]) // 2


@pytest.fixture(scope="module")
def elastic(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, dict[str, Any]]:
    """A server of three slices, and one of each of them alone, in bytes the same."""
    model = str(models / "qwen3_moe")
    recipe = dict(open_checkpoint(model).slice("mixed").widths)
    alone: dict[Any, dict[str, Any]] = {
        8: {"bits": 8},
        2: {"bits": 2},
        "mixed": {"recipe": recipe},
    }
    steps: dict[Any, list[dict[str, Any]]] = {choice: [{"run": [None] * 4}] for choice in alone}
    settings: dict[Any, dict[str, Any]] = alone | {"elastic": {"bits": 8, "elastic": [2, 8, "mixed"]}}
    steps["elastic"] = [{"run": [8, 2, "mixed", None]}, {"switch": 2}, {"run": [None] * 4}]
    jobs = {
        name: {"model": model, "llm": {"additional_config": {"matquant": own}}, "steps": steps[name]}
        for name, own in settings.items()
    }
    return run_jobs("elastic.elastic_runs", jobs, tmp_path_factory.mktemp("elastic"))[0]


def test_each_request_has_the_bytes_of_a_server_at_its_slice(elastic: dict[Any, dict[str, Any]]) -> None:
    assert "error" not in elastic["elastic"], elastic["elastic"]
    mixed, switched = elastic["elastic"]["runs"]
    for place, choice in enumerate([8, 2, "mixed", 8]):
        assert torch.equal(mixed[place], elastic[choice]["runs"][0][place])
    for place in range(4):
        assert torch.equal(switched[place], elastic[2]["runs"][0][place])


LATENT: dict[str, Any] = {
    **{"num_key_value_heads": 4, "head_dim": 64, "q_lora_rank": 64, "kv_lora_rank": 512, "first_k_dense_replace": 1},
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_shared_experts": 2},
    **{"n_group": 1, "topk_group": 1, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
}
METHODS = {"deepseek_v2": "greedy", "deepseek_v3": "noaux_tc"}


def write_plain(folder: Path, checkpoint: Path, width: int) -> Path:
    """A model that is not quantized, of the dequantized weights of a slice."""
    opened = open_checkpoint(checkpoint)
    weights = {f"{layer}.weight": weight for layer, weight in opened.weights(opened.slice(width))}
    folder.mkdir()
    save_file(
        {name: tensor.clone() for name, tensor in (weights | dict(opened.unquantized())).items()},
        folder / "model.safetensors",
    )
    config = {name: value for name, value in opened.config.items() if name != "quantization_config"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("model_type", METHODS)
def test_latent_attention_as_vllm_serves_the_dequantized_weights(model_type: str, tmp_path: Path) -> None:
    """Compared with vLLM itself, which computes random weights of these models in another way than transformers."""
    options = LATENT | {"topk_method": METHODS[model_type]}
    model = write_checkpoint(tmp_path / "model", model_type, Format(group_size=32), 0, **options)
    plain = write_plain(tmp_path / "plain", model, 4)
    (tmp_path / "run").mkdir()
    jobs: dict[Any, dict[str, Any]] = {
        "quantized": at(4) | {"model": str(model), "tokens": TOKENS},
        "plain": {"llm": {}, "model": str(plain), "tokens": TOKENS},
    }
    found = run_jobs("engine_runs", jobs, tmp_path / "run")[0]
    assert not {name for name, each in found.items() if "error" in each}, found
    [quantized], [expected] = (found[name]["log_probabilities"] for name in jobs)
    torch.testing.assert_close(quantized, expected, rtol=0, atol=TOLERANCE)
