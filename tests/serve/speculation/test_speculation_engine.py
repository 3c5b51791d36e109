"""vLLM serving tiny models whose narrow slices draft, against the same servers without drafts."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.serve.engine_jobs import run_jobs
from tests.serve.tiny_models import EMBEDDINGS, log_probabilities, own_decoder, reference_model, write_checkpoint
from vllm_matquant.checkpoint.reader import open_checkpoint
from vllm_matquant.checkpoint.recipe import Recipe
from vllm_matquant.checkpoint.recipe_store import add_recipes
from vllm_matquant.checkpoint.spec import Format

pytestmark = pytest.mark.slow

MIXED = {"embed": 3, "q_proj": 5, "k_proj": 6, "v_proj": 7, "o_proj": 5, "gate_proj": 5, "up_proj": 6, "down_proj": 7,
         "lm_head": 6}  # fmt: skip
VOCABULARY = 8  # of the model that is sampled from
KINDS: dict[str, tuple[Format, dict[str, Any]]] = {
    "untied": (Format(group_size=32, **EMBEDDINGS), {"attention_bias": True}),
    "tied": (Format(group_size=32, **EMBEDDINGS), {"tie_word_embeddings": True}),
    "unquantized": (Format(group_size=64, ignored_layers=("lm_head", "model.layers.0.mlp.down_proj")), {}),
    "sampled": (Format(group_size=32, **EMBEDDINGS), {"vocab_size": VOCABULARY}),
}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for seed, (name, (checkpoint_format, options)) in enumerate(KINDS.items()):
        write_checkpoint(root / name, "llama", checkpoint_format, seed, **options)
        checkpoint = open_checkpoint(root / name)
        widths = {layer: width for layer in checkpoint.layers for part, width in MIXED.items() if part in layer}
        with_own = name == "untied"
        own = {layer: own_decoder(checkpoint.decoder(layer, width)) for layer, width in widths.items()}
        recipe = Recipe("mixed", widths, kl=0.5, own_decoders=with_own)
        add_recipes(checkpoint, [recipe], {"mixed": own} if with_own else None)
    return root


def some_tokens(seed: int, count: int) -> list[int]:
    return torch.randint(128, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


# Lengths around the ends of blocks of 16; the last two begin alike, so that one finds the other's blocks in the cache.
PROMPTS = [*(some_tokens(seed, count) for seed, count in enumerate((1, 15, 16, 17, 40))), some_tokens(4, 40)[:33]]
GREEDY = {"temperature": 0, "max_tokens": 30}
# Prompts come in parts beside requests that generate, and some requests end where the model has no positions left.
CROWDED = {"max_num_batched_tokens": 16, "max_num_seqs": 4, "enable_chunked_prefill": True}
UNTIL_THE_END = [GREEDY | {"max_tokens": 64 - len(prompt)} for prompt in PROMPTS]


def settings(**fields: Any) -> dict[str, Any]:
    return {"additional_config": {"matquant": fields}}


PARALLEL = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
COMPILED = {"enforce_eager": False}
# Of each model: the bits that it is served at, and drafts with arguments of their engines.
DRAFTS: dict[str, tuple[int, dict[str, tuple[dict[str, Any], dict[str, Any]]]]] = {
    "untied": (
        8,
        {
            "2, 1 ahead": ({"speculate_bits": 2, "speculate_tokens": 1}, {}),
            "4, 2 ahead": ({"speculate_bits": 4}, {}),
            "recipe, 3 ahead": ({"speculate_bits": "mixed", "speculate_tokens": 3}, {}),
            "7, 4 ahead": ({"speculate_bits": 7, "speculate_tokens": 4}, {}),
            "7, compiled": ({"speculate_bits": 7, "speculate_tokens": 3}, COMPILED),
        },
    ),
    "tied": (
        6,
        {
            "3, 3 ahead": ({"speculate_bits": 3, "speculate_tokens": 3}, {}),
            "3, parallel": ({"speculate_bits": 3, "speculate_tokens": 3}, PARALLEL),
        },
    ),
    "unquantized": (8, {"7, 4 ahead": ({"speculate_bits": 7, "speculate_tokens": 4}, {})}),
}
EACH = [(name, draft) for name, (_, drafts) in DRAFTS.items() for draft in drafts]
Results = dict[tuple[str, str], dict[str, Any]]
Logs = dict[tuple[str, str], str]


@pytest.fixture(scope="session")
def engines(models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Logs]:
    """What the engines gave, and what each of them wrote."""
    jobs = {
        ("sampled", ""): sampling_job(models / "sampled"),
        ("untied", "one request"): counted_job(models / "untied"),
    }
    for name, (bits, drafts) in DRAFTS.items():
        for draft, (fields, llm) in {"none": ({}, {}), **drafts}.items():
            jobs[name, draft] = {
                "model": str(models / name),
                "llm": CROWDED | settings(bits=bits, **fields) | llm,
                "prompts": PROMPTS,
                "runs": [UNTIL_THE_END, [GREEDY | {"max_tokens": 4}]],
            }
    folder = tmp_path_factory.mktemp("engines")
    return run_jobs("speculation.speculation_runs", jobs, folder, VLLM_LOGGING_LEVEL="INFO", OMP_NUM_THREADS="1")


@pytest.fixture(scope="session")
def results(engines: tuple[Results, Logs]) -> Results:
    return engines[0]


@pytest.mark.parametrize(("name", "draft"), EACH)
def test_drafts_change_no_greedy_answer(results: Results, name: str, draft: str) -> None:
    found = results[name, draft]
    assert "error" not in found, found
    assert found["tokens"] == results[name, "none"]["tokens"]
    assert [len(each) for each in found["tokens"][0]] == [64 - len(prompt) for prompt in PROMPTS]


@pytest.mark.parametrize(("name", "draft"), EACH)
def test_drafts_are_accepted(results: Results, name: str, draft: str) -> None:
    found = results[name, draft]
    share = found["accepted"] / found["drafts"]
    if draft.startswith("7"):
        # A slice that says what the served one says: every pass of a draft must read what it should to come so far.
        assert share > 0.7
        assert found["by_position"][-1] > 0.6 * found["by_position"][0]
    elif draft.startswith("recipe"):
        assert share < 0.1  # its own decoders, which are far off, take the place of the plain ones
    else:
        assert 0.1 < share < 1


@pytest.mark.parametrize(("name", "draft"), [each for each in EACH if "parallel" not in each[1]])
def test_only_the_drafts_decoders_are_in_memory_besides(
    models: Path, engines: tuple[Results, Logs], name: str, draft: str
) -> None:
    results, logs = engines
    found, alone = results[name, draft], results[name, "none"]
    checkpoint = open_checkpoint(models / name)
    decoders = 0
    for layer, width in checkpoint.slice(DRAFTS[name][1][draft][0]["speculate_bits"]).widths.items():
        rows, groups = checkpoint.decoder(layer, width).affine.scale.shape
        decoders += checkpoint.format.decoder_kind.form(width).nbytes(rows, groups)
    if draft.startswith("recipe"):  # decoders of its own, and the plain ones of its widths
        decoders *= 2
    assert found["bytes"][0] - alone["bytes"][0] == decoders
    assert f"this costs {decoders} bytes on this rank" in logs[name, draft]
    assert found["blocks"] == alone["blocks"]


def test_an_engine_says_once_whether_drafts_pay(engines: tuple[Results, Logs]) -> None:
    _, logs = engines
    said = {key: log.count("Speculation pays: ") + log.count("Speculation does not pay: ") for key, log in logs.items()}
    assert said["untied", "2, 1 ahead"] == 1  # which had steps enough
    assert max(said.values()) == 1
    assert said["untied", "none"] == 0


AHEAD, COUNT = 3, 45


def counted_job(model: Path) -> dict[str, Any]:
    return {
        "model": str(model),
        "llm": settings(bits=8, speculate_bits=4, speculate_tokens=AHEAD),
        "prompts": [PROMPTS[1]],
        "runs": [[{"temperature": 0, "max_tokens": COUNT}]],
    }


@torch.no_grad()
def test_drafts_are_what_the_draft_says_after_what_the_served_slice_has_read(models: Path, results: Results) -> None:
    served, draft = (reference_model(models / "untied", width) for width in (8, 4))
    prompt, drafted, accepted = PROMPTS[1], 0, 0
    tokens = [*prompt, int(served(torch.tensor([prompt])).logits[0, -1].argmax())]
    while len(tokens) < len(prompt) + COUNT:
        cache, guesses = served(torch.tensor([tokens[:-1]])).past_key_values, tokens[-1:]
        for _ in range(AHEAD):
            logits = draft(torch.tensor([guesses[-1:]]), past_key_values=cache).logits
            guesses.append(int(logits[0, -1].argmax()))
        said = served(torch.tensor([tokens[:-1] + guesses])).logits[0, len(tokens) - 1 :].argmax(-1).tolist()
        kept = next((place for place, token in enumerate(guesses[1:]) if token != said[place]), AHEAD)
        tokens += said[: kept + 1]
        drafted, accepted = drafted + AHEAD, accepted + kept
    found = results["untied", "one request"]
    assert found["tokens"][0][0] == tokens[len(prompt) :][:COUNT]
    assert 0.2 * drafted < accepted < 0.8 * drafted  # else it would say little
    assert found["drafts"] == drafted
    assert found["accepted"] == pytest.approx(accepted, abs=AHEAD)  # the last step may end within its drafts


# Of requests that sample, all in the same batches.
SAMPLING = [
    {"temperature": 1.0},
    {"temperature": 0.5},
    {"temperature": 1.5, "top_k": 3},
    {"temperature": 2.0, "top_p": 0.7},
    {"temperature": 0.7, "top_k": 5, "top_p": 0.8},
]
PROMPT = [3, 1, 4, 1, 5]
REQUESTS = 1200  # of each


def sampling_job(model: Path) -> dict[str, Any]:
    greedy = {"temperature": 0, "max_tokens": 4}
    many = [*({"max_tokens": 4} | each for each in SAMPLING), greedy] * REQUESTS
    seeded = [{"max_tokens": 12, "temperature": 1.0, "seed": seed} for seed in range(8)]
    return {
        "model": str(model),
        "llm": {"max_num_seqs": 250, "seed": 1} | settings(bits=8, speculate_bits=3),
        "prompts": [PROMPT],
        "runs": [many, seeded, seeded],
    }


@pytest.fixture(scope="session")
def sampled(results: Results) -> dict[str, Any]:
    return results["sampled", ""]


def probabilities(logits: torch.Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
    """Of the next token: [vocabulary]."""
    kept = (logits / temperature).softmax(-1)
    if top_k:
        kept = torch.where(kept >= kept.sort(descending=True).values[top_k - 1], kept, 0.0)
        kept = kept / kept.sum()
    order = kept.argsort(descending=True)
    before = kept[order].cumsum(-1) - kept[order]
    kept[order[before >= top_p]] = 0
    return kept / kept.sum()


@pytest.fixture(scope="session")
def next_logits(models: Path) -> Callable[[tuple[int, ...]], torch.Tensor]:
    model = reference_model(models / "sampled", 8)
    return functools.cache(lambda after: log_probabilities(model, [*PROMPT, *after, 0])[-1].double())


@pytest.mark.parametrize("which", range(len(SAMPLING)), ids=map(str, SAMPLING))
def test_samples_are_those_of_the_served_slice(
    sampled: dict[str, Any], next_logits: Callable[[tuple[int, ...]], torch.Tensor], which: int
) -> None:
    assert 0.1 < sampled["accepted"] / sampled["drafts"] < 0.95
    tokens = sampled["tokens"][0][which :: len(SAMPLING) + 1]
    # The first token is sampled without drafts, the second and third are drafts or what took their place.
    expected = torch.zeros(VOCABULARY, VOCABULARY, dtype=torch.float64)
    for first, second in itertools.product(range(VOCABULARY), repeat=2):
        of_first = probabilities(next_logits(()), **SAMPLING[which])[first]
        of_second = probabilities(next_logits((first,)), **SAMPLING[which])[second]
        expected[second] += of_first * of_second * probabilities(next_logits((first, second)), **SAMPLING[which])
    counts = torch.zeros_like(expected)
    for _, second, third, _ in tokens:
        counts[second, third] += 1
    assert len(tokens) == REQUESTS == counts.sum()
    distance = (counts / REQUESTS - expected).abs().sum() / 2
    # What chance alone gives on average, and four times what it strays by.
    by_chance = (expected * (1 - expected) / REQUESTS).sqrt().sum() / 2
    assert distance < by_chance + 4 * (1 / (4 * REQUESTS)) ** 0.5
    assert not counts[expected == 0].any()


def test_greedy_requests_among_others_are_greedy(
    sampled: dict[str, Any], next_logits: Callable[[tuple[int, ...]], torch.Tensor]
) -> None:
    expected: tuple[int, ...] = ()
    for _ in range(4):
        expected += (int(next_logits(expected).argmax()),)
    for tokens in sampled["tokens"][0][len(SAMPLING) :: len(SAMPLING) + 1]:
        assert tuple(tokens) == expected


def test_a_seed_gives_the_same_answer_again(sampled: dict[str, Any]) -> None:
    _, first, second = sampled["tokens"]
    assert first == second
    assert len({tuple(each) for each in first}) > 1
