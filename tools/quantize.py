"""Quantize a Hugging Face checkpoint to a nested one, which vLLM serves at any of its widths."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from arguments import output_file, positive, width_list

from vllm_matquant.checkpoint.files import publish_json
from vllm_matquant.checkpoint.manifest import command_line
from vllm_matquant.checkpoint.spec import GROUP_SIZES, WIDTHS, GroupSize, is_group_size
from vllm_matquant.quantize.methods import METHODS
from vllm_matquant.quantize.pipeline import CalibrationSettings, plan_format, quantize
from vllm_matquant.quantize.source import SourceModel, locate


def group_size(text: str) -> GroupSize:
    """Parse a number of columns, ``auto`` or ``channel``."""
    size = int(text) if text.isdigit() else text
    if not is_group_size(size):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a multiple of 8, auto or channel")
    return size


def build_parser() -> argparse.ArgumentParser:
    calibration = CalibrationSettings()
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python tools/quantize.py SmolLM2-135M-Instruct --output nested --group-size 64",
    )
    parser.add_argument("model", help="folder with config.json, safetensors files and tokenizer, or a name on the hub")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write; made if absent")
    parser.add_argument("--overwrite", action="store_true", help="replace the matquant checkpoint in the output folder")
    parser.add_argument("--bits", type=width_list, default=WIDTHS, help="widths to offer, such as 2,4,8 (default: all)")
    parser.add_argument(
        "--group-size",
        type=group_size,
        default="auto",
        help=f"columns that share a decoder; auto: the largest of {', '.join(map(str, GROUP_SIZES))} that divides "
        "each layer's input; channel: a whole row (default: %(default)s)",
    )
    parser.add_argument(
        "--method", choices=METHODS, default="nested", help="how to choose the codes (default: %(default)s)"
    )
    parser.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="REGEX",
        help="leave the layers that match unquantized; may be given several times",
    )
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--calibration",
        metavar="hf:NAME|FILE.txt|FILE.jsonl",
        help="text to calibrate on: a data set, a text, or JSON lines with a field text; default: a built-in text",
    )
    group.add_argument(
        "--samples", type=positive, default=calibration.samples, help="windows to take from it (default: %(default)s)"
    )
    group.add_argument(
        "--sequence-length",
        type=positive,
        default=calibration.sequence_length,
        help="tokens in each (default: %(default)s)",
    )
    group.add_argument(
        "--seed", type=int, default=calibration.seed, help="of the windows' places (default: %(default)s)"
    )
    parser.add_argument(
        "--errors", type=output_file, metavar="OUT", help="write each layer's output error there (JSON)"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        method = METHODS[options.method](options.bits)
        source = SourceModel(locate(options.model))
        format_ = plan_format(source, method, options.group_size, options.ignore)
        errors = quantize(
            source,
            options.output,
            method,
            format_,
            CalibrationSettings(options.calibration, options.samples, options.sequence_length, options.seed),
            command=command_line(sys.argv if arguments is None else ["quantize.py", *arguments]),
            overwrite=options.overwrite,
        )
    except (ValueError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"\n{parser.prog}: interrupted; nothing was written to {options.output}\n")
    if options.errors:
        publish_json(options.errors, errors)
    offered = ", ".join(map(str, format_.widths))
    print(f"{options.output} offers {offered} bits: vllm serve {options.output} --bits {format_.widths[0]}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
