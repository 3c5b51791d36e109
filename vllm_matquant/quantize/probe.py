"""How fast a method is on this machine, from trying it on small random layers."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.optimize import nnls

from vllm_matquant.checkpoint.codebook import ENTRIES, PLACES, Codebook
from vllm_matquant.checkpoint.decoder import AFFINE_INT8, Affine, Decoder, DecoderKind
from vllm_matquant.checkpoint.spec import GROUP_SIZES, GroupSize
from vllm_matquant.quantize.activations import Activations
from vllm_matquant.quantize.block import BlockTask
from vllm_matquant.quantize.device import products_dtype
from vllm_matquant.quantize.method import Method
from vllm_matquant.quantize.training import begin_training

# (rows, columns, windows of text) of the trials: far apart in each, so that the terms can be told apart.
_TRIALS = ((32, 256, 4), (256, 256, 4), (32, 1024, 4), (32, 512, 32), (256, 1024, 4), (32, 1536, 4), (128, 1536, 4))
_BUDGET = 20.0  # seconds after which no further trial begins


@dataclass(frozen=True)
class Speed:
    """What work takes on this machine.

    Attributes:
        layer: seconds for each of the terms that the work on a layer is made of: passes over the weights, products of
            weights and Hessian, decompositions of the Hessian, second moments of the text, runs over the text.
        product: seconds for each weight and token of a product, as blocks are run.
        decoding: seconds for each weight in a step of training end to end, besides products.
    """

    layer: Sequence[float]
    product: float
    decoding: float

    def seconds(self, rows: int, columns: int, tokens: int) -> float:
        """To quantize a layer, calibrated on so many tokens."""
        return sum(part * term for part, term in zip(self.layer, _terms(rows, columns, tokens), strict=True))


@torch.no_grad()
def measure_speed(
    method: Method, group_size: GroupSize, sequence_length: int, kind: DecoderKind | None = None
) -> Speed:
    """Quantize small random layers and fit the time of any layer to what that took.

    Args:
        method: to try.
        group_size: as in the format; "auto" counts as the largest.
        sequence_length: tokens in a window.
        kind: how decoders are stored; by default the last kind that the method can fill.
    """
    kind = kind or method.decoder_kinds[-1]

    def seconds(rows: int, columns: int, windows: int) -> float:
        groups = {"channel": columns, "auto": max(GROUP_SIZES)}
        size = groups[group_size] if isinstance(group_size, str) else group_size
        shape = rows, math.ceil(columns / size) * size
        return _quantize_random(method, *shape, size, kind, windows, sequence_length)

    seconds(*_TRIALS[0])  # what is done but once is not to count
    terms: list[list[float]] = []
    taken: list[float] = []
    for rows, columns, windows in _TRIALS:
        if sum(taken) < _BUDGET:
            terms.append(_terms(rows, columns, windows * sequence_length))
            # The machine may have been busy once.
            taken.append(min(seconds(rows, columns, windows) for _ in range(2)))
    trained = AFFINE_INT8 if kind.one_width else kind  # decoders of one width are not trained
    product, decoding = (min(part) for part in zip(*(_train(trained, sequence_length) for _ in range(3)), strict=True))
    return Speed(_fit(terms, taken), product, decoding)


def _terms(rows: int, columns: int, tokens: int) -> list[float]:
    weights = rows * columns
    return [weights, weights * columns, columns**3, tokens * columns**2, tokens * weights]


def _fit(terms: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Coefficients, none of them negative, with the least squares of relative errors."""
    equations = torch.tensor(terms, dtype=torch.float64) / torch.tensor(seconds, dtype=torch.float64).unsqueeze(1)
    scale = equations.amax(dim=0)
    found, _ = nnls((equations / scale).numpy(), torch.ones(len(terms)).numpy())
    return (torch.from_numpy(found) / scale).tolist()


def _train(kind: DecoderKind, tokens: int) -> tuple[float, float]:
    """Seconds for each weight and token of a product, and for each weight of what a step of training does besides."""
    size, group = 1024, 64
    trained = begin_training(_random_decoder(kind, size, size // group), torch.empty)
    inputs = torch.zeros(tokens, size, dtype=products_dtype())
    codes = torch.randint(4, (size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    for _ in range(2):  # forwards, and once more before it goes backwards
        weight = trained.decode(codes).to(inputs.dtype)
    trained.step(trained.slopes(weight, codes), 0.0, 1)
    decoded = time.perf_counter()
    _ = inputs @ weight.T
    return (time.perf_counter() - decoded) / (size * size * tokens), (decoded - start) / (size * size)


def _random_decoder(kind: DecoderKind, rows: int, groups: int) -> Decoder:
    """A decoder of 2 bits."""
    scale = torch.ones(rows, groups)
    if kind.affine:
        return kind.encode(Affine(scale, torch.zeros_like(scale)), 2)
    levels = torch.randn(ENTRIES, PLACES, generator=torch.Generator().manual_seed(0))
    return kind.encode(Codebook(levels, levels.new_empty(0, ENTRIES, PLACES), scale), 2)


def _quantize_random(
    method: Method, rows: int, columns: int, group_size: int, kind: DecoderKind, windows: int, sequence_length: int
) -> float:
    """Seconds to quantize a block of one random layer, and to go on to the next."""
    block, text = _Block(rows, columns), torch.zeros(windows, sequence_length, dtype=torch.int64)
    activations = Activations(_Noise(columns), text, method.followed_widths) if method.needs_calibration else None
    task = BlockTask("trial", block, {"trial.layer": group_size}, activations, decoder_kind=kind)
    start = time.perf_counter()
    layers = dict(method.quantize_block(task))
    if activations:
        activations.advance(block, lambda width: task.decoded(layers, width, method.slicing))
    return time.perf_counter() - start


class _Block(torch.nn.Module):
    """A block of one linear layer."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(columns, rows, bias=False)
        self.layer.weight.normal_(generator=torch.Generator().manual_seed(0))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.layer(hidden).mean(dim=-1, keepdim=True)


@dataclass(frozen=True)
class _Noise:
    """A source of random hidden states."""

    hidden_size: int

    def embed(self, tokens: torch.Tensor, hidden: torch.Tensor) -> list[dict[str, Any]]:
        hidden.normal_(generator=torch.Generator().manual_seed(0))
        return [{}, {}]
