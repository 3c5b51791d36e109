"""From a source checkpoint to a nested one, block by block."""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from tqdm import tqdm

from vllm_matquant.checkpoint.decoder import Affine
from vllm_matquant.checkpoint.manifest import describe_files, versions
from vllm_matquant.checkpoint.names import CONFIG_FILE
from vllm_matquant.checkpoint.quantization_config import check_layer_widths, format_to_config
from vllm_matquant.checkpoint.spec import Format, GroupSize
from vllm_matquant.checkpoint.staging import check_output, is_copied
from vllm_matquant.checkpoint.writer import CheckpointWriter
from vllm_matquant.measure.windows import Windows, draw_windows, load_tokenizer
from vllm_matquant.quantize import ranks
from vllm_matquant.quantize.activations import Activations
from vllm_matquant.quantize.block import BlockTask
from vllm_matquant.quantize.embeddings import head_hessian, layer_method, quantize_rows
from vllm_matquant.quantize.end_to_end import EndToEnd
from vllm_matquant.quantize.layer import QuantizedLayer
from vllm_matquant.quantize.machine import describe_machine
from vllm_matquant.quantize.method import Method
from vllm_matquant.quantize.plan import Plan, make_plan, shard_bytes
from vllm_matquant.quantize.probe import measure_cost
from vllm_matquant.quantize.quality import HeldOut
from vllm_matquant.quantize.resume import ResumeError, WorkFolder
from vllm_matquant.quantize.source import SourceModel

_LOGGER = logging.getLogger(__name__)
_Setting = TypeVar("_Setting")


@dataclass(frozen=True)
class CalibrationSettings:
    """What to calibrate on; see :func:`vllm_matquant.measure.windows.draw_windows`."""

    source: str | None = None
    samples: int = 64
    sequence_length: int = 512
    seed: int = 0
    text_column: str = "text"


@dataclass(frozen=True)
class Outcome:
    """What was measured while a model was quantized.

    Attributes:
        errors: relative output error of each layer at each width, see
            :func:`vllm_matquant.quantize.layer.relative_error`; empty for a method without Hessians.
        quality: of each width on the held-out text, as rows of :func:`vllm_matquant.measure.evaluate.evaluate`; empty
            without one.
        calibration: :attr:`vllm_matquant.measure.windows.Windows.source`, None for a method without Hessians.
        seconds: wall time of each step.
    """

    errors: dict[str, dict[int, float]]
    quality: list[dict[str, Any]]
    calibration: dict[str, Any] | None
    seconds: dict[str, float]


class _Clock:
    def __init__(self) -> None:
        self._last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, step: str) -> None:
        now = time.perf_counter()
        self.seconds[step], self._last = now - self._last, now


def plan_format(
    source: SourceModel,
    method: Method,
    group_size: GroupSize,
    ignore: Sequence[str],
    group_size_for: Sequence[tuple[str, GroupSize]] = (),
    bits_for: Sequence[tuple[str, tuple[int, ...]]] = (),
    *,
    quantize_embeddings: bool = False,
) -> Format:
    """The format of the checkpoint to be written, with the settings checked against every layer.

    Args:
        ignore: regular expressions; a layer whose full name one of them matches anywhere is not quantized.
        group_size_for: regular expressions with the group size of the layers they match; the last match counts.
        bits_for: likewise with the widths of these layers, ascending.
        quantize_embeddings: quantize the input embedding and the output head too, but for those that are ignored. Where
            they are tied, one cannot be without the other.

    Raises:
        ConfigError: the group size does not divide a layer's input features, or a layer's width would never be served.
        ValueError: an expression is none, or matches no layer, or no layer is left; or embeddings shall be quantized
            and none is left; or the method can do no embeddings, or not the widths asked for.
    """
    embeddings = list(source.skeleton.embeddings) if quantize_embeddings else []
    layers = [*embeddings, *source.linears, *source.other_linears]
    kind = "linear layers and embeddings" if embeddings else "linear layers"
    ignored: list[str] = []
    for expression in ignore:
        ignored += _matching(layers, expression, "ignore", kind)
    outer = _outer_layers_but(source, ignored, method) if quantize_embeddings else []
    ignored = [name for name in (*source.other_linears, *ignored) if name not in (*embeddings, *outer)]
    if not set(source.linears) - set(ignored):
        raise ValueError(
            f"ignore: found {list(ignore)}, which match every linear layer, expected some layer to be left"
        )

    def settings(option: str, rules: Sequence[tuple[str, _Setting]]) -> dict[str, _Setting]:
        found: dict[str, _Setting] = {}
        for expression, value in rules:
            # Tied layers are one, which bears the first's name.
            found |= dict.fromkeys(map(source.owner, _matching(layers, expression, option, kind)), value)
        return found

    group_sizes, layer_widths = settings("group-size-for", group_size_for), settings("bits-for", bits_for)
    format_ = Format(
        method.widths,
        group_size,
        tuple(dict.fromkeys(ignored)),
        method.slicing,
        quantized_embeddings=tuple(name for name in embeddings if name in outer),
    )
    shapes = source.skeleton.quantized_layers(format_, source.folder / CONFIG_FILE)
    format_ = replace(
        format_,
        layer_group_sizes={name: group_sizes[name] for name in shapes if name in group_sizes},
        layer_widths={
            name: layer_widths[name] for name in shapes if layer_widths.get(name, method.widths) != method.widths
        },
    )
    if format_.layer_widths and not method.takes_layer_widths:
        raise ValueError(f"bits-for: found method {method.name}, expected one that takes layers with other widths")
    for name, widths in format_.layer_widths.items():
        check_layer_widths(widths, method.widths, f"widths of {name}", source.folder)
        method.with_widths(widths)  # which refuses those that the method cannot do
    for name, (_, in_features) in shapes.items():
        format_.group_size_of(in_features, name, source.folder)
    return format_


def _outer_layers_but(source: SourceModel, ignored: Sequence[str], method: Method) -> list[str]:
    """Input embedding and output head, without those that share their weight with one of ``ignored``.

    Raises:
        ValueError: none is left, or ``method`` cannot quantize them.
    """
    layer_method(method)
    left_out = set(map(source.owner, ignored))
    found = [name for name in (source.embedding, source.output_head) if name is not None]
    layers = [name for name in found if source.owner(name) not in left_out]
    if not layers:
        raise ValueError(
            f"quantize-embeddings: found {' and '.join(found) or 'no embedding'}, of which ignore leaves none, "
            "expected an embedding or output head to quantize (tied ones are both ignored if one is)"
        )
    return layers


def _matching(names: Sequence[str], expression: str, option: str, kind: str) -> list[str]:
    try:
        matching = [name for name in names if re.search(expression, name)]
    except re.error as cause:
        raise ValueError(f"{option}: found {expression!r}, expected a regular expression ({cause})") from cause
    if not matching:
        raise ValueError(f"{option}: {expression!r} matches none of the model's {len(names)} {kind}")
    return matching


def dry_run(
    source: SourceModel,
    output: Path,
    method: Method,
    format_: Format,
    settings: CalibrationSettings,
    *,
    overwrite: bool = False,
    resume: bool = False,
    activations_on_disk: bool = False,
    held_out: torch.Tensor | None = None,
) -> Plan:
    """Check what :func:`quantize` checks, but for the values of the source's weights, and plan it; writes nothing.

    Raises:
        As :func:`quantize`.
    """
    _check_output(source, output, overwrite=overwrite, resume=resume)
    if method.needs_calibration:
        _calibrate(source, settings)
    cost = measure_cost(method, format_.group_size, settings.sequence_length)
    calibration = (settings.samples, settings.sequence_length) if method.needs_calibration else (0, 0)
    windows = (0, 0) if held_out is None else (held_out.shape[0], held_out.shape[1])
    return make_plan(
        source, output, method, format_, cost, calibration, windows, activations_on_disk=activations_on_disk
    )


def quantize(
    source: SourceModel,
    output: Path,
    method: Method,
    format_: Format,
    settings: CalibrationSettings,
    *,
    command: Sequence[str] = (),
    overwrite: bool = False,
    resume: bool = False,
    activations_on_disk: bool = False,
    held_out: torch.Tensor | None = None,
) -> Outcome:
    """Quantize ``source`` into the folder ``output``.

    Every block is run on the outputs of the blocks before it in the source's own precision; what ``format_`` quantizes
    of embedding and output head comes after the last one. Finished blocks are kept in a work folder inside ``output``
    until the checkpoint is published, also if an error or an interrupt ends the work; memory holds one block and the
    activations.

    Inside :func:`vllm_matquant.quantize.ranks.started` every rank must call this with the same arguments, and must see
    the same ``output``; each does a share of the work, and the first one writes.

    Args:
        command: the command line, for the manifest.
        overwrite: replace the matquant checkpoint in ``output``; without ``resume`` also unfinished work there.
        resume: go on from unfinished work in ``output``, if there is any. The files will be the very same that an
            uninterrupted run writes.
        activations_on_disk: keep activations in files on the disk of ``output`` instead of in memory.
        held_out: int64 [windows, length], tokens that calibration does not see, to measure each width's quality on.

    Raises:
        CheckpointError: the source holds values that are not finite, or ``output`` cannot be used, see
            :class:`CheckpointWriter`.
        ResumeError: there is unfinished work, and neither ``resume`` nor ``overwrite`` is given, or it was begun with
            another model, text, setting or version.
        TextError: the calibration text cannot be used.
        ValueError: a text has fewer windows than there are ranks, or the ranks were given different work.
        LostRankError: another rank has ended.
        OSError: the disk is full, or the folder cannot be written to.

    Returns:
        What was measured; on other ranks than the first without the layers' errors.
    """
    work = WorkFolder(output)
    blocks = [source.block_name(index) for index in range(source.block_count)]
    clock = _Clock()
    _check_output(source, output, overwrite=overwrite, resume=resume)
    calibration = _calibrate(source, settings) if method.needs_calibration else None
    if calibration:
        ranks.check_windows(len(calibration.tokens), "samples")
    if held_out is not None:
        ranks.check_windows(len(held_out), "held-out-samples")
    given = [method, format_to_config(format_), settings, calibration.source if calibration else None]
    ranks.check_same(given, "the ranks have other settings or texts than each other, expected the same for all")
    # All ranks have found their input good: from here on the first one writes.

    def take_part() -> list[dict[str, Any]]:
        ranks.wait()  # for the work folder
        clock.lap("prepare")
        folder = work.path if activations_on_disk else None
        states = _quantize_layers(source, method, format_, calibration, work, folder)
        clock.lap("quantize")
        ranks.wait()  # for the last layers in it
        if calibration and states is not None:
            _train(source, method, format_, calibration, states, work, folder)
            del states
            ranks.wait()
            clock.lap("train")
        quality = [] if held_out is None else _measure(source, held_out, format_, work, folder)
        clock.lap("evaluate")
        return quality

    if not ranks.is_first():
        return Outcome({}, take_part(), calibration.source if calibration else None, clock.seconds)
    replace = overwrite or work.publishing
    with CheckpointWriter(output, format_, shard_bytes=shard_bytes(source), overwrite=replace) as writer:
        origin = _read_source(source) | {"calibration": calibration.source if calibration else None}
        depends_on = _dependencies(source, method, format_, calibration) | origin
        if resume and work.exists:
            work.check_settings(depends_on)
        else:
            work.begin(depends_on)
        try:
            quality = take_part()
            errors = _add_layers(source, format_, work, writer)
            work.begin_publishing()
            writer.finish(source.config, copy_from=source.folder, manifest={"command": list(command), **origin})
        except BaseException:
            if finished := work.finished(blocks):
                _LOGGER.warning("%d of %d blocks are finished and kept, for --resume", finished, len(blocks))
            else:
                work.remove()
            raise
        work.remove()
        clock.lap("write")
    return Outcome(errors, quality, origin["calibration"], clock.seconds)


def _check_output(source: SourceModel, output: Path, *, overwrite: bool, resume: bool) -> None:
    work = WorkFolder(output)
    if work.exists and not (resume or overwrite):
        blocks = [source.block_name(index) for index in range(source.block_count)]
        found = f"unfinished work, {work.finished(blocks)} of {len(blocks)} blocks"
        raise ResumeError(work.path, "work folder", found, "none, or leave to resume, or to overwrite")
    check_output(output, overwrite or work.publishing)


def _calibrate(source: SourceModel, settings: CalibrationSettings) -> Windows:
    return draw_windows(
        settings.source,
        load_tokenizer(source.folder),
        samples=settings.samples,
        sequence_length=settings.sequence_length,
        seed=settings.seed,
        text_column=settings.text_column,
    )


def _read_source(source: SourceModel) -> dict[str, Any]:
    """Read all of the source once, before the long work: SHA-256 of its files, and whether its values are finite."""
    total = 2 * sum(path.stat().st_size for path in source.files)
    with tqdm(total=total, desc="checking the source", unit="B", unit_scale=True) as progress:
        files = describe_files(source.files, progress.update)
        source.check_values(progress.update)
    return {"source": files}


def _dependencies(source: SourceModel, method: Method, format_: Format, calibration: Windows | None) -> dict[str, Any]:
    """What the checkpoint's bytes depend on besides the source's weights and the calibration text."""
    copied = [path for path in source.folder.iterdir() if path.is_file() and is_copied(path.name)]
    return {
        "copied": describe_files(copied),
        "tokens": hashlib.sha256(calibration.tokens.numpy().tobytes()).hexdigest() if calibration else None,
        "method": {"name": method.name, **asdict(method)},
        "format": format_to_config(format_),
        "versions": versions(),
        "machine": describe_machine(),
        "ranks": ranks.count(),
    }


@torch.no_grad()
def _quantize_layers(
    source: SourceModel,
    method: Method,
    format_: Format,
    calibration: Windows | None,
    work: WorkFolder,
    folder: Path | None,
) -> torch.Tensor | None:
    """Quantize the blocks that are not finished, and then embedding and output head.

    Returns:
        The outputs of the source's last block on the calibration text, float32 [sequences, length, hidden_size], if
        decoders are still to be trained on them.
    """
    blocks = [source.block_name(index) for index in range(source.block_count)]
    outer = source.outer_layers(format_)
    finished = ranks.from_first(work.finished([*blocks, *outer]))
    left = list(outer)[max(0, finished - len(blocks)) :]
    trains = bool(_untrained(method, work))
    if finished == len(blocks) + len(outer) and not trains:
        return None
    states = _quantize_blocks(source, method, format_, calibration, work, folder)
    head = source.owner(source.output_head) if source.output_head else None
    hessian = head_hessian(source, states) if states is not None and head in left else None
    # The activations are gone before the rows of a vocabulary come.
    kept = states if trains else None
    del states
    total = sum(outer[name][0] for name in left)
    with tqdm(total=total, desc="embeddings", unit="row", smoothing=0, disable=_silent() or not left) as progress:
        for name in left:
            group_size = format_.group_size_of(outer[name][1], name)
            moments = hessian if name == head else None
            own = layer_method(method).with_widths(format_.widths_of(name))
            layer = quantize_rows(source, name, own, group_size, moments, progress.update)
            if ranks.is_first():
                work.save(name, {name: layer})
    return kept


def _untrained(method: Method, work: WorkFolder) -> list[int]:
    """The widths whose decoders are still to be trained."""
    widths = method.trained_widths
    done = ranks.from_first(sum(work.is_trained(width) for width in widths))
    return list(widths[done:])


@torch.no_grad()
def _train(
    source: SourceModel,
    method: Method,
    format_: Format,
    calibration: Windows,
    states: torch.Tensor,
    work: WorkFolder,
    folder: Path | None,
) -> None:
    """Train the decoders of the widths that are not finished, one after the other.

    Args:
        states: see :func:`_quantize_layers`.
    """
    if not (settings := method.training):
        return
    for width in _untrained(method, work):
        trained = EndToEnd(source, format_, width, work.load, calibration.tokens, states, settings, folder).train()
        if ranks.is_first():
            work.save_trained(width, trained)
        ranks.wait()  # for what the next width must not count as its own


def _quantize_blocks(
    source: SourceModel,
    method: Method,
    format_: Format,
    calibration: Windows | None,
    work: WorkFolder,
    folder: Path | None,
) -> torch.Tensor | None:
    """Quantize the blocks that are not finished; what they are given is made anew from the finished ones.

    Returns:
        The outputs of the source's last block on the calibration text, if there is one.
    """
    names = [source.block_name(index) for index in range(source.block_count)]
    finished = ranks.from_first(work.finished(names))
    # Where all blocks are finished, the source's states are wanted, and no slice's.
    followed = method.followed_widths if finished < len(names) else ()
    activations = Activations(source, calibration.tokens, followed, folder) if calibration else None
    if activations:
        for index in tqdm(range(finished), desc="resuming", unit="block", disable=_silent() or not finished):
            _replay_block(_block_task(source, index, format_, activations), method, format_, work)
    tasks = [_group_sizes(source, index, format_) for index in range(len(names))]
    done, total = sum(map(len, tasks[:finished])), sum(map(len, tasks))
    with tqdm(total=total, initial=done, desc="quantizing", unit="layer", smoothing=0, disable=_silent()) as progress:
        for index in range(finished, len(names)):
            _quantize_block(_block_task(source, index, format_, activations), method, work, progress)
    return activations.reference if activations else None


# A block is an argument and nothing else, so that it is gone before the next one is loaded.
def _quantize_block(task: BlockTask, method: Method, work: WorkFolder, progress: tqdm[NoReturn]) -> None:
    layers = {}
    for name, layer in method.quantize_block(task):
        layers[name] = layer
        progress.update()
    if ranks.is_first():
        work.save(task.name, layers)
    _advance(task, method, layers)


def _replay_block(task: BlockTask, method: Method, format_: Format, work: WorkFolder) -> None:
    _advance(task, method, work.load(task.name, format_.widths_of))


def _advance(task: BlockTask, method: Method, layers: Mapping[str, QuantizedLayer]) -> None:
    if task.activations:
        task.activations.advance(task.block, lambda width: task.decoded(layers, width, method.slicing))


@torch.no_grad()
def _measure(
    source: SourceModel, tokens: torch.Tensor, format_: Format, work: WorkFolder, folder: Path | None
) -> list[dict[str, Any]]:
    """The quality of every width on the held-out ``tokens``, from the finished layers."""

    def finished(name: str | None) -> QuantizedLayer | None:
        owner = source.quantized_owner(name, format_)
        return None if owner is None else work.load(owner, format_.widths_of)[owner]

    held_out = HeldOut(source, tokens, format_, finished(source.embedding), folder)
    for index in tqdm(range(source.block_count), desc="measuring", unit="block", disable=_silent()):
        _measure_block(_block_task(source, index, format_, None), format_, work, held_out)
    return held_out.rows(finished(source.output_head))


def _measure_block(task: BlockTask, format_: Format, work: WorkFolder, held_out: HeldOut) -> None:
    held_out.advance(task, work.load(task.name, format_.widths_of))


def _silent() -> bool:
    """Whether progress is for another rank to show."""
    return not ranks.is_first()


def _block_task(source: SourceModel, index: int, format_: Format, activations: Activations | None) -> BlockTask:
    group_sizes = _group_sizes(source, index, format_)
    widths = {layer: format_.widths_of(layer) for layer in group_sizes if layer in format_.layer_widths}
    return BlockTask(source.block_name(index), source.load_block(index), group_sizes, activations, widths)


def _group_sizes(source: SourceModel, index: int, format_: Format) -> dict[str, int]:
    """Group size of the layers of a block that are quantized."""
    return {
        layer: format_.group_size_of(in_features, layer)
        for layer, (_, in_features) in source.block_linears(index).items()
        if layer not in format_.ignored_layers
    }


def _add_layers(
    source: SourceModel, format_: Format, work: WorkFolder, writer: CheckpointWriter
) -> dict[str, dict[int, float]]:
    """Add the finished layers, then every other tensor; returns the layers' errors in the model's order."""
    errors: dict[str, dict[int, float]] = {}
    blocks = [source.block_name(index) for index in range(source.block_count)]
    for finished in tqdm([*blocks, *source.outer_layers(format_)], desc="writing", unit="block"):
        for name, layer in work.load(finished, format_.widths_of).items():
            kind = format_.decoder_kind
            writer.add_layer(
                name, layer.codes, {r: kind.encode(Affine(d.scale, d.offset), r) for r, d in layer.decoders.items()}
            )
            if layer.errors:
                errors[name] = layer.errors
    for name in source.unquantized_names(format_):
        writer.add_tensor(name, source.tensor(name))
    return {name: errors[name] for name in source.skeleton.quantized_layers(format_) if name in errors}
