"""Training on the outputs of a transformer block, several widths at once: what every such method shares."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch

from vllm_matquant.quantize import ranks
from vllm_matquant.quantize.block import BlockTask
from vllm_matquant.quantize.device import fast_products, to_device
from vllm_matquant.quantize.runner import call_block
from vllm_matquant.quantize.training import batches


class BlockTrainingSettings(Protocol):
    """What every such training needs to be told."""

    @property
    def iterations(self) -> int:
        """Steps of the optimizer."""

    @property
    def sequences(self) -> int:
        """Windows of the calibration text in a step, rounded up to as many on each rank."""

    @property
    def device(self) -> str:
        """Torch device to train on, this rank's own."""

    @property
    def seed(self) -> int:
        """Of the windows' order."""


class Trained(Protocol):
    """A layer in training."""

    def weights(self) -> list[torch.Tensor]:
        """Its weight at each width, float32 [out_features, in_features], without derivatives."""


L = TypeVar("L", bound=Trained)


@dataclass
class BlockStep:
    """What the losses of a step are made of.

    Attributes:
        windows: of the calibration text, places among this rank's.
        target: the source's outputs on them, float32 [windows, length, hidden_size].
        outputs: of the same shape, those of the width whose loss is asked for and, without derivatives, of the widths
            before it.
    """

    windows: list[int]
    target: torch.Tensor
    outputs: dict[int, torch.Tensor] = field(default_factory=dict)


def train_block(
    task: BlockTask,
    layers: Mapping[str, L],
    widths: Sequence[int],
    loss: Callable[[int, BlockStep], torch.Tensor],
    advance: Callable[[L, Sequence[torch.Tensor], int], None],
    settings: BlockTrainingSettings,
) -> None:
    """Train the layers of a block on its outputs, each width on its own slice's activations.

    Each rank has the loss of its own windows, and all take the same steps, by the mean of their gradients.

    Args:
        task: the block, with activations that follow ``widths``.
        layers: in training, by their full names.
        widths: in the order in which they are run in a step; that of :meth:`Trained.weights`.
        loss: of a width in a step.
        advance: changes a layer by the derivatives of the losses by its weights, one for each width; steps count from
            1.
        settings: of the training.
    """
    device, activations = settings.device, task.calibration
    block = copy.deepcopy(task.block).to(device)
    sources = activations.outputs(task.block)
    arguments = to_device(activations.arguments, device)
    order = batches(len(sources), settings.iterations, settings.sequences, settings.seed)
    for number, windows in enumerate(order, start=1):
        step = BlockStep(windows, sources[windows].to(device))
        weights = {name: layer.weights() for name, layer in layers.items()}
        gradients: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
        for place, width in enumerate(widths):
            leaves = {name: weight[place].requires_grad_() for name, weight in weights.items()}
            with torch.enable_grad():
                hidden = activations.slices[width][windows].to(device)
                with fast_products(device):
                    step.outputs[width] = call_block(block, hidden, arguments, task.local_names(leaves)).float()
                found = ranks.means(torch.autograd.grad(loss(width, step), list(leaves.values())))
            step.outputs[width] = step.outputs[width].detach()
            for name, gradient in zip(leaves, found, strict=True):
                gradients[name].append(gradient)
        for name, layer in layers.items():
            advance(layer, gradients[name], number)
