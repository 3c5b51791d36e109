"""Decoders of a recipe's own, trained end to end for just its widths."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from vllm_matquant.checkpoint.decoder import Decoder
from vllm_matquant.checkpoint.reader import Checkpoint
from vllm_matquant.checkpoint.spec import PARENT_BITS
from vllm_matquant.quantize.activations import Activations
from vllm_matquant.quantize.end_to_end import EndToEnd, EndToEndSettings
from vllm_matquant.quantize.layer import QuantizedLayer
from vllm_matquant.quantize.selection import Selection
from vllm_matquant.quantize.source import Source


@torch.no_grad()
def train_recipe(
    source: Source,
    checkpoint: Checkpoint,
    widths: Mapping[str, int],
    tokens: torch.Tensor,
    settings: EndToEndSettings,
    folder: Path | None = None,
) -> dict[str, Decoder]:
    """Train the decoders of every layer at its width, from those of the plain widths.

    Args:
        source: the model that was quantized.
        checkpoint: what it was quantized to.
        widths: of every quantized layer.
        tokens: int64 [windows, length], the text to train on.
        settings: how; ``up_to`` plays no part.
        folder: on whose disk to keep what would else be in memory, see :class:`Activations`.

    Returns:
        The decoder of each layer, of the checkpoint's kind; those of embeddings and output heads are as before.

    Raises:
        ValueError: the divergence is no longer finite.
    """

    def load(name: str, widths_of: Callable[[str], tuple[int, ...]]) -> dict[str, QuantizedLayer]:
        layers = {}
        for layer in checkpoint.layers:
            if layer == name or layer.startswith(f"{name}."):
                [width] = widths_of(layer)
                stored = checkpoint.format.stored_width(width)
                codes = checkpoint.stored_codes(layer, stored) << (PARENT_BITS - stored)
                layers[layer] = QuantizedLayer(codes, {width: checkpoint.decoder(layer, width)})
        return layers

    activations = Activations(source.runner, tokens, (), folder)
    for index in range(len(source.runner.block_names)):
        activations.advance(source.runner.load_block(index), lambda width: {})
    selection = Selection(source, checkpoint.format)
    training = EndToEnd(selection, widths, load, tokens, activations.reference, settings, folder)
    trained = {name: decoder for block in training.train().values() for name, decoder in block.items()}
    return {layer: trained.get(layer) or checkpoint.decoder(layer, width) for layer, width in widths.items()}
