"""From what a quantization measured to its report."""

from __future__ import annotations

import resource
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_matquant.checkpoint.manifest import versions
from vllm_matquant.checkpoint.reader import open_checkpoint
from vllm_matquant.quantize.machine import describe_machine
from vllm_matquant.quantize.pipeline import Outcome
from vllm_matquant.quantize.report.card import read_license
from vllm_matquant.quantize.report.data import LayerRow, Report


def collect_report(
    source: Path,
    files: Sequence[Path],
    output: Path,
    method: str,
    settings: Mapping[str, Any],
    outcome: Outcome,
    *,
    model: str,
    quality_text: dict[str, Any],
    command: Sequence[str],
    tower: Collection[str] = (),
) -> Report:
    """The report on the checkpoint that was just written to ``output``.

    Args:
        source: folder of the source.
        files: of its tensors.
        output: folder of the checkpoint.
        method: name of what chose the codes.
        settings: of it, as JSON has them.
        outcome: what was measured meanwhile.
        model: what to call the source.
        quality_text: what its quality was measured on.
        command: the command line, without folders of the machine.
        tower: the source's parameters that are not of its language model.
    """
    checkpoint = open_checkpoint(output, check_values=False)
    format_ = checkpoint.format

    def errors(layer: str) -> dict[int, float]:
        found = outcome.errors.get(layer)
        return {width: found[format_.width_of(layer, width)] for width in format_.widths} if found else {}

    return Report(
        model=model,
        method=method,
        settings=dict(settings),
        format=format_,
        layers=[
            LayerRow(name, shape, errors(name), name in outcome.shown) for name, shape in checkpoint.layers.items()
        ],
        quality=outcome.quality,
        quality_text=quality_text,
        calibration=outcome.calibration,
        bytes={
            width: sum(path.stat().st_size for path in checkpoint.files_for(checkpoint.slice(width)))
            for width in format_.widths
        },
        seconds=outcome.seconds | {"total": sum(outcome.seconds.values())},
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        software={**versions(), **{name: str(value) for name, value in describe_machine().items()}},
        command=command,
        source_bytes=sum(path.stat().st_size for path in files if path.suffix == ".safetensors"),
        tower=sorted({".".join(name.split(".")[:2]) for name in tower}),
        license=read_license(source),
    )
