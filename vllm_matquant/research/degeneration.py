"""Measure what low precision in randomly chosen layers costs a model: the observations of a scaling law."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel

from vllm_matquant.measure.model import LayerModel, batches
from vllm_matquant.quantize.baselines import nearest_levels
from vllm_matquant.research.law import UNQUANTIZED_BITS, Observation


def round_to_nearest(weight: torch.Tensor, bits: float, block: int) -> torch.Tensor:
    """A weight rounded to the nearest of 2^bits levels between the least and the largest of each block.

    Args:
        weight: float [out_features, in_features].
        bits: of a level's number; 16 for the weight itself.
        block: columns that share a scale and an offset; the last of a row may be smaller.

    Returns:
        float32 [out_features, in_features].
    """
    if bits >= UNQUANTIZED_BITS:
        return weight.float()
    columns = weight.shape[1]
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % block), mode="replicate")
    groups = padded.unflatten(1, (-1, block))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    return (nearest_levels(groups, scale, low) * scale + low).flatten(1)[:, :columns]


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Names of a model's linear layers, but for its output head."""
    head = model.get_output_embeddings()
    return [
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and module is not head
    ]


class MixedModel:
    """A model whose linear layers are in low or in high precision.

    Args:
        name: what observations call it.
        model: transformers' model, changed in place.
        layers: names of the layers to choose from.
        tokens: int64 [windows, length] to measure perplexity on.
        low_bits: bits of layers in low precision.
        high_bits: of all others; 16 for the weights as they are.
    """

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        layers: Sequence[str],
        tokens: torch.Tensor,
        low_bits: float,
        high_bits: float = UNQUANTIZED_BITS,
    ) -> None:
        self.name, self._model = name, LayerModel(model.requires_grad_(False), layers)
        self._tokens, self._bits = tokens, (low_bits, high_bits)
        self._source = {layer: model.get_parameter(f"{layer}.weight").detach().clone() for layer in layers}
        self.weights = self._model.weights
        self._base: dict[int, float] = {}
        self._current = dict.fromkeys(layers, (UNQUANTIZED_BITS, 0))  # bits and block of what each layer has

    def observe(self, ratios: Sequence[float], blocks: Sequence[int], trials: int, seed: int) -> Iterator[Observation]:
        """Measure ``trials`` random choices of layers for each share and each block size.

        Args:
            ratios: shares of weights in low precision to come near to, 0 to 1.
            blocks: columns that share a scale.
            trials: choices for each; where all layers are chosen there is but one.
            seed: of the choices.
        """
        layers = set(self._source)
        draw = random.Random(seed)
        for block in blocks:
            for ratio in ratios:
                choices = [self._choose(ratio, draw) for _ in range(trials)]
                if all(chosen == layers for chosen in choices):
                    choices = choices[:1]
                shares = [sum(self._source[layer].numel() for layer in chosen) / self.weights for chosen in choices]
                mixes = tuple(math.expm1(self._loss(chosen, block) - self._base_loss(block)) for chosen in choices)
                yield Observation(self.name, self.weights, sum(shares) / len(shares), block, mixes)

    def _choose(self, ratio: float, draw: random.Random) -> set[str]:
        """Layers drawn at random until their share of the weights is nearest to ``ratio``."""
        order = draw.sample(list(self._source), len(self._source))
        chosen: set[str] = set()
        share = 0.0
        for layer in order:
            added = self._source[layer].numel() / self.weights
            if chosen and abs(share + added - ratio) > abs(share - ratio):
                break
            chosen.add(layer)
            share += added
        return chosen

    def _base_loss(self, block: int) -> float:
        """The loss with all layers in high precision."""
        if block not in self._base:
            self._base[block] = self._loss(set(), block)
        return self._base[block]

    @torch.no_grad()
    def _loss(self, low: set[str], block: int) -> float:
        """Nats per token with the layers ``low`` in low precision."""
        for layer, weight in self._source.items():
            bits = self._bits[0] if layer in low else self._bits[1]
            if self._current[layer] != (bits, block):
                self._model.load([(layer, round_to_nearest(weight, bits, block))])
                self._current[layer] = bits, block
        total = 0.0
        for batch in batches(self._tokens):
            logits = self._model.logits(batch)
            total += float(
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
            )
        return total / (self._tokens.shape[0] * (self._tokens.shape[1] - 1))
