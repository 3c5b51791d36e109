"""transformers' models whose layers take other weights: what every quantized model is measured as."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from vllm_matquant.checkpoint.language_model import build_language_model
from vllm_matquant.checkpoint.reader import Checkpoint

_BATCH_TOKENS = 2048

LayerWeights = Iterable[tuple[str, torch.Tensor]]
"""Names of layers, each with its weight [out_features, in_features]."""


class LayerModel:
    """A model whose layers take other weights in place.

    Attributes:
        model: transformers' causal language model.
        layers: names of the layers, in order.
    """

    def __init__(self, model: PreTrainedModel, layers: Iterable[str]) -> None:
        """Take a model as it is.

        Args:
            model: a causal language model; it is put into its evaluation mode.
            layers: names of the layers whose weights will change, each with a parameter ``NAME.weight`` in the model.

        Raises:
            KeyError: the model has no such layer.
        """
        self.model = model.eval()
        self.layers = list(layers)
        parameters = dict(model.named_parameters())
        self._weights = {layer: parameters[f"{layer}.weight"] for layer in self.layers}

    @property
    def weights(self) -> int:
        """How many weights all layers have."""
        return sum(map(self.weights_of, self.layers))

    def weights_of(self, layer: str) -> int:
        """How many weights a layer has."""
        return self._weights[layer].numel()

    @torch.no_grad()
    def load(self, weights: LayerWeights) -> None:
        """Give layers other weights; those not named keep theirs."""
        for layer, weight in weights:
            self._weights[layer].copy_(weight)

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """What the model says of each following token.

        Args:
            tokens: int64 [windows, length].

        Returns:
            float32 [windows, length - 1, vocabulary].
        """
        logits: torch.Tensor = self.model(tokens.to(self.model.device), use_cache=False).logits
        return logits[:, :-1].float()


def slice_model(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """transformers' model of a checkpoint with all but its quantized layers' weights, which are random.

    Args:
        checkpoint: whose configuration and unquantized tensors the model gets.
        dtype: of its parameters.
    """
    model = build_language_model(checkpoint.config, dtype=dtype)
    model.load_state_dict(dict(checkpoint.unquantized()), strict=False)  # the reader has checked the names
    model.tie_weights()
    return model


def stored_weights(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of a safetensors file whose tensors bear the names of layers."""
    with safe_open(path, framework="pt") as file:
        for layer in sorted(file.keys()):
            yield layer, file.get_tensor(layer)


def batches(tokens: torch.Tensor) -> Sequence[torch.Tensor]:
    """Windows [windows, length], as many at a time as go through a model at once."""
    return tokens.split(max(1, _BATCH_TOKENS // tokens.shape[1]))
