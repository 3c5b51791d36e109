"""What a recipe may cost: an average width, bytes of weights, or measured milliseconds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vllm_matquant.checkpoint.reader import Checkpoint
from vllm_matquant.checkpoint.sizes import UNITS, split_amount
from vllm_matquant.checkpoint.spec import WIDTHS

Costs = Mapping[str, Mapping[int, float]]
"""What each layer costs at each of its widths."""


class BudgetError(ValueError):
    """A budget cannot be read, or is less than the least that the checkpoint can cost."""


@dataclass(frozen=True)
class Budget:
    """A limit.

    Attributes:
        name: as it was written, without blanks; recipes bear it.
        kind: "bits" per weight on average, "bytes" of all weights or "ms" of all quantized layers.
        limit: in these units.
    """

    name: str
    kind: str
    limit: float

    def costs(self, checkpoint: Checkpoint, milliseconds: Costs | None = None) -> tuple[Costs, float]:
        """What each layer takes of the budget at each of its widths, and what is left for the layers.

        Args:
            checkpoint: whose layers they are.
            milliseconds: of each layer and width, where the budget is one of time.
        """
        format, layers = checkpoint.format, checkpoint.layers
        if self.kind == "ms":
            if milliseconds is None:
                raise ValueError("a budget of time needs the layers' measured times")
            return milliseconds, self.limit
        if self.kind == "bytes":
            return _table(
                checkpoint, lambda layer, width: format.resident_bytes(*layers[layer], width, layer)
            ), self.limit - checkpoint.unquantized_bytes()
        weights = sum(map(math.prod, layers.values()))
        return _table(checkpoint, lambda layer, width: math.prod(layers[layer]) * width), self.limit * weights


def parse_budget(text: str) -> Budget:
    """Read ``2.5`` (bits per weight), ``90MiB`` or ``1.2GB`` (all weights), ``6.5ms`` (all quantized layers).

    Raises:
        BudgetError: anything else, or an average width that is not in 2..8.
    """
    text = text.strip()
    amount = split_amount(text)
    if amount is None or amount[1] not in ("", "ms", *UNITS):
        expected = "bits such as 2.5, a size such as 90MiB, or a time such as 6ms"
        raise BudgetError(f"budget: found {text!r}, expected {expected}")
    number, unit = amount
    name = text.replace(" ", "")
    if unit == "":
        if not WIDTHS[0] <= number <= WIDTHS[-1]:
            raise BudgetError(f"budget: found {text} bits, expected {WIDTHS[0]} to {WIDTHS[-1]}")
        return Budget(name, "bits", number)
    return Budget(name, "ms", number) if unit == "ms" else Budget(name, "bytes", number * UNITS[unit])


def spent(costs: Costs, widths: Mapping[str, int]) -> float:
    """What these widths cost."""
    return sum(costs[layer][widths[layer]] for layer in costs)


def check_feasible(budget: Budget, costs: Costs, limit: float) -> None:
    """Refuse a budget that no widths meet.

    Raises:
        BudgetError: the message says the least that would do.
    """
    least = sum(min(own.values()) for own in costs.values())
    if least > limit:
        needed = budget.limit * least / limit if budget.kind == "bits" else budget.limit + least - limit
        expected = f"{needed:,.0f} bytes" if budget.kind == "bytes" else f"{needed:.4g} {budget.kind}"
        raise BudgetError(
            f"budget {budget.name}: found less than the narrowest widths cost, expected at least {expected}"
        )


def _table(checkpoint: Checkpoint, cost: Callable[[str, int], float]) -> Costs:
    return {
        layer: {width: cost(layer, width) for width in checkpoint.format.widths_of(layer)}
        for layer in checkpoint.layers
    }
