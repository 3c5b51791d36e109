"""What a method is given to quantize: one transformer block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from vllm_matquant.checkpoint.decoder import AFFINE_INT8, DecoderKind
from vllm_matquant.checkpoint.spec import Slicing
from vllm_matquant.quantize.activations import Activations
from vllm_matquant.quantize.layer import QuantizedLayer


@dataclass(frozen=True)
class BlockTask:
    """A transformer block to quantize.

    Attributes:
        name: full name, such as "model.layers.3".
        block: the source's, in float32.
        group_sizes: of the layers to quantize, by their full names.
        widths: of those layers that have others than the model.
        decoder_kind: how decoders are stored.
        activations: what the block is given on the calibration text; None for a method that needs none.
        token_weights: how much each token of that counts in the Hessians of the layers, see
            :func:`vllm_matquant.quantize.sensitivity.token_weights`; without a layer's, all count the same.
        shown: layers of experts that too few tokens reached, which are fitted to all tokens of the block; a method adds
            them when it finds them.
    """

    name: str
    block: torch.nn.Module
    group_sizes: Mapping[str, int]
    activations: Activations | None
    widths: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    decoder_kind: DecoderKind = AFFINE_INT8
    token_weights: Mapping[str, torch.Tensor] = field(default_factory=dict)
    shown: set[str] = field(default_factory=set)

    @property
    def calibration(self) -> Activations:
        """The activations of a task that has some.

        Raises:
            ValueError: it has none.
        """
        if self.activations is None:
            raise ValueError(f"{self.name}: found no calibration text, expected one for this method")
        return self.activations

    @property
    def linears(self) -> dict[str, torch.nn.Linear]:
        """The layers to quantize, by their full names, in the model's order."""
        modules = {f"{self.name}.{name}": module for name, module in self.block.named_modules()}
        return {name: module for name in self.group_sizes if isinstance(module := modules[name], torch.nn.Linear)}

    def decoded(self, layers: Mapping[str, QuantizedLayer], width: int, slicing: Slicing) -> dict[str, torch.Tensor]:
        """The weights of ``layers``' slices, by their names within the block."""
        return self.local_names({name: layer.decode(width, slicing) for name, layer in layers.items()})

    def local_names(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The weights of layers, given by full names, by their names within the block."""
        return {weight_name(name, self.name): weight for name, weight in weights.items()}


def weight_name(layer: str, block: str) -> str:
    """The name of a layer's weight within its block; both given by full names."""
    return f"{layer.removeprefix(f'{block}.')}.weight"
