"""From what a quantization measured to its report."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_matquant.checkpoint.manifest import versions
from vllm_matquant.checkpoint.reader import open_checkpoint
from vllm_matquant.quantize.machine import describe_machine
from vllm_matquant.quantize.method import Method
from vllm_matquant.quantize.pipeline import Outcome
from vllm_matquant.quantize.report.card import read_license
from vllm_matquant.quantize.report.data import LayerRow, Report
from vllm_matquant.quantize.source import Source


def collect_report(
    source: Source,
    output: Path,
    method: Method,
    outcome: Outcome,
    *,
    model: str,
    quality_text: dict[str, Any],
    command: Sequence[str],
) -> Report:
    """The report on the checkpoint that was just written to ``output``.

    Args:
        model: what to call the source.
        quality_text: what its quality was measured on.
        command: the command line, without folders of the machine.
    """
    checkpoint = open_checkpoint(output, check_values=False)
    format_ = checkpoint.format

    def errors(layer: str) -> dict[int, float]:
        found = outcome.errors.get(layer)
        return {width: found[format_.width_of(layer, width)] for width in format_.widths} if found else {}

    return Report(
        model=model,
        method=method.name,
        settings=asdict(method),
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
        source_bytes=sum(path.stat().st_size for path in source.tensors.files if path.suffix == ".safetensors"),
        tower=sorted({".".join(name.split(".")[:2]) for name in source.skeleton.tower}),
        license=read_license(source.folder),
    )
