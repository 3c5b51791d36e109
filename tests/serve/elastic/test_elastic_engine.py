"""vLLM serving tiny models at several widths, against servers that hold one of them alone: the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.serve.engine_jobs import run_jobs
from tests.serve.tiny_models import EMBEDDINGS, own_decoder, write_checkpoint
from vllm_matquant.checkpoint.reader import open_checkpoint
from vllm_matquant.checkpoint.recipe import Recipe
from vllm_matquant.checkpoint.recipe_store import add_recipes
from vllm_matquant.checkpoint.spec import Format

pytestmark = pytest.mark.slow

TWO = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
COMPILED = {"enforce_eager": False}
# The widths at which a server of one width is started too, for the runs of a server that has been switched there: each
# width on one of the models, and few where a start takes long.
COLD: dict[tuple[str, str], tuple[dict[str, Any], tuple[Any, ...]]] = {
    ("untied", "eager"): ({}, (2, 4, 5, 7, "mixed")),
    ("tied", "eager"): ({}, (3, 6, 8, "mixed")),
    ("untied", "compiled"): (COMPILED, (2, 5, 8)),
    ("tied", "parallel"): (TWO, (3,)),
    ("untied", "parallel, compiled"): (TWO | COMPILED, (2,)),
}
MIX = [8, 3, 2, None]
MIXED = {"embed": 3, "q_proj": 2, "k_proj": 4, "v_proj": 5, "o_proj": 3, "gate_proj": 3, "up_proj": 2, "down_proj": 4,
         "lm_head": 4}  # fmt: skip


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    kinds: dict[str, dict[str, Any]] = {"untied": {"attention_bias": True}, "tied": {"tie_word_embeddings": True}}
    for seed, (name, options) in enumerate(kinds.items()):
        write_checkpoint(root / name, "llama", Format(group_size=32, **EMBEDDINGS), seed, **options)
        checkpoint = open_checkpoint(root / name)
        widths = {layer: width for layer in checkpoint.layers for part, width in MIXED.items() if part in layer}
        own = {layer: own_decoder(checkpoint.decoder(layer, width)) for layer, width in widths.items()}
        with_own = name == "untied"  # decoders that its recipe alone has, beside those of the plain widths
        recipe = Recipe("mixed", widths, kl=0.5, own_decoders=with_own)
        add_recipes(checkpoint, [recipe], {"mixed": own} if with_own else None)
    write_checkpoint(root / "rounded", "llama", Format(group_size=32, slicing="round"), 3)
    return root


def settings(**fields: Any) -> dict[str, Any]:
    return {"additional_config": {"matquant": fields}}


def alone(models: Path, name: str, choice: Any) -> dict[str, Any]:
    """The settings of a server that holds one slice."""
    if isinstance(choice, int):
        return settings(bits=choice)
    return settings(recipe=dict(open_checkpoint(models / name).slice(choice).widths))


Results = dict[tuple[str, str], dict[Any, dict[str, Any]]]
OTHER = ("untied", "other")


@pytest.fixture(scope="session")
def results(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What the engines of each model and each way to serve it gave; one process runs all of them, one after the other,
    for to start it takes longer than most of the engines."""
    jobs = {each: jobs_of(models, *each) for each in COLD} | {OTHER: other_jobs(models)}
    told = {(each, name): job for each, named in jobs.items() for name, job in named.items()}
    found = run_jobs("elastic.elastic_runs", told, tmp_path_factory.mktemp("engines"))[0]
    return {each: {name: found[each, name] for name in named} for each, named in jobs.items()}


def jobs_of(models: Path, name: str, how: str) -> dict[Any, dict[str, Any]]:
    """Servers of one width, and one that is switched to all of these."""
    llm, choices = COLD[name, how]
    model, every = str(models / name), [None] * len(MIX)
    jobs: dict[Any, dict[str, Any]] = {
        choice: {"model": model, "llm": llm | alone(models, name, choice), "steps": [{"run": every}]}
        for choice in choices
    }
    warm: list[dict[str, Any]] = [{"run": every}]
    for choice in choices:
        warm += [{"switch": choice}, {"run": every}]
    warm += [{"switch": choices[0]}, {"run": MIX}, {"switch": 8}, {"run": every}]
    jobs["warm"] = {"model": model, "llm": llm | settings(bits=8, elastic="2..8,mixed"), "steps": warm}
    return jobs


def other_jobs(models: Path) -> dict[Any, dict[str, Any]]:
    """Servers and requests that are refused."""
    model = {"model": str(models / "untied")}
    steps = [{"run": [4, 2]}, {"run": [8]}, {"run": [3]}, {"switch": 3}, {"run": [None]}]
    return {
        "even": model | {"llm": settings(elastic=[2, 4, 8], client_bits=[2, 4]), "steps": steps},
        "plain": model | {"llm": settings(bits=8), "steps": [{"run": [4]}, {"switch": 4}]},
        "rounded": {"model": str(models / "rounded"), "llm": settings(elastic=[2, 8]), "steps": []},
        "unknown": model | {"llm": settings(elastic=["other", 8]), "steps": []},
    }


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(a, b), f"request {index}: up to {(a - b).abs().max()} apart"


@pytest.mark.parametrize(("name", "how"), COLD)
def test_a_switched_server_gives_the_bytes_of_one_that_started_there(results: Results, name: str, how: str) -> None:
    found = results[name, how]
    warm = found["warm"]
    assert "error" not in warm, warm
    for place, choice in enumerate(COLD[name, how][1], 1):
        assert_same(warm["runs"][place], found[choice]["runs"][0])
        assert (warm["runs"][place][0] - warm["runs"][0][0]).abs().max() > 1e-3 or choice == 8


@pytest.mark.parametrize(("name", "how"), COLD)
def test_requests_of_one_batch_have_the_bytes_of_servers_at_their_widths(results: Results, name: str, how: str) -> None:
    found, choices = results[name, how], COLD[name, how][1]
    mixed = found["warm"]["runs"][-2]
    compared = 0
    for request, asked in enumerate(MIX):
        choice = choices[0] if asked is None else asked
        alone = found[choice]["runs"][0] if choice in found else found["warm"]["runs"][0] if choice == 8 else None
        if alone is not None:
            assert torch.equal(mixed[request], alone[request]), (request, choice)
            compared += 1
    assert compared >= 3


@pytest.mark.parametrize(("name", "how"), COLD)
def test_back_at_the_first_width_prompts_in_the_cache_are_its_own(results: Results, name: str, how: str) -> None:
    runs = results[name, how]["warm"]["runs"]
    for a, b in zip(runs[-1], runs[0], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)  # a prompt in the cache is computed in other steps


@pytest.mark.parametrize(("name", "how"), COLD)
def test_no_address_changes_and_all_processes_switch(results: Results, name: str, how: str) -> None:
    found = results[name, how]
    warm = found["warm"]
    assert not warm["moved"]
    assert len(warm["states"]) == (1 if how in ("eager", "compiled") else 2)
    for state in warm["states"]:
        assert state["active"] == "uniform-8"
        assert state["tokens"]["uniform-3"] > 0
        assert (state["tokens"]["mixed"] > 0) == ("mixed" in COLD[name, how][1])
    if how == "compiled":  # one width's graph is another's, and one switched server has one
        assert found[2]["generated"] > 0
        assert found[5]["generated"] == found[8]["generated"] == 0
        assert 0 < warm["generated"] <= found[2]["generated"]


def test_what_is_not_offered_is_refused(results: Results) -> None:
    runs = results[OTHER]["even"]["runs"]
    assert isinstance(runs[0], list)
    assert runs[1:4] == [
        "VLLMValidationError: matquant_bits: found 8, expected one of 4, 2 (parameter=matquant_bits, value=8)",
        "VLLMValidationError: matquant_bits: found 3, expected one of 4, 2 (parameter=matquant_bits, value=3)",
        "OfferError: found 3, expected one of 8, 4, 2",
    ]
    assert isinstance(runs[4], list)


def test_a_server_with_one_width_says_so(results: Results) -> None:
    asked, switched = results[OTHER]["plain"]["runs"]
    assert "this server has one width; with --elastic" in asked
    assert "an engine with one width" in switched


def test_offers_that_cannot_be_served(results: Results) -> None:
    found = results[OTHER]
    assert "rounded slices" in found["rounded"]["error"]
    assert "'other'" in found["unknown"]["error"]
