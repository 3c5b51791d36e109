"""The job that makes a nested checkpoint."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field
from pathlib import Path
from typing import cast

from vllm_matquant.checkpoint.decoder import EVERY_KIND
from vllm_matquant.checkpoint.files import publish_json
from vllm_matquant.checkpoint.manifest import command_line
from vllm_matquant.checkpoint.spec import GROUP_SIZES, WIDTHS, Format, GroupSize
from vllm_matquant.checkpoint.tensor_parallel import describe_misfits, misfits
from vllm_matquant.jobs import arguments
from vllm_matquant.jobs.job import PlannedJob, Say, argument, command_of, running, silent
from vllm_matquant.measure.windows import Windows, load_tokenizer, spread_windows
from vllm_matquant.quantize import ranks
from vllm_matquant.quantize.fused import check_fused
from vllm_matquant.quantize.gptvq import counted_bits
from vllm_matquant.quantize.method import Method
from vllm_matquant.quantize.methods import METHODS, with_settings
from vllm_matquant.quantize.pipeline import CalibrationSettings, Outcome, dry_run, plan_format
from vllm_matquant.quantize.pipeline import quantize as quantize_source
from vllm_matquant.quantize.plan import Plan, check_room
from vllm_matquant.quantize.report.collect import collect_report
from vllm_matquant.quantize.report.write import write_report
from vllm_matquant.quantize.selection import Selection
from vllm_matquant.quantize.source import SourceModel, locate, name_of

_CALIBRATION = CalibrationSettings()


@dataclass(frozen=True)
class Quantize(PlannedJob[Outcome]):
    """Quantize a Hugging Face checkpoint to a nested one, which vLLM serves at any of its widths.

    Gives what was measured meanwhile: errors of each layer, quality of each width, seconds of each step.
    """

    epilog = (
        "example: matquant quantize SmolLM2-135M-Instruct --output nested --group-size 64\n"
        "on several processes, which share the work: torchrun --nproc-per-node N -m vllm_matquant quantize ..."
    )

    model: Path | str = field(
        metadata=argument(
            "folder with config.json, safetensors files and tokenizer, or a name on the hub", positional=True
        )
    )
    output: Path | str = field(metadata=argument("folder to write; made if absent", parse=Path, metavar="DIR"))
    _: KW_ONLY
    overwrite: bool = field(
        default=False,
        metadata=argument("replace the matquant checkpoint, or unfinished work, in the output folder"),
    )
    resume: bool = field(
        default=False,
        metadata=argument("go on from the unfinished work in the output folder, if there is any", recorded=False),
    )
    bits: Sequence[int] = field(
        default=WIDTHS, metadata=argument("widths to offer, such as 2,4,8 (default: all)", parse=arguments.width_list)
    )
    bits_for: Mapping[str, Sequence[int] | int] | Sequence[tuple[str, Sequence[int] | int]] = field(
        default=(),
        metadata=argument(
            "other widths for the layers that match, such as down_proj=4,8: where the model is served at a width that "
            "such a layer lacks, the layer takes its next wider one, or else its widest; may be given several times, "
            "and the last match counts; layers that vLLM computes as one need the same",
            parse=arguments.bits_for,
            show=arguments.show_rule,
            repeated=True,
            metavar="REGEX=WIDTHS",
        ),
    )
    group_size: GroupSize = field(
        default="auto",
        metadata=argument(
            f"columns that share a decoder; auto: the largest of {', '.join(map(str, GROUP_SIZES))} that divides "
            "each layer's input; channel: a whole row (default: %(default)s)",
            parse=arguments.group_size,
        ),
    )
    group_size_for: Mapping[str, GroupSize] | Sequence[tuple[str, GroupSize]] = field(
        default=(),
        metadata=argument(
            "another group size for the layers that match; may be given several times, and the last match counts; "
            "layers that vLLM computes as one, such as q, k and v, need the same",
            parse=arguments.group_size_for,
            show=arguments.show_rule,
            repeated=True,
            metavar="REGEX=SIZE",
        ),
    )
    decoder: str | None = field(
        default=None,
        metadata=argument(
            "how scales and offsets are stored: affine-int8, up to 4 bits one byte each and two steps a row, or "
            "affine-float16, all in float16 (default: affine-int8; with --group-size channel affine-float16, for one "
            "group a row gains nothing); codebook-4d, what method nested-vq has in their place; with method gptvq "
            "vectors-2d (the default there), vectors-1d or vectors-4d: so many columns share an entry of a codebook",
            choices=tuple(EVERY_KIND),
        ),
    )
    method: str = field(
        default="nested", metadata=argument("how to choose the codes (default: %(default)s)", choices=tuple(METHODS))
    )
    setting: Mapping[str, object] | Sequence[str] = field(
        default=(),
        metadata=argument(
            "change a setting of the method, such as end_to_end.up_to=4, or of nested-tuned tuning.iterations=100 and "
            "tuning.device=cuda; may be given several times",
            repeated=True,
            metavar="NAME=VALUE",
        ),
    )
    ignore: Sequence[str] = field(
        default=(),
        metadata=argument(
            "leave the layers that match unquantized; may be given several times", repeated=True, metavar="REGEX"
        ),
    )
    quantize_embeddings: bool = field(
        default=False,
        metadata=argument(
            "quantize the input embedding and the output head too (default: leave them as they are); their columns "
            "must be a multiple of the group size; --ignore leaves one of them out, or both if they are tied"
        ),
    )
    calibration: Path | str | None = field(
        default=None,
        metadata=argument(
            "text to calibrate on: a text, a list in .json, records in .jsonl, .csv or .parquet (each with a text or a "
            "chat), or a data set; default: a built-in text",
            metavar="hf:NAME|FILE",
            group="calibration",
        ),
    )
    text_column: str = field(
        default=_CALIBRATION.text_column,
        metadata=argument(
            "the text's field in a record, of the held-out text too (default: %(default)s)",
            metavar="NAME",
            group="calibration",
        ),
    )
    samples: int = field(
        default=_CALIBRATION.samples,
        metadata=argument(
            "windows to take from it (default: %(default)s)", parse=arguments.positive, group="calibration"
        ),
    )
    sequence_length: int = field(
        default=_CALIBRATION.sequence_length,
        metadata=argument("tokens in each (default: %(default)s)", parse=arguments.positive, group="calibration"),
    )
    seed: int = field(
        default=_CALIBRATION.seed,
        metadata=argument("of the windows' places (default: %(default)s)", parse=int, group="calibration"),
    )
    activations_on_disk: bool = field(
        default=False,
        metadata=argument(
            "keep the calibration's activations in files next to the output instead of in memory", group="calibration"
        ),
    )
    held_out: Path | str | None = field(
        default=None,
        metadata=argument(
            "text that calibration does not see, to measure perplexity and KL divergence of every width on (default: "
            "the part of the language reference that the built-in text leaves out)",
            parse=Path,
            metavar="FILE",
            group="report",
        ),
    )
    held_out_samples: int = field(
        default=8,
        metadata=argument(
            "windows to take from it, as long as those of the calibration (default: %(default)s)",
            parse=arguments.positive,
            metavar="N",
            group="report",
        ),
    )
    no_report: bool = field(
        default=False,
        metadata=argument("measure no quality, and write neither report nor model card", group="report"),
    )
    errors: Path | str | None = field(
        default=None,
        metadata=argument(
            "write each layer's output error there (JSON)", parse=arguments.output_file, metavar="OUT", group="report"
        ),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.calibration is not None and not METHODS[self.method].needs_calibration:
            raise ValueError(
                f"calibration: found {self.calibration}, expected none with method {self.method}, which reads no text. "
                "Leave out --calibration, or choose another --method"
            )
        if self.held_out is not None and self.no_report:
            raise ValueError(
                f"held_out: found {self.held_out}, expected none with --no-report, which measures no quality. "
                "Leave out one of --held-out and --no-report"
            )

    def plan(self) -> Plan:
        work = self._work()
        held_out = None if self.no_report else self._held_out_windows(work[0].folder)
        return dry_run(
            *work,
            overwrite=self.overwrite,
            resume=self.resume,
            activations_on_disk=self.activations_on_disk,
            held_out=None if held_out is None else held_out.tokens,
        )

    def check_plan(self, plan: Plan) -> None:
        check_room(Path(self.output), plan.disk, on_disk=self.activations_on_disk)

    def run(self, say: Say = silent) -> Outcome:
        output, outcome = Path(self.output), None
        source, _, method, format_, _ = work = self._work()
        held_out = None if self.no_report else self._held_out_windows(source.folder)
        found = misfits(format_, Selection(source, format_).shapes)
        if found and not ranks.launched_rank():
            say(f"tensor parallelism will be {describe_misfits(found)}; a smaller --group-size fits more")
        command = command_line(command_of("quantize", self))
        try:
            with ranks.started():
                outcome = quantize_source(
                    *work,
                    command=command,
                    overwrite=self.overwrite,
                    resume=self.resume,
                    activations_on_disk=self.activations_on_disk,
                    held_out=None if held_out is None else held_out.tokens,
                )
            if ranks.launched_rank():
                return outcome
            if held_out is not None:
                report = collect_report(
                    source.folder,
                    source.tensors.files,
                    output,
                    method.name,
                    asdict(method),
                    outcome,
                    model=name_of(self.model),
                    quality_text=held_out.source,
                    command=command,
                    tower=source.skeleton.tower,
                )
                write_report(report, output)
        except KeyboardInterrupt as stop:
            left = (
                "no checkpoint was written to" if outcome is None else "the report is missing, the checkpoint whole in"
            )
            raise KeyboardInterrupt(f"{left} {output}") from stop
        if self.errors:
            publish_json(Path(self.errors), outcome.errors)
        for row in outcome.quality:
            perplexities = f"perplexity {row['perplexity']:.2f} (source {row['reference_perplexity']:.2f})"
            say(f"{row['bits']} bits: {perplexities}, KL divergence {row['kl']:.4f}")
        say(self._how_to_use(format_, Selection(source, format_).shapes))
        return outcome

    def _work(self) -> tuple[SourceModel, Path, Method, Format, CalibrationSettings]:
        """What to quantize, to where, how, and on which text."""
        # Of what a user may give, the job holds what the command line's parser makes of it.
        settings_of_method = cast(Sequence[str], self.setting)
        bits_for = cast(Sequence[tuple[str, tuple[int, ...]]], self.bits_for)
        group_size_for = cast(Sequence[tuple[str, GroupSize]], self.group_size_for)
        method = with_settings(METHODS[self.method](tuple(self.bits)), settings_of_method)
        source = SourceModel(locate(str(self.model)))
        format_ = plan_format(
            source,
            method,
            self.group_size,
            self.ignore,
            group_size_for,
            bits_for,
            quantize_embeddings=self.quantize_embeddings,
            decoder_kind=EVERY_KIND[self.decoder] if self.decoder else None,
        )
        check_fused(source.skeleton, format_)
        calibration = None if self.calibration is None else str(self.calibration)
        settings = CalibrationSettings(calibration, self.samples, self.sequence_length, self.seed, self.text_column)
        return source, Path(self.output), method, format_, settings

    def _held_out_windows(self, source: Path) -> Windows:
        """The windows of the held-out text that each width's quality is measured on."""
        return spread_windows(
            None if self.held_out is None else Path(self.held_out),
            load_tokenizer(source),
            samples=self.held_out_samples,
            sequence_length=self.sequence_length,
            text_column=self.text_column,
        )

    def _how_to_use(self, format_: Format, shapes: Mapping[str, tuple[int, int]]) -> str:
        """What was made, and the command line to go on with."""
        folder = shlex.quote(str(self.output))
        offered = ", ".join(map(str, format_.widths))
        if format_.decoder_kind.one_width:
            model = shlex.quote(str(self.model))
            counted = f"{counted_bits(format_, shapes):.3f} a weight as GPTVQ counts them"
            return (
                f"{self.output} has {offered} bits, {counted}; no kernel serves it, but it can be measured: "
                f"matquant evaluate {folder} --reference {model} --text FILE"
            )
        return f"{self.output} offers {offered} bits: vllm serve {folder} --bits {format_.widths[0]}"


quantize = running(Quantize)
