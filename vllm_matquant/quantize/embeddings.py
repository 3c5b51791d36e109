"""The input embedding and the output head, with a row for each token of the vocabulary, quantized after the blocks.

After the last block, the inputs of the head on the calibration text are known, and with them its Hessian. An embedding
only looks rows up, so that no column weighs more than another: its Hessian is the identity. Where the two are tied,
their one weight is quantized with the Hessian of the head, whose every output depends on all columns of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from vllm_matquant.checkpoint.decoder import DecoderKind
from vllm_matquant.quantize import ranks
from vllm_matquant.quantize.activations import BATCH_TOKENS
from vllm_matquant.quantize.hessian import Moments
from vllm_matquant.quantize.layer import QuantizedLayer, join_rows, output_energies
from vllm_matquant.quantize.method import LayerMethod, Method
from vllm_matquant.quantize.source import Source, read_matrix


def layer_method(method: Method) -> LayerMethod:
    """The method as one that can quantize a layer outside of blocks.

    Raises:
        ValueError: it quantizes whole blocks only.
    """
    if not isinstance(method, LayerMethod):
        raise ValueError(f"quantize-embeddings: found method {method.name}, expected one that quantizes single layers")
    if not method.rows_apart:
        raise ValueError(
            f"quantize-embeddings: found method {method.name}, which needs all rows of a layer at once, expected one "
            "that takes them in parts"
        )
    return method


def head_hessian(source: Source, outputs: torch.Tensor) -> torch.Tensor:
    """Second moments of the output head's inputs: float32 [in_features, in_features].

    Args:
        source: the model.
        outputs: of the last block on the calibration text, float32 [sequences, length, hidden_size].

    Raises:
        ValueError: the inputs are not finite.
    """
    final = source.runner.load_final()
    moments = Moments()
    for batch in outputs.split(max(1, BATCH_TOKENS // outputs.shape[1])):
        moments.add(final(batch))
    moments.add_up()
    return moments.mean(source.output_head or "output head")


def part_rows(source: Source, rows: int, columns: int) -> int:
    """Rows of a layer outside of blocks to quantize at a time: as many weights as the largest layer in a block has."""
    most = max(math.prod(matrix.shape) for matrix in source.matrices.values() if matrix.block is not None)
    return min(rows, max(1, most // columns))


def quantize_rows(
    source: Source,
    name: str,
    method: LayerMethod,
    group_size: int,
    kind: DecoderKind,
    hessian: torch.Tensor | None,
    progress: Callable[[int], object] = lambda rows: None,
) -> QuantizedLayer:
    """Quantize an embedding or output head part by part: a row does not depend on any other.

    Of each part every rank solves some rows.

    Args:
        source: the model.
        name: of the layer.
        method: how to quantize it.
        group_size: columns that share a decoder; divides the layer's columns.
        kind: how decoders are stored.
        hessian: float32 [in_features, in_features]; None for the identity.
        progress: called with the rows of each part.
    """
    rows, columns = source.matrices[name].shape
    count, size = len(method.widths), part_rows(source, rows, columns)
    if hessian is None:
        hessian = torch.eye(columns)
    parts: list[QuantizedLayer] = []
    errors, energies_of_weight = (dict.fromkeys(method.widths, 0.0) for _ in range(2))
    for start in range(0, rows, size):
        whole = read_matrix(source, name, slice(start, start + size))
        weight = whole[ranks.own_rows(len(whole))].float()
        part = method.quantize(weight, hessian, group_size, kind)
        if method.needs_calibration:
            energies = output_energies([weight] * count, part, method.slices(part.codes), [hessian] * count)
            for width, (error, energy) in energies.items():
                errors[width] += error
                energies_of_weight[width] += energy
        parts.append(part.gathered(len(whole)))
        progress(len(whole))
    layer = join_rows(parts)
    if not method.needs_calibration:
        return layer
    return replace(layer, errors={width: errors[width] / (energies_of_weight[width] or 1.0) for width in method.widths})
