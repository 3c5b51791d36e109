"""Make a model of a known shape with random weights, in bfloat16 and as a nested checkpoint: for benchmarks of speed.

Nothing is downloaded. OUTPUT/bf16 has the unquantized model, OUTPUT/nested a checkpoint of the same shape whose codes
are random too: to quantize the first would take longer, and speed does not depend on what the codes are. Neither has a
tokenizer.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import vllm_matquant.cli.threads  # noqa: F401 - before torch

# isort: split
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig

from vllm_matquant.checkpoint.codebook import ENTRIES, PLACES, Codebook
from vllm_matquant.checkpoint.decoder import AFFINE_INT8, CODEBOOK, KINDS, Affine, Decoder, DecoderKind
from vllm_matquant.checkpoint.decoder_form import Values
from vllm_matquant.checkpoint.errors import CheckpointError
from vllm_matquant.checkpoint.spec import PARENT_BITS, WIDTHS, Format
from vllm_matquant.checkpoint.writer import CheckpointWriter
from vllm_matquant.jobs.arguments import positive

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "tinyllama-1.1b": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "llama-3-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
HEAD = "lm_head"
STANDARD_DEVIATION = 0.02  # of weights
LARGEST = 3 * STANDARD_DEVIATION  # the codes stand for weights of up to this magnitude


def random_layer(
    rows: int, columns: int, group_size: int, generator: torch.Generator, kind: DecoderKind = AFFINE_INT8
) -> tuple[torch.Tensor, dict[int, Decoder]]:
    """Random parent codes, uint8 [rows, columns], and decoders to the middle of what a slice stands for."""
    codes = torch.randint(0, 2**PARENT_BITS, (rows, columns), dtype=torch.uint8, generator=generator)
    whole = torch.ones(rows, columns // group_size)
    entries = torch.rand(ENTRIES, PLACES, generator=generator) * LARGEST
    return codes, {width: kind.encode(_values(kind, width, whole, entries), width) for width in WIDTHS}


def _values(kind: DecoderKind, width: int, whole: torch.Tensor, entries: torch.Tensor) -> Values:
    if kind == CODEBOOK:  # around an entry as far as half of the largest weight
        steps = LARGEST / 2 ** torch.arange(1.0, width - 1).view(-1, 1, 1)
        increments = steps.expand(-1, ENTRIES, PLACES)
        return Codebook(entries - increments.sum(0) / 2, increments, whole)
    step, merged = 2 * LARGEST / (2**PARENT_BITS - 1), 2 ** (PARENT_BITS - width)
    return Affine(whole * (step * merged), whole * (step * (merged - 1) / 2 - LARGEST))


def write_models(
    shape: str,
    output: Path,
    group_size: int,
    seed: int,
    head_bits: int | None = None,
    kind: DecoderKind = AFFINE_INT8,
) -> None:
    """Write OUTPUT/bf16 and OUTPUT/nested, whose output head is quantized if it is to have ``head_bits``.

    Raises:
        CheckpointError: the group size does not divide the columns of a layer, or the output holds a model.
    """
    config = LlamaConfig(**SHAPES[shape], tie_word_embeddings=False)
    torch.manual_seed(seed)
    format_ = Format(group_size=group_size, decoder_kind=kind)
    if head_bits is not None:
        format_ = replace(format_, ignored_layers=(), layer_widths={HEAD: (head_bits,)})
    with CheckpointWriter(output / "nested", format_) as writer:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        quantized = linear - set(format_.ignored_layers)
        generator = torch.Generator().manual_seed(seed)
        for name, tensor in tqdm(model.state_dict().items(), desc=shape, unit="tensor"):
            layer = name.removesuffix(".weight")
            if layer in quantized:
                rows, columns = tensor.shape
                codes, decoders = random_layer(rows, columns, group_size, generator, kind)
                own = {width: decoders[width] for width in format_.widths_of(layer)}
                writer.add_layer(layer, codes, own)
            else:
                writer.add_tensor(name, tensor)
        model.save_pretrained(output / "bf16")
        writer.finish(model.config.to_dict() | {"architectures": [type(model).__name__]})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama-1.1b", help="default: %(default)s")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the two models")
    parser.add_argument("--group-size", type=positive, default=128, help="columns of a group (default: %(default)s)")
    parser.add_argument(
        "--head-bits",
        type=int,
        choices=WIDTHS,
        metavar="BITS",
        help="quantize the output head too, to this width alone (default: bfloat16)",
    )
    parser.add_argument(
        "--decoders",
        choices=KINDS,
        default=AFFINE_INT8.name,
        help="how codes become weights, see docs/reference/format.md (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        kind = KINDS[options.decoders]
        write_models(options.shape, options.output, options.group_size, options.seed, options.head_bits, kind)
    except (CheckpointError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    print(options.output / "nested")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
