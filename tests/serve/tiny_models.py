"""Tiny random models, quantized by rounding to nearest, and what transformers computes with their slices."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.random_models import randomized
from vllm_matquant.checkpoint.codebook import Codebook, by_column, by_four, signs, with_signs
from vllm_matquant.checkpoint.decoder import Affine, Decoder, DecoderKind
from vllm_matquant.checkpoint.experts import gate_layers, separate_experts
from vllm_matquant.checkpoint.reader import Checkpoint, open_checkpoint
from vllm_matquant.checkpoint.slice import Slice
from vllm_matquant.checkpoint.spec import PARENT_BITS, Format
from vllm_matquant.checkpoint.writer import CheckpointWriter
from vllm_matquant.serve.served import Served

VOCABULARY = 128
REACH = 0.5  # how far the further bits of random codebooks reach to either side
# Fields of a format that has the embedding and the output head quantized too.
EMBEDDINGS: dict[str, Any] = {"ignored_layers": (), "quantized_embeddings": ("model.embed_tokens",)}
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}


def random_model(model_type: str, seed: int, **overrides: object) -> torch.nn.Module:
    """A causal language model whose every parameter, biases and norms too, is random."""
    config = AutoConfig.for_model(model_type, **(_SHAPE | overrides))
    return randomized(config, seed)


def quantize(
    weight: torch.Tensor, group_size: int, checkpoint_format: Format, layer: str = ""
) -> tuple[torch.Tensor, dict[int, Decoder]]:
    """Min-max codes [N, K], and for each width the decoder that decodes a slice to the middle of its interval."""
    groups = weight.unflatten(1, (-1, group_size))
    if not checkpoint_format.decoder_kind.affine:
        return _quantize_by_codebooks(groups, checkpoint_format, layer)
    low, high = groups.amin(-1), groups.amax(-1)
    step = (high - low) / (2**PARENT_BITS - 1)
    codes = ((groups - low[..., None]) / step[..., None]).round().to(torch.uint8).flatten(1)
    decoders = {}
    for width in checkpoint_format.widths_of(layer):
        merged = 2 ** (PARENT_BITS - width)
        middle = (merged - 1) / 2 if checkpoint_format.slicing == "truncate" else 0.0
        decoders[width] = checkpoint_format.decoder_kind.encode(Affine(step * merged, low + step * middle), width)
    return codes, decoders


def _quantize_by_codebooks(
    groups: torch.Tensor, checkpoint_format: Format, layer: str
) -> tuple[torch.Tensor, dict[int, Decoder]]:
    """As :func:`quantize`, of weights [N, groups, columns]: the nearest of random entries, and further bits that halve
    what is around it. Levels and increments of each width have some noise, so that layers, widths and places differ."""
    scale = groups.abs().amax(-1)
    fours = by_four((groups / scale[..., None]).flatten(1))
    generator = torch.Generator().manual_seed(int(groups.abs().sum() * 1000))
    entries = 0.5 * torch.randn(64, 4, generator=generator)
    indexed = with_signs(entries)
    nearest = torch.cdist(fours, indexed.expand(len(fours), -1, -1)).argmin(2)
    off = (fours - indexed[nearest]) * signs(fours)[nearest // 64]
    further = ((off + REACH) * 32 / REACH).floor().clamp(0, 63).to(torch.uint8)
    top = (nearest[..., None] >> torch.tensor([0, 2, 4, 6]) & 3).to(torch.uint8)
    codes = by_column(top << 6 | further, groups[0].numel())
    decoders = {}
    for width in checkpoint_format.widths_of(layer):
        noise = torch.rand(width - 1, 64, 4, generator=generator) - 0.5
        levels = entries - REACH * (1 - 0.5 ** (width - 2)) + noise[0] / 8
        increments = REACH * 0.5 ** torch.arange(width - 2).view(-1, 1, 1) * (1 + noise[1:])
        values = Codebook(levels, increments, scale)
        decoders[width] = checkpoint_format.decoder_kind.encode(values, width)
    return codes, decoders


def write_checkpoint(
    folder: Path, model_type: str, checkpoint_format: Format, seed: int = 0, **overrides: object
) -> Path:
    """Quantize the layers of a random model that the format says are, and write a checkpoint."""
    model = separate_experts(random_model(model_type, seed, **overrides))
    quantized, gates = set(checkpoint_format.quantized_embeddings), gate_layers(model)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name not in {*checkpoint_format.ignored_layers, *gates}:
            quantized.add(name)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    with CheckpointWriter(folder, checkpoint_format) as writer:
        for name, tensor in model.state_dict().items():
            layer = name.removesuffix(".weight")
            if name in tied:
                continue
            if layer in quantized:
                group_size = checkpoint_format.group_size_of(tensor.shape[1], layer)
                writer.add_layer(layer, *quantize(tensor, group_size, checkpoint_format, layer))
            else:
                writer.add_tensor(name, tensor)
        writer.finish(model.config.to_dict() | {"architectures": [type(model).__name__]})
    return folder


def requantize(checkpoint: Checkpoint, kind: DecoderKind, folder: Path) -> Path:
    """A checkpoint of the same model, of the weights of the widest slice, with another kind of decoders."""
    of_kind = dataclasses.replace(checkpoint.format, decoder_kind=kind)
    with CheckpointWriter(folder, of_kind) as writer:
        for layer, weight in checkpoint.weights(checkpoint.slice()):
            group_size = of_kind.group_size_of(weight.shape[1], layer)
            writer.add_layer(layer, *quantize(weight, group_size, of_kind, layer))
        for name, tensor in checkpoint.unquantized():
            writer.add_tensor(name, tensor)
        writer.finish(checkpoint.config, copy_from=checkpoint.folder)
    return folder


class _Everywhere(dict[str, int]):
    """The same width for every layer, whatever its name."""

    def __init__(self, width: int) -> None:
        super().__init__({"any": width})

    def get(self, layer: str, default: Any = None) -> Any:
        return self["any"]


def served_at(width: int, activation_bits: int | None = None, resident: Sequence[int] = ()) -> Served:
    """What a server holds whose every layer is at one width, or can be switched to some."""
    slices = [
        Slice(f"uniform-{each}", _Everywhere(each), each, 0, (), width=each)
        for each in dict.fromkeys((width, *resident))
    ]
    return Served(slices[0], tuple(slices), activation_bits)


def served_widths(widths: dict[str, int]) -> Served:
    """What a server holds that has a width for each layer."""
    recipe = Slice("recipe", widths, 0.0, 0, ())
    return Served(recipe, (recipe,))


def own_decoder(plain: Decoder) -> Decoder:
    """What a recipe has in the place of a plain decoder."""
    values = plain.values
    if isinstance(values, Codebook):
        changed = Codebook(values.levels * 0.75, values.increments, values.scale * 1.25)
        return plain.form.encode(changed, plain.width)
    return plain.form.encode(Affine(plain.affine.scale * 1.25, plain.affine.offset * 0.75), plain.width)


def reference_model(folder: Path, widths: int | dict[str, int], own_decoders: bool = False) -> torch.nn.Module:
    """transformers' own model with the dequantized slices of a checkpoint as its weights.

    Args:
        folder: the checkpoint.
        widths: the width of every layer, or the width of a layer by a part of its name, which all layers must have.
        own_decoders: whether :func:`own_decoder` has changed the decoders.
    """
    checkpoint = open_checkpoint(folder)
    fields = {name: value for name, value in checkpoint.config.items() if name != "quantization_config"}
    model_type = fields.pop("model_type")
    config = AutoConfig.for_model(model_type, **fields)
    model = separate_experts(AutoModelForCausalLM.from_config(config, dtype=torch.float32)).eval()
    weights = dict(checkpoint.unquantized())
    for layer in checkpoint.layers:
        width = widths if isinstance(widths, int) else next(w for part, w in widths.items() if part in layer)
        codes = checkpoint.codes(layer, width)
        decoder = checkpoint.decoder(layer, width)
        weights[f"{layer}.weight"] = (own_decoder(decoder) if own_decoders else decoder).decode(codes)
    loaded = model.load_state_dict(weights, strict=False)
    missing = set(loaded.missing_keys) - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    if missing or loaded.unexpected_keys:
        raise RuntimeError(f"{folder}: missing {missing}, unexpected {loaded.unexpected_keys}")
    model.tie_weights()
    return model


@torch.no_grad()
def log_probabilities(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    """Log-probabilities of the whole vocabulary after each token but the last: [len(tokens) - 1, vocabulary]."""
    return model(torch.tensor([tokens])).logits[0, :-1].float().log_softmax(-1)
