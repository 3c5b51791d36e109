"""The job that makes a nested checkpoint of one that another tool has quantized."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from statistics import fmean

from vllm_matquant.checkpoint.decoder import AFFINE_FLOAT16, AFFINE_KINDS, EVERY_KIND
from vllm_matquant.checkpoint.files import publish_json
from vllm_matquant.checkpoint.manifest import command_line
from vllm_matquant.checkpoint.staging import check_output
from vllm_matquant.jobs import arguments
from vllm_matquant.jobs.job import PlannedJob, Say, argument, command_of, running, silent
from vllm_matquant.quantize.imports.model import ImportedModel, refuse_gguf
from vllm_matquant.quantize.imports.pipeline import WAYS, ImportPlan, check_room, plan_import, run_import
from vllm_matquant.quantize.pipeline import Outcome
from vllm_matquant.quantize.report.collect import collect_report
from vllm_matquant.quantize.report.write import write_report
from vllm_matquant.quantize.source import locate, name_of


@dataclass(frozen=True)
class ImportModel(PlannedJob[Outcome]):
    """Make a nested checkpoint of one that GPTQ, AWQ, AutoRound or compressed-tensors has quantized.

    Its codes become the most significant bits of the parent, so that the widest slice is the model itself; narrower
    slices are fitted to it without a text. Gives the error of each layer at each width.
    """

    epilog = "example: matquant import Qwen3-0.6B-GPTQ-Int4 --output nested"

    source: Path | str = field(
        metadata=argument("folder with config.json and safetensors files, or a name on the hub", positional=True)
    )
    output: Path | str = field(metadata=argument("folder to write; made if absent", parse=Path, metavar="DIR"))
    _: KW_ONLY
    overwrite: bool = field(default=False, metadata=argument("replace the matquant checkpoint in the output folder"))
    bits: Sequence[int] | None = field(
        default=None,
        metadata=argument(
            "widths to offer, such as 2,4 (default: all up to that of the codes)", parse=arguments.width_list
        ),
    )
    method: str = field(
        default=WAYS[0],
        metadata=argument(
            "exact: the codes as they are, refused where the groups of columns do not lie side by side; nearest: codes "
            "of 8 bits for the same weights, in groups that do (default: %(default)s)",
            choices=WAYS,
        ),
    )
    decoder: str = field(
        default=AFFINE_FLOAT16.name,
        metadata=argument(
            "how scales and offsets are stored: affine-float16, as the other tools store scales, or affine-int8, up to "
            "4 bits one byte each, which is smaller and not exact (default: %(default)s)",
            choices=tuple(kind.name for kind in AFFINE_KINDS),
        ),
    )
    no_report: bool = field(default=False, metadata=argument("write neither report nor model card"))
    errors: Path | str | None = field(
        default=None,
        metadata=argument(
            "write each layer's error at each width there (JSON)", parse=arguments.output_file, metavar="OUT"
        ),
    )

    def plan(self) -> ImportPlan:
        check_output(Path(self.output), self.overwrite)
        way = next(way for way in WAYS if way == self.method)
        refuse_gguf(Path(self.source))
        model = ImportedModel(locate(str(self.source)))
        return plan_import(model, Path(self.output), way, self.bits, EVERY_KIND[self.decoder])

    def check_plan(self, plan: ImportPlan) -> None:
        check_room(plan, Path(self.output))

    def run(self, say: Say = silent) -> Outcome:
        output, plan = Path(self.output), self.plan()
        command = command_line(command_of("import", self))
        say(str(plan))
        outcome = run_import(plan, output, command=command, overwrite=self.overwrite)
        if not self.no_report:
            model = plan.model
            report = collect_report(
                model.folder,
                model.tensors.files,
                output,
                f"import of {model.layout.name}",
                {"method": plan.way},
                Outcome({}, [], None, outcome.seconds),  # errors of weights, and not of outputs on a text
                model=name_of(self.source),
                quality_text={},
                command=command,
            )
            write_report(report, output)
        if self.errors:
            publish_json(Path(self.errors), outcome.errors)
        for width in reversed(plan.format.widths):
            found = [of_layer[plan.format.width_of(name, width)] for name, of_layer in outcome.errors.items()]
            mean, most = fmean(found), max(found)
            say(f"{width} bits: error of the weights, |E|^2 / |W|^2, {mean:.3g} on average, {most:.3g} at most")
        widths = ", ".join(map(str, plan.format.widths))
        say(f"{output} offers {widths} bits: vllm serve {shlex.quote(str(output))} --bits {plan.format.widths[-1]}")
        return outcome


import_model = running(ImportModel)
