"""What drafts are made with, and how many tokens they are ahead."""

from __future__ import annotations

from vllm_matquant.checkpoint.spec import WIDTHS
from vllm_matquant.serve.elastic.policy import Choice

DEFAULT_TOKENS, MOST_TOKENS = 2, 16
DRAFT_CHOICE = (
    f"a width from {WIDTHS[0]} to {WIDTHS[-1]}, a number such as 2.5 as the budget of an average, or a recipe's name"
)


def parse_draft(text: str) -> Choice | float:
    """What a text such as 3, 2.5 or my-recipe means: a width, the budget of an average (a float), or a recipe's name.

    Raises:
        ValueError: it is empty, or a number outside of the widths; the message says what was expected.
    """
    number: float | None
    try:
        number = float(text) if "." in text else int(text)
    except ValueError:
        number = None
    if not text or (number is not None and not WIDTHS[0] <= number <= WIDTHS[-1]):
        raise ValueError(f"found {text!r}, expected {DRAFT_CHOICE}")
    return text if number is None else number
