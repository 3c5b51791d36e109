"""How much the model's predictions mind an error at each token: Hessians that know the whole model.

The Hessian of a layer's output error, the mean of x^T x, counts every token alike, though an error may decide the
prediction at one and do nothing at another. To second order the KL divergence from the model's predictions to those
with an error e_t in a layer's output at token t is half of ``sum_t e_t F_t e_t^T``, F_t the covariance of the gradient
g_t, by that output, of the log-likelihood of words that are drawn from the model's own predictions (Fisher's
information). With each F_t taken as a multiple of the identity, the mean of ``|g_t|^2 x_t^T x_t`` takes the Hessian's
place: one factor of a Kronecker-factored curvature (K-FAC, arXiv 1503.05671; for quantization YAQA, arXiv 2505.22988;
with the gradient of the loss on the text's own words GuidedQuant, arXiv 2505.07004).

One pass over the text, forwards and backwards, finds the ``|g_t|^2`` of every layer. It takes a few windows at a time
through all blocks and keeps what each block was given, so that memory holds one block and these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from vllm_matquant.checkpoint.experts import Routed, routed_to
from vllm_matquant.quantize import ranks
from vllm_matquant.quantize.activations import BATCH_TOKENS, allocate
from vllm_matquant.quantize.device import fast_products, products_dtype, to_device
from vllm_matquant.quantize.end_to_end import HEAD_TOKENS
from vllm_matquant.quantize.runner import call_block
from vllm_matquant.quantize.source import Source, head_weight


@dataclass(frozen=True)
class SensitivitySettings:
    """How tokens are weighed.

    Attributes:
        tokens: whether they are; every token counts the same if not.
        device: torch device to run the model on; "cuda" is a GPU of its own for each rank.
        seed: of the directions in which the predictions are changed.
    """

    tokens: bool = True
    device: str = "cpu"
    seed: int = 0


@torch.no_grad()
def token_weights(
    source: Source,
    layers: Container[str],
    tokens: torch.Tensor,
    settings: SensitivitySettings,
    folder: Path | None = None,
) -> dict[str, torch.Tensor]:
    """How much each token counts in the Hessian of each layer.

    Args:
        source: the model.
        layers: full names of linear layers of its blocks.
        tokens: int64 [windows, length], the whole calibration text.
        settings: how to weigh.
        folder: see :class:`vllm_matquant.quantize.activations.Activations`.

    Returns:
        For each layer, by its full name, float32 [sequences, length] for this rank's windows: the squared length of the
        gradient by the layer's output, relative to its mean over the whole text. Layers that are called with the same
        tensor have one Hessian, and so one tensor here: the mean of theirs. Ones where no output changes the
        predictions; zeros of an expert for tokens that are not routed to it.

    Raises:
        ValueError: a gradient is not finite.
        WriteError: the disk has no room for the first block's inputs and the weights.
    """
    return _Pass(source, layers, tokens, settings, folder).run()


class _Pass:
    def __init__(
        self,
        source: Source,
        layers: Container[str],
        tokens: torch.Tensor,
        settings: SensitivitySettings,
        folder: Path | None,
    ) -> None:
        self._runner, self._layers, self._settings = source.runner, layers, settings
        self._device, self._folder = ranks.own_device(settings.device), folder
        self._places = ranks.spread(range(len(tokens)))
        tokens = ranks.spread(tokens)
        self._inputs = allocate((*tokens.shape, self._runner.hidden_size), folder)
        self._arguments = to_device(self._runner.embed(tokens, self._inputs), self._device)
        self._head = self._runner.load_head(self._device)
        self._head_weight = head_weight(source).to(self._device, products_dtype(self._device))
        self._found: dict[str, torch.Tensor] = {}
        self._stages: dict[str, str] = {}  # layer -> the first that is called with the same tensor
        self._last: tuple[str, torch.Tensor] | None = None

    def run(self) -> dict[str, torch.Tensor]:
        windows, length = self._inputs.shape[:2]
        size = max(1, BATCH_TOKENS // length)
        batches = [slice(start, start + size) for start in range(0, windows, size)]
        for batch in tqdm(batches, "weighing tokens", unit="batch", disable=not ranks.is_first()):
            self._run_batch(batch)
        for name, weights in self._found.items():
            self._make_relative(name, weights)
        for first in dict.fromkeys(self._stages.values()):
            stage = [name for name, other in self._stages.items() if other == first]
            for name in stage[1:]:
                self._found[first] += self._found.pop(name)
            self._found[first] /= len(stage)
        return {name: self._found[first] for name, first in self._stages.items()}

    def _run_batch(self, batch: slice) -> None:
        states = [self._inputs[batch].to(self._device)]
        for index in range(len(self._runner.block_names)):
            with fast_products(self._device):
                block = self._runner.load_block(index).to(self._device)
                states.append(call_block(block, states[-1], self._arguments[index]).float())
        slope = self._head_slope(states.pop(), self._places[batch])
        for index in reversed(range(len(self._runner.block_names))):
            slope = self._backward(index, states.pop(), slope, batch)

    def _backward(self, index: int, hidden: torch.Tensor, slope: torch.Tensor, batch: slice) -> torch.Tensor:
        """Take down the gradients by the outputs of a block's layers; returns that by its input."""
        block = self._runner.load_block(index).to(self._device).requires_grad_(False)
        for name, module in block.named_modules():
            full = f"{self._runner.block_names[index]}.{name}"
            if full in self._layers:
                module.register_forward_hook(self._observer(full, batch))
        with torch.enable_grad(), fast_products(self._device):
            output = call_block(block, hidden.requires_grad_(), self._arguments[index])
            (gradient,) = torch.autograd.grad(output, hidden, slope.to(output.dtype))
        self._last = None
        return gradient

    def _observer(self, name: str, batch: slice) -> Callable[..., None]:
        if name not in self._found:
            self._found[name] = allocate(self._inputs.shape[:2], self._folder).zero_()
        weights = self._found[name]

        def take(gradient: torch.Tensor, routed: Routed | None) -> None:
            lengths = gradient.float().square().sum(-1).flatten().cpu()
            if routed is None:
                weights[batch] += lengths.view(weights[batch].shape)
            else:
                weights[batch].view(-1).index_add_(0, routed.tokens.cpu(), lengths)

        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
            if self._last is None or self._last[1] is not inputs[0]:
                self._last = (name, inputs[0])
            self._stages[name] = self._last[0]
            routed = routed_to(module)
            output.register_hook(lambda gradient: take(gradient, routed))

        return hook

    def _head_slope(self, hidden: torch.Tensor, places: range) -> torch.Tensor:
        """The gradient by the last block's outputs, for a random change of every token's logits.

        Args:
            hidden: the last block's outputs, float32 [sequences, length, hidden_size].
            places: of the sequences among the text's windows, each of which has random numbers of its own.
        """
        slopes = torch.empty_like(hidden)
        for place, states, filled in zip(places, hidden, slopes, strict=True):
            generator = torch.Generator().manual_seed(self._settings.seed + place)
            for state, slope in zip(states.split(HEAD_TOKENS), filled.split(HEAD_TOKENS), strict=True):
                with torch.enable_grad(), fast_products(self._device):
                    leaf = state[None].requires_grad_()
                    logits = self._head(leaf, self._head_weight)
                probabilities = logits.detach().float().softmax(-1)
                signs = random_signs(probabilities.shape, generator).to(self._device)
                change = random_change(probabilities, signs).to(logits.dtype)
                slope.copy_(torch.autograd.grad(logits, leaf, change)[0][0])
        return slopes

    def _make_relative(self, name: str, weights: torch.Tensor) -> None:
        total, count = ranks.totals([float(weights.double().sum()), weights.numel()])
        if not 0 <= total < float("inf"):
            raise ValueError(f"{name}: the gradients on the calibration text hold values that are not finite")
        if total:
            weights *= count / total
        else:
            weights.fill_(1.0)


# The eight signs that each byte stands for.
_SIGNS = (torch.arange(256).unsqueeze(1) >> torch.arange(8) & 1) * 2.0 - 1.0


def random_signs(shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """Numbers that are 1 or -1 with the same probability, float32 of ``shape``, on the CPU.

    Eight are made of a random byte: a generator takes as long for one bit as for eight.
    """
    count = math.prod(shape)
    drawn = torch.randint(0, 256, (-(-count // 8),), generator=generator)
    return _SIGNS[drawn].flatten()[:count].view(*shape)


def random_change(probabilities: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """A change of logits with the mean and the covariance of the log-likelihood's gradient for a drawn word.

    With p the probabilities and s random signs, ``sqrt(p) s - p (sqrt(p) . s)`` has the mean zero and the covariance
    ``diag(p) - p p^T``. All words have their say in it, where a drawn word is one of many.

    Args:
        probabilities: floating point [..., vocabulary].
        signs: of the same shape, each 1 or -1 with the same probability.

    Returns:
        floating point of the same shape.
    """
    change = probabilities.sqrt() * signs
    return change - probabilities * change.sum(-1, keepdim=True)
