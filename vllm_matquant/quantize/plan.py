"""What a quantization will write, need and take, told before it begins: bytes on disk exactly, the rest about."""

from __future__ import annotations

import math
import resource
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_matquant.checkpoint.errors import OutputError
from vllm_matquant.checkpoint.packing import PACKED_CODES
from vllm_matquant.checkpoint.spec import BASE_BITS, Format
from vllm_matquant.checkpoint.staging import STAGING_FOLDER
from vllm_matquant.checkpoint.tensor_parallel import Misfit, describe_misfits, misfits
from vllm_matquant.quantize.activations import BATCH_TOKENS
from vllm_matquant.quantize.device import products_dtype
from vllm_matquant.quantize.embeddings import part_rows
from vllm_matquant.quantize.end_to_end import HEAD_TOKENS
from vllm_matquant.quantize.method import Method
from vllm_matquant.quantize.probe import Speed
from vllm_matquant.quantize.report.wording import duration, size
from vllm_matquant.quantize.resume import WORK_FOLDER
from vllm_matquant.quantize.selection import Selection
from vllm_matquant.quantize.source import Source
from vllm_matquant.quantize.training import kept_bytes

_FLOAT = torch.float32.itemsize
_SHARD_BYTES = (2**27, 2**31)  # the least and the most that the writer may hold in memory
_LOGITS_BYTES = 20  # that the comparison of two widths takes for a token and word of the vocabulary
_DECODING_BYTES = 4 * _FLOAT  # that a weight takes while it is decoded
_PACKING_BYTES = 8  # that a weight takes while its code is taken apart into bits


@dataclass(frozen=True)
class Plan:
    """Foreseen of a quantization.

    Attributes:
        files: bytes of the tensors in the files that serving each width needs.
        output: bytes of all of them.
        disk: bytes on the output's disk at the worst: output, finished blocks, and activations if kept there.
        free: bytes free there now, see :func:`free_bytes`.
        memory: about how many bytes of memory are needed at the worst, by what takes them.
        seconds: about how many it takes to quantize, without reading and writing files.
        misfits: tensor parallel sizes that the checkpoint cannot be served with.
    """

    files: dict[int, int]
    output: int
    disk: int
    free: int | None
    memory: dict[str, int]
    seconds: float
    misfits: Sequence[Misfit] = ()

    def __str__(self) -> str:
        lines = [("files to serve", ", ".join(f"{width} bits {size(count)}" for width, count in self.files.items()))]
        enough = "" if self.free is None or self.disk <= self.free else ": NOT ENOUGH"
        lines.append(
            ("disk", f"{size(self.disk)} until the end, then {size(self.output)}; {size(self.free)} free{enough}")
        )
        parts = ", ".join(f"{part} {size(count)}" for part, count in self.memory.items())
        lines.append(("memory", f"about {size(sum(self.memory.values()))} ({parts})"))
        lines.append(("time", f"about {duration(self.seconds)}, by trials on small layers; files not counted"))
        if self.misfits:
            lines.append(("tensor parallel", f"{describe_misfits(self.misfits)}; a smaller --group-size fits more"))
        return "\n".join(f"{name:<16}{value}" for name, value in lines)


def shard_bytes(source: Source) -> int:
    """What the writer may hold in memory: as much as a transformer block in float32, which must fit anyway."""
    least, most = _SHARD_BYTES
    return min(max(_FLOAT * _weights(_largest_block(source)), least), most)


def make_plan(
    selection: Selection,
    method: Method,
    speed: Speed,
    output: Path,
    calibration: tuple[int, int],
    held_out: tuple[int, int] = (0, 0),
    *,
    on_disk: bool = False,
) -> Plan:
    """Plan a quantization; reads no weights.

    Args:
        selection: what is quantized.
        method: how.
        speed: of the method, see :func:`vllm_matquant.quantize.probe.measure_speed`.
        output: folder of the checkpoint.
        calibration: windows of the calibration text, and tokens in each; zeros for a method without calibration.
        held_out: windows of the held-out text, and tokens in each; zeros if quality is not to be measured.
        on_disk: activations are kept in files beside the output.
    """
    format_, shards = selection.format, _shard_sizes(selection)
    activations = _activations(selection, method, calibration, held_out)
    steps = _steps(selection, method, {} if on_disk else activations, calibration[1], held_out[1])
    worst = max(steps.values(), key=lambda step: sum(step.values()))
    return Plan(
        files={
            width: sum(count for shard, count in shards.items() if shard <= format_.stored_width(width))
            for width in format_.widths
        },
        output=shards.total(),
        disk=disk_bytes(selection, method, calibration, held_out, on_disk=on_disk),
        free=free_bytes(output),
        memory={"program": _resident_bytes(), **{part: count for part, count in worst.items() if count}},
        seconds=_seconds(selection, method, speed, *calibration),
        misfits=misfits(format_, selection.shapes),
    )


def disk_bytes(
    selection: Selection,
    method: Method,
    calibration: tuple[int, int],
    held_out: tuple[int, int] = (0, 0),
    *,
    on_disk: bool = False,
) -> int:
    """Bytes of tensors on the output's disk at the worst: output, finished blocks, and activations if kept there.

    Args:
        selection, method, calibration, held_out, on_disk: as of :func:`make_plan`.
    """
    format_, total = selection.format, _shard_sizes(selection).total()
    total += sum(_finished_bytes(format_, name, *shape) for name, shape in selection.shapes.items())
    for name, shape in selection.linears.items():
        trained = set(method.trained_widths) & set(format_.widths_of(name))
        total += sum(_decoder_bytes(format_, name, *shape, width) for width in trained)
    return total + (max(_activations(selection, method, calibration, held_out).values()) if on_disk else 0)


def free_bytes(output: Path, work_folder: str = WORK_FOLDER) -> int | None:
    """Bytes free on the disk of the folder ``output``, None if its file system does not tell.

    Unfinished work in the folder counts as free: it is either a part of what is needed or removed first.

    Args:
        output: the folder, which need not be there.
        work_folder: name of the folder in it that holds unfinished work.
    """
    usage = shutil.disk_usage(next(path for path in (output, *output.absolute().parents) if path.exists()))
    kept = (path for folder in (work_folder, STAGING_FOLDER) for path in (output / folder).rglob("*"))
    return usage.free + sum(path.stat().st_size for path in kept if path.is_file()) if usage.total else None


def check_room(output: Path, needed: int, *, on_disk: bool = False) -> None:
    """Check that the output's disk has room for the work, before any of it is done.

    Args:
        output: folder of the checkpoint.
        needed: see :func:`disk_bytes`.
        on_disk: activations are kept there too.

    Raises:
        OutputError: it has less than ``needed`` bytes free.
    """
    hint = "Write to another disk (--output), or offer fewer widths (--bits)"
    hint += ", or leave out --activations-on-disk" if on_disk else ""
    need_room(output, needed, free_bytes(output), hint)


def need_room(output: Path, needed: int, free: int | None, hint: str) -> None:
    """Refuse a disk that is too small.

    Args:
        output: the folder to name in an error.
        needed: bytes.
        free: bytes, see :func:`free_bytes`.
        hint: what helps.

    Raises:
        OutputError: it has less than ``needed`` bytes free.
    """
    if free is None or needed <= free:
        return
    raise OutputError(output, "disk", f"{free:,} bytes free", f"at least {needed:,} until the end of the work", hint)


def _seconds(selection: Selection, method: Method, speed: Speed, windows: int, length: int) -> float:
    tokens = windows * length
    seconds = sum(speed.seconds(*shape, tokens) for shape in selection.linears.values())
    for rows, columns in selection.outer.values():  # part by part; no block is run for them
        part = part_rows(selection.source, rows, columns)
        seconds += math.ceil(rows / part) * speed.seconds(part, columns, 0) + speed.seconds(0, columns, tokens)
    weights = _weights(selection.linears.values())
    if method.weighing:  # forwards twice and backwards once, without a gradient of any weight
        seconds += (3 * weights + 2 * math.prod(_vocabulary(selection.source))) * tokens * speed.product
    if settings := method.training:
        # A block's weights are in four products, two runs and two gradients, the head's in three.
        products = 4 * weights + 3 * math.prod(_vocabulary(selection.source))
        step = (products * settings.sequences * length) * speed.product
        step += weights * speed.decoding
        seconds += len(method.trained_widths) * settings.steps(windows) * step
    return seconds


def _steps(
    selection: Selection, method: Method, activations: dict[str, int], window: int, held_out: int
) -> dict[str, dict[str, int]]:
    """About how many bytes of memory each step of the work needs, by what takes them.

    Args:
        selection, method: see :func:`make_plan`.
        activations: bytes of those in memory, by step.
        window: tokens in a window of the calibration text.
        held_out: tokens in a window of the held-out text, 0 without one.
    """
    source, shapes = selection.source, _largest_block(selection.source)
    block, largest, rows = _weights(shapes), max(map(math.prod, shapes)), sum(rows for rows, _ in shapes)
    words, columns = _vocabulary(source)
    steps = {
        "calibrating": {
            "block": _FLOAT * block,
            "work on its layers": method.work_bytes(shapes),
            "a batch in the block": BATCH_TOKENS * _FLOAT * rows if method.needs_calibration else 0,
        },
        "writing": {
            "shards to write": min(shard_bytes(source), _shard_sizes(selection).total()),
            "packing": 2 * largest + _PACKING_BYTES * min(largest, PACKED_CODES),
        },
    }
    for name, shape in selection.outer.items():
        part = (part_rows(source, *shape), shape[1])
        steps[name] = {
            f"codes of {name}": 2 * _finished_bytes(selection.format, name, *shape),  # twice while parts are joined
            "work on some of its rows": _FLOAT * math.prod(part) + method.work_bytes([part]),
        }
    inputs = (len(source.runner.block_names) + 1) * source.runner.hidden_size
    if method.weighing and window:
        tokens = window * max(1, BATCH_TOKENS // window)
        steps["weighing tokens"] = {
            "block to run": (_FLOAT + products_dtype().itemsize) * block,
            "a batch in the model": tokens * _FLOAT * (2 * rows + inputs),
            "output head": 2 * _FLOAT * words * columns + _LOGITS_BYTES * words * HEAD_TOKENS,
        }
    if method.training and method.trained_widths:
        tokens = method.training.sequences * window
        steps["training"] = {
            # The codes of the parent and of the slice, the weight and its gradient.
            "block in training": (2 + 2 * products_dtype().itemsize) * block + _DECODING_BYTES * largest,
            "a batch in the model": tokens * _FLOAT * (2 * rows + inputs),
            "output head": 2 * _FLOAT * words * columns + _LOGITS_BYTES * words * HEAD_TOKENS,
        }
    if held_out:
        steps["measuring"] = {
            "block and its slice": (2 * _FLOAT + 2) * block + _DECODING_BYTES * largest,
            "a batch in the block": BATCH_TOKENS * _FLOAT * rows,
            "output heads": 2 * _FLOAT * words * columns + _LOGITS_BYTES * words * held_out,
        }
    for step, count in activations.items():
        steps[step]["activations"] = count
    return steps


def _activations(
    selection: Selection, method: Method, calibration: tuple[int, int], held_out: tuple[int, int]
) -> dict[str, int]:
    """Bytes of hidden states, and of token weights and decoders in training, in the steps that have some."""
    state = selection.source.runner.hidden_size * _FLOAT
    found = {"calibrating": math.prod(calibration) * state * (2 + len(method.followed_widths))}
    if method.weighing and any(calibration):
        weights = math.prod(calibration) * _FLOAT * len(selection.linears)
        found["weighing tokens"] = math.prod(calibration) * state + weights
        found["calibrating"] += weights
    if method.trained_widths:
        sizes = [
            (rows, columns // selection.format.group_size_of(columns, name))
            for name, (rows, columns) in selection.linears.items()
        ]
        forms = map(selection.format.decoder_kind.form, method.trained_widths)
        decoders = max(sum(kept_bytes(form, *size) for size in sizes) for form in forms)
        found["training"] = 2 * math.prod(calibration) * state + decoders
    if any(held_out):
        found["measuring"] = math.prod(held_out) * state * (2 + len(selection.format.widths))
    return found


def _shard_sizes(selection: Selection) -> Counter[int]:
    """Bytes of the tensors in the shards of each width."""
    sizes: Counter[int] = Counter()
    for name, shape in selection.shapes.items():
        for width, tensors in selection.format.tensors_of_layer(*shape, name).items():
            sizes[width] += sum(spec.nbytes for spec in tensors.values())
    for name in selection.unquantized:
        sizes[BASE_BITS] += selection.source.tensors.spec(name).nbytes
    return sizes


def _finished_bytes(format_: Format, name: str, rows: int, columns: int) -> int:
    """Bytes of a layer in the work folder: codes, and the decoders of its widths."""
    widths = format_.widths_of(name)
    return rows * columns + sum(_decoder_bytes(format_, name, rows, columns, width) for width in widths)


def _decoder_bytes(format_: Format, name: str, rows: int, columns: int, width: int) -> int:
    """Bytes of a layer's decoder of one width."""
    return format_.decoder_kind.form(width).nbytes(rows, columns // format_.group_size_of(columns, name))


def _largest_block(source: Source) -> list[tuple[int, int]]:
    """Shapes of the matrices in the transformer block that has most weights."""
    blocks: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
    for matrix in source.matrices.values():
        if matrix.block is not None:
            blocks[matrix.block].append(matrix.shape)
    return max(blocks.values(), key=_weights)


def _weights(shapes: Iterable[tuple[int, int]]) -> int:
    return sum(map(math.prod, shapes))


def _vocabulary(source: Source) -> tuple[int, int]:
    """Shape of the largest matrix with a row for each token, (0, 0) without one."""
    return max((matrix.shape for matrix in source.matrices.values() if matrix.block is None), default=(0, 0))


def _resident_bytes() -> int:
    """Memory of this process now: mostly its libraries, which the quantization needs as well."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
