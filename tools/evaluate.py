"""Perplexity of a nested checkpoint's widths and recipes on a text, and KL divergence from the model it comes from."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arguments import (
    add_recipes_argument,
    chosen_slices,
    figures,
    headings,
    output_file,
    positive,
    width_list,
)

from vllm_matquant.checkpoint.files import publish_json
from vllm_matquant.checkpoint.reader import open_checkpoint
from vllm_matquant.measure.windows import load_tokenizer, spread_windows
from vllm_matquant.quantize.evaluate import evaluate
from vllm_matquant.quantize.source import locate
from vllm_matquant.serve.precision import ACTIVATION_BITS

COLUMNS = ("bits", "bits_per_weight", "perplexity", "reference_perplexity", "kl", "tokens")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder of the nested checkpoint")
    parser.add_argument("--reference", required=True, metavar="MODEL", help="the source model: a folder or a hub name")
    parser.add_argument("--text", required=True, type=Path, metavar="FILE", help="text that calibration never saw")
    parser.add_argument("--bits", type=width_list, help="widths to evaluate; default: all that the folder can serve")
    add_recipes_argument(parser, "evaluate")
    parser.add_argument(
        "--samples", type=positive, default=16, help="windows, spread evenly over the text (default: %(default)s)"
    )
    parser.add_argument(
        "--sequence-length", type=positive, default=512, help="tokens in each window (default: %(default)s)"
    )
    parser.add_argument(
        "--activation-bits",
        type=int,
        choices=ACTIVATION_BITS,
        help="round what quantized layers read, as the kernels of the CPU do; default: not at all",
    )
    parser.add_argument("--json", type=output_file, metavar="OUT", help="write the rows there (JSON)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        checkpoint = open_checkpoint(options.folder)
        slices = chosen_slices(checkpoint, options)
        reference = locate(options.reference)
        windows = spread_windows(
            options.text,
            load_tokenizer(reference),
            samples=options.samples,
            sequence_length=options.sequence_length,
        )
        rows: list[dict[str, Any]] = [
            row | {"beginning_of_text": windows.source["beginning_of_text"]}
            for row in evaluate(checkpoint, reference, windows.tokens, slices, options.activation_bits)
        ]
    except (ValueError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    print(headings(COLUMNS))
    for row in rows:
        print(figures(row, COLUMNS), row.get("recipe", ""))
    if options.json:
        publish_json(options.json, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
