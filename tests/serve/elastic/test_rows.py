"""Which slice each row of a step is computed with, while requests come and go."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import Module
from vllm import SamplingParams
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality

from tests.serve.elastic.slices import an_offer
from vllm_matquant.serve.elastic import rows as rows_module
from vllm_matquant.serve.elastic.batch import BatchSlots
from vllm_matquant.serve.elastic.requests import SLICE
from vllm_matquant.serve.elastic.rows import RowSlots


def new_rows(requests: list[int], active: int = 0) -> RowSlots:
    rows = RowSlots(12, 4, active)
    rows.requests = requests
    return rows


def test_each_token_has_the_slice_of_its_request() -> None:
    rows = new_rows([2, 0, 1])
    rows.begin_step([0, 3, 4, 6])
    assert rows.tokens.tolist() == [2, 2, 2, 0, 1, 1] + [1] * 6
    assert rows.computed == [1, 2, 3, 0]
    rows.requests = [0]
    rows.begin_step([0, 1])
    assert rows.tokens.tolist() == [0] * 12
    assert rows.computed == [2, 2, 3, 0]


def test_padding_of_starts_is_not_read() -> None:
    rows = new_rows([3, 1])
    rows.begin_step([0, 2, 5, 5, 5])
    assert rows.tokens[:5].tolist() == [3, 3, 1, 1, 1]


def test_a_step_of_no_request_is_computed_with_the_active_slice() -> None:
    rows = new_rows([1])
    rows.begin_step([0, 4])
    rows.requests = []
    rows.switch(2)
    rows.begin_step([0])
    assert rows.tokens.tolist() == [2] * 12
    rows.begin_head(torch.empty(5, 8))
    assert rows.heads.tolist() == [2] * 12


def test_a_step_with_fewer_requests_than_the_batch_is_refused() -> None:
    with pytest.raises(RuntimeError, match="found 1 requests in a step, expected 2"):
        new_rows([0, 1]).begin_step([0, 4])


def test_rows_of_an_output_head() -> None:
    rows = new_rows([2, 0, 1])
    hidden = torch.randn(9, 8)
    rows.begin_step([0, 4, 5, 9])
    rows._end_step(hidden)
    rows.begin_head(hidden[[3, 4, 8]])  # one row for each request
    assert rows.heads[:3].tolist() == [2, 0, 1]
    rows.begin_head(hidden[3:6])  # log-probabilities of a prompt, here of several
    assert rows.heads[:3].tolist() == [2, 0, 1]
    rows.begin_head(hidden[5:9])
    assert rows.heads[:4].tolist() == [1, 1, 1, 1]
    with pytest.raises(RuntimeError, match="found 2, expected one for each of 3"):
        rows.begin_head(torch.randn(2, 8))


def test_addresses_stay() -> None:
    rows = new_rows([2])
    addresses = rows.tokens.data_ptr(), rows.heads.data_ptr()
    rows.switch(1)
    rows.begin_step([0, 5])
    rows.begin_head(torch.randn(1, 8))
    assert addresses == (rows.tokens.data_ptr(), rows.heads.data_ptr())


def test_slots_are_filled_before_the_model_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []

    class Model(Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(rows.tokens[: len(x)].tolist())
            return x * 2

        def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
            seen.append(rows.heads[: len(hidden)].tolist())
            return hidden

    model, rows = Model(), new_rows([3, 1])
    rows.attach(model)
    context = SimpleNamespace(
        attn_metadata={"a": object(), "b": SimpleNamespace(query_start_loc=torch.tensor([0, 2, 3]))}
    )
    monkeypatch.setattr(rows_module, "is_forward_context_available", lambda: True)
    monkeypatch.setattr(rows_module, "get_forward_context", lambda: context)
    hidden = model(torch.randn(3, 4))
    model.compute_logits(hidden[[1, 2]])
    model.compute_logits(hidden[1:3])
    assert seen == [[3, 3, 1], [3, 1], [3, 1]]


class Batch:
    """vLLM's batch, as its contract with logits processors has it, beside what it should come to."""

    def __init__(self) -> None:
        self.offer = an_offer()
        self.rows = new_rows([])
        quant_config = SimpleNamespace(offer=self.offer, row_slots=lambda _: self.rows)
        self.listener = BatchSlots(SimpleNamespace(quant_config=quant_config), torch.device("cpu"), False)  # type: ignore[arg-type]
        self.expected: list[int] = []

    def update(self, removed: list[int], added: dict[int, int | None], moved: list[Any]) -> None:
        params = {
            index: SamplingParams(extra_args=None if slot is None else {SLICE: self.offer.slices[slot].name})
            for index, slot in added.items()
        }
        size = len(self.expected)
        self.listener.update_state(
            BatchUpdate(size, removed, [(i, each, None, []) for i, each in params.items()], moved)
        )
        assert self.rows.requests == self.expected


@pytest.mark.parametrize("seed", range(20))
def test_churn_of_the_batch(seed: int) -> None:
    """Requests end, come, take free places, are moved down and swapped, as vLLM does it between any two steps."""
    generator = torch.Generator().manual_seed(seed)

    def draw(limit: int) -> int:
        return int(torch.randint(limit, (1,), generator=generator))

    batch = Batch()
    for _ in range(200):
        places: list[int | None] = list(batch.expected)
        removed = [index for index in range(len(places)) if draw(4) == 0]
        for index in removed:
            places[index] = None
        added, moved = {}, []
        for _ in range(draw(3)):
            free = [index for index, slot in enumerate(places) if slot is None]
            index = free[0] if free else len(places)
            if index == len(places):
                places.append(None)
            places[index] = added[index] = draw(4)
        while None in places:  # the last ones move down
            last = max((index for index, slot in enumerate(places) if slot is not None), default=-1)
            first = places.index(None)
            if last > first:
                places[first], places[last] = places[last], None
                moved.append((last, first, MoveDirectionality.UNIDIRECTIONAL))
            places = places[: max(last, first)] if last > first else places[:first]
        if len(places) > 1 and draw(2):
            one, other = 0, len(places) - 1
            places[one], places[other] = places[other], places[one]
            moved.append((one, other, MoveDirectionality.SWAP))
        batch.expected = [slot for slot in places if slot is not None]
        still_free = [index for index in removed if index not in added]
        batch.update(still_free, added, moved)
        batch.listener.update_state(None)
        assert batch.rows.requests == batch.expected


def test_a_request_that_was_given_no_slice_has_the_active_one() -> None:
    batch = Batch()
    batch.rows.active = 3
    batch.expected = [3, 1]
    batch.update([], {0: None, 1: 1}, [])


def test_a_request_that_vllm_did_not_tell_of_is_a_fault() -> None:
    batch = Batch()
    with pytest.raises(KeyError):
        batch.listener.update_state(BatchUpdate(2, [], [(0, SamplingParams(), None, [])], []))


def test_logits_stay() -> None:
    listener = Batch().listener
    logits = torch.randn(3, 5)
    assert listener.apply(logits) is logits
    assert listener.is_argmax_invariant()
