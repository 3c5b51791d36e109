"""What a checkpoint comes from: all that its bytes depend on, to be written down and compared."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from typing import Any

from vllm_matquant.checkpoint.copied import copied_files
from vllm_matquant.checkpoint.manifest import describe_file, describe_files, versions
from vllm_matquant.checkpoint.names import CONFIG_FILE
from vllm_matquant.checkpoint.quantization_config import format_to_config
from vllm_matquant.checkpoint.spec import Format
from vllm_matquant.measure.windows import Windows
from vllm_matquant.quantize import ranks
from vllm_matquant.quantize.machine import describe_machine
from vllm_matquant.quantize.method import Method
from vllm_matquant.quantize.selection import Selection
from vllm_matquant.quantize.source import Source
from vllm_matquant.quantize.values import check_values, checking


def read_source(selection: Selection) -> dict[str, Any]:
    """Read all of the source, before the long work: size and SHA-256 of its files, and whether its values will do.

    Args:
        selection: what is quantized of it.

    Raises:
        TensorValueError: see :func:`vllm_matquant.quantize.values.check_values`.
    """
    source = selection.source
    files = [source.folder / CONFIG_FILE, *source.tensors.files]
    with checking(2 * sum(path.stat().st_size for path in files)) as progress:
        described = describe_files(files, progress.update)
        check_values(selection, progress.update)
    return described


def describe_settings(source: Source, method: Method, format_: Format, calibration: Windows | None) -> dict[str, Any]:
    """What the checkpoint's bytes depend on besides the source's weights and the calibration text."""
    return {
        "copied": {name: describe_file(source.folder / name) for name in copied_files(source.folder)},
        "tokens": hashlib.sha256(calibration.tokens.numpy().tobytes()).hexdigest() if calibration else None,
        "method": {"name": method.name, **asdict(method)},
        "format": format_to_config(format_),
        "versions": versions(),
        "machine": describe_machine(),
        "ranks": ranks.count(),
    }
