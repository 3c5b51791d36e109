"""Train a small Llama on a text: a model of a size of one's own, for scaling laws and tests, with no download.

The tokenizer, byte-level BPE, is trained on the same text. A twentieth of the text, at its end, is not trained on. With
--start the model begins as some blocks of a trained one, and learns to do without the others.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import vllm_matquant.cli.threads  # noqa: F401 - before torch

# isort: split
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import trange
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from vllm_matquant.jobs.arguments import output_folder, positive
from vllm_matquant.measure.text import read_text
from vllm_matquant.measure.windows import TextTokenizer, load_tokenizer
from vllm_matquant.quantize.source import locate
from vllm_matquant.research.degeneration import linear_layers

HELD_OUT = 1 / 20  # of the text
WARM_UP = 0.05  # of the steps
END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(text: str, vocabulary: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split("\n"), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT)


def train(options: argparse.Namespace) -> None:
    """Train, and write model and tokenizer to a folder.

    Raises:
        ValueError: the text is too short.
    """
    torch.manual_seed(options.seed)
    text = "\n\n".join(read_text(path) for path in options.text)
    split = int(len(text) * (1 - HELD_OUT))
    source = locate(options.start) if options.start else None
    tokenizer = load_tokenizer(source) if source else TextTokenizer(train_tokenizer(text[:split], options.vocabulary))
    ids, held_out = (torch.tensor(tokenizer.ids(part)) for part in (text[:split], text[split:]))
    length, count = options.sequence_length, tokenizer.text_length(options.sequence_length)
    if len(held_out) < count:
        raise ValueError(f"text: found {len(held_out)} tokens that are not trained on, expected at least {count}")
    model = thinned(source, options.layers) if source else new_model(tokenizer.tokenizer, options)
    rate = options.learning_rate or (3e-4 if source else 2e-3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, options.steps))
    bar = trange(options.steps, desc="training", unit="step")
    for _ in bar:
        batch = tokenizer.windows(ids, torch.randint(len(ids) - count, (options.batch,)).tolist(), length)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix_str(f"loss {loss.item():.3f}")
    windows = tokenizer.windows(held_out, range(0, len(held_out) - count + 1, count)[:64], length)
    with torch.no_grad():
        loss = float(model(windows, labels=windows).loss)
    model.to(torch.bfloat16).save_pretrained(options.output)
    tokenizer.tokenizer.save_pretrained(options.output)
    weights = sum(model.get_parameter(f"{layer}.weight").numel() for layer in linear_layers(model))
    print(f"{options.output}: {weights:,} weights in linear layers, held-out perplexity {math.exp(loss):.2f}")


def new_model(tokenizer: PreTrainedTokenizerFast, options: argparse.Namespace) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden_size,
        intermediate_size=3 * options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden_size // 64,
        num_key_value_heads=options.hidden_size // 64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def thinned(source: Path, count: int) -> PreTrainedModel:
    """A trained model with ``count`` of its decoder blocks, spread evenly from the first to the last.

    Raises:
        ValueError: it has fewer.
    """
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, trust_remote_code=False)
    decoder = model.get_decoder()
    blocks = list(decoder.layers)
    if count > len(blocks):
        raise ValueError(f"--layers: found {count}, expected at most the {len(blocks)} of {source.name}")
    places = torch.linspace(0, len(blocks) - 1, count).round().int().tolist()
    decoder.layers = torch.nn.ModuleList(blocks[place] for place in places)
    model.config.num_hidden_layers = count
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[place] for place in places]
    return model


def _rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to a tenth."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.55 + 0.45 * math.cos(math.pi * (step - warm) / max(1, steps - warm))


def heads(text: str) -> int:
    """A hidden size that heads of 64 divide."""
    size = positive(text)
    if size % 64:
        raise argparse.ArgumentTypeError(f"found {text}, expected a multiple of 64")
    return size


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", required=True, metavar="FILE", help="texts to train on (UTF-8)")
    parser.add_argument("--output", type=output_folder, required=True, metavar="DIR", help="a folder that is not there")
    parser.add_argument(
        "--start",
        metavar="MODEL",
        help="go on from some blocks of this trained model, with its tokenizer, instead of from random weights",
    )
    parser.add_argument("--hidden-size", type=heads, default=256, help="default: %(default)s")
    parser.add_argument("--layers", type=positive, default=6, help="default: %(default)s")
    parser.add_argument("--vocabulary", type=positive, default=4096, help="tokens to learn (default: %(default)s)")
    parser.add_argument("--steps", type=positive, default=1000, help="default: %(default)s")
    parser.add_argument("--batch", type=positive, default=16, help="windows of a step (default: %(default)s)")
    parser.add_argument("--sequence-length", type=positive, default=128, help="tokens of each (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, help="default: 2e-3, or 3e-4 with --start")
    parser.add_argument("--seed", type=int, default=0, help="of weights and windows (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        train(options)
    except (ValueError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
