"""From a trained model to the tensors of a checkpoint of the parent's format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from vllm_matquant.checkpoint.decoder import Decoder
from vllm_matquant.checkpoint.names import DOCUMENT_FILES
from vllm_matquant.checkpoint.reader import Checkpoint
from vllm_matquant.checkpoint.spec import Format
from vllm_matquant.checkpoint.writer import CheckpointWriter
from vllm_matquant.quantize import ranks
from vllm_matquant.train.distributed import whole
from vllm_matquant.train.model import NestedModel
from vllm_matquant.train.settings import SLICINGS

Layer = tuple[str, torch.Tensor, dict[int, Decoder]]
"""Name, parent codes (uint8 [out_features, in_features]) and the decoder of each width of a layer."""


def trained_format(checkpoint: Checkpoint, form: str) -> Format:
    """The parent's format with the slices of a form of training, without recipes."""
    return replace(checkpoint.format, recipes=(), slicing=SLICINGS[form])


def left_behind(checkpoint: Checkpoint) -> list[str]:
    """What the parent's folder has that is true of the parent alone: recipes, report, model card."""
    documents = [name for name in DOCUMENT_FILES if (checkpoint.folder / name).exists()]
    return [*checkpoint.format.recipes, *documents]


def trained_layers(model: NestedModel, checkpoint: Checkpoint) -> Iterator[Layer]:
    """The layers as they are stored; every process must go through all of them.

    Decoders of widths that were not trained, and layers that were not, are the parent's own.

    Args:
        model: after the training.
        checkpoint: the parent.
    """
    kind = checkpoint.format.decoder_kind
    for name, latent in model.layers.items():
        codes, values = latent.finished(whole)
        decoders = {width: checkpoint.decoder(name, width) for width in latent.widths if width not in values}
        decoders |= {width: kind.encode(each, width) for width, each in values.items()}
        yield name, codes, dict(sorted(decoders.items()))


def publish(
    writer: CheckpointWriter | None, layers: Iterator[Layer], checkpoint: Checkpoint, manifest: Mapping[str, Any]
) -> None:
    """Write a checkpoint with the parent's other tensors and files; every process must take part.

    Args:
        writer: of the checkpoint, None on other processes than the first.
        layers: see :func:`trained_layers`.
        checkpoint: the parent.
        manifest: see :meth:`vllm_matquant.checkpoint.writer.CheckpointWriter.finish`.
    """
    for name, codes, decoders in layers:
        if writer:
            writer.add_layer(name, codes, decoders)
    if writer:
        for name, tensor in checkpoint.unquantized():
            writer.add_tensor(name, tensor)
        writer.finish(checkpoint.config, copy_from=checkpoint.folder, manifest=dict(manifest))
    ranks.wait()
