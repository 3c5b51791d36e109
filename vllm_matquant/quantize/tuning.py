"""Block-wise tuning of codes and decoders, for several widths at once.

A layer-wise solver does not know what one layer's error does to the next. Here a block's codes and decoders are trained
on the error of the block's output, each width on its own activations: codes by signed gradients (AutoRound, arXiv
2309.05516, eq. 3 to 6), scales and offsets by Adam (as OmniQuant, arXiv 2308.13137, learns clipping).

Every weight has a *position* on each width's scale of codes, and its code is the position's floor. The code of a wider
slice is held inside the cell of the narrower one's, so that the codes nest at every step. A position is moved by the
gradient of its own width and, as a code decides in which cell the wider ones lie, in part by theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from vllm_matquant.checkpoint.decoder import Decoder
from vllm_matquant.checkpoint.packing import slice_codes
from vllm_matquant.checkpoint.spec import PARENT_BITS
from vllm_matquant.quantize import ranks
from vllm_matquant.quantize.activations import BATCH_TOKENS
from vllm_matquant.quantize.block import BlockTask
from vllm_matquant.quantize.block_training import BlockStep, train_block
from vllm_matquant.quantize.layer import QuantizedLayer
from vllm_matquant.quantize.runner import run_block
from vllm_matquant.quantize.training import TrainedAffine

_MARGIN = 0.05  # to the cell's border, from where a position starts


@dataclass(frozen=True)
class TuningSettings:
    """How to tune a block.

    Attributes:
        iterations: steps of the optimizer; its rates fall linearly to zero.
        sequences: windows of the calibration text in a step, rounded up to as many on each rank.
        position_range: how far a position can travel in all, in cells of its width.
        decoder_rate: of Adam, relative to each scale.
        distillation: weight of the distance to the widest slice's outputs, beside that to the source's
            (co-distillation, MatQuant, arXiv 2502.06786, section 3.2).
        coupling: share of the wider widths' gradients in the movement of a position: a code decides in which cell
            theirs lie.
        device: torch device to tune on; "cuda" is a GPU of its own for each rank.
        seed: of the windows' order.
    """

    iterations: int = 50
    sequences: int = 4
    position_range: float = 0.15
    decoder_rate: float = 2e-3
    distillation: float = 0.0
    coupling: float = 0.5
    device: str = "cpu"
    seed: int = 0


class TunedLayer:
    """A layer's codes and decoders at the tuned widths, while they are trained.

    Args:
        weight: float32 [out_features, in_features], the source's.
        layer: where to start from; truncated slices.
        widths: ascending.
        settings: of the tuning.
    """

    def __init__(
        self, weight: torch.Tensor, layer: QuantizedLayer, widths: Sequence[int], settings: TuningSettings
    ) -> None:
        device = settings.device
        self._start = layer
        self._widths = widths
        self._coupling = settings.coupling
        self._positions, self._decoders = [], []
        group_size = weight.shape[1] // layer.decoders[widths[0]].affine.scale.shape[1]
        for width in widths:
            values = layer.decoders[width].affine.to(device)
            codes = slice_codes(layer.codes, PARENT_BITS, width, "truncate").to(device).float()
            scale, offset = (part.repeat_interleave(group_size, dim=1) for part in (values.scale, values.offset))
            exact = (weight.to(device) - offset) / scale.clamp(min=torch.finfo(torch.float32).tiny) + 0.5
            # Inside the cell that the solver chose: next to the border where the solver overruled the nearest level.
            self._positions.append(torch.clamp(exact, codes + _MARGIN, codes + 1 - _MARGIN))
            self._decoders.append(TrainedAffine(values, width))
        self._codes = self._nested_codes()

    def weights(self) -> list[torch.Tensor]:
        """The decoded weight of each width: float32 [out_features, in_features]."""
        self._codes = self._nested_codes()
        return [trained.decode(codes) for codes, trained in zip(self._codes, self._decoders, strict=True)]

    def step(self, gradients: Sequence[torch.Tensor], position_rate: float, decoder_rate: float, step: int) -> None:
        """One step of the optimizer.

        Args:
            gradients: of each width's loss, with respect to its weight.
            position_rate: in cells.
            decoder_rate: relative to the scale.
            step: counts from 1.
        """
        for place, gradient in enumerate(gradients):
            trained = self._decoders[place]
            trained.step(trained.slopes(gradient, self._codes[place]), decoder_rate, step)
            direction = gradient.clone()
            for wider in gradients[place + 1 :]:
                direction.add_(wider, alpha=self._coupling)
            highest = 2 ** self._widths[place] - _MARGIN
            self._positions[place].sub_(direction.sign_(), alpha=position_rate).clamp_(_MARGIN, highest)

    def finish(self) -> tuple[torch.Tensor, dict[int, Decoder]]:
        """What was trained: parent codes, uint8 [out_features, in_features], and decoders to store.

        Where a tuned code is still the start's, the bits below it are the start's too.
        """
        widest = self._widths[-1]
        tuned = self._nested_codes()[-1].cpu().to(torch.int32)
        lowest = tuned << (PARENT_BITS - widest)
        parents = self._start.codes.to(torch.int32).clamp(lowest, lowest + 2 ** (PARENT_BITS - widest) - 1)
        decoders = {
            width: self._start.decoders[width].form.encode(trained.values.to("cpu"), width)
            for width, trained in zip(self._widths, self._decoders, strict=True)
        }
        return parents.to(torch.uint8), decoders

    def _nested_codes(self) -> list[torch.Tensor]:
        codes: list[torch.Tensor] = []
        for place, positions in enumerate(self._positions):
            floor = positions.floor()
            if place:
                cell = 2 ** (self._widths[place] - self._widths[place - 1])
                lowest = codes[-1] * cell
                floor = floor.clamp(lowest, lowest + (cell - 1))
            codes.append(floor)
        return codes


def token_error(outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of a token's squared error relative to its squared norm.

    What follows normalizes each token, so that a few tokens with large states must not outweigh all others.

    Args:
        outputs, target: float32 [..., hidden_size].
    """
    return ((outputs - target).square().sum(dim=-1) / target.square().sum(dim=-1)).mean()


def tune_block(
    task: BlockTask, layers: dict[str, QuantizedLayer], widths: Sequence[int], settings: TuningSettings
) -> dict[str, TunedLayer]:
    """Train the codes and decoders of a block's layers.

    The loss is the sum over widths of the logarithm of :func:`token_error`: every width counts by its relative gain.
    Each rank has the loss of its own windows, and all take the same steps, by the mean of their gradients.

    Args:
        layers: the block's layers, quantized; where to start from.
        widths: ascending; followed by the task's activations, as the widest of the layers is for distillation.
    """
    settings = replace(settings, device=ranks.own_device(settings.device))
    linears = task.linears
    tuned = {name: TunedLayer(linears[name].weight, layer, widths, settings) for name, layer in layers.items()}
    teacher = _teacher(task, layers) if settings.distillation else None

    def loss(width: int, step: BlockStep) -> torch.Tensor:
        found = token_error(step.outputs[width], step.target).log()
        if teacher is not None:
            taught = token_error(step.outputs[width], teacher[step.windows].to(settings.device)).log()
            found = found + settings.distillation * taught
        return found

    def advance(layer: TunedLayer, gradients: Sequence[torch.Tensor], number: int) -> None:
        remaining = 1 - (number - 1) / settings.iterations
        # The rates' mean is half the first one.
        rate = 2 * settings.position_range / settings.iterations * remaining
        layer.step(gradients, rate, settings.decoder_rate * remaining, number)

    train_block(task, tuned, widths, loss, advance, settings)
    return tuned


def _teacher(task: BlockTask, layers: Mapping[str, QuantizedLayer]) -> torch.Tensor:
    """The outputs of the widest slice, float32 [sequences, length, hidden_size]."""
    activations = task.calibration
    width = max(activations.slices)
    inputs = activations.slices[width]
    outputs = torch.empty_like(inputs)
    weights = task.decoded(layers, width, "truncate")
    with activations.products():
        run_block(task.block, inputs, outputs, activations.arguments, BATCH_TOKENS, weights)
    return outputs
