"""vLLM serving LoRA adapters on quantized layers, against transformers with deltas added to the dequantized weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.lora.layers import LoRAMapping

from tests.serve.adapter_runs import TOKENS
from tests.serve.engine_jobs import run_jobs
from tests.serve.tiny_adapters import add_adapter, write_adapter
from tests.serve.tiny_models import EMBEDDINGS, reference_model, write_checkpoint
from vllm_matquant.checkpoint.reader import open_checkpoint
from vllm_matquant.checkpoint.spec import Format
from vllm_matquant.serve.adapters import AdapterRows

TOLERANCE = 1e-4
VOCABULARY = 120  # which vLLM pads
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
# Of "some" parts of fused layers have none.
TARGETS = {"all": [*LINEAR, "embed_tokens", "lm_head"], "some": ["q_proj", "v_proj", "up_proj", "down_proj"]}
RANKS = {"all": (4, 8), "some": (8, 4)}  # and alpha
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
MODELS: dict[str, tuple[str, Format, dict[str, Any]]] = {
    # Biases in every linear layer, so that row-parallel ones have some too.
    "llama": ("llama", Format(group_size=32, **EMBEDDINGS), {"attention_bias": True, "mlp_bias": True}),
    "tied": ("llama", Format(group_size=32, **EMBEDDINGS), {"tie_word_embeddings": True}),
    "mixture": ("qwen3_moe", Format(group_size=32), EXPERTS),
}
# Longer than a block of the cache of prompts, and of lengths of their own.
PROMPTS = [
    torch.randint(VOCABULARY, (size,), generator=torch.Generator().manual_seed(size)).tolist() for size in (35, 40, 7)
]


SLOTS = [7, None, 5]  # adapters in vLLM's slots, by their numbers
RANK, INPUTS, SLICES = 4, 24, (16, 8)


def mapped(tokens: list[int], samples: list[int]) -> AdapterRows:
    """Rows of a step whose tokens, and those to sample from, have these adapters; 0 for none."""
    rows = AdapterRows(max_num_batched_tokens=64, max_batches=8, device="cpu")
    rows.update_metadata(LoRAMapping(tuple(tokens), tuple(samples), is_prefill=True), SLOTS, len(SLOTS) + 1, 100)
    return rows


def random_matrices(generator: torch.Generator, rows: int, columns: int) -> torch.Tensor:
    return torch.randn(len(SLOTS), 1, rows, columns, generator=generator)


def delta(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor, adapters: list[int]) -> torch.Tensor:
    """What adapters add to the rows of ``x``, one row at a time."""
    found = torch.zeros(len(x), second.shape[2], dtype=torch.float64)
    for row, adapter in enumerate(adapters):
        if adapter:
            slot = SLOTS.index(adapter)
            found[row] = second[slot, 0].double() @ (first[slot, 0].double() @ x[row].double())
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tokens", [[0, 5, 5, 7, 0, 7, 5], [7, 7, 7], [0, 0], [5], [0, 7]], ids=str)
def test_what_is_added_to_rows(tokens: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(len(tokens), INPUTS, generator=generator), torch.randn(len(tokens), 24, generator=generator)
    first = [random_matrices(generator, RANK, INPUTS) for _ in SLICES]
    second = [random_matrices(generator, size, RANK) for size in SLICES]
    expected = y + torch.cat([delta(x, *each, tokens) for each in zip(first, second, strict=True)], dim=1)
    rows, found = mapped(tokens, [tokens[-1]]), y.clone()
    rows.add_lora_linear(found, x, tuple(first), tuple(second), 1.0, SLICES)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)
    # Of an embedding the first product is a look-up, which is given.
    found, looked_up = y[:, :16].clone(), torch.randn(len(tokens), RANK, generator=generator)
    rows.add_lora_embedding(found, looked_up, second[0], add_input=True)
    identity = torch.eye(RANK).expand(len(SLOTS), 1, -1, -1)
    expected = y[:, :16] + delta(looked_up, identity, second[0], tokens)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)


def test_what_is_added_to_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, samples = [0, 5, 5, 7, 0, 7, 5], [0, 5, 7, 5]
    rows, step = mapped(tokens, samples), torch.randn(len(tokens), INPUTS, generator=generator)
    first, second = random_matrices(generator, RANK, INPUTS), random_matrices(generator, 20, RANK)
    picked = step[[0, 2, 5, 6]]  # a copy, to sample from
    for hidden, adapters in [(picked, samples), (step[1:5], tokens[1:5]), (step, tokens)]:
        logits = torch.randn(len(hidden), 24, generator=generator)  # padded
        expected = logits.double()
        expected[:, :20] += delta(hidden, first, second, adapters)
        rows.add_lora_logits(logits, hidden, first, second, 1.0)
        torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-4)
    with pytest.raises(RuntimeError, match="output head: found 2, expected 4"):
        rows.add_lora_logits(torch.zeros(2, 24), torch.zeros(2, INPUTS), first, second, 1.0)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapted")
    for seed, (name, (model_type, checkpoint_format, options)) in enumerate(MODELS.items()):
        folder = write_checkpoint(root / name, model_type, checkpoint_format, seed, vocab_size=VOCABULARY, **options)
        model = reference_model(folder, 8)
        for adapter, targets in TARGETS.items():
            chosen = ATTENTION if name == "mixture" else targets
            write_adapter(root / "adapters" / name / adapter, model, chosen, *RANKS[adapter], seed=seed)
    return root


def asked(*requests: tuple[int, str | None, int | None]) -> list[Any]:
    return [[PROMPTS[prompt], adapter, bits] for prompt, adapter, bits in requests]


# Every width with every adapter and without, of one prompt, so that the cache of prompts would mix them up.
EACH = [(0, adapter, bits) for bits in (8, 4, 2) for adapter in ("all", "some", None)]
DEFAULT = [(1, "some", None), (2, None, None), (1, "all", None), (1, "some", None)]
ONE_BY_ONE = [(0, "all", None), (1, None, None), (2, "some", None), (0, None, None)]


@pytest.fixture(scope="module")
def results(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, dict[str, Any]]:
    def job(name: str, steps: list[Any], settings: dict[str, Any], **llm: Any) -> dict[str, Any]:
        return {
            "model": str(models / name),
            "adapters": {adapter: str(models / "adapters" / name / adapter) for adapter in TARGETS},
            "llm": {"additional_config": {"matquant": settings}, "max_loras": 2} | llm,
            "steps": steps,
        }

    jobs = {
        "elastic": job(
            "llama",
            [{"run": asked(*EACH)}, {"cached": asked(*EACH)}, {"switch": 2}, {"run": asked(*DEFAULT)}],
            {"bits": 8, "elastic": [2, 4, 8]},
            max_num_seqs=len(EACH), block_size=32, enable_prefix_caching=True,
        ),
        # One adapter at a time in a batch, beside requests without any.
        "parallel": job(
            "tied", [{"run": asked(*ONE_BY_ONE)}], {"bits": 4},
            max_loras=1, tensor_parallel_size=2, distributed_executor_backend="mp",
        ),
        "drafts": job("llama", [{"run": asked(*DEFAULT)}], {"bits": 8, "speculate_bits": 7, "speculate_tokens": 2}),
        "mixture": job("mixture", [{"run": asked(*DEFAULT)}], {"bits": 4}, lora_target_modules=ATTENTION),
    }  # fmt: skip
    return run_jobs("adapter_runs", jobs, tmp_path_factory.mktemp("adapters"))[0]


@torch.no_grad()
def assert_served(models: Path, name: str, run: list[dict[str, Any]], requests: list[Any], bits: int) -> None:
    """Log-probabilities are the reference's, of a batch whose requests are computed at ``bits`` unless they ask."""
    known: dict[Any, torch.nn.Module] = {}
    for result, (prompt, adapter, own) in zip(run, requests, strict=True):
        chosen = adapter, own or bits
        if chosen not in known:
            model = reference_model(models / name, chosen[1])
            known[chosen] = model if adapter is None else add_adapter(model, models / "adapters" / name / adapter)
        tokens = PROMPTS[prompt] + result["tokens"]
        expected = known[chosen](torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
        torch.testing.assert_close(result["rows"], expected[-len(result["rows"]) :], rtol=0, atol=TOLERANCE)


def told(results: dict[Any, dict[str, Any]], name: str) -> dict[str, Any]:
    assert "error" not in results[name], results[name]["error"]
    assert results[name]["resident_bytes"] == results[name]["predicted_bytes"]
    return results[name]


@pytest.mark.slow
def test_adapters_and_widths_in_one_batch(models: Path, results: dict[Any, dict[str, Any]]) -> None:
    assert_served(models, "llama", told(results, "elastic")["runs"][0], EACH, 8)


@pytest.mark.slow
def test_what_is_cached_of_a_prompt_is_found_by_its_width_and_adapter(
    models: Path, results: dict[Any, dict[str, Any]]
) -> None:
    run = told(results, "elastic")["runs"][1]
    assert [request["cached"] for request in run] == [32] * len(EACH)
    assert_served(models, "llama", run, EACH, 8)


@pytest.mark.slow
def test_a_switch_under_adapters(models: Path, results: dict[Any, dict[str, Any]]) -> None:
    assert_served(models, "llama", told(results, "elastic")["runs"][2], DEFAULT, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "model", "requests", "bits"),
    [
        ("parallel", "tied", ONE_BY_ONE, 4),
        ("drafts", "llama", DEFAULT, 8),
        ("mixture", "mixture", DEFAULT, 4),
    ],
)
def test_served(
    models: Path, results: dict[Any, dict[str, Any]], name: str, model: str, requests: list[Any], bits: int
) -> None:
    [run] = told(results, name)["runs"]
    assert_served(models, model, run, requests, bits)
    assert all(len(request["tokens"]) == TOKENS for request in run)


@pytest.mark.slow
def test_layers_that_vllm_wraps_are_counted_once(models: Path, results: dict[Any, dict[str, Any]]) -> None:
    expected = open_checkpoint(models / "mixture").slice(4).resident_bytes
    assert told(results, "mixture")["resident_bytes"] == [expected]


@pytest.mark.slow
def test_drafts_are_made_with_the_adapters_of_their_requests(results: dict[Any, dict[str, Any]]) -> None:
    drafts = told(results, "drafts")
    assert drafts["drafts"] > 0
    assert drafts["accepted"] / drafts["drafts"] > 0.75


@torch.no_grad()
def test_peft_reads_the_adapters_of_these_tests_as_they_do(models: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT, the reference for adapters' files, is not installed")
    tokens = torch.tensor([PROMPTS[0]])
    for name in ("llama", "tied"):
        for adapter in TARGETS:
            folder = models / "adapters" / name / adapter
            expected = peft.PeftModel.from_pretrained(reference_model(models / name, 4), folder)(tokens).logits
            found = add_adapter(reference_model(models / name, 4), folder)(tokens).logits
            torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
