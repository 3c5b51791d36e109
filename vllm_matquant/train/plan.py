"""What a training will need, told before it begins: memory by a step on tensors that have no memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vllm_matquant.checkpoint.affine import Affine
from vllm_matquant.checkpoint.language_model import build_language_model
from vllm_matquant.checkpoint.names import CONFIG_FILE
from vllm_matquant.checkpoint.reader import Checkpoint
from vllm_matquant.checkpoint.skeleton import Skeleton, build_skeleton
from vllm_matquant.checkpoint.spec import served_width
from vllm_matquant.measure.peak import PeakBytes
from vllm_matquant.quantize.plan import free_bytes
from vllm_matquant.quantize.report.wording import size
from vllm_matquant.quantize.terms import trained_widths
from vllm_matquant.train.latent import Parent
from vllm_matquant.train.model import NestedModel, maker_of
from vllm_matquant.train.objective import add_gradients
from vllm_matquant.train.optimizer import Optimizer
from vllm_matquant.train.pipeline import Work, disk_bytes, run_widths
from vllm_matquant.train.settings import TrainingSettings
from vllm_matquant.train.state import WORK_FOLDER


@dataclass(frozen=True)
class TrainingPlan:
    """Foreseen of a training.

    Attributes:
        weights: how many have positions.
        trained: positions, scales and centres: values that follow gradients.
        steps: of the optimizer.
        windows: how many different ones the text has, up to those that the steps take.
        tokens: that go through the model in all steps, each once.
        memory: bytes of tensors at the worst, on one process that trains alone, by what takes them.
        disk: bytes on the output's disk at the worst.
        output: bytes of the checkpoint's tensors.
        free: bytes free on the output's disk.
    """

    weights: int
    trained: int
    steps: int
    windows: int
    tokens: int
    memory: dict[str, int]
    disk: int
    output: int
    free: int | None

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {size(count)}" for part, count in self.memory.items())
        enough = "" if self.free is None or self.disk <= self.free else ": NOT ENOUGH"
        lines = [
            ("trained", f"{self.trained:,} values: positions of {self.weights:,} weights, and decoders"),
            ("steps", f"{self.steps:,}, of {self.tokens:,} tokens in all; {self.windows:,} windows are different"),
            ("memory", f"about {size(sum(self.memory.values()))} of tensors in one process ({parts})"),
            ("disk", f"{size(self.disk)} until the end, then {size(self.output)}; {size(self.free)} free{enough}"),
        ]
        return "\n".join(f"{name:<16}{value}" for name, value in lines)


def make_plan(work: Work) -> TrainingPlan:
    """Plan a training; loads no weights."""
    settings, parent = work.settings, work.parent
    skeleton = build_skeleton(parent.config, parent.folder / CONFIG_FILE)
    disk, output = disk_bytes(parent, settings)
    with FakeTensorMode(), PeakBytes() as peak:
        model = _model(parent, skeleton, settings, run_widths(work))
        optimizer = Optimizer(model.parameters(), settings)
        _take_step(model, optimizer, settings)
        kept = list(model.model.parameters())
        trained = sum(parameter.numel() for parameter in optimizer.trained)
        memory = {
            "source model": sum(each.nbytes for each in kept if not each.requires_grad),
            "codes and decoders": sum(buffer.nbytes for nested in model.layers.values() for buffer in nested.buffers()),
            "positions": 4 * trained,
            "gradients": 4 * trained,
            "moments": 8 * trained,
        }
    memory["activations and work"] = max(0, peak.peak - sum(memory.values()))
    return TrainingPlan(
        weights=model.weights,
        trained=trained,
        steps=settings.steps,
        windows=len(work.tokens),
        tokens=settings.steps * settings.windows * settings.sequence_length,
        memory=memory,
        disk=disk,
        output=output,
        free=free_bytes(work.output, WORK_FOLDER),
    )


def _model(parent: Checkpoint, skeleton: Skeleton, settings: TrainingSettings, widths: set[int]) -> NestedModel:
    """The model that is trained, of tensors without memory."""
    model = build_language_model(parent.config, dtype=settings.dtype)
    load = _loader(parent, widths)
    make = maker_of(parent.format, load, settings.form, settings.start, settings.seed)
    nested = NestedModel(model, skeleton, parent.layers, trained_widths(settings.terms), load, make)
    if settings.gradient_checkpointing:
        nested.keep_no_activations()
    return nested


def _loader(parent: Checkpoint, run: set[int]) -> Callable[[str], Parent]:
    """Gives layers of the parent's shapes."""

    def load(layer: str) -> Parent:
        (rows, columns), widths = parent.layers[layer], parent.format.widths_of(layer)
        groups = columns // parent.format.group_size_of(columns, layer)

        def values() -> Affine:
            return Affine(torch.zeros(rows, groups), torch.zeros(rows, groups))

        decoders = {width: values() for width in {served_width(widths, width) for width in run}}
        return Parent(torch.zeros(rows, columns, dtype=torch.uint8), widths[-1], widths, decoders, values())

    return load


def _take_step(model: NestedModel, optimizer: Optimizer, settings: TrainingSettings) -> None:
    """All that a step does."""
    assert settings.weights is not None
    tokens = torch.zeros(settings.batch, settings.sequence_length, dtype=torch.int64)
    for _ in range(min(settings.accumulate, 2)):  # a second batch finds gradients; further ones find the same
        add_gradients(model, settings.terms, settings.weights, tokens)
    optimizer.step(0)
    for nested in model.layers.values():
        nested.project()
