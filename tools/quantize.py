"""Quantize a Hugging Face checkpoint to a nested one, which vLLM serves at any of its widths."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from arguments import output_file, positive, width_list

from vllm_matquant.checkpoint.files import publish_json
from vllm_matquant.checkpoint.manifest import command_line
from vllm_matquant.checkpoint.quantization_config import is_group_size
from vllm_matquant.checkpoint.spec import GROUP_SIZES, WIDTHS, GroupSize
from vllm_matquant.measure.windows import load_tokenizer, spread_windows
from vllm_matquant.quantize import ranks
from vllm_matquant.quantize.methods import METHODS, with_settings
from vllm_matquant.quantize.pipeline import CalibrationSettings, dry_run, plan_format, quantize
from vllm_matquant.quantize.report.collect import collect_report
from vllm_matquant.quantize.report.write import check_report_requirements, write_report
from vllm_matquant.quantize.source import SourceModel, locate


def group_size(text: str) -> GroupSize:
    """Parse a number of columns, ``auto`` or ``channel``."""
    size = int(text) if text.isdigit() else text
    if not is_group_size(size):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a multiple of 8, auto or channel")
    return size


def group_size_for(text: str) -> tuple[str, GroupSize]:
    """Parse ``REGEX=SIZE``."""
    expression, equals, size = text.rpartition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected REGEX=SIZE")
    return expression, group_size(size)


def bits_for(text: str) -> tuple[str, tuple[int, ...]]:
    """Parse ``REGEX=WIDTHS``."""
    expression, equals, widths = text.rpartition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected REGEX=WIDTHS")
    return expression, width_list(widths)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,  # the manifest's command line leaves out --resume, which must thus be spelled so
        epilog="example: python tools/quantize.py SmolLM2-135M-Instruct --output nested --group-size 64; on several "
        "processes, which share the work: torchrun --nproc-per-node N tools/quantize.py ...",
    )
    parser.add_argument("model", help="folder with config.json, safetensors files and tokenizer, or a name on the hub")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write; made if absent")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the matquant checkpoint, or unfinished work, in the output folder",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the unfinished work in the output folder, if there is any"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything and say what it will take; write nothing"
    )
    parser.add_argument("--bits", type=width_list, default=WIDTHS, help="widths to offer, such as 2,4,8 (default: all)")
    parser.add_argument(
        "--bits-for",
        type=bits_for,
        action="append",
        default=[],
        metavar="REGEX=WIDTHS",
        help="other widths for the layers that match, such as down_proj=4,8: where the model is served at a width that "
        "such a layer lacks, the layer takes its next wider one, or else its widest; may be given several times, and "
        "the last match counts; layers that vLLM computes as one need the same",
    )
    parser.add_argument(
        "--group-size",
        type=group_size,
        default="auto",
        help=f"columns that share a decoder; auto: the largest of {', '.join(map(str, GROUP_SIZES))} that divides "
        "each layer's input; channel: a whole row (default: %(default)s)",
    )
    parser.add_argument(
        "--group-size-for",
        type=group_size_for,
        action="append",
        default=[],
        metavar="REGEX=SIZE",
        help="another group size for the layers that match; may be given several times, and the last match counts; "
        "layers that vLLM computes as one, such as q, k and v, need the same",
    )
    parser.add_argument(
        "--method", choices=METHODS, default="nested", help="how to choose the codes (default: %(default)s)"
    )
    parser.add_argument(
        "--setting",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change a setting of the method, such as end_to_end.up_to=4, or of nested-tuned tuning.iterations=100 and "
        "tuning.device=cuda; may be given several times",
    )
    parser.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="REGEX",
        help="leave the layers that match unquantized; may be given several times",
    )
    parser.add_argument(
        "--quantize-embeddings",
        action="store_true",
        help="quantize the input embedding and the output head too (default: leave them as they are); their columns "
        "must be a multiple of the group size; --ignore leaves one of them out, or both if they are tied",
    )
    _add_calibration(parser)
    _add_report(parser)
    return parser


def _add_calibration(parser: argparse.ArgumentParser) -> None:
    calibration = CalibrationSettings()
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--calibration",
        metavar="hf:NAME|FILE.txt|FILE.jsonl",
        help="text to calibrate on: a data set, a text, or JSON lines; default: a built-in text",
    )
    group.add_argument(
        "--text-column",
        default=calibration.text_column,
        metavar="NAME",
        help="the text's column in the data set, or field in the JSON lines (default: %(default)s)",
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
    group.add_argument(
        "--activations-on-disk",
        action="store_true",
        help="keep the calibration's activations in files next to the output instead of in memory",
    )


def _add_report(parser: argparse.ArgumentParser) -> None:
    report = parser.add_argument_group("report")
    report.add_argument(
        "--held-out",
        type=Path,
        metavar="FILE.txt",
        help="text that calibration does not see, to measure perplexity and KL divergence of every width on (default: "
        "the part of the language reference that the built-in text leaves out)",
    )
    report.add_argument(
        "--held-out-samples",
        type=positive,
        default=8,
        metavar="N",
        help="windows to take from it, as long as those of the calibration (default: %(default)s)",
    )
    report.add_argument(
        "--no-report", action="store_true", help="measure no quality, and write neither report nor model card"
    )
    report.add_argument(
        "--errors", type=output_file, metavar="OUT", help="write each layer's output error there (JSON)"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = build_parser()
    if ranks.launched_rank():
        parser.prog += f" (rank {ranks.launched_rank()})"
    options = parser.parse_args(arguments)
    outcome = None
    try:
        method = with_settings(METHODS[options.method](options.bits), options.setting)
        source = SourceModel(locate(options.model))
        format_ = plan_format(
            source,
            method,
            options.group_size,
            options.ignore,
            options.group_size_for,
            options.bits_for,
            quantize_embeddings=options.quantize_embeddings,
        )
        settings = CalibrationSettings(
            options.calibration, options.samples, options.sequence_length, options.seed, options.text_column
        )
        work = source, options.output, method, format_, settings
        how = {name: getattr(options, name) for name in ("overwrite", "resume", "activations_on_disk")}
        tokens = None
        if not options.no_report:
            check_report_requirements()
            held_out = spread_windows(
                options.held_out,
                load_tokenizer(source.folder),
                samples=options.held_out_samples,
                sequence_length=settings.sequence_length,
            )
            tokens = held_out.tokens
        if options.dry_run:
            if ranks.launched_rank() == 0:
                print(dry_run(*work, **how, held_out=tokens))
            return 0
        command = command_line(sys.argv if arguments is None else ["quantize.py", *arguments])
        command = [argument for argument in command if argument != "--resume"]
        with ranks.started():
            outcome = quantize(*work, **how, command=command, held_out=tokens)
        if ranks.launched_rank():
            return 0
        if tokens is not None:
            model = Path(options.model).resolve().name if Path(options.model).is_dir() else options.model
            report = collect_report(
                source, options.output, method, outcome, model=model, quality_text=held_out.source, command=command
            )
            write_report(report, options.output)
    except (ValueError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        result = "no checkpoint was written to" if outcome is None else "the report is missing, the checkpoint whole in"
        parser.exit(130, f"\n{parser.prog}: interrupted; {result} {options.output}\n")
    if options.errors:
        publish_json(options.errors, outcome.errors)
    offered = ", ".join(map(str, format_.widths))
    for row in outcome.quality:
        perplexities = f"perplexity {row['perplexity']:.2f} (source {row['reference_perplexity']:.2f})"
        print(f"{row['bits']} bits: {perplexities}, KL divergence {row['kl']:.4f}")
    print(f"{options.output} offers {offered} bits: vllm serve {options.output} --bits {format_.widths[0]}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
