"""The integer program: the widths of least predicted loss within a budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from vllm_matquant.search.budget import Costs

_GAP = 1e-4  # relative, between the solution and the proven bound
_NODES = 20_000  # of the solver's tree: a bound on its time that leaves its result the same on every machine


@dataclass(frozen=True)
class Limit:
    """``sum of costs <= bound``."""

    costs: Costs
    bound: float


def cheapest_widths(
    losses: Mapping[str, Mapping[int, float]], budget: Limit, region: Limit | None = None
) -> dict[str, int]:
    """The widths with the least sum of losses within a budget: a multiple-choice knapsack, solved by HiGHS.

    Args:
        losses: what each layer loses at each of its widths; may be negative.
        budget: of what the widths cost; kept exactly.
        region: another limit, kept up to the solver's tolerance.

    Raises:
        ValueError: no widths keep the limits.
    """
    choices = [(layer, width) for layer, own in losses.items() for width in own]
    rows = {layer: row for row, layer in enumerate(losses)}
    ones = np.ones(len(choices))
    one_each = csr_array((ones, ([rows[layer] for layer, _ in choices], range(len(choices)))))
    constraints = [LinearConstraint(one_each, 1, 1)]
    for limit in (budget, region) if region else (budget,):
        costs = np.array([limit.costs[layer][width] for layer, width in choices], dtype=float)
        scale = costs.max() or 1.0
        constraints.append(LinearConstraint(costs[None] / scale, -np.inf, limit.bound / scale))
    values = np.array([losses[layer][width] for layer, width in choices])
    solution = milp(
        values / (np.abs(values).max() or 1.0),
        integrality=ones,
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": _GAP, "node_limit": _NODES},
    )
    if solution.x is None:
        raise ValueError(f"the integer program has no solution: {solution.message}")
    chosen = {layer: width for (layer, width), taken in zip(choices, solution.x, strict=True) if taken > 0.5}
    return _within(chosen, losses, budget)


def _within(widths: dict[str, int], losses: Mapping[str, Mapping[int, float]], budget: Limit) -> dict[str, int]:
    """The widths themselves if they keep the budget exactly, and not only up to the solver's tolerance."""
    while sum(budget.costs[layer][width] for layer, width in widths.items()) > budget.bound:
        cheaper = [
            (losses[layer][other] - losses[layer][width], layer, other)
            for layer, width in widths.items()
            for other in losses[layer]
            if budget.costs[layer][other] < budget.costs[layer][width]
        ]
        if not cheaper:
            raise ValueError("no widths keep the budget")
        _, layer, other = min(cheaper)
        widths = widths | {layer: other}
    return widths
