"""From a source checkpoint to a nested one: what is checked, done and kept, on one rank or several."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_matquant.checkpoint.errors import OutputError
from vllm_matquant.checkpoint.names import CONFIG_FILE
from vllm_matquant.checkpoint.quantization_config import format_to_config
from vllm_matquant.checkpoint.spec import Format
from vllm_matquant.checkpoint.staging import check_output
from vllm_matquant.checkpoint.writer import CheckpointWriter
from vllm_matquant.measure.windows import Windows, draw_windows, load_tokenizer
from vllm_matquant.quantize import ranks
from vllm_matquant.quantize.choice import plan_format
from vllm_matquant.quantize.method import Method
from vllm_matquant.quantize.methods import check_devices
from vllm_matquant.quantize.origin import describe_settings, read_source
from vllm_matquant.quantize.plan import Plan, check_room, disk_bytes, make_plan, shard_bytes
from vllm_matquant.quantize.probe import measure_speed
from vllm_matquant.quantize.resume import ResumeError, WorkFolder
from vllm_matquant.quantize.run import Run
from vllm_matquant.quantize.selection import Selection
from vllm_matquant.quantize.source import Source
from vllm_matquant.quantize.values import check_values, checking

__all__ = ["CalibrationSettings", "Outcome", "dry_run", "plan_format", "quantize"]

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class CalibrationSettings:
    """What to calibrate on; see :func:`vllm_matquant.measure.windows.draw_windows`."""

    source: str | None = None
    samples: int = 64
    sequence_length: int = 512
    seed: int = 0
    text_column: str = "text"

    def load(self, folder: Path) -> Windows:
        """Tokenize the text for the model in ``folder``.

        Raises:
            TextError: the text cannot be used.
        """
        return draw_windows(
            self.source,
            load_tokenizer(folder),
            samples=self.samples,
            sequence_length=self.sequence_length,
            seed=self.seed,
            text_column=self.text_column,
        )


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
        shown: layers of experts that too few tokens reached: they were fitted to all tokens of their block.
    """

    errors: dict[str, dict[int, float]]
    quality: list[dict[str, Any]]
    calibration: dict[str, Any] | None
    seconds: dict[str, float]
    shown: frozenset[str] = frozenset()


class _Clock:
    def __init__(self) -> None:
        self._last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, step: str) -> None:
        now = time.perf_counter()
        self.seconds[step], self._last = now - self._last, now


def dry_run(
    source: Source,
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
    """Check what :func:`quantize` checks, but for the room on the disk, and plan it; writes nothing.

    The plan says how much room there is: :func:`vllm_matquant.quantize.plan.check_room` judges it.

    Args:
        source, output, method, format_, settings, overwrite, resume, activations_on_disk, held_out: as of
            :func:`quantize`.

    Raises:
        CheckpointError, ResumeError, TextError: as :func:`quantize`.
    """
    check_devices(method)
    _check_output(WorkFolder(output), source, overwrite=overwrite, resume=resume)
    windows = (0, 0)
    if method.needs_calibration:
        settings.load(source.folder)
        windows = settings.samples, settings.sequence_length
    selection = Selection(source, format_)
    with checking(sum(path.stat().st_size for path in source.tensors.files)) as progress:
        check_values(selection, progress.update)
    speed = measure_speed(method, format_.group_size, settings.sequence_length, format_.decoder_kind)
    return make_plan(selection, method, speed, output, windows, _shape(held_out), on_disk=activations_on_disk)


def quantize(
    source: Source,
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
        source: the model.
        output: folder of the checkpoint; made if absent.
        method: how codes and decoders are chosen.
        format_: of the checkpoint, see :func:`plan_format`.
        settings: what to calibrate on.
        command: the command line, for the manifest.
        overwrite: replace the matquant checkpoint in ``output``; without ``resume`` also unfinished work there.
        resume: go on from unfinished work in ``output``, if there is any. The files will be the very same that an
            uninterrupted run writes.
        activations_on_disk: keep activations in files on the disk of ``output`` instead of in memory.
        held_out: int64 [windows, length], tokens that calibration does not see, to measure each width's quality on.

    Raises:
        CheckpointError: the source holds values that are not finite or that decoders cannot hold, or ``output`` cannot
            be used, see :class:`CheckpointWriter`.
        ResumeError: there is unfinished work, and neither ``resume`` nor ``overwrite`` is given, or it was begun with
            another model, text, setting or version.
        TextError: the calibration text cannot be used.
        ValueError: a text has fewer windows than there are ranks, the ranks were given different work, or a device that
            the method names is not there.
        LostRankError: another rank has ended.
        OutputError: the disk has too little room for the work.
        WriteError: the disk is full, or the folder cannot be written to.

    Returns:
        What was measured; on other ranks than the first without the layers' errors.
    """
    clock, work = _Clock(), WorkFolder(output)
    check_devices(method)
    _check_output(work, source, overwrite=overwrite, resume=resume)
    calibration = settings.load(source.folder) if method.needs_calibration else None
    if calibration:
        ranks.check_windows(len(calibration.tokens), "samples")
    if held_out is not None:
        ranks.check_windows(len(held_out), "held-out-samples")
    text = calibration.source if calibration else None
    given = [method, format_to_config(format_), settings, text]
    ranks.check_same(given, "the ranks have other settings or texts than each other, expected the same for all")
    run = Run(source, method, format_, calibration, work, work.path if activations_on_disk else None)
    windows = (settings.samples, settings.sequence_length) if calibration else (0, 0)
    needed = disk_bytes(run.selection, method, windows, _shape(held_out), on_disk=activations_on_disk)
    check_room(output, needed, on_disk=activations_on_disk)
    # All ranks have found their input good: from here on the first one writes.
    if not ranks.is_first():
        return Outcome({}, _take_part(run, held_out, clock), text, clock.seconds)
    replace = overwrite or work.publishing
    with CheckpointWriter(output, format_, shard_bytes=shard_bytes(source), overwrite=replace) as writer:
        origin = {"source": read_source(run.selection), "calibration": text}
        depends_on = describe_settings(source, method, format_, calibration) | origin
        if resume and work.exists:
            work.check_settings(depends_on)
        else:
            work.begin(depends_on)
        with _kept_when_interrupted(run):
            quality = _take_part(run, held_out, clock)
            shown = run.shown()
            errors = run.publish(writer, {"command": list(command), **origin})
        work.remove()
        clock.lap("write")
    return Outcome(errors, quality, text, clock.seconds, shown)


def _shape(windows: torch.Tensor | None) -> tuple[int, int]:
    """Windows of a text, and tokens in each; zeros without one."""
    return (0, 0) if windows is None else (windows.shape[0], windows.shape[1])


def _take_part(run: Run, held_out: torch.Tensor | None, clock: _Clock) -> list[dict[str, Any]]:
    """Every rank's share of the steps before the checkpoint is written; returns the quality of each width."""
    ranks.wait()  # for the work folder
    clock.lap("prepare")
    states = run.blocks()
    moments = run.head_moments(states)
    if not run.untrained():
        states = None  # the activations are gone before the rows of a vocabulary come
    run.outer(moments)
    clock.lap("quantize")
    ranks.wait()  # for the last layers in the work folder
    if states is not None:
        run.train(states)
        del states
        ranks.wait()
        clock.lap("train")
    quality = [] if held_out is None else run.measure(held_out)
    clock.lap("evaluate")
    return quality


@contextmanager
def _kept_when_interrupted(run: Run) -> Iterator[None]:
    """Keep finished blocks, whatever ends the work, and remove a work folder that holds none."""
    try:
        yield
    except BaseException:
        if finished := run.work.finished(run.block_names):
            _LOGGER.warning("%d of %d blocks are finished and kept, for --resume", finished, len(run.block_names))
        else:
            run.work.remove()
        raise


def _check_output(work: WorkFolder, source: Source, *, overwrite: bool, resume: bool) -> None:
    output = work.path.parent
    if work.exists and not (resume or overwrite):
        blocks = source.runner.block_names
        found = f"unfinished work, {work.finished(blocks)} of {len(blocks)} blocks"
        replaces = (output / CONFIG_FILE).exists() and not work.publishing
        go_on = "--resume --overwrite" if replaces else "--resume"
        raise ResumeError(
            work.path, "work folder", found, "none", f"Use {go_on} to go on, or --overwrite to start again"
        )
    try:
        check_output(output, overwrite or work.publishing)
    except OutputError as error:
        if overwrite or not work.exists:
            raise
        check_output(output, overwrite=True)  # tells what --overwrite does not help against
        hint = "Use --resume --overwrite to go on with the unfinished work and replace it, not --overwrite alone"
        raise OutputError(error.where, error.subject, error.found, error.expected, hint) from error
