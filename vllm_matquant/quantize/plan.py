"""What a quantization will write, need and take, known before it begins."""

from __future__ import annotations

import math
import resource
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_matquant.checkpoint.packing import PACKED_CODES
from vllm_matquant.checkpoint.spec import BASE_BITS, Format
from vllm_matquant.quantize.activations import BATCH_TOKENS
from vllm_matquant.quantize.decoders import DECODER_DTYPE
from vllm_matquant.quantize.device import products_dtype
from vllm_matquant.quantize.embeddings import part_rows
from vllm_matquant.quantize.end_to_end import HEAD_TOKENS
from vllm_matquant.quantize.method import Method
from vllm_matquant.quantize.probe import Cost
from vllm_matquant.quantize.report.wording import duration, size
from vllm_matquant.quantize.source import SourceModel
from vllm_matquant.quantize.training import TrainedDecoder

_FLOAT = torch.float32.itemsize
_SHARD_BYTES = (2**27, 2**31)  # the least and the most that the writer may hold in memory
_LOGITS_BYTES = 20  # that the comparison of two widths takes for a token and word of the vocabulary
_PACKING_BYTES = 8  # that a weight takes while its code is taken apart into bits
_TRAINED_BYTES = 3 * _FLOAT  # that a weight of one layer takes while its decoder takes a step
_DECODING_BYTES = 3 * _FLOAT  # that a weight takes while it is decoded


@dataclass(frozen=True)
class Plan:
    """Foreseen of a quantization.

    Attributes:
        files: bytes of the tensors in the files that serving each width needs.
        output: bytes of all of them.
        disk: bytes on the output's disk at the worst: output, finished blocks, and activations if kept there.
        free: bytes free there now.
        memory: bytes of memory at the worst, by what takes them.
        seconds: to quantize, without reading and writing files.
    """

    files: dict[int, int]
    output: int
    disk: int
    free: int
    memory: dict[str, int]
    seconds: float

    def __str__(self) -> str:
        lines = [("files to serve", ", ".join(f"{width} bits {size(count)}" for width, count in self.files.items()))]
        enough = "" if self.disk <= self.free else ": NOT ENOUGH"
        lines.append(
            ("disk", f"{size(self.disk)} until the end, then {size(self.output)}; {size(self.free)} free{enough}")
        )
        parts = ", ".join(f"{part} {size(count)}" for part, count in self.memory.items())
        lines.append(("memory", f"about {size(sum(self.memory.values()))} ({parts})"))
        lines.append(("time", f"about {duration(self.seconds)}, by trials on small layers; files not counted"))
        return "\n".join(f"{name:<16}{value}" for name, value in lines)


def shard_bytes(source: SourceModel) -> int:
    """What the checkpoint's writer may hold in memory: as much as a decoder block in float32, which must fit anyway."""
    least, most = _SHARD_BYTES
    return min(max(_largest_block(source) * _FLOAT, least), most)


def make_plan(
    source: SourceModel,
    output: Path,
    method: Method,
    format_: Format,
    cost: Cost,
    calibration: tuple[int, int],
    held_out: tuple[int, int] = (0, 0),
    *,
    activations_on_disk: bool,
) -> Plan:
    """Plan a quantization; reads no weights.

    Args:
        cost: of the method, see :func:`vllm_matquant.quantize.probe.measure_cost`.
        calibration: windows of the calibration text, and tokens in each; zeros for a method without calibration.
        held_out: likewise of the held-out text.
    """
    tokens = math.prod(calibration)
    shards = _shard_sizes(source, format_)
    files = {
        width: sum(size for stored, size in shards.items() if stored <= format_.stored_width(width))
        for width in format_.widths
    }
    state = source.hidden_size * _FLOAT
    calibrating = {"activations": tokens * state * (2 + len(method.followed_widths))}
    measuring = {"activations of the held-out text": math.prod(held_out) * state * (2 + len(format_.widths))}
    training = _training_activations(source, method, format_, calibration)
    # One is gone before the other is made.
    activations = max(calibrating["activations"], *measuring.values(), sum(training.values()))
    shapes = source.skeleton.quantized_layers(format_)
    finished = {name: _finished_bytes(format_, name, *shape) for name, shape in shapes.items()}
    kept = sum(finished.values()) + _trained_bytes(source, method, format_)
    outer = source.outer_layers(format_).values()
    seconds = sum(cost.seconds(*shape, tokens) for shape in source.quantized_linears(format_).values())
    seconds += sum(_outer_seconds(source, cost, *shape, tokens) for shape in outer)
    seconds += _training_seconds(source, method, format_, cost, calibration)
    return Plan(
        files=files,
        output=shards.total(),
        disk=shards.total() + kept + (activations if activations_on_disk else 0),
        free=shutil.disk_usage(next(path for path in (output, *output.absolute().parents) if path.exists())).free,
        memory=_peak_memory(
            source,
            method,
            format_,
            cost,
            {} if activations_on_disk else calibrating,
            {} if activations_on_disk else training,
            {} if activations_on_disk else measuring,
            calibration[1],
            held_out[1],
        ),
        seconds=seconds,
    )


def _shard_sizes(source: SourceModel, format_: Format) -> Counter[int]:
    """Bytes of the tensors in the shards of each width."""
    sizes: Counter[int] = Counter()
    shapes = source.skeleton.quantized_layers(format_)
    for name, shape in shapes.items():
        for width, tensors in format_.tensors_of_layer(*shape, name).items():
            sizes[width] += sum(spec.nbytes for spec in tensors.values())
    for name in source.unquantized_names(format_):
        sizes[BASE_BITS] += source.tensor_spec(name).nbytes
    return sizes


def _outer_seconds(source: SourceModel, cost: Cost, rows: int, columns: int, tokens: int) -> float:
    """To quantize an embedding or output head, part by part; no block is run for it."""
    part = part_rows(source, rows, columns)
    return math.ceil(rows / part) * cost.seconds(part, columns, 0) + cost.seconds(0, columns, tokens)


def _training_seconds(
    source: SourceModel, method: Method, format_: Format, cost: Cost, calibration: tuple[int, int]
) -> float:
    """To train decoders end to end."""
    windows, length = calibration
    if not method.training:
        return 0.0
    # A block's weights are in four products: run twice, and two gradients. The head's are in three.
    weights = 3 / 4 * math.prod(max(source.skeleton.embeddings.values()))
    weights += sum(rows * columns for rows, columns in source.quantized_linears(format_).values())
    tokens = method.training.steps(windows) * method.training.sequences * length
    return len(method.trained_widths) * tokens * weights * cost.training


def _training_activations(
    source: SourceModel, method: Method, format_: Format, calibration: tuple[int, int]
) -> dict[str, int]:
    """Bytes that lie in memory or on disk while decoders are trained."""
    if not method.trained_widths:
        return {}
    groups = sum(
        rows * columns // format_.group_size_of(columns, name)
        for name, (rows, columns) in source.quantized_linears(format_).items()
    )
    return {
        "activations": 2 * math.prod(calibration) * source.hidden_size * _FLOAT,
        "decoders in training": TrainedDecoder.VALUES * groups * _FLOAT,
    }


def _finished_bytes(format_: Format, name: str, rows: int, columns: int) -> int:
    """Bytes of a layer in the work folder: codes, and the decoders of its widths."""
    groups = columns // format_.group_size_of(columns, name)
    return rows * columns + 2 * len(format_.widths_of(name)) * rows * groups * DECODER_DTYPE.itemsize


def _trained_bytes(source: SourceModel, method: Method, format_: Format) -> int:
    """Bytes of the decoders in the work folder that training has changed."""
    return sum(
        2 * rows * columns // format_.group_size_of(columns, name) * DECODER_DTYPE.itemsize
        for name, (rows, columns) in source.quantized_linears(format_).items()
        for width in method.trained_widths
        if width in format_.widths_of(name)
    )


def _peak_memory(
    source: SourceModel,
    method: Method,
    format_: Format,
    cost: Cost,
    calibrating: dict[str, int],
    training: dict[str, int],
    measuring: dict[str, int],
    calibration_window: int,
    window: int,
) -> dict[str, int]:
    """Bytes by what takes them, in the stage of the work that takes most.

    Args:
        calibrating: activations in memory while blocks are quantized.
        training: likewise, while decoders are trained.
        measuring: likewise, while the quality is measured.
        calibration_window: tokens in a window of the calibration text.
        window: tokens in a window of the held-out text; 0 without one.
    """
    blocks = range(source.block_count)
    outer = source.outer_layers(format_)
    stages = [_block_memory(source, index, method, format_, cost) | calibrating for index in blocks]
    stages += [_outer_memory(source, format_, cost, name, *shape) for name, shape in outer.items()]
    if method.training and method.trained_widths:
        tokens = method.training.sequences * calibration_window
        stages += [_training_memory(source, index, format_, tokens) | training for index in blocks]
    if window:
        stages += [_decoded_block_memory(source, index, format_) | measuring for index in blocks]
        stages.append(_logits_memory(source, outer, window) | measuring)
    others = [source.tensor_spec(name).nbytes for name in source.unquantized_names(format_)]
    weights = max(rows * columns for rows, columns in (*source.linears.values(), *outer.values()))
    stages.append(
        {
            "shards to write": min(shard_bytes(source), _shard_sizes(source, format_).total()) + max(others),
            "packing": 2 * weights + _PACKING_BYTES * min(weights, PACKED_CODES),
        }
    )
    worst = max(stages, key=lambda stage: sum(stage.values()))
    return {"program": _resident_bytes(), **{part: size for part, size in worst.items() if size}}


def _block_memory(source: SourceModel, index: int, method: Method, format_: Format, cost: Cost) -> dict[str, int]:
    shapes = source.block_linears(index)
    quantized = [shape for name, shape in shapes.items() if name not in format_.ignored_layers]
    running = BATCH_TOKENS * _FLOAT * sum(rows for rows, _ in shapes.values())
    return {
        "block": _FLOAT * sum(rows * columns for rows, columns in shapes.values()),
        "work on its layers": cost.peak_bytes(quantized) if quantized else 0,
        "a batch in the block": running if method.needs_calibration else 0,
    }


def _outer_memory(
    source: SourceModel, format_: Format, cost: Cost, name: str, rows: int, columns: int
) -> dict[str, int]:
    part = part_rows(source, rows, columns)
    return {
        # Of all rows twice: while the parts are joined.
        f"codes of {name}": 2 * _finished_bytes(format_, name, rows, columns),
        "work on some of its rows": _FLOAT * part * columns + cost.peak_bytes([(part, columns)]),
    }


def _decoded_block_memory(source: SourceModel, index: int, format_: Format) -> dict[str, int]:
    """Of a block that a slice of it is run beside."""
    shapes = source.block_linears(index)
    quantized = {name: shape for name, shape in shapes.items() if name not in format_.ignored_layers}
    weights = [rows * columns for rows, columns in quantized.values()]
    return {
        "block": _FLOAT * sum(rows * columns for rows, columns in shapes.values()),
        "its codes": sum(_finished_bytes(format_, name, *shape) for name, shape in quantized.items()),
        "its slice": _FLOAT * sum(weights) + _DECODING_BYTES * max(weights, default=0),
        "a batch in the block": BATCH_TOKENS * _FLOAT * sum(rows for rows, _ in shapes.values()),
    }


def _training_memory(source: SourceModel, index: int, format_: Format, tokens: int) -> dict[str, int]:
    """Of a block that the decoders are trained of, on so many tokens in a step."""
    shapes = source.block_linears(index).values()
    vocabulary, hidden_size = max(source.skeleton.embeddings.values())
    weights = [rows * columns for rows, columns in shapes]
    # Of all layers the codes of the parent and of the slice, the weight and its gradient.
    block = (2 + 2 * products_dtype().itemsize) * sum(weights)
    return {
        "block in training": block + _TRAINED_BYTES * max(weights),
        "a batch in the block": 2 * tokens * _FLOAT * sum(rows + columns for rows, columns in shapes),
        "inputs of all blocks": (source.block_count + 1) * tokens * source.hidden_size * _FLOAT,
        "output head": 2 * _FLOAT * vocabulary * hidden_size,
        "log-probabilities": _LOGITS_BYTES * vocabulary * HEAD_TOKENS,
    }


def _logits_memory(source: SourceModel, outer: Mapping[str, tuple[int, int]], window: int) -> dict[str, int]:
    vocabulary, hidden_size = max(source.skeleton.embeddings.values())
    quantized = source.output_head is not None and source.owner(source.output_head) in outer
    copies = 2 * _FLOAT + 1 if quantized else _FLOAT  # the source's, and a slice's with its codes
    return {
        "output head": copies * vocabulary * hidden_size,
        "log-probabilities": _LOGITS_BYTES * vocabulary * window,
    }


def _largest_block(source: SourceModel) -> int:
    """Weights in the linear layers of the largest decoder block."""
    blocks = (source.block_linears(index).values() for index in range(source.block_count))
    return max(sum(rows * columns for rows, columns in shapes) for shapes in blocks)


def _resident_bytes() -> int:
    """Memory of this process now: mostly its libraries, which the quantization needs as well."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
