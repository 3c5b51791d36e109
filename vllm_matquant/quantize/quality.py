"""Perplexity and KL divergence of every width, measured block by block while the model is quantized.

A held-out text goes through the source's blocks and those of every slice along with the calibration text. Thus the
figures of :func:`vllm_matquant.quantize.evaluate.evaluate` are there at the end without a whole model in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from vllm_matquant.checkpoint.spec import Format
from vllm_matquant.quantize.activations import Activations
from vllm_matquant.quantize.block import BlockTask
from vllm_matquant.quantize.layer import QuantizedLayer
from vllm_matquant.quantize.source import SourceModel


class HeldOut:
    """A held-out text on its way through the source and every slice.

    Args:
        source: the model.
        tokens: int64 [windows, length]; a window's first token is not predicted.
        format_: of the checkpoint in the making.
        folder: see :class:`Activations`.
    """

    def __init__(self, source: SourceModel, tokens: torch.Tensor, format_: Format, folder: Path | None = None) -> None:
        self._source, self._tokens, self._format = source, tokens, format_
        self._activations = Activations(source, tokens, format_.widths, folder, exact=True)
        self._shapes: dict[str, tuple[int, int]] = {}

    def advance(self, task: BlockTask, layers: Mapping[str, QuantizedLayer]) -> None:
        """Go through a block.

        Args:
            layers: its quantized layers.
        """
        self._activations.advance(task.block, lambda width: task.decoded(layers, width, self._format.slicing))
        for name, layer in layers.items():
            out_features, in_features = layer.codes.shape
            self._shapes[name] = out_features, in_features

    @torch.no_grad()
    def rows(self) -> list[dict[str, Any]]:
        """The figures of each width, as rows of :func:`vllm_matquant.quantize.evaluate.evaluate`."""
        head = self._source.load_head()
        windows, length = self._tokens.shape
        predicted = windows * (length - 1)
        losses = dict.fromkeys([None, *self._format.widths], 0.0)
        divergence = dict.fromkeys(self._format.widths, 0.0)
        # One window at a time: its logits over a whole vocabulary are larger than its hidden states by far.
        for window, following in enumerate(self._tokens[:, 1:, None]):
            expected = _log_probabilities(head, self._activations.reference[window])
            losses[None] -= float(expected.gather(1, following).double().sum())
            for width, hidden in self._activations.slices.items():
                found = _log_probabilities(head, hidden[window])
                losses[width] -= float(found.gather(1, following).double().sum())
                divergence[width] += float((expected.exp() * (expected - found)).sum(dim=1).double().sum())
        weights = sum(rows * columns for rows, columns in self._shapes.values())
        resident = {
            width: sum(self._format.resident_bytes(*shape, width, name) for name, shape in self._shapes.items())
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


def _log_probabilities(head: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    """What the model says of each following token of a window: float32 [length - 1, vocabulary]."""
    return head(hidden[None])[0, :-1].float().log_softmax(dim=-1)
