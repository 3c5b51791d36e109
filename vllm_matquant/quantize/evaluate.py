"""Quality of each width: perplexity, and KL divergence from the model that was quantized."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from vllm_matquant.checkpoint.reader import Checkpoint
from vllm_matquant.kernels.reference import dequantize

_BATCH_TOKENS = 2048


def text_windows(text: str, tokenizer: PreTrainedTokenizerBase, *, samples: int, sequence_length: int) -> torch.Tensor:
    """``samples`` windows spread evenly over a text: int64 [samples, sequence_length].

    Raises:
        ValueError: the text is shorter than one window for each sample, or windows hold nothing to predict.
    """
    if sequence_length < 2:
        raise ValueError(f"sequence_length: found {sequence_length}, expected at least 2: the first token is given")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if len(ids) < samples * sequence_length:
        raise ValueError(
            f"text: found {len(ids):,} tokens, expected at least {samples * sequence_length:,} "
            f"({samples} samples of {sequence_length})"
        )
    starts = torch.linspace(0, len(ids) - sequence_length, samples).long().tolist()
    return torch.stack([ids[start : start + sequence_length] for start in starts])


@torch.no_grad()
def evaluate(
    checkpoint: Checkpoint, reference: Path, tokens: torch.Tensor, widths: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Compare each width with the reference, both computed in float32 by transformers.

    Args:
        reference: folder of the source model.
        tokens: int64 [samples, sequence_length]; a window's first token is not predicted.

    Yields:
        For each width ``bits``, ``perplexity``, ``reference_perplexity``, ``kl`` (nats per token, from the reference to
        the slice), ``tokens`` (how many were predicted) and ``bits_per_weight`` (codes and decoder).

    Raises:
        ValueError: the reference does not have the checkpoint's layers.
    """
    model = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32).eval()
    parameters = dict(model.named_parameters())
    for layer, shape in checkpoint.layers.items():
        found = tuple(parameters[f"{layer}.weight"].shape) if f"{layer}.weight" in parameters else "no such layer"
        if found != shape:
            raise ValueError(f"{reference}: {layer}: found {found}, expected {shape} as in {checkpoint.folder}")
    batches = tokens.split(max(1, _BATCH_TOKENS // tokens.shape[1]))
    predicted = tokens.shape[0] * (tokens.shape[1] - 1)
    weights = sum(rows * columns for rows, columns in checkpoint.layers.values())
    with tempfile.TemporaryDirectory() as folder:
        # Log-probabilities of a whole vocabulary for each token: more than memory should hold.
        size = predicted * model.config.vocab_size
        stored = torch.from_file(f"{folder}/reference", shared=True, size=size, dtype=torch.float32)
        reference_logs = stored.view(predicted, -1)
        reference_loss, start = 0.0, 0
        for batch in tqdm(batches, desc="reference", unit="batch"):
            logs, loss = _log_probabilities(model, batch)
            reference_logs[start : start + len(logs)] = logs
            reference_loss, start = reference_loss + loss, start + len(logs)
        for width in widths:
            load_slice(model, checkpoint, width)
            divergence, total, start = 0.0, 0.0, 0
            for batch in tqdm(batches, desc=f"{width} bits", unit="batch"):
                logs, loss = _log_probabilities(model, batch)
                expected = reference_logs[start : start + len(logs)]
                divergence += float((expected.exp() * (expected - logs)).sum(dim=1).double().sum())
                total, start = total + loss, start + len(logs)
            yield {
                "bits": width,
                "perplexity": math.exp(total / predicted),
                "reference_perplexity": math.exp(reference_loss / predicted),
                "kl": divergence / predicted,
                "tokens": predicted,
                "bits_per_weight": 8 * checkpoint.resident_bytes(width) / weights,
            }


@torch.no_grad()
def load_slice(model: PreTrainedModel, checkpoint: Checkpoint, width: int) -> None:
    """Put the decoded ``width``-bit weights of ``checkpoint`` into a transformers model of the same architecture."""
    parameters = dict(model.named_parameters())
    for layer in checkpoint.layers:
        scale, offset = checkpoint.decoder(layer, width)
        parameters[f"{layer}.weight"].copy_(dequantize(checkpoint.codes(layer, width), scale, offset))


def _log_probabilities(model: PreTrainedModel, tokens: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Log-probabilities [predicted tokens, vocabulary] of a batch of windows, and the sum of the true tokens' loss."""
    logs = model(tokens).logits[:, :-1].float().log_softmax(dim=-1).flatten(0, 1)
    loss = -logs.gather(1, tokens[:, 1:].reshape(-1, 1)).double().sum()
    return logs, float(loss)
