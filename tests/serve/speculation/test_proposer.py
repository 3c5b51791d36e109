"""What a proposer measures, by a clock that passes of a model move; no model is made."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.spec_decode.draft_model import DraftModelProposer

from vllm_matquant.serve.speculation import proposer
from vllm_matquant.serve.speculation.payoff import Payoff
from vllm_matquant.serve.speculation.proposer import SliceProposer

REQUESTS, TOKENS = 3, 2
DRAFT, PLAIN, CHECK, BETWEEN = 1.0, 4.0, 6.0, 0.5  # seconds


class Clock:
    """Seconds that passes take."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(proposer, "time", clock)
    return clock


@pytest.fixture
def drafting(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A proposer of no model, whose passes take the times above."""
    made: Any = SliceProposer.__new__(SliceProposer)
    made.model = torch.nn.Module()
    made._layers, made._payoff, made._ended, made._began = [], Payoff(TOKENS, wanted=2), clock.now, clock.now

    def run_pass(seconds: float) -> None:
        made._note_beginning()
        clock.now += seconds

    def propose(*_: Any, **__: Any) -> torch.Tensor:
        for _ in range(TOKENS):
            run_pass(DRAFT)
        return torch.zeros(REQUESTS, TOKENS)

    def plain_pass(_: int) -> float:
        run_pass(PLAIN)
        return PLAIN

    monkeypatch.setattr(DraftModelProposer, "propose", propose)
    monkeypatch.setattr(SliceProposer, "_time_plain_pass", lambda self, requests: plain_pass(requests))
    monkeypatch.setattr(proposer, "get_tensor_model_parallel_rank", lambda: 0)
    made.run_pass = run_pass
    return made


def step(drafting: Any, clock: Clock, tokens: int, rejected: torch.Tensor | None) -> None:
    clock.now += BETWEEN
    drafting.run_pass(CHECK)
    metadata = SimpleNamespace(
        batch_size=lambda: REQUESTS,
        query_start_loc=torch.arange(REQUESTS + 1),
        seq_lens=torch.full((REQUESTS,), 9),
        replace=lambda **_: None,
    )
    drafting.propose(TOKENS, torch.zeros(tokens), common_attn_metadata=metadata, num_rejected_tokens_gpu=rejected)


def test_what_is_measured(drafting: Any, clock: Clock) -> None:
    payoff = drafting._payoff
    step(drafting, clock, 40, None)  # prompts
    step(drafting, clock, REQUESTS * (TOKENS + 1) - 2, torch.tensor([1, 0, 0]))  # one request had no drafts yet
    assert payoff._drafted == 0
    for rejected in ([2, 0, 1], [0, 0, 0]):
        step(drafting, clock, REQUESTS * (TOKENS + 1), torch.tensor(rejected))
    assert payoff.is_settled()
    assert payoff.acceptance == pytest.approx(9 / 12)
    assert payoff._drafting == [TOKENS * DRAFT] * 2
    assert payoff._checking == [BETWEEN + CHECK] * 2
    assert payoff._plain == [BETWEEN + PLAIN] * 2
    assert payoff.gain == pytest.approx((1 + 1.5) * 4.5 / (2 + 6.5))
    step(drafting, clock, REQUESTS * (TOKENS + 1), torch.tensor([2, 2, 2]))
    assert payoff.acceptance == pytest.approx(9 / 12)


@pytest.mark.parametrize(("rejected", "level"), [(0, "INFO"), (2, "WARNING")])
def test_what_it_says_of_it(
    drafting: Any, clock: Clock, rejected: int, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[tuple[str, str]] = []
    log = SimpleNamespace(
        info=lambda text, payoff: said.append(("INFO", text % payoff)),
        warning=lambda text, payoff: said.append(("WARNING", text % payoff)),
    )
    monkeypatch.setattr(proposer, "logger", log)
    for _ in range(5):
        step(drafting, clock, REQUESTS * (TOKENS + 1), torch.full((REQUESTS,), rejected))
    assert [each[0] for each in said] == [level]
    assert ("does not pay" in said[0][1]) == (level == "WARNING")
