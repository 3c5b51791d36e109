"""OmniQuant's learned equivalent transformations, between the linear layers of a block.

A channel that one layer, the writer, gives and another one, the reader, takes can be divided by a scale in the one and
multiplied by it in the other: the block's outputs stay what they are, and the reader's columns become easier to
quantize (OmniQuant, arXiv 2308.13137, section 3.3). Here these are the values and the output of attention, and the
halves of a gated feed-forward network: ``v_proj`` and ``o_proj``, ``up_proj`` and ``down_proj``. Scales are folded into
both when a block is finished, so that nothing is left to do at run time.

A writer's channels are its rows. All that a row's grid is made of follows a factor of the row, so that a scale changes
none of the writer's codes: in training it is the reader's alone, and in the end the writer's decoders are divided.

Two pairs of the paper's are left out. A norm before q, k and v, or before gate and up, would have another weight, and
whatever measures, searches or trains a checkpoint takes all but its quantized layers from the source. Between queries
and keys lie rotations, which a scale of single channels does not pass. There are no shifts, for they need biases.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch

from vllm_matquant.checkpoint.affine import Affine
from vllm_matquant.quantize import ranks
from vllm_matquant.quantize.block import BlockTask
from vllm_matquant.quantize.fused import FUSED_PARTS
from vllm_matquant.quantize.runner import call_block

_LOGGER = logging.getLogger(__name__)
_WRITERS = ("v_proj", "up_proj")  # whose outputs reach the reader channel by channel, times what has no scale
_TRIAL_EXPONENTS = 3  # scales of a trial are powers of two, which change no bit of what is computed
_LEAST_ENERGY = 1e-4  # of a channel, relative to the mean, where scales start: what is never used has no size
_TRIAL_ERROR = 1e-5  # of the block's largest output: far below what a norm or a bias in between would change


@dataclass(frozen=True)
class TransformationSettings:
    """How to learn scales between layers. None are unless one of the two is set.

    Attributes:
        rate: of Adam, in the logarithm of a scale; falls linearly to zero. The paper has .005 for some thousands of
            steps.
        migration: where scales start: the power of the root mean square of what the reader is given in a channel, as
            AWQ's (arXiv 2306.00978, eq. 4); with 0 all start at 1.

    Raises:
        ValueError: a number is not from 0 up.
    """

    rate: float = 0.0
    migration: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value < math.inf:
                raise ValueError(f"setting transformations.{name}: found {value}, expected a number from 0 up")

    @property
    def wanted(self) -> bool:
        """Whether there are scales at all."""
        return self.rate > 0 or self.migration > 0


@dataclass(frozen=True)
class Pair:
    """Two layers of a block with channels between them.

    Attributes:
        writer: full name of the layer whose rows give the channels.
        reader: of the one whose columns take them.
        channels: int64 [in_features of the reader], the channel that each column takes: with grouped queries several
            columns take one.
    """

    writer: str
    reader: str
    channels: torch.Tensor

    @torch.no_grad()
    def trial(self, task: BlockTask, hidden: torch.Tensor) -> bool:
        """Whether scales leave the block's outputs as they are, tried with random ones.

        Args:
            task: the block.
            hidden: what to give it, float32 [1, length, hidden_size].
        """
        writer, reader = (task.linears[name].weight for name in (self.writer, self.reader))
        generator = torch.Generator().manual_seed(0)
        scales = 2.0 ** torch.randint(-_TRIAL_EXPONENTS, _TRIAL_EXPONENTS + 1, (len(writer),), generator=generator)
        scaled = {self.writer: writer / scales.unsqueeze(1), self.reader: reader * scales[self.channels]}
        expected, found = (
            call_block(task.block, hidden, task.calibration.arguments, task.local_names(weights))
            for weights in ({}, scaled)
        )
        return float((found - expected).abs().max()) <= _TRIAL_ERROR * float(expected.abs().max())


class _UnfitError(Exception):
    """Says why two layers are no pair."""


def find_pairs(task: BlockTask) -> list[Pair]:
    """The pairs of layers between which channels can be scaled.

    They are found by the names that vLLM fuses layers by and by the modules that these lie in, and tried: a block in
    which something else stands between the two is not known by its names. What is left out is said in the log.

    Args:
        task: a block with activations.

    Raises:
        ValueError: there is none.
    """
    hidden = torch.randn(1, *task.calibration.reference.shape[1:], generator=torch.Generator().manual_seed(0))
    pairs, reasons = list[Pair](), list[str]()
    for parent, children, writer in _writers(task.block):
        try:
            pairs.append(_pair(task, parent, children, writer, hidden))
        except _UnfitError as cause:
            reasons.append(f"{parent}.{writer}: {cause}")
    message = "the ranks found other pairs of layers to scale channels between; quantize with one rank"
    ranks.check_same([(pair.writer, pair.reader) for pair in pairs], message)
    if not pairs:
        found = "; ".join(reasons) or f"no {' and no '.join(_WRITERS)}"
        raise ValueError(
            f"setting transformations: {task.name}: found no layers between which channels can be scaled ({found}), "
            "expected some. Leave out --setting transformations.rate and transformations.migration"
        )
    for reason in reasons:
        if ranks.is_first():
            _say_once(f"no channels are scaled behind {reason}")
    return pairs


@cache
def _say_once(sentence: str) -> None:
    """Every block has the same to say."""
    _LOGGER.warning("%s", sentence)


def _writers(block: torch.nn.Module) -> Iterator[tuple[str, list[str], str]]:
    """Each module of a block with a writer in it: its name, the names of its linear layers, and that of the writer."""
    for parent, module in block.named_modules():
        children = [name for name, child in module.named_children() if isinstance(child, torch.nn.Linear)]
        yield from ((parent, children, writer) for writer in _WRITERS if writer in children)


def _pair(task: BlockTask, parent: str, children: list[str], writer: str, hidden: torch.Tensor) -> Pair:
    """The pair of a writer, which has been tried.

    Raises:
        _UnfitError: it makes none.
    """
    fused = next(parts for parts in FUSED_PARTS if writer in parts)
    others = [name for name in children if name not in fused]
    if missing := [name for name in fused if name not in children]:
        raise _UnfitError(f"found no {missing[0]} beside it, expected {', '.join(fused)}")
    if len(others) != 1:
        raise _UnfitError(f"found {', '.join(others) or 'no layer'} behind it, expected one linear layer")
    names = [f"{task.name}.{parent}.{name}" for name in (writer, *others)]
    if ignored := [name for name in names if name not in task.group_sizes]:
        raise _UnfitError(f"found {ignored[0].rpartition('.')[2]} not quantized, expected both to be")
    first, second = (task.linears[name] for name in names)
    if "bias" in dict(first.named_parameters()):
        raise _UnfitError("found a bias, expected none: it would have to be scaled too, and biases stay the source's")
    channels = _channels(first.out_features, second.in_features, task.block.get_submodule(parent))
    pair = Pair(names[0], names[1], channels)
    if not pair.trial(task, hidden):
        raise _UnfitError(f"found other outputs of the block with scaled channels between it and {others[0]}")
    return pair


def _channels(given: int, taken: int, module: torch.nn.Module) -> torch.Tensor:
    """The channel that each column of a reader takes: int64 [taken].

    Args:
        given: channels of the writer.
        taken: columns of the reader; more where several heads of queries read one of values.
        module: that both lie in.

    Raises:
        _UnfitError: the module does not say how heads are grouped.
    """
    channels = torch.arange(given)
    if taken == given:
        return channels
    size = getattr(module, "head_dim", None)
    if not isinstance(size, int) or given % size or taken % given:
        raise _UnfitError(
            f"found {given} channels for {taken} columns and heads of {size}, expected whole groups of heads"
        )
    return channels.unflatten(0, (-1, size)).repeat_interleave(taken // given, dim=0).flatten()


class ChannelScales:
    """The scales between two layers, in training.

    Attributes:
        logs: float32 [channels], logarithms of the scales.
        rate: of Adam for them.

    Args:
        pair: the layers.
        energies: float32 [in_features of the reader], mean squares of what it is given.
        settings: of the training.
        device: torch device to train on.
    """

    def __init__(self, pair: Pair, energies: torch.Tensor, settings: TransformationSettings, device: str) -> None:
        self.rate, self._channels = settings.rate, pair.channels.to(device)
        count = int(pair.channels.max()) + 1
        summed = torch.zeros(count).index_add(0, pair.channels, energies)
        sizes = summed.clamp(min=_LEAST_ENERGY * float(summed.mean()) + torch.finfo(torch.float32).tiny).log() / 2
        self.logs = (settings.migration * (sizes - sizes.mean())).to(device).requires_grad_()

    def of_columns(self) -> torch.Tensor:
        """What each column of the reader is multiplied by: float32 [in_features], differentiable by ``logs``."""
        return self.logs.exp()[self._channels]

    @torch.no_grad()
    def of_rows(self) -> torch.Tensor:
        """What each row of the writer is divided by: float32 [out_features], on the CPU."""
        return self.logs.exp().cpu()


@dataclass(frozen=True)
class Fold:
    """The scales that become part of a layer when its block is finished.

    Attributes:
        linear: the source's layer.
        columns: what each column is multiplied by, float32 [in_features]; None for nothing.
        rows: what each row is divided by, float32 [out_features]; None for nothing.
    """

    linear: torch.nn.Linear
    columns: torch.Tensor | None = None
    rows: torch.Tensor | None = None

    @classmethod
    @torch.no_grad()
    def of(cls, linear: torch.nn.Linear, read: ChannelScales | None, written: ChannelScales | None) -> Fold:
        """The scales of a layer.

        Args:
            linear: the source's layer.
            read: of its columns.
            written: of its rows.
        """
        return cls(linear, read.of_columns().cpu() if read else None, written.of_rows() if written else None)

    def weight(self) -> torch.Tensor:
        """The layer's weight in the block with scales, float32 [out_features, in_features]."""
        weight: torch.Tensor = self.linear.weight
        if self.columns is not None:
            weight = weight * self.columns
        return weight if self.rows is None else weight / self.rows.unsqueeze(1)

    def hessian(self, hessian: torch.Tensor) -> torch.Tensor:
        """That of what the layer is given there, from that of what it is given in the source."""
        return hessian if self.columns is None else hessian / torch.outer(self.columns, self.columns)

    def grid(self, grid: Affine) -> Affine:
        """The grid of codes there, from that of the weight whose columns alone are scaled."""
        if self.rows is None:
            return grid
        rows = self.rows.unsqueeze(1)
        return Affine(grid.scale / rows, grid.offset / rows)
