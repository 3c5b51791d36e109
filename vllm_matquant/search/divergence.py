"""How far a candidate's predictions lie from the model's: the loss that a search makes small, and its derivatives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from vllm_matquant.measure.divergence import Reference, log_probabilities
from vllm_matquant.measure.model import batches
from vllm_matquant.measure.sliced import REFERENCE, SlicedModel


class Divergence:
    """KL divergence, in nats per token, from the reference to candidates, on one text.

    The reference's probabilities are kept in memory: 4 bytes for each predicted token and word of the vocabulary.

    Args:
        model: whose layers take the candidates' widths.
        tokens: int64 [windows, length]; a window's first token is not predicted.
    """

    def __init__(self, model: SlicedModel, tokens: torch.Tensor) -> None:
        self._model = model
        self._batches = batches(tokens)
        self._expected: list[Reference] = []  # of each batch

    def of(self, widths: Mapping[str, int], share: float = 1.0) -> float:
        """The divergence with these widths, on the first ``share`` of the text."""
        count = max(1, round(share * len(self._batches)))
        with torch.no_grad():
            self._prepare(count)
            self._model.set(widths)
            return sum(float(self._sum(index)) for index in range(count)) / self._predicted(count)

    def slopes(self, widths: Mapping[str, int]) -> dict[str, dict[int, float]]:
        """What the divergence would change, to first order, if one layer changed its width.

        Args:
            widths: of all layers; where the derivative is taken.

        Returns:
            For each layer and each of its widths the product of the derivative and the change of the weight.
        """
        count = len(self._batches)
        self._prepare(count)
        self._model.set(widths)
        gradient: dict[str, torch.Tensor] = {}
        with self._model.differentiable():
            for index, batch in enumerate(self._batches):
                loss = self._sum(index) / self._predicted(count)
                for layer, slope in self._model.gradients(loss, batch).items():
                    gradient[layer] = gradient[layer].add_(slope.float()) if layer in gradient else slope.float()
        products = {layer: self._model.products(layer, slope.flatten()[None]) for layer, slope in gradient.items()}
        return {
            layer: {width: float(product - own[widths[layer]]) for width, product in own.items()}
            for layer, own in products.items()
        }

    def _predicted(self, count: int) -> int:
        return sum(batch.shape[0] * (batch.shape[1] - 1) for batch in self._batches[:count])

    @torch.no_grad()
    def _prepare(self, count: int) -> None:
        if len(self._expected) >= count:
            return
        self._model.set(dict.fromkeys(self._model.layers, REFERENCE))
        passes = self._model.passes  # once for all candidates: none of them pays for it
        for batch in self._batches[len(self._expected) : count]:
            self._expected.append(Reference(self._model.logits(batch)))
        self._model.passes = passes

    def _sum(self, index: int) -> torch.Tensor:
        """The divergence of one batch, summed over its tokens."""
        return self._expected[index].divergences(self._model.logits(self._batches[index])).sum()


def fisher_samples(model: SlicedModel, tokens: torch.Tensor, seeds: Sequence[int]) -> dict[str, dict[int, list[float]]]:
    """Samples of how the reference's predictions change with each layer's width, one for each window.

    A label is drawn for each token from the reference's own predictions; with g the derivative of their summed
    negative log-likelihood by a layer's weight, the mean over labels of (g . change)^2 / 2 is the second-order term of
    the divergence that the change causes, for the Fisher information is the divergence's Hessian there. Samples keep
    g . change, so that any two widths of a layer can be compared.

    Args:
        model: whose layers are set to the reference.
        tokens: int64 [windows, length]; gradients of all of them are in memory at once.
        seeds: of the labels, for each window.

    Returns:
        For each layer and each of its widths g . (slice - reference) / sqrt(predicted tokens), for each window.
    """
    model.set(dict.fromkeys(model.layers, REFERENCE))
    gradients: dict[str, list[torch.Tensor]] = {layer: [] for layer in model.layers}
    with model.differentiable():
        for window, seed in zip(tokens.split(1), seeds, strict=True):
            logs = log_probabilities(model.logits(window)[0])
            generator = torch.Generator().manual_seed(seed)
            labels = torch.multinomial(logs.detach().exp().cpu(), 1, generator=generator).to(logs.device)
            loss = -logs.gather(1, labels).sum() / len(logs) ** 0.5
            for layer, gradient in model.gradients(loss, window).items():
                gradients[layer].append(gradient.flatten())
    samples = {}
    for layer in model.layers:
        products = model.products(layer, torch.stack(gradients.pop(layer)).float())
        samples[layer] = {width: product.tolist() for width, product in products.items()}
    return samples
