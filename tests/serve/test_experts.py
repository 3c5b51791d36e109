"""vLLM serving tiny mixtures of experts, against transformers with the dequantized slices as its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.serve.engine_jobs import run_jobs
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
    jobs["expert parallel"] = qwen | at(4, enable_expert_parallel=True)
    several = {"matquant": {"bits": 8, "resident": [2, 8]}}
    two = {"": 2}
    jobs["parallel"] = qwen | at(3, tensor_parallel_size=2, distributed_executor_backend="mp")
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


def test_experts_are_not_divided_between_ranks(results: dict[Any, dict[str, Any]]) -> None:
    assert "enable_expert_parallel: found True, expected false" in results["expert parallel"]["error"]


def test_tensor_parallel(results: dict[Any, dict[str, Any]], models: Path) -> None:
    assert_served(results["parallel"], models / "qwen3_moe", 3)


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
