"""The loss of a step and its derivative.

Every term compares the predictions q of a slice with a target p: the source's, a wider slice's, or the text's next
token, which is certain. The divergence from p to q has the derivative ``q - p`` by the slice's logits, whatever p is.
So all terms of one width are one pass backwards, and no graph of a loss is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch

from vllm_matquant.measure.divergence import divergences, log_probabilities
from vllm_matquant.quantize.terms import SOURCE, Term

_PART_TOKENS = 128  # whose probabilities over a whole vocabulary are in memory in float32 at a time


class Sliceable(Protocol):
    """A model that can be run at any width."""

    def logits(self, tokens: torch.Tensor, width: int) -> torch.Tensor:
        """The logits of every position: floating point [windows, length, vocabulary]."""


def add_gradients(
    model: Sliceable, terms: Sequence[Term], weights: Sequence[float], tokens: torch.Tensor, share: float = 1.0
) -> dict[Term, torch.Tensor]:
    """Run every width once, forwards and backwards, and add the loss's derivatives to the parameters' gradients.

    Wide slices come first, so that those that learn from them find their predictions, detached. Each width's backward
    pass comes right after its own forward pass: memory holds the activations of one width.

    Args:
        model: to train.
        terms: of the loss.
        weights: of the terms.
        tokens: int64 [windows, length]; each window's first token is given, all others are predicted.
        share: of these windows in the step's loss.

    Returns:
        The value of each term, in nats per predicted token: float32 scalars, neither weighed nor shared.
    """
    weighed = dict(zip(terms, weights, strict=True))
    teachers = {term.teacher for term in terms if term.teacher is not None}
    predictions: dict[int, torch.Tensor] = {}
    if SOURCE in teachers:
        with torch.no_grad():
            predictions[SOURCE] = model.logits(tokens, SOURCE)
    values: dict[Term, torch.Tensor] = {}
    for width in sorted({term.width for term in terms} | teachers - {SOURCE}, reverse=True):
        own = [term for term in terms if term.width == width]
        with torch.set_grad_enabled(bool(own)):
            logits = model.logits(tokens, width)
        if own:
            found, gradient = compare({term: weighed[term] for term in own}, logits.detach(), predictions, tokens)
            values |= found
            logits.backward(gradient.mul_(share))
        if width in teachers:
            predictions[width] = logits.detach()
    return values


@torch.no_grad()
def compare(
    terms: dict[Term, float], logits: torch.Tensor, predictions: dict[int, torch.Tensor], tokens: torch.Tensor
) -> tuple[dict[Term, torch.Tensor], torch.Tensor]:
    """The terms of one width, and the derivative of their weighed sum by its logits.

    Args:
        terms: each with its weight.
        logits: of the width, floating point [windows, length, vocabulary].
        predictions: logits of the teachers, of the same shape.
        tokens: int64 [windows, length].

    Returns:
        Each term's mean over the predicted tokens (float32 scalars), and the derivative, of ``logits``' shape and
        dtype.
    """
    gradient = torch.zeros_like(logits)
    predicted = tokens.shape[0] * (tokens.shape[1] - 1)
    values = {term: logits.new_zeros((), dtype=torch.float32) for term in terms}
    for window, part in _parts(tokens):
        logs = log_probabilities(logits[window, part])
        found, slope = logs.exp(), torch.zeros_like(logs)
        for term, weight in terms.items():
            slope.add_(found, alpha=weight / predicted)
            if term.teacher is None:
                following = tokens[window, part.start + 1 : part.stop + 1, None]
                values[term] -= logs.gather(1, following).sum() / predicted
                slope.scatter_add_(1, following, slope.new_full(following.shape, -weight / predicted))
            else:
                expected = log_probabilities(predictions[term.teacher][window, part])
                values[term] += divergences(expected, logs).sum() / predicted
                slope.sub_(expected.exp_(), alpha=weight / predicted)
        gradient[window, part] = slope.to(gradient.dtype)
    return values, gradient


@torch.no_grad()
def divergence(model: Sliceable, widths: Iterable[int], tokens: torch.Tensor) -> dict[int, torch.Tensor]:
    """Mean divergence from the source's predictions to those of slices, in nats per predicted token.

    Args:
        model: the model.
        widths: of the slices.
        tokens: int64 [windows, length].
    """
    predictions = {SOURCE: model.logits(tokens, SOURCE)}
    found: dict[int, torch.Tensor] = {}
    for width in widths:
        term = Term(width)
        found[width] = compare({term: 1.0}, model.logits(tokens, width), predictions, tokens)[0][term]
    return found


def _parts(tokens: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """Windows, and in each the positions whose next token is predicted, a few at a time."""
    windows, length = tokens.shape
    for window in range(windows):
        for start in range(0, length - 1, _PART_TOKENS):
            yield window, slice(start, min(start + _PART_TOKENS, length - 1))
