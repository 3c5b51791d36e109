"""From a source checkpoint to a nested one, block by block."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from vllm_matquant.checkpoint.manifest import describe_files
from vllm_matquant.checkpoint.spec import Format
from vllm_matquant.checkpoint.writer import CheckpointWriter
from vllm_matquant.quantize.calibration import Calibration, load_calibration
from vllm_matquant.quantize.hessian import HessianCollector
from vllm_matquant.quantize.methods import Method, relative_error
from vllm_matquant.quantize.source import SourceModel, load_tokenizer, run_block

_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class CalibrationSettings:
    """What to calibrate on; see :func:`vllm_matquant.quantize.calibration.load_calibration`."""

    source: str | None = None
    samples: int = 32
    sequence_length: int = 512
    seed: int = 0


def plan_format(source: SourceModel, method: Method, group_size: int | str, ignore: Sequence[str]) -> Format:
    """The format of the checkpoint to be written, with the settings checked against every layer.

    Args:
        ignore: regular expressions; a layer whose full name one of them matches anywhere is not quantized.

    Raises:
        ConfigError: the group size does not divide a layer's input features.
        ValueError: an expression is none, or matches no layer, or no layer is left.
    """
    ignored = list(source.other_linears)
    linears = [*source.linears, *source.other_linears]
    for expression in ignore:
        try:
            matching = [name for name in linears if re.search(expression, name)]
        except re.error as cause:
            raise ValueError(f"ignore: found {expression!r}, expected a regular expression ({cause})") from cause
        if not matching:
            raise ValueError(f"ignore: {expression!r} matches none of the model's {len(linears)} linear layers")
        ignored += matching
    if not set(linears) - set(ignored):
        raise ValueError(
            f"ignore: found {list(ignore)}, which match every linear layer, expected some layer to be left"
        )
    format_ = Format(method.widths, group_size, tuple(dict.fromkeys(ignored)), method.slicing)  # type: ignore[arg-type]
    for name, (_, in_features) in source.linears.items():
        if name not in format_.ignored_layers:
            format_.group_size_of(in_features, name, source.folder)
    return format_


def quantize(
    source: SourceModel,
    output: Path,
    method: Method,
    format_: Format,
    settings: CalibrationSettings,
    *,
    command: Sequence[str] = (),
    overwrite: bool = False,
) -> dict[str, dict[int, float]]:
    """Quantize ``source`` into the folder ``output``.

    Every block is run on the outputs of the blocks before it in the source's own precision.

    Returns:
        The relative output error of each layer at each width, see
        :func:`vllm_matquant.quantize.methods.relative_error`; empty for a method without Hessians.
    """
    with CheckpointWriter(output, format_, overwrite=overwrite) as writer:
        calibration = _calibrate(source, settings) if method.needs_hessian else None
        errors = _quantize_blocks(source, method, format_, calibration, writer)
        quantized = {f"{name}.weight" for name in source.linears if name not in format_.ignored_layers}
        for name in source.tensor_names:
            if name not in quantized:
                writer.add_tensor(name, source.tensor(name))
        origin = {
            "command": list(command),
            "source": describe_files(source.files),
            "calibration": calibration.source if calibration else None,
        }
        writer.finish(source.config, copy_from=source.folder, manifest=origin)
    return errors


def _calibrate(source: SourceModel, settings: CalibrationSettings) -> Calibration:
    return load_calibration(
        settings.source,
        load_tokenizer(source.folder),
        samples=settings.samples,
        sequence_length=settings.sequence_length,
        seed=settings.seed,
    )


@torch.no_grad()
def _quantize_blocks(
    source: SourceModel,
    method: Method,
    format_: Format,
    calibration: Calibration | None,
    writer: CheckpointWriter,
) -> dict[str, dict[int, float]]:
    errors: dict[str, dict[int, float]] = {}
    hidden, arguments = source.embed(calibration.tokens) if calibration else (None, [])
    count = len(source.linears.keys() - set(format_.ignored_layers))
    with tqdm(total=count, desc="quantizing", unit="layer", smoothing=0) as progress:
        for index in range(source.block_count):
            prefix = source.block_name(index)
            block = source.load_block(index)
            linears = {
                f"{prefix}.{name}": module
                for name, module in block.named_modules()
                if isinstance(module, torch.nn.Linear) and f"{prefix}.{name}" not in format_.ignored_layers
            }
            hessians = HessianCollector(linears)
            if hidden is not None:
                with hessians.collecting():
                    run_block(block, hidden, arguments[index], _BATCH_TOKENS)
            for name, linear in linears.items():
                weight = linear.weight
                hessian = hessians.hessian(name) if hidden is not None else torch.eye(weight.shape[1])
                layer = method.quantize(weight, hessian, format_.group_size_of(weight.shape[1], name))
                writer.add_layer(name, layer.codes, {r: (d.scale, d.offset) for r, d in layer.decoders.items()})
                if hidden is not None:
                    errors[name] = relative_error(weight, layer, method.slices(layer.codes), hessian)
                progress.update()
    return errors
