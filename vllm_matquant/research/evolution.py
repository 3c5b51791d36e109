"""EvoPress (arXiv 2410.14649): evolutionary search by level switches and selection in steps (its algorithm 1)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from vllm_matquant.search.budget import Costs, spent
from vllm_matquant.search.planner import Planner, Step

_MOST_SWITCHES = 3
_STAGES = ((8, 0.25), (2, 0.5), (1, 1.0))  # how many candidates pass, after which share of the text

Widths = dict[str, int]
Fitness = Callable[[Widths], float]


def evolution(
    planner: Planner,
    costs: Costs,
    limit: float,
    generations: int,
    offspring: int,
    start: Mapping[str, int] | None = None,
) -> Iterator[Step]:
    """The search on a planner's measurements.

    Args:
        planner: what measures divergence.
        costs: of each layer and width.
        limit: what the widths may cost together.
        generations: how many.
        offspring: mutations in each.
        start: where to begin; by default all as wide as the budget allows.

    Yields:
        The survivor of each generation.
    """
    stages = [(partial(planner.kl, share=share), survivors) for survivors, share in _STAGES]
    found = evolve(
        start or fill(costs, limit), stages, costs, limit,
        generations=generations, offspring=offspring, seed=planner.seed,
    )  # fmt: skip
    for generation, (widths, kl) in enumerate(found, start=1):
        yield Step(widths, kl, planner.journal.passes, f"generation {generation}/{generations}")


def evolve(
    start: Mapping[str, int],
    stages: Sequence[tuple[Fitness, int]],
    costs: Costs,
    limit: float,
    *,
    generations: int,
    offspring: int,
    seed: int,
) -> Iterator[tuple[Widths, float]]:
    """One generation after the other, each the best of the one before and its mutations.

    Args:
        start: widths within the budget.
        stages: losses on more and more text, each with how many candidates it lets through; the last one lets one.
        costs: of each layer and width.
        limit: what the widths may cost together.
        generations: how many.
        offspring: mutations in each.
        seed: of the mutations.

    Yields:
        The survivor of each generation with its loss in the last stage.
    """
    draw = random.Random(seed)
    parent = dict(start)
    for _ in range(generations):
        candidates = [parent, *(mutate(parent, costs, limit, draw) for _ in range(offspring))]
        loss = 0.0
        for fitness, survivors in stages:
            if len(candidates) > survivors or survivors == 1:
                # The parent comes first, and sorting is stable: a mutation must be better to take its place.
                ranked = sorted(((fitness(widths), index) for index, widths in enumerate(candidates)))
                loss = ranked[0][0]
                candidates = [candidates[index] for _, index in ranked[:survivors]]
        parent = candidates[0]
        yield parent, loss


def mutate(parent: Mapping[str, int], costs: Costs, limit: float, draw: random.Random) -> Widths:
    """A copy with some layers a step wider and as many steps narrower as the budget then demands."""
    child = dict(parent)
    for _ in range(min(draw.randint(1, _MOST_SWITCHES), draw.randint(1, _MOST_SWITCHES))):
        risen = _step(child, costs, draw, 1, set())
        while spent(costs, child) > limit:
            if _step(child, costs, draw, -1, {risen}) is None:
                return dict(parent)
    return child


def _step(widths: Widths, costs: Costs, draw: random.Random, direction: int, without: set[str | None]) -> str | None:
    """Move one layer, drawn at random, to the next of its widths; returns which one, None if none can move."""
    movable = [
        layer
        for layer in costs
        if layer not in without
        and (widths[layer] < max(costs[layer]) if direction > 0 else widths[layer] > min(costs[layer]))
    ]
    if not movable:
        return None
    layer = draw.choice(movable)
    own = sorted(costs[layer])
    widths[layer] = own[own.index(widths[layer]) + direction]
    return layer


def fill(costs: Costs, limit: float) -> Widths:
    """Widths to start from: all as wide as the budget allows, the last layers one step narrower than the first.

    Raises:
        ValueError: not even the narrowest widths are within the budget.
    """
    widths = {layer: min(own) for layer, own in costs.items()}
    if spent(costs, widths) > limit:
        raise ValueError("not even the narrowest widths are within the budget")
    while True:
        moved = False
        for layer, own in costs.items():
            wider = [width for width in sorted(own) if width > widths[layer]]
            if wider and spent(costs, widths) - own[widths[layer]] + own[wider[0]] <= limit:
                widths[layer] = wider[0]
                moved = True
        if not moved:
            return widths
