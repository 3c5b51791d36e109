"""Losses and their derivatives, against torch's own."""

from __future__ import annotations

import pytest
import torch

from vllm_matquant.quantize.terms import SOURCE, Term, parse_terms
from vllm_matquant.train import objective
from vllm_matquant.train.objective import add_gradients, divergence

VOCABULARY, WINDOWS, LENGTH = 11, 2, 7


class Table:
    """Logits of every width as parameters; notes what is run, and how."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = (WINDOWS, LENGTH, VOCABULARY)
        self.of = {width: torch.randn(shape, generator=generator).requires_grad_() for width in (SOURCE, 2, 4, 8)}
        self.tokens = torch.randint(VOCABULARY, (WINDOWS, LENGTH), generator=generator)
        self.runs: list[tuple[int, bool]] = []

    def logits(self, tokens: torch.Tensor, width: int) -> torch.Tensor:
        self.runs.append((width, torch.is_grad_enabled()))
        return 1 * self.of[width]


def expected_values(table: Table, terms: tuple[Term, ...]) -> dict[Term, torch.Tensor]:
    """Each term by torch's own losses; a teacher is detached."""
    values = {}
    for term in terms:
        found = table.of[term.width][:, :-1].flatten(0, 1).log_softmax(-1)
        if term.teacher is None:
            values[term] = torch.nn.functional.nll_loss(found, table.tokens[:, 1:].flatten())
        else:
            wanted = table.of[term.teacher][:, :-1].flatten(0, 1).detach().log_softmax(-1)
            values[term] = torch.nn.functional.kl_div(found, wanted, log_target=True, reduction="batchmean")
    return values


@pytest.mark.parametrize(
    "text", ["8,4,2", "8,4,8->2", "8,4,2,8->2", "8:text,4:text,2:text", "8->2", "4->2,8->4,8->2", "2:text,2,4->2,8"]
)
@pytest.mark.parametrize("seed", range(2))
def test_values_and_derivatives(text: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective, "_PART_TOKENS", 4)  # parts that end within windows
    terms, table = parse_terms(text), Table(seed)
    weights = [0.3 + 0.4 * place for place in range(len(terms))]
    found = add_gradients(table, terms, weights, table.tokens, share=0.25)
    expected = expected_values(table, terms)
    assert set(found) == set(terms)
    for term, value in expected.items():
        torch.testing.assert_close(found[term], value)
    total = sum(weight * expected[term] for term, weight in zip(terms, weights, strict=True))
    widths = sorted({term.width for term in terms})
    gradients = torch.autograd.grad(0.25 * total, [table.of[width] for width in widths])
    for width, gradient in zip(widths, gradients, strict=True):
        torch.testing.assert_close(table.of[width].grad, gradient, rtol=1e-4, atol=1e-7)
    for width in set(table.of) - set(widths):
        assert table.of[width].grad is None


def test_each_width_runs_once_and_teachers_first() -> None:
    table = Table(0)
    add_gradients(table, parse_terms("2,4->2,8->2,4"), (1, 1, 1, 1), table.tokens)
    assert table.runs == [(SOURCE, False), (8, False), (4, True), (2, True)]
    assert table.of[8].grad is None  # it only teaches


def test_a_teacher_gets_no_gradient_from_its_pupil() -> None:
    alone, teaching = Table(0), Table(0)
    add_gradients(alone, parse_terms("8"), (1,), alone.tokens)
    add_gradients(teaching, parse_terms("8,8->2"), (1, 5), teaching.tokens)
    assert torch.equal(alone.of[8].grad, teaching.of[8].grad)
    assert teaching.of[2].grad.abs().max() > 0


def test_without_the_source_it_is_not_run() -> None:
    table = Table(0)
    add_gradients(table, parse_terms("4:text"), (1,), table.tokens)
    assert table.runs == [(4, True)]


def test_divergence() -> None:
    table = Table(3)
    terms = parse_terms("4,2")
    found, expected = divergence(table, (4, 2), table.tokens), expected_values(table, terms)
    for term in terms:
        torch.testing.assert_close(found[term.width], expected[term])
