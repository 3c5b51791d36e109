"""From a trained model to the tensors of a checkpoint of the parent's format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from vllm_matquant.checkpoint.affine import Affine, middle_code
from vllm_matquant.checkpoint.decoder import Decoder
from vllm_matquant.checkpoint.names import DOCUMENT_FILES
from vllm_matquant.checkpoint.reader import Checkpoint
from vllm_matquant.checkpoint.spec import Format
from vllm_matquant.checkpoint.writer import CheckpointWriter
from vllm_matquant.quantize import ranks
from vllm_matquant.train.distributed import whole
from vllm_matquant.train.latent import changed, moved_codes
from vllm_matquant.train.model import NestedModel, read_parent

Layer = tuple[str, torch.Tensor, dict[int, Decoder]]
"""Name, parent codes (uint8 [out_features, in_features]) and the decoder of each width of a layer."""


def trained_format(checkpoint: Checkpoint) -> Format:
    """The parent's format, without its recipes."""
    return replace(checkpoint.format, recipes=())


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
    for name, nested in model.layers.items():
        parent = read_parent(checkpoint, name, nested.trained)
        codes = parent.codes
        decoders = {width: checkpoint.decoder(name, width) for width in parent.widths}
        if nested.shift is not None:
            codes = moved_codes(codes, whole(nested.shift).cpu(), parent.stored, nested.trained[-1])
            for width in nested.trained:
                values, change = parent.decoders[width], whole(nested.changes[str(width)]).cpu()
                scale, centre = changed(values.scale, values.centre(width), change)
                decoders[width] = kind.encode(Affine(scale, centre - middle_code(width) * scale), width)
        yield name, codes, decoders


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
