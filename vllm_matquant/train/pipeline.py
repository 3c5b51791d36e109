"""From a parent to a trained one: what is checked, done and kept."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from vllm_matquant.checkpoint.errors import CheckpointError, MissingFileError
from vllm_matquant.checkpoint.manifest import describe_files, versions
from vllm_matquant.checkpoint.names import CONFIG_FILE, INDEX_FILE
from vllm_matquant.checkpoint.reader import Checkpoint
from vllm_matquant.checkpoint.skeleton import build_skeleton
from vllm_matquant.checkpoint.staging import check_output
from vllm_matquant.checkpoint.writer import CheckpointWriter
from vllm_matquant.measure.text import TextError
from vllm_matquant.measure.windows import TextTokenizer, Windows, every_window
from vllm_matquant.quantize import ranks
from vllm_matquant.quantize.device import check_device
from vllm_matquant.quantize.plan import free_bytes, need_room
from vllm_matquant.quantize.resume import ResumeError
from vllm_matquant.quantize.terms import named_widths, trained_widths
from vllm_matquant.quantize.values import checking
from vllm_matquant.train.distributed import claim, place
from vllm_matquant.train.log import Log, check_logger
from vllm_matquant.train.loop import Progress, Training
from vllm_matquant.train.model import is_fixed, load_model
from vllm_matquant.train.optimizer import Optimizer
from vllm_matquant.train.publish import left_behind, publish, trained_format, trained_layers
from vllm_matquant.train.settings import NATIVE, ROUNDED, SLICINGS, TrainingSettings
from vllm_matquant.train.state import WORK_FOLDER, TrainingFolder

_LOGGER = logging.getLogger(__name__)
_FEW_STEPS = 20  # between two looks at how many codes have changed


class UntrainableError(CheckpointError):
    """The parent's codes or decoders are of a kind that is not trained."""


@dataclass(frozen=True)
class Work:
    """What to train, on what, and where it goes.

    Attributes:
        parent: the checkpoint to train.
        source: folder of the model that it was made from.
        output: folder of the checkpoint in the making.
        tokens: int64 [windows, length], the text to train on.
        texts: what the windows were made from, see :class:`vllm_matquant.measure.windows.Windows`.
        settings: how to train.
        held_out: a text to measure on, None for none.
        evaluate_every: steps from one measurement to the next.
        checkpoint_every: steps from one kept state to the next.
        log_folder: where TensorBoard's logs go, None for nowhere.
    """

    parent: Checkpoint
    source: Path
    output: Path
    tokens: torch.Tensor
    texts: Sequence[dict[str, Any]]
    settings: TrainingSettings
    held_out: Windows | None = None
    evaluate_every: int = 100
    checkpoint_every: int = 100
    log_folder: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """What a training came to.

    Attributes:
        steps: taken in all.
        losses: the value of each term in the last step, in nats per token; empty where no step was left.
        changed: share of the codes that are others than the parent's, by trained width.
        held_out: for each measurement the steps taken before and the divergence from the source by width, in nats per
            token; the first was made before the first step. Of a training that went on, those of its last part.
        left_behind: files of the parent that were not carried over, as they are true of the parent alone.
        seconds: wall time of a step, a mean.
    """

    steps: int
    losses: dict[str, float]
    changed: dict[int, float]
    held_out: list[tuple[int, dict[int, float]]] = field(default_factory=list)
    left_behind: list[str] = field(default_factory=list)
    seconds: float = 0.0


def check_parent(parent: Checkpoint, settings: TrainingSettings) -> None:
    """Check that a checkpoint can be trained so.

    Raises:
        UntrainableError: it has codebooks, vectors or rounded slices.
        MissingFileError: it was not fetched whole.
        WidthError: a term names a width that it does not offer.
    """
    form, where = parent.format, parent.folder / CONFIG_FILE
    again = "Make a parent with matquant quantize MODEL --output DIR"
    if not form.decoder_kind.affine:
        raise UntrainableError(
            where, "decoder_kind", form.decoder_kind.name, "affine-int8 or affine-float16, which can be trained", again
        )
    if settings.form != NATIVE:
        if form.quantized_embeddings and form.slicing != SLICINGS[settings.form]:
            method = "matgptq" if settings.form == ROUNDED else "matquant-omni-extra"
            found, expected = list(form.quantized_embeddings), "none, or a parent with such slices, as these stay"
            hint = f"{again} --method {method}"
            raise UntrainableError(where, "quantized_embeddings", found, expected, hint)
    elif form.slicing != SLICINGS[NATIVE]:
        hint = f"{again}, by another --method than matgptq"
        raise UntrainableError(where, "slicing", form.slicing, "truncate: slices that are prefixes of the codes", hint)
    missing = [name for names in parent.missing_files.values() for name in names]
    if missing:
        hint = "Fetch the whole checkpoint: all planes are trained together"
        raise MissingFileError(parent.folder, missing[0], "no such file", "the files of all widths", hint)
    for width in named_widths(settings.terms):
        form.check_width(width, where, "terms")


def state_bytes(parent: Checkpoint, settings: TrainingSettings) -> int:
    """Bytes of a kept state: of all that is trained, in float32, and of two moments."""
    skeleton, values = build_skeleton(parent.config, parent.folder / CONFIG_FILE), 0
    for name, (rows, columns) in parent.layers.items():
        if not is_fixed(name, skeleton):
            groups = columns // parent.format.group_size_of(columns, name)
            widths = {parent.format.width_of(name, width) for width in trained_widths(settings.terms)}
            values += rows * (columns + (2 * groups * len(widths) if settings.form == NATIVE else 0))
    return 3 * torch.float32.itemsize * values


def disk_bytes(parent: Checkpoint, settings: TrainingSettings) -> tuple[int, int]:
    """Bytes on the output's disk at the worst, a state while the next one or the checkpoint is written; and in the end.

    Args:
        parent: the checkpoint to train.
        settings: how to train it.
    """
    state = state_bytes(parent, settings)
    output = sum((parent.folder / name).stat().st_size for name in set(parent.weight_map.values()))
    return state + max(state, output), output


def read_texts(
    texts: Sequence[str | None], tokenizer: TextTokenizer, settings: TrainingSettings, text_column: str = "text"
) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """The windows to train on, and what they were made from.

    Args:
        texts: see :func:`vllm_matquant.measure.text.read_source`; None for the text that comes with this package.
        tokenizer: the model's.
        settings: how many windows, of what length.
        text_column: the text's field in a record, or column in a data set.

    Returns:
        int64 [windows, length], and a description of each text.

    Raises:
        TextError: a text is shorter than a window, or all have fewer windows than a step takes.
    """
    found = [
        every_window(
            text,
            tokenizer,
            most=settings.steps * settings.windows,
            sequence_length=settings.sequence_length,
            text_column=text_column,
        )
        for text in texts
    ]
    tokens = torch.cat([each.tokens for each in found])
    if len(tokens) < settings.windows:
        raise TextError(
            f"text: found {len(tokens)} windows of {settings.sequence_length} tokens, expected at least "
            f"{settings.windows}, those of one step. Give more text, or take a smaller --batch or --accumulate"
        )
    return tokens, [each.source for each in found]


def check_work(work: Work, *, overwrite: bool = False, resume: bool = False) -> None:
    """Check all that can be checked before anything is allocated.

    Args:
        work, overwrite, resume: as of :func:`train`.

    Raises:
        CheckpointError, ValueError: as of :func:`train`.
    """
    check_device("device", work.settings.device)
    check_parent(work.parent, work.settings)
    if work.settings.batch % ranks.count():
        raise ValueError(f"batch: found {work.settings.batch}, expected a multiple of the {ranks.count()} processes")
    if work.log_folder:
        check_logger()
    folder = TrainingFolder(work.output)
    if folder.exists and not (resume or overwrite):
        found = f"an unfinished training, {folder.steps} of {work.settings.steps} steps"
        replaces = (work.output / CONFIG_FILE).exists() and not folder.publishing
        go_on = "--resume --overwrite" if replaces else "--resume"
        hint = f"Use {go_on} to go on, or --overwrite to start again"
        raise ResumeError(folder.path, "work folder", found, "none", hint)
    check_output(work.output, overwrite or folder.publishing)


def check_disk(output: Path, needed: int) -> None:
    """Refuse a disk that is too small.

    Args:
        output: folder of the checkpoint.
        needed: bytes, see :func:`disk_bytes`.

    Raises:
        OutputError: it has too little room.
    """
    need_room(output, needed, free_bytes(output, WORK_FOLDER), "Write to another disk (--output)")


def train(work: Work, *, command: Sequence[str] = (), overwrite: bool = False, resume: bool = False) -> Outcome:
    """Train a parent, and write a checkpoint of the same format.

    Inside :func:`vllm_matquant.quantize.ranks.started` every rank must call this with the same arguments, and must see
    the same output; each runs a share of every batch's windows and holds a part of what is trained.

    Args:
        work: what to train.
        command: the command line, for the manifest.
        overwrite: replace the matquant checkpoint in the output; without ``resume`` also unfinished work there.
        resume: go on from the state that is kept in the output, if there is any.

    Raises:
        CheckpointError: the parent cannot be trained, or the output cannot be used.
        ResumeError: there is unfinished work, and neither ``resume`` nor ``overwrite`` is given, or it was begun with
            another parent, source, text, setting or version.
        ValueError: the loss is no longer finite, the device is not there, or a batch cannot be shared out.
        MissingLoggerError: logs were asked for, and the package that writes them is not installed.
        LostRankError: another rank has ended.
        OutputError: the disk has too little room.
        WriteError: the disk is full, or the folder cannot be written to.
        KeyboardInterrupt: with what is kept.
    """
    check_work(work, overwrite=overwrite, resume=resume)
    check_disk(work.output, disk_bytes(work.parent, work.settings)[0])
    parent, settings = work.parent, work.settings
    folder, left = TrainingFolder(work.output), left_behind(parent)  # the output may be the parent's own folder
    device = ranks.own_device(settings.device)
    claim(device)
    depends_on = _depends_on(work)
    ranks.check_same(depends_on, "the ranks have other settings or texts than each other, expected the same for all")
    with ExitStack() as stack:
        writer, origin = None, dict[str, Any]()
        if ranks.is_first():
            origin = depends_on | _files(work)
            replaces = overwrite or folder.publishing
            writer = stack.enter_context(
                CheckpointWriter(work.output, trained_format(parent, settings.form), overwrite=replaces)
            )
            if resume and folder.exists:
                folder.check_settings(origin)
            else:
                folder.begin(origin)
        ranks.wait()  # for the work folder
        stack.enter_context(_kept_when_interrupted(folder))
        trained, widths = trained_widths(settings.terms), run_widths(work)
        model = load_model(
            work.source, parent, trained, widths, settings.dtype, settings.form, settings.start, settings.seed
        )
        if settings.gradient_checkpointing:
            model.keep_no_activations()
        place(model, device)
        optimizer = Optimizer(model.parameters(), settings)
        done = folder.load(optimizer, model.sharded)
        outcome = _steps(
            work,
            Training(model, optimizer, work.tokens, settings),
            done,
            lambda steps: folder.save(optimizer, steps, model.sharded),
        )
        if ranks.is_first():
            folder.begin_publishing()
        told = {name: each for name, each in origin.items() if name in ("parent", "source", "training")}
        manifest = {"command": list(command), **told}
        publish(writer, trained_layers(model, parent), parent, manifest)
        if ranks.is_first():
            folder.remove()
    return replace(outcome, left_behind=left)


def run_widths(work: Work) -> set[int]:
    """The widths that the model is run at: those that terms name, and all that are measured."""
    return {*named_widths(work.settings.terms), *(work.parent.format.widths if work.held_out else ())}


def _steps(work: Work, training: Training, done: int, save: Any) -> Outcome:
    """Take the steps that are left; measure, log and keep the state meanwhile."""
    settings, measured = work.settings, list[tuple[int, dict[int, float]]]()
    log = Log(work.log_folder, done) if work.log_folder and ranks.is_first() else None
    widths, start, losses = work.parent.format.widths, time.perf_counter(), dict[str, float]()

    def measure(steps: int) -> dict[int, float]:
        assert work.held_out
        found = training.measure(work.held_out.tokens, widths)
        measured.append((steps, found))
        return found

    if work.held_out and not done:
        found = measure(0)
        if log:
            log.add(Progress(0, {}, {}, None, {}, found))
    for each in training.steps(done):
        last, losses = each.step == settings.steps, each.losses
        if work.held_out and (last or each.step % work.evaluate_every == 0):
            each = replace(each, held_out=measure(each.step))
        if work.log_folder and (last or each.step % _FEW_STEPS == 0):
            each = replace(each, changed=training.changed())
        if log:
            log.add(each)
        if last or each.step % work.checkpoint_every == 0:
            save(each.step)
    if log:
        log.close()
    taken = settings.steps - done
    seconds = (time.perf_counter() - start) / taken if taken else 0.0
    return Outcome(settings.steps, losses, training.changed(), measured, seconds=seconds)


def _files(work: Work) -> dict[str, Any]:
    """Size and SHA-256 of the files of parent and source."""
    parent, source = work.parent.folder, work.source
    of_parent = [parent / CONFIG_FILE, parent / INDEX_FILE]
    of_parent += [parent / name for name in sorted(set(work.parent.weight_map.values()))]
    of_source = [source / CONFIG_FILE, *sorted(source.glob("*.safetensors"))]
    with checking(sum(path.stat().st_size for path in (*of_parent, *of_source))) as progress:
        described = [describe_files(files, progress.update) for files in (of_parent, of_source)]
    return {"parent": described[0], "source": described[1]}


def _depends_on(work: Work) -> dict[str, Any]:
    """What the result depends on besides these."""
    return {
        "training": work.settings.describe() | {"texts": list(work.texts)},
        "tokens": hashlib.sha256(work.tokens.numpy().tobytes()).hexdigest(),
        "versions": versions(),
        "ranks": ranks.count(),
    }


@contextmanager
def _kept_when_interrupted(folder: TrainingFolder) -> Iterator[None]:
    """Keep the last state, whatever ends the work, and remove a work folder that holds none."""
    try:
        yield
    except BaseException:
        if ranks.is_first():
            if steps := folder.steps:
                _LOGGER.warning("the state after step %d is kept, for --resume", steps)
            else:
                folder.remove()
        raise
