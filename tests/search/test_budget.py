"""Budgets, and that nothing that searches ever exceeds one."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_matquant.checkpoint.decoder import AFFINE_INT8, CODEBOOK, DecoderKind
from vllm_matquant.checkpoint.spec import Format
from vllm_matquant.research.evolution import evolve, fill, mutate
from vllm_matquant.research.shapes import SHAPES, shape_widths
from vllm_matquant.search.budget import Budget, BudgetError, check_feasible, parse_budget, spent
from vllm_matquant.search.program import Limit, cheapest_widths


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2.5", Budget("2.5", "bits", 2.5)),
        (" 3 ", Budget("3", "bits", 3.0)),
        ("90MiB", Budget("90MiB", "bytes", 90 * 2**20)),
        ("1.2 GB", Budget("1.2GB", "bytes", 1.2e9)),
        ("6.5ms", Budget("6.5ms", "ms", 6.5)),
    ],
)
def test_parse(text: str, expected: Budget) -> None:
    assert parse_budget(text) == expected


@pytest.mark.parametrize("text", ["", "1.9", "8.1", "2,5", "-3", "3 bits", "90mib", "ms", "nan", "1e3"])
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(BudgetError, match=r"budget: found .*, expected"):
        parse_budget(text)


LAYERS = {"a": (64, 96), "model.layers.0.q": (32, 64), "model.layers.1.q": (96, 64)}


def checkpoint(kind: DecoderKind = AFFINE_INT8) -> Any:
    format = Format(group_size=32, layer_widths={"a": (3, 6)}, decoder_kind=kind)
    return SimpleNamespace(format=format, layers=LAYERS, unquantized_bytes=lambda: 1000)


def test_costs_by_hand() -> None:
    costs, limit = Budget("3", "bits", 3.0).costs(checkpoint())
    assert limit == 3 * (64 * 96 + 128 * 64)
    assert costs["a"] == {3: 3 * 64 * 96, 6: 6 * 64 * 96}
    costs, limit = Budget("1MB", "bytes", 1e6).costs(checkpoint())
    assert limit == 1e6 - 1000
    assert costs["model.layers.0.q"][5] == 5 * 32 * 64 // 8 + 4 * 32 * 2
    costs, _ = Budget("1MB", "bytes", 1e6).costs(checkpoint(CODEBOOK))
    assert costs["model.layers.0.q"][5] == 5 * 32 * 64 // 8 + 32 * 2 + 2 * 32 + 8 * 256
    assert costs["model.layers.0.q"][2] == 2 * 32 * 64 // 8 + 32 * 2 + 2 * 32 + 256
    times = {layer: {2: 1.0} for layer in LAYERS}
    assert Budget("6ms", "ms", 6.0).costs(checkpoint(), times) == (times, 6.0)


def test_a_budget_that_nothing_meets_is_refused_with_the_least() -> None:
    budget = Budget("2", "bits", 2.0)
    with pytest.raises(BudgetError, match=r"budget 2: found less .* at least 2\.429 bits"):
        check_feasible(budget, *budget.costs(checkpoint()))


@st.composite
def problems(draw: Any) -> tuple[dict[str, dict[int, float]], dict[str, dict[int, float]], float]:
    """Costs and losses of some layers, and a limit that the narrowest widths meet."""
    costs, losses = {}, {}
    for index in range(draw(st.integers(1, 8))):
        widths = sorted(draw(st.sets(st.integers(2, 8), min_size=1)))
        size = draw(st.integers(1, 1000))
        layer = f"model.layers.{index}.x"
        costs[layer] = {width: float(size * width) for width in widths}
        values = draw(st.lists(st.floats(-1, 1), min_size=len(widths), max_size=len(widths)))
        losses[layer] = dict(zip(widths, values, strict=True))
    least, most = (sum(pick(own.values()) for own in costs.values()) for pick in (min, max))
    return costs, losses, draw(st.floats(least, most + 1))


@settings(deadline=None, max_examples=150)
@given(problems(), st.integers(0, 100))
def test_no_budget_is_ever_exceeded(problem: Any, seed: int) -> None:
    costs, losses, limit = problem
    found = [cheapest_widths(losses, Limit(costs, limit)), fill(costs, limit)]
    # Near the fill: as the sequence of programs asks, where both limits bind.
    away = {layer: {width: abs(width - found[1][layer]) * own[width] for width in own} for layer, own in costs.items()}
    found += [
        cheapest_widths(losses, Limit(costs, limit), Limit(away, bound)) for bound in (0.0, limit / 50, limit / 3)
    ]
    found += [shape_widths(name, costs, limit) for name in SHAPES]
    found.append(mutate(found[0], costs, limit, random.Random(seed)))
    stages = [(lambda widths: float(sum(losses[layer][width] for layer, width in widths.items())), 1)]
    evolved = list(evolve(found[1], stages, costs, limit, generations=3, offspring=4, seed=seed))
    found += [widths for widths, _ in evolved]
    for widths in found:
        assert widths.keys() == costs.keys()
        assert all(widths[layer] in costs[layer] for layer in costs)
        assert spent(costs, widths) <= limit
    fitness = [loss for _, loss in evolved]
    assert fitness == sorted(fitness, reverse=True)  # never worse than the generation before


@settings(deadline=None, max_examples=60)
@given(problems())
def test_the_program_finds_the_best_widths(problem: Any) -> None:
    """Against all combinations."""
    costs, losses, limit = problem
    costs, losses = (dict(list(part.items())[:4]) for part in (costs, losses))
    limit = max(limit / 2, sum(min(own.values()) for own in costs.values()))
    best = float("inf")
    combinations: list[dict[str, int]] = [{}]
    for layer, own in costs.items():
        combinations = [widths | {layer: width} for widths in combinations for width in own]
    for widths in combinations:
        if spent(costs, widths) <= limit:
            best = min(best, sum(losses[layer][width] for layer, width in widths.items()))
    found = cheapest_widths(losses, Limit(costs, limit))
    assert sum(losses[layer][width] for layer, width in found.items()) == pytest.approx(best, abs=1e-3)


def test_a_program_without_a_solution_is_refused() -> None:
    with pytest.raises(ValueError, match="no solution"):
        cheapest_widths({"a": {2: 0.0}}, Limit({"a": {2: 2.0}}, 1.0))


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_follow_the_depth(name: str) -> None:
    costs = {f"model.layers.{block}.q": {width: float(width) for width in range(2, 9)} for block in range(9)}
    widths = list(shape_widths(name, costs, 4.0 * 9).values())
    middle = widths[4]
    if name == "pyramid":
        assert middle > widths[0] == widths[8]
    elif name == "reverse-pyramid":
        assert middle < widths[0] == widths[8]
    else:
        assert widths == sorted(widths, reverse=name == "decreasing")
        assert widths[0] != widths[8]
    assert sum(widths) > 3.5 * 9  # most of the budget is used
