"""What a loss consists of: which width learns from whom.

MatQuant (arXiv 2502.06786, eq. 7) sums a loss over widths, each weighed by a lambda. Here such a sum is a list of
terms, as a user writes it: ``8,4,2``, ``8,4,8->2`` (co-distillation, section 3.2), ``8:text,4:text,2:text``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vllm_matquant.checkpoint.spec import WIDTHS

SOURCE = 0  # what stands for a width where the model has the weights of the model that was quantized
GRAMMAR = (
    'terms separated by commas: "4" (4 bits learn from the source\'s predictions), "4:text" (4 bits learn the text\'s '
    f'next tokens) or "8->2" (2 bits learn from the predictions of 8), of widths from {WIDTHS[0]} to {WIDTHS[-1]}'
)
_TERM = re.compile(r"(?:(?P<teacher>\d+)->)?(?P<width>\d+)(?P<text>:text)?")


@dataclass(frozen=True)
class Term:
    """A part of a loss.

    Attributes:
        width: whose slice learns.
        teacher: the width whose slice's predictions it learns, SOURCE for those of the model that was quantized; None
            for the text's own next tokens.
    """

    width: int
    teacher: int | None = SOURCE

    def __str__(self) -> str:
        if self.teacher is None:
            return f"{self.width}:text"
        return f"{self.teacher}->{self.width}" if self.teacher else str(self.width)


def parse_terms(text: str) -> tuple[Term, ...]:
    """Parse ``8,4,2,8->2``.

    Raises:
        ValueError: it is none of :data:`GRAMMAR`, a term stands there twice, or a teacher is not wider than its pupil.
    """
    terms = tuple(map(_parse, text.split(",")))
    for term in terms:
        if terms.count(term) > 1:
            raise ValueError(f"found {term} twice in {text!r}, expected each term once; --weights makes it count more")
    return terms


def _parse(text: str) -> Term:
    found = _TERM.fullmatch(text.strip())
    if not found or (found["teacher"] and found["text"]):
        raise ValueError(f"found {text!r}, expected {GRAMMAR}")
    width, teacher = int(found["width"]), None if found["text"] else int(found["teacher"] or SOURCE)
    if not {width, teacher} <= {*WIDTHS, SOURCE, None} or width == SOURCE or found["teacher"] == str(SOURCE):
        raise ValueError(f"found {text!r}, expected {GRAMMAR}")
    if teacher and teacher <= width:
        raise ValueError(f"found {text!r}, expected a teacher that is wider than its pupil, such as 8->2")
    return Term(width, teacher)


def check_weights(terms: Sequence[Term], weights: Sequence[float] | None) -> tuple[float, ...]:
    """The weight of each term, 1 for each if none are given.

    Raises:
        ValueError: there are more or fewer weights than terms.
    """
    if weights is None:
        return (1.0,) * len(terms)
    if len(weights) != len(terms):
        written = ",".join(map(str, terms))
        raise ValueError(f"weights: found {len(weights)}, expected {len(terms)}, one for each term of {written}")
    return tuple(weights)


def trained_widths(terms: Iterable[Term]) -> tuple[int, ...]:
    """The widths that learn something, ascending."""
    return tuple(sorted({term.width for term in terms}))


def named_widths(terms: Iterable[Term]) -> tuple[int, ...]:
    """The widths that are run: those that learn and those that only teach, ascending."""
    terms = list(terms)
    return tuple(sorted({term.width for term in terms} | {term.teacher for term in terms if term.teacher}))
