"""What a method costs, from trying it on small random layers: seconds and bytes of memory for layers of any shape.

Both are taken as sums of the terms that the work on a layer is made of, with coefficients fitted to the trials: passes
over the weights, products of weights and Hessian, decompositions of the Hessian, and runs over the calibration text.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vllm_matquant.checkpoint.spec import GROUP_SIZES, GroupSize
from vllm_matquant.quantize.activations import Activations
from vllm_matquant.quantize.block import BlockTask
from vllm_matquant.quantize.decoders import Decoder
from vllm_matquant.quantize.device import products_dtype
from vllm_matquant.quantize.end_to_end import EndToEndSettings
from vllm_matquant.quantize.method import Method
from vllm_matquant.quantize.training import TrainedDecoder

# (rows, columns, windows of text) of the trials: far apart in each, so that the terms can be told apart.
_TIME_TRIALS = (
    (32, 256, 4),
    (256, 256, 4),
    (32, 1024, 4),
    (32, 512, 32),
    (256, 1024, 4),
    (32, 1536, 4),
    (128, 1536, 4),
)
_MEMORY_TRIALS = ((32, 256), (128, 256), (32, 512))
_BUDGET = 20.0  # seconds after which no further time trial begins


@dataclass(frozen=True)
class Cost:
    """What layers cost, as coefficients of :func:`_time_terms` and :func:`_memory_terms`.

    Attributes:
        time: of a layer, in seconds.
        first: memory at the worst, in bytes, of a block of one layer; besides the block and the activations.
        further: what every other layer of the block adds.
        training: seconds for each weight and token of a step of training end to end.
    """

    time: Sequence[float]
    first: Sequence[float]
    further: Sequence[float]
    training: float = 0.0

    def seconds(self, rows: int, columns: int, tokens: int) -> float:
        """To quantize a layer, calibrated on so many tokens."""
        return _weighted(self.time, _time_terms(rows, columns, tokens))

    def peak_bytes(self, shapes: Iterable[tuple[int, int]]) -> int:
        """Memory at the worst while a block with layers of these (rows, columns) is quantized, likewise."""
        terms = [_memory_terms(*shape) for shape in shapes]
        further = [_weighted(self.further, each) for each in terms]
        largest = max(_weighted(self.first, each) - added for each, added in zip(terms, further, strict=True))
        return round(largest + sum(further))


@torch.no_grad()
def measure_cost(method: Method, group_size: GroupSize, sequence_length: int) -> Cost:
    """Quantize small random blocks and fit the cost of any layer to what that took.

    Args:
        group_size: as in the format; "auto" counts as the largest.
        sequence_length: tokens in a window.
    """

    def trial(rows: int, columns: int, windows: int, layers: int = 1) -> _Trial:
        if group_size == "channel":
            return _Trial(rows, columns, columns, windows, sequence_length, layers)
        group = max(GROUP_SIZES) if group_size == "auto" else group_size
        return _Trial(rows, math.ceil(columns / group) * group, group, windows, sequence_length, layers)

    trial(32, 256, 4).run(method)  # what is done but once is no cost
    time_terms: list[list[float]] = []
    seconds: list[float] = []
    for each in (trial(*shape) for shape in _TIME_TRIALS):
        if sum(seconds) < _BUDGET:
            time_terms.append(_time_terms(each.rows, each.columns, each.windows * sequence_length))
            seconds.append(min(each.seconds(method) for _ in range(2)))  # the machine may have been busy once
    single, double = ([trial(*shape, 4, layers) for shape in _MEMORY_TRIALS] for layers in (1, 2))
    memory_terms = [_memory_terms(each.rows, each.columns) for each in single]
    first, both = ([each.peak_bytes(method) for each in trials] for trials in (single, double))
    return Cost(
        time=_fit(time_terms, seconds),
        first=_fit(memory_terms, first),
        further=_fit(memory_terms, [max(1, two - one) for two, one in zip(both, first, strict=True)]),
        training=min(_train(method.training, sequence_length) for _ in range(3)) if method.training else 0.0,
    )


def _train(settings: EndToEndSettings, sequence_length: int) -> float:
    """Seconds for each weight and token of a step on a layer, as :class:`EndToEnd` takes it."""
    size, group, tokens = 1024, 64, settings.sequences * sequence_length
    trained = TrainedDecoder(Decoder(torch.ones(size, size // group), torch.zeros(size, size // group)), 2)
    codes = torch.zeros(size, size, dtype=torch.uint8)
    inputs = torch.zeros(tokens, size, dtype=products_dtype())
    start = time.perf_counter()
    for _ in range(2):  # forwards, and once more before it goes backwards
        floats = codes.float()
        weight = trained.decode(floats).to(inputs.dtype)
        outputs = inputs @ weight.T
    _, gradient = outputs @ weight, outputs.T @ inputs
    trained.step(trained.slopes(gradient, floats), 0.0, 1)
    return (time.perf_counter() - start) / (size * size * tokens)


def _time_terms(rows: int, columns: int, tokens: int) -> list[float]:
    weights = rows * columns
    return [weights, weights * columns, columns**3, tokens * columns**2, tokens * weights]


def _memory_terms(rows: int, columns: int) -> list[float]:
    return [rows * columns, columns**2, rows + columns]


def _weighted(coefficients: Sequence[float], terms: Sequence[float]) -> float:
    return sum(coefficient * term for coefficient, term in zip(coefficients, terms, strict=True))


def _fit(terms: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
    """Coefficients, none of them negative, with the least squares of relative errors."""
    equations = torch.tensor(terms, dtype=torch.float64) / torch.tensor(values, dtype=torch.float64).unsqueeze(1)
    best, least = [0.0] * equations.shape[1], math.inf
    # The best fit has no negative coefficient among those that it uses, so it is one of all choices of terms.
    for used in product([True, False], repeat=equations.shape[1]):
        if not 0 < sum(used) <= len(equations):
            continue
        part = equations[:, list(used)]
        scale = part.amax(dim=0)
        scaled = torch.linalg.lstsq(part / scale, torch.ones(len(part), 1, dtype=torch.float64)).solution.flatten()
        error = float((part / scale @ scaled - 1).square().sum())
        if (scaled >= 0).all() and error < least:
            found = iter((scaled / scale).tolist())
            best, least = [next(found) if use else 0.0 for use in used], error
    return best


@dataclass(frozen=True)
class _Trial:
    """A random block of equal layers to quantize."""

    rows: int
    columns: int
    group_size: int
    windows: int
    sequence_length: int
    layers: int

    def seconds(self, method: Method) -> float:
        start = time.perf_counter()
        self.run(method)
        return time.perf_counter() - start

    def peak_bytes(self, method: Method) -> int:
        block, activations = self._prepare(method)
        with _PeakBytes() as memory:
            self._quantize(method, block, activations)
        return memory.peak

    def run(self, method: Method) -> None:
        self._quantize(method, *self._prepare(method))

    def _prepare(self, method: Method) -> tuple[_Block, Activations | None]:
        if not method.needs_calibration:
            return _Block(self.rows, self.columns, self.layers), None
        text = torch.zeros(self.windows, self.sequence_length, dtype=torch.int64)
        activations = Activations(_Noise(self.columns), text, method.followed_widths)
        return _Block(self.rows, self.columns, self.layers), activations

    def _quantize(self, method: Method, block: _Block, activations: Activations | None) -> None:
        task = BlockTask("trial", block, {f"trial.{i}": self.group_size for i in range(self.layers)}, activations)
        layers = dict(method.quantize_block(task))
        if activations:
            activations.advance(block, lambda width: task.decoded(layers, width, method.slicing))


class _Block(torch.nn.ModuleList):
    """A block of linear layers, one after the other."""

    def __init__(self, rows: int, columns: int, layers: int) -> None:
        generator = torch.Generator().manual_seed(0)
        super().__init__(torch.nn.Linear(columns, rows, bias=False) for _ in range(layers))
        for parameter in self.parameters():
            parameter.data.normal_(generator=generator)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self:
            hidden = hidden + layer(hidden).mean(dim=-1, keepdim=True)
        return hidden


@dataclass(frozen=True)
class _Noise:
    """A source of random hidden states."""

    hidden_size: int

    def embed(self, tokens: torch.Tensor, hidden: torch.Tensor) -> list[dict[str, Any]]:
        hidden.normal_(generator=torch.Generator().manual_seed(0))
        return [{}, {}]


class _PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made inside the ``with`` statement take at a time.

    Attributes:
        peak: in bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live = 0

    def __torch_dispatch__(
        self, operation: Callable[..., Any], types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        given = {id(t.untyped_storage()) for t in tree_leaves((arguments, keywords)) if isinstance(t, torch.Tensor)}
        made = operation(*arguments, **(keywords or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and id(tensor.untyped_storage()) not in given:
                self._add(tensor.untyped_storage())
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self._live += size
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._remove, size)

    def _remove(self, size: int) -> None:
        self._live -= size
