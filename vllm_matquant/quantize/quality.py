"""Perplexity and KL divergence of every width, measured block by block.

When all is quantized, a held-out text goes through the source and every slice. It could not go along with the
calibration text: a slice begins with its embedding, and a quantized one is known only after the last block. Thus the
figures of :func:`vllm_matquant.measure.evaluate.evaluate` are there at the end without a whole model in memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vllm_matquant.checkpoint.spec import Format
from vllm_matquant.measure.divergence import divergences, log_probabilities
from vllm_matquant.quantize import ranks
from vllm_matquant.quantize.activations import Activations
from vllm_matquant.quantize.block import BlockTask
from vllm_matquant.quantize.layer import QuantizedLayer
from vllm_matquant.quantize.runner import Head
from vllm_matquant.quantize.source import Source

_DECODED_WEIGHTS = 2**22  # at a time


class HeldOut:
    """A held-out text on its way through the source and every slice.

    Args:
        source: the model.
        tokens: int64 [windows, length]; a window's first token is not predicted.
        format_: of the checkpoint in the making.
        embedding: the input embedding, None if it is not quantized.
        folder: see :class:`Activations`.
    """

    def __init__(
        self,
        source: Source,
        tokens: torch.Tensor,
        format_: Format,
        embedding: QuantizedLayer | None = None,
        folder: Path | None = None,
    ) -> None:
        self._source, self._tokens, self._format = source, tokens, format_
        self._activations = Activations(source.runner, tokens, format_.widths, folder, exact=True)
        if embedding is None:
            return
        for width, hidden in self._activations.slices.items():

            def rows(ids: torch.Tensor, width: int = width) -> torch.Tensor:
                return embedding[ids].decode(width, format_.slicing)

            source.runner.embed(ranks.spread(tokens), hidden, rows)

    def advance(self, task: BlockTask, layers: Mapping[str, QuantizedLayer]) -> None:
        """Go through a block.

        Args:
            layers: its quantized layers.
        """
        self._activations.advance(task.block, lambda width: task.decoded(layers, width, self._format.slicing))

    @torch.no_grad()
    def rows(self, quantized_head: QuantizedLayer | None = None) -> list[dict[str, Any]]:
        """The figures of each width, as rows of :func:`vllm_matquant.measure.evaluate.evaluate`.

        Args:
            quantized_head: the output head, or the embedding that it is tied to; None if it is not quantized.
        """
        head = self._source.runner.load_head()
        weight = None if quantized_head is None else torch.empty(quantized_head.codes.shape)
        windows, length = self._tokens.shape
        predicted = windows * (length - 1)
        losses = dict.fromkeys([None, *self._format.widths], 0.0)
        divergence = dict.fromkeys(self._format.widths, 0.0)
        # One window at a time: its logits over a whole vocabulary are larger than its hidden states by far. So are
        # those of one width's head, decoded for each window anew, which takes less time than the product with it.
        for window, following in enumerate(ranks.spread(self._tokens)[:, 1:, None]):
            expected = _log_probabilities(head, self._activations.reference[window])
            losses[None] -= float(expected.gather(1, following).double().sum())
            for width, hidden in self._activations.slices.items():
                if quantized_head is not None and weight is not None:
                    self._decode(quantized_head, width, weight)
                found = _log_probabilities(head, hidden[window], weight)
                losses[width] -= float(found.gather(1, following).double().sum())
                divergence[width] += float(divergences(expected, found).double().sum())
        losses = dict(zip(losses, ranks.totals(list(losses.values())), strict=True))
        divergence = dict(zip(divergence, ranks.totals(list(divergence.values())), strict=True))
        shapes = self._source.skeleton.quantized_layers(self._format)
        weights = sum(rows * columns for rows, columns in shapes.values())
        resident = {
            width: sum(self._format.resident_bytes(*shape, width, name) for name, shape in shapes.items())
            for width in self._format.widths
        }
        return [
            {
                "bits": width,
                "perplexity": math.exp(losses[width] / predicted),
                "reference_perplexity": math.exp(losses[None] / predicted),
                "kl": divergence[width] / predicted,
                "tokens": predicted,
                "bits_per_weight": 8 * resident[width] / weights,
            }
            for width in self._format.widths
        ]

    def _decode(self, layer: QuantizedLayer, width: int, weight: torch.Tensor) -> None:
        """Decode the slice of a large layer into ``weight``, some rows at a time."""
        count = max(1, _DECODED_WEIGHTS // weight.shape[1])
        for start in range(0, len(weight), count):
            rows = slice(start, start + count)
            weight[rows] = layer[rows].decode(width, self._format.slicing)


def _log_probabilities(head: Head, hidden: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """What the model says of each following token of a window: float32 [length - 1, vocabulary]."""
    return log_probabilities(head(hidden[None], weight)[0, :-1])
