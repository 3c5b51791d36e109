"""Decoders trained on the predictions of the whole model, for one width after the other, or for a recipe's widths.

A method that sees a block at a time cannot know what an error does to the model's predictions. When every layer is
quantized, the scales and offsets of a width follow the gradient of the KL divergence from the source's predictions to
the slice's on the calibration text (as EfficientQAT, arXiv 2407.11062, section 3.3, trains scales on a text's own
words). The codes stay as they are, and each width has decoders of its own: what one width gains costs the others
nothing. The same goes for a recipe, whose layers have other neighbours than in a model of one width.

A step goes through the blocks forwards and then backwards. Between the two it keeps what each block was given and runs
the block once more, so that memory holds one block at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from vllm_matquant.checkpoint.decoder import Decoder
from vllm_matquant.checkpoint.packing import slice_codes
from vllm_matquant.checkpoint.spec import PARENT_BITS, served_width
from vllm_matquant.measure.divergence import divergences, log_probabilities
from vllm_matquant.quantize import ranks
from vllm_matquant.quantize.activations import allocate
from vllm_matquant.quantize.block import weight_name
from vllm_matquant.quantize.device import fast_products, products_dtype, to_device
from vllm_matquant.quantize.layer import QuantizedLayer
from vllm_matquant.quantize.runner import call_block
from vllm_matquant.quantize.selection import Selection
from vllm_matquant.quantize.source import head_weight
from vllm_matquant.quantize.training import TrainedDecoder, batches, begin_training, relative_rate

HEAD_TOKENS = 128  # for which logits are computed at a time

LoadLayers = Callable[[str, Callable[[str], tuple[int, ...]]], dict[str, QuantizedLayer]]
"""Gives the layers of the block, or the one outside of blocks, of a name, with decoders of the widths asked for."""


@dataclass(frozen=True)
class EndToEndSettings:
    """How to train decoders on the model's predictions.

    Attributes:
        up_to: widest width to train; 0 for none.
        epochs: how often each window of the calibration text is seen.
        sequences: windows of it in a step, rounded up to as many on each rank.
        rate: of Adam at 2 bits, relative to each scale; with every bit more it is smaller by the square root of 2, as
            there is less to mend. It falls to zero with the square root of the steps that are left.
        device: torch device to train on; "cuda" is a GPU of its own for each rank.
        seed: of the windows' order.

    Raises:
        ValueError: a number is too small for what it counts.
    """

    up_to: int = 3
    epochs: float = 1.5
    sequences: int = 1
    rate: float = 1.5e-3
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("up_to", 0), ("sequences", 1)):
            if (found := getattr(self, name)) < least:
                raise ValueError(f"end_to_end.{name}: found {found}, expected at least {least}")
        for name in ("epochs", "rate"):
            if not 0 < (found := getattr(self, name)) < math.inf:
                raise ValueError(f"end_to_end.{name}: found {found}, expected a positive number")

    def steps(self, windows: int) -> int:
        """How many steps are taken on a text of so many windows."""
        return max(1, round(self.epochs * windows / self.sequences))


class EndToEnd:
    """The training of one width's decoders, or of a recipe's, in a finished model.

    Args:
        selection: the model, and what is quantized of it; truncated slices.
        widths: the width to train, or that of every quantized layer.
        load: gives the finished layers.
        tokens: int64 [windows, length], the whole calibration text.
        expected: float32 [sequences, length, hidden_size], the outputs of the source's last block on this rank's
            windows of it.
        settings: how to train.
        folder: see :class:`vllm_matquant.quantize.activations.Activations`; of what is kept for each decoder too.
    """

    def __init__(
        self,
        selection: Selection,
        widths: int | Mapping[str, int],
        load: LoadLayers,
        tokens: torch.Tensor,
        expected: torch.Tensor,
        settings: EndToEndSettings,
        folder: Path | None = None,
    ) -> None:
        self._selection, self._runner = selection, selection.source.runner
        self._widths, self._load = widths, load
        self._settings, self._steps = settings, settings.steps(len(tokens))
        self._device = ranks.own_device(settings.device)
        self._expected = expected
        self._blocks = self._runner.block_names
        self._trained = [self._begin(block, folder) for block in self._blocks]
        self._inputs = allocate(expected.shape, folder)
        embedding = self._outer_layer(selection.source.embedding)
        rows = None if embedding is None else lambda ids: self._decode(embedding[ids])
        self._arguments = to_device(self._runner.embed(ranks.spread(tokens), self._inputs, rows), self._device)
        self._head = self._runner.load_head(self._device)
        self._source_head = self._slice_head = self._for_products(head_weight(selection.source))
        if (head := self._outer_layer(selection.source.output_head)) is not None:
            self._slice_head = self._for_products(self._decode(head))

    @torch.no_grad()
    def train(self) -> dict[str, dict[str, Decoder]]:
        """Take all steps.

        Returns:
            For each block the decoders of its layers that have the width that is trained, or of all where each has its
            own, as they will be stored.

        Raises:
            ValueError: the divergence is no longer finite.
        """
        order = batches(len(self._inputs), self._steps, self._settings.sequences, self._settings.seed)
        title = f"training {self._widths} bits" if isinstance(self._widths, int) else "training decoders"
        progress = tqdm(order, title, self._steps, unit="step", smoothing=0, disable=not ranks.is_first())
        for step, batch in enumerate(progress, start=1):
            states = [self._inputs[batch].to(self._device)]
            for index in range(len(self._blocks)):
                states.append(self._forward(index, states[-1]))
            divergence, slope = self._divergence(states.pop(), self._expected[batch].to(self._device))
            if not math.isfinite(divergence):
                raise ValueError(
                    f"{title}: the KL divergence is {divergence} in step {step}, expected a finite one; a smaller "
                    f"end_to_end.rate than {self._settings.rate} may help"
                )
            for index in reversed(range(len(self._blocks))):
                slope = self._backward(index, states.pop(), slope, step)
            progress.set_postfix_str(f"KL {divergence:.3f}")
        kind = self._selection.format.decoder_kind
        return {
            block: {name: kind.encode(each.values.to("cpu"), each.width) for name, each in trained.items()}
            for block, trained in zip(self._blocks, self._trained, strict=True)
        }

    def _begin(self, block: str, folder: Path | None) -> dict[str, TrainedDecoder]:
        """What is trained of a block: a layer with other widths than the model may have none of the model's width."""
        trained = {}
        for name, layer in self._layers(block).items():
            [(width, decoder)] = layer.decoders.items()
            if not isinstance(self._widths, int) or width == self._widths:
                trained[name] = begin_training(
                    decoder, lambda shape: allocate(shape, folder).to(self._device), self._device
                )
        return trained

    def _layers(self, name: str) -> dict[str, QuantizedLayer]:
        return self._load(name, lambda layer: (self._width_of(layer),))

    def _width_of(self, layer: str) -> int:
        if isinstance(self._widths, int):
            return served_width(self._selection.format.widths_of(layer), self._widths)
        return self._widths[layer]

    def _decode(self, layer: QuantizedLayer) -> torch.Tensor:
        """The weight of a layer that has the decoder of one width alone."""
        [width] = layer.decoders
        return layer.decode(width, self._selection.format.slicing)

    def _rate(self, width: int, step: int) -> float:
        first = self._settings.rate * relative_rate(width)
        return first * (1 - (step - 1) / self._steps) ** 0.5

    def _outer_layer(self, name: str | None) -> QuantizedLayer | None:
        """The input embedding or the output head, if it is quantized."""
        owner = self._selection.outer_owner(name)
        return None if owner is None else self._layers(owner)[owner]

    def _for_products(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.to(self._device, products_dtype(self._device))

    def _prepare(self, index: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """A block's parameters as the slice has them, by their names within it, and the codes of its trained layers."""
        name = self._blocks[index]
        layers, trained = self._layers(name), self._trained[index]
        others = self._runner.block_parameters(index, without=layers)
        parameters = {key: value.to(self._device) for key, value in others.items()}
        codes: dict[str, torch.Tensor] = {}
        for layer_name, layer in layers.items():
            if layer_name in trained:
                [width] = layer.decoders
                sliced = slice_codes(layer.codes, PARENT_BITS, width, self._selection.format.slicing)
                codes[layer_name] = sliced.to(self._device)
                weight = trained[layer_name].decode(codes[layer_name])
            else:
                weight = self._decode(layer)
            parameters[weight_name(layer_name, name)] = self._for_products(weight)
        return parameters, codes

    def _run(self, index: int, parameters: dict[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
        with fast_products(self._device):
            return call_block(self._runner.empty_block(index), hidden, self._arguments[index], parameters).float()

    def _forward(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        parameters, _ = self._prepare(index)
        return self._run(index, parameters, hidden)

    def _backward(self, index: int, hidden: torch.Tensor, slope: torch.Tensor, step: int) -> torch.Tensor:
        """Train the decoders of a block.

        Args:
            hidden: what it was given, float32 [sequences, length, hidden_size].
            slope: the loss's derivative by what it made of that.

        Returns:
            The loss's derivative by ``hidden``.
        """
        parameters, codes = self._prepare(index)
        trained = self._trained[index]
        leaves = [parameters[weight_name(name, self._blocks[index])].requires_grad_() for name in codes]
        with torch.enable_grad():
            output = self._run(index, parameters, hidden.requires_grad_())
            first, *others = torch.autograd.grad(output, [hidden, *leaves], slope)
        found = [trained[name].slopes(each, codes[name]) for name, each in zip(codes, others, strict=True)]
        for name, slopes in zip(codes, ranks.means(found), strict=True):
            trained[name].step(slopes, self._rate(trained[name].width, step), step)
        return first

    def _divergence(self, hidden: torch.Tensor, expected: torch.Tensor) -> tuple[float, torch.Tensor]:
        """Mean KL divergence from the source's predictions to the slice's, in nats per token, and its derivative.

        Args:
            hidden, expected: outputs of the last block, float32 [sequences, length, hidden_size].
        """
        slopes, total = torch.empty_like(hidden), 0.0
        tokens = hidden.shape[0] * hidden.shape[1]
        # Few tokens at a time: their logits over a whole vocabulary are larger than their hidden states by far.
        parts = zip(*(each.flatten(0, 1).split(HEAD_TOKENS) for each in (hidden, expected, slopes)), strict=True)
        for state, target, slope in parts:
            with fast_products(self._device):
                wanted = log_probabilities(self._head(target[None], self._source_head)[0])
                with torch.enable_grad():
                    leaf = state[None].requires_grad_()
                    logits = self._head(leaf, self._slice_head)
            found = log_probabilities(logits[0].detach())
            total += float(divergences(wanted, found).sum())
            gradient = found.exp_().sub_(wanted.exp_()).div_(tokens).to(logits.dtype)
            slope.copy_(torch.autograd.grad(logits, leaf, gradient[None])[0][0])
        return total / tokens, slopes
