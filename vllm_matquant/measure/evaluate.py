"""Quality of each width: perplexity, and KL divergence from the model that was quantized."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from vllm_matquant.checkpoint.language_model import load_language_model
from vllm_matquant.checkpoint.reader import Checkpoint
from vllm_matquant.checkpoint.slice import Slice
from vllm_matquant.kernels.reference import Rounding, round_activations
from vllm_matquant.measure.divergence import divergences, log_probabilities
from vllm_matquant.measure.mapped import mapped
from vllm_matquant.measure.model import LayerModel, LayerWeights, batches


def evaluate(
    checkpoint: Checkpoint,
    reference: Path,
    tokens: torch.Tensor,
    slices: Sequence[Slice],
    rounding_of: Callable[[int], Rounding] | None = None,
) -> Iterator[dict[str, Any]]:
    """Compare slices of a nested checkpoint with the reference, see :func:`compare`.

    Args:
        checkpoint: the nested checkpoint.
        reference: folder of the source model.
        tokens: int64 [samples, sequence_length].
        slices: those to compare.
        rounding_of: how the CPU's kernels round what a layer of a width reads; by default not at all.

    Yields:
        For each width ``bits``, the figures of :func:`compare` and ``bits_per_weight`` (codes and decoder). A recipe's
        ``bits`` are the average of its widths, and its name stands as ``recipe``.

    Raises:
        ValueError: the reference does not have the checkpoint's layers.
    """
    weights = sum(rows * columns for rows, columns in checkpoint.layers.values())
    roundings: dict[str, Rounding] = {}  # of the layers of the slice that is being compared

    def weights_of() -> Iterator[tuple[str, LayerWeights]]:
        for each in slices:
            if rounding_of:
                roundings.update({layer: rounding_of(width) for layer, width in each.widths.items()})
            yield each.name, checkpoint.weights(each)

    group_sizes = {
        layer: checkpoint.format.group_size_of(columns, layer) for layer, (_, columns) in checkpoint.layers.items()
    }
    rounding = partial(_round_inputs, group_sizes, roundings) if rounding_of else None
    compared = compare(reference, tokens, checkpoint.layers, weights_of(), rounding)
    for each, quality in zip(slices, compared, strict=True):
        yield each.label | quality | {"bits_per_weight": 8 * each.resident_bytes / weights}


@torch.no_grad()
def compare(
    reference: Path,
    tokens: torch.Tensor,
    layers: Mapping[str, tuple[int, int]],
    candidates: Iterable[tuple[str, LayerWeights]],
    prepare: Callable[[PreTrainedModel], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Compare quantized models with the reference they were made from, all computed in float32 by transformers.

    Args:
        reference: folder of the source model.
        tokens: int64 [samples, sequence_length]; a window's first token is not predicted.
        layers: name and shape [out_features, in_features] of the quantized layers; all else is the reference's.
        candidates: for each model what to call it and the weights of just these layers.
        prepare: changes the model once, between the reference and the candidates.

    Yields:
        For each candidate ``perplexity``, ``reference_perplexity``, ``kl`` (nats per token, from the reference to the
        candidate) and ``tokens`` (how many were predicted).

    Raises:
        ValueError: the reference does not have the layers, or a candidate has others.
        WriteError: the disk for temporary files has no room for the reference's predictions.
    """
    loaded = load_language_model(reference, dtype=torch.float32)
    shapes = {name: tuple(parameter.shape) for name, parameter in loaded.named_parameters()}
    for layer, shape in layers.items():
        found = shapes.get(f"{layer}.weight", "no such layer")
        if found != shape:
            raise ValueError(f"{reference}: {layer}: found {found}, expected {shape} as in the quantized model")
    model, parts = LayerModel(loaded, layers), batches(tokens)
    predicted = tokens.shape[0] * (tokens.shape[1] - 1)
    # Log-probabilities of a whole vocabulary for each token: more than memory should hold.
    hint = "Let TMPDIR name a folder with more room, or ask for fewer windows (--samples)"
    reference_logs = mapped((predicted, loaded.config.get_text_config().vocab_size), Path(tempfile.gettempdir()), hint)
    reference_loss, start = 0.0, 0
    for batch in tqdm(parts, desc="reference", unit="batch"):
        logs, loss = _predictions(model, batch)
        reference_logs[start : start + len(logs)] = logs
        reference_loss, start = reference_loss + loss, start + len(logs)
    if prepare:
        prepare(loaded)
    for name, weights in candidates:
        model.load(_checked(name, weights, layers))
        divergence, total, start = 0.0, 0.0, 0
        for batch in tqdm(parts, desc=name, unit="batch"):
            logs, loss = _predictions(model, batch)
            expected = reference_logs[start : start + len(logs)]
            divergence += float(divergences(expected, logs).double().sum())
            total, start = total + loss, start + len(logs)
        yield {
            "perplexity": math.exp(total / predicted),
            "reference_perplexity": math.exp(reference_loss / predicted),
            "kl": divergence / predicted,
            "tokens": predicted,
        }


def _round_inputs(group_sizes: Mapping[str, int], roundings: Mapping[str, Rounding], model: PreTrainedModel) -> None:
    """Have linear layers round what they read, as ``roundings`` says when they read it."""

    def rounding(name: str) -> Callable[..., Any]:
        return lambda module, inputs: (round_activations(inputs[0], group_sizes[name], roundings[name]), *inputs[1:])

    for name, module in model.named_modules():
        if name in group_sizes and isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(rounding(name))


def _checked(
    name: str, weights: LayerWeights, layers: Mapping[str, tuple[int, int]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights, which must be of all ``layers`` and no other: one left out would keep another candidate's weight."""
    absent = set(layers)
    for layer, weight in weights:
        if tuple(weight.shape) != layers.get(layer):
            expected = layers.get(layer, "no such layer")
            raise ValueError(f"{name}: {layer}: found {tuple(weight.shape)}, expected {expected}")
        absent.discard(layer)
        yield layer, weight
    if absent:
        raise ValueError(f"{name}: {min(absent)}: found no such layer, expected {layers[min(absent)]}")


def _predictions(model: LayerModel, tokens: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Log-probabilities [predicted tokens, vocabulary] of a batch of windows, and the sum of the true tokens' loss."""
    logs = log_probabilities(model.logits(tokens)).flatten(0, 1)
    loss = -logs.gather(1, tokens[:, 1:].reshape(-1, 1)).double().sum()
    return logs, float(loss)
