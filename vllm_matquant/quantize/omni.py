"""OmniQuant under MatQuant's loss: one 8-bit code, of which several widths are rounded slices.

OmniQuant (arXiv 2308.13137, section 3.2) learns how much of a group's range is clipped, by the error of a block's
outputs; where that is asked for, it learns scales between layers too (section 3.3, see
:mod:`vllm_matquant.quantize.transformations`). MatQuant (arXiv 2502.06786, eq. 6 and 7) sums that error over the slices
``S(q, r)`` of one 8-bit code q, which are rounded and clamped, each weighed by a lambda; with co-distillation (section
3.2) a slice also learns from the outputs of a wider one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from vllm_matquant.checkpoint.affine import Affine
from vllm_matquant.checkpoint.decoder import DecoderKind
from vllm_matquant.checkpoint.packing import slice_codes
from vllm_matquant.checkpoint.slicing import SLICE_RULES
from vllm_matquant.checkpoint.spec import PARENT_BITS, Slicing
from vllm_matquant.quantize import ranks
from vllm_matquant.quantize.block import BlockTask
from vllm_matquant.quantize.block_training import BlockStep, train_block
from vllm_matquant.quantize.decoders import rounded_levels
from vllm_matquant.quantize.layer import QuantizedLayer, relative_error
from vllm_matquant.quantize.method import Method
from vllm_matquant.quantize.terms import Term, check_weights, named_widths, parse_terms, trained_widths
from vllm_matquant.quantize.transformations import ChannelScales, Fold, TransformationSettings, find_pairs

_START = 4.0  # of what a sigmoid turns into the share of the range that is kept: .98


@dataclass(frozen=True)
class ClippingSettings:
    """How to learn clipping on a block's outputs.

    Attributes:
        iterations: steps of Adam; its rate falls linearly to zero.
        sequences: windows of the calibration text in a step, rounded up to as many on each rank.
        rate: of Adam, in the sigmoid's argument; the paper has .01 for some thousands of steps.
        device: torch device to train on; "cuda" is a GPU of its own for each rank.
        seed: of the windows' order.
    """

    iterations: int = 50
    sequences: int = 2
    rate: float = 0.1
    device: str = "cpu"
    seed: int = 0


class ClippedLayer:
    """A layer whose groups' clipping is in training.

    Args:
        weight: float32 [out_features, in_features].
        group_size: columns that share a range; divides in_features.
        bits: of the code that all widths are slices of.
        widths: whose weights are asked for in training.
        slicing: how the code is cut to them.
        settings: of the training.
        scales: of its columns, trained with it; None for none.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        group_size: int,
        bits: int,
        widths: Sequence[int],
        slicing: Slicing,
        settings: ClippingSettings,
        scales: ChannelScales | None = None,
    ) -> None:
        self._weight = weight.to(settings.device)
        self._group_size, self._bits, self._widths, self._scales = group_size, bits, widths, scales
        self._highest = SLICE_RULES[slicing].highest
        self._ends = self._ends_of(self._weight)
        self._kept = torch.full_like(self._ends, _START, requires_grad=True)
        rates = [(self._kept, settings.rate), *([(scales.logs, scales.rate)] if scales else [])]
        self._optimizer = torch.optim.Adam([{"params": [each], "lr": rate, "first_lr": rate} for each, rate in rates])
        self._settings = settings
        self._decoded: list[torch.Tensor] = []

    def weights(self) -> list[torch.Tensor]:
        """The decoded weight of each width, as the source's columns have it: float32 [out_features, in_features]."""
        with torch.enable_grad():
            columns = self._scales.of_columns() if self._scales else None
            codes, grid = self._quantized(columns)
            self._decoded = [self._decode(codes, grid, width) for width in self._widths]
            if columns is not None:
                self._decoded = [decoded / columns for decoded in self._decoded]
        return [decoded.detach() for decoded in self._decoded]

    def step(self, gradients: Sequence[torch.Tensor], number: int) -> None:
        """One step of the optimizer.

        Args:
            gradients: of each width's loss, with respect to its weight.
            number: of the step, from 1.
        """
        groups = self._optimizer.param_groups
        for group in groups:
            group["lr"] = group["first_lr"] * (1 - (number - 1) / self._settings.iterations)
        trained = [parameter for group in groups for parameter in group["params"]]
        for parameter, slope in zip(trained, torch.autograd.grad(self._decoded, trained, list(gradients)), strict=True):
            parameter.grad = slope
        self._optimizer.step()

    @torch.no_grad()
    def finish(self) -> tuple[torch.Tensor, Affine]:
        """Codes of the weight with its columns scaled, uint8 [out_features, in_features], and the grid they lie on."""
        codes, grid = self._quantized(self._scales.of_columns() if self._scales else None)
        return codes.to("cpu", torch.uint8), grid.to("cpu")

    def _quantized(self, columns: torch.Tensor | None) -> tuple[torch.Tensor, Affine]:
        """Codes, whole numbers as floating point, and their grid; both follow what is trained."""
        weight, ends = self._weight, self._ends
        if columns is not None:
            weight = weight * columns
            ends = self._ends_of(weight)
        grid = self._grid(ends)
        return self._codes(weight, grid), grid

    def _ends_of(self, weight: torch.Tensor) -> torch.Tensor:
        """The least and the largest weight of each group: [2, out_features, groups]."""
        grouped = weight.unflatten(1, (-1, self._group_size))
        return torch.stack([grouped.amin(dim=2), grouped.amax(dim=2)])

    def _grid(self, ends: torch.Tensor) -> Affine:
        low, high = torch.where(ends[0] < ends[1], self._kept.sigmoid(), 1) * ends
        # Where a group lies on one side of zero, the end that is clipped less can come to lie beyond the other.
        low, high = torch.minimum(low, high), torch.maximum(low, high)
        return Affine((high - low) / (2**self._bits - 1), low)

    def _codes(self, weight: torch.Tensor, grid: Affine) -> torch.Tensor:
        grouped = weight.unflatten(1, (-1, self._group_size))
        scale = torch.where(grid.scale > 0, grid.scale, 1).unsqueeze(2)
        return _rounded((grouped - grid.offset.unsqueeze(2)) / scale).clamp(0, 2**self._bits - 1).flatten(1)

    def _decode(self, codes: torch.Tensor, grid: Affine, width: int) -> torch.Tensor:
        step = 2 ** (self._bits - width)
        sliced = _rounded(codes / step).clamp(0, self._highest(width)) if step > 1 else codes
        grouped = sliced.unflatten(1, (-1, self._group_size)) * (step * grid.scale.unsqueeze(2))
        return (grouped + grid.offset.unsqueeze(2)).flatten(1)


def _rounded(values: torch.Tensor) -> torch.Tensor:
    """The nearest whole numbers, half up as slices are rounded; derivatives pass straight through."""
    return values + ((values + 0.5).floor() - values).detach()


@dataclass(frozen=True)
class OmniMethod(Method):
    """What learning clipping for one width and for several have in common.

    Attributes:
        clipping: how clipping is learned.
        transformations: how scales between layers are learned; by default none are.
    """

    clipping: ClippingSettings = field(default_factory=ClippingSettings)
    transformations: TransformationSettings = field(default_factory=TransformationSettings)

    takes_layer_widths: ClassVar[bool] = False  # a block is trained at the widths of the model

    @property
    @abstractmethod
    def code_bits(self) -> int:
        """Of the codes that are learned."""

    @property
    @abstractmethod
    def loss(self) -> dict[Term, float]:
        """The terms of the loss and the weight of each."""

    @property
    def followed_widths(self) -> tuple[int, ...]:
        return named_widths(self.loss)

    def work_bytes(self, shapes: Sequence[tuple[int, int]]) -> int:
        # Of every layer at once: codes, weights of each width and what their derivatives need, a copy of the block, and
        # Hessians, of which one is copied while it is made.
        scaled = 16 if self.transformations.wanted else 0
        training = (24 + scaled + 24 * len(self.followed_widths)) * sum(rows * columns for rows, columns in shapes)
        return max(training, 12 * max(columns for _, columns in shapes) ** 2) + sum(4 * c**2 for _, c in shapes)

    def quantize_block(self, task: BlockTask) -> Iterator[tuple[str, QuantizedLayer]]:
        settings = replace(self.clipping, device=ranks.own_device(self.clipping.device))
        widths = self.followed_widths[::-1]  # teachers before those that learn from them
        if not task.linears:  # every one of the block's is ignored
            return
        hessians = self.collect(task)
        read, written = dict[str, ChannelScales](), dict[str, ChannelScales]()
        for pair in find_pairs(task) if self.transformations.wanted else ():
            energies = hessians.hessian(pair.reader).diagonal()
            scales = ChannelScales(pair, energies, self.transformations, settings.device)
            read[pair.reader] = written[pair.writer] = scales
        how = self.code_bits, widths, self.slicing, settings
        layers = {
            name: ClippedLayer(linear.weight, task.group_sizes[name], *how, read.get(name))
            for name, linear in task.linears.items()
        }
        train_block(task, layers, widths, self._loss_of, ClippedLayer.step, settings)
        for name, layer in layers.items():
            fold = Fold.of(task.linears[name], read.get(name), written.get(name))
            yield name, self._finished(fold, layer, hessians.hessian(name), task.decoder_kind)

    def _loss_of(self, width: int, step: BlockStep) -> torch.Tensor:
        """Of a width's terms: mean squared distances to the source's outputs, or to a wider slice's."""
        found = step.outputs[width]
        loss = 0 * found.sum()  # of a width that only teaches
        for term, weight in self.loss.items():
            if term.width == width:
                wanted = step.outputs[term.teacher] if term.teacher else step.target
                loss = loss + weight * (found - wanted).square().mean()
        return loss

    def _finished(self, fold: Fold, trained: ClippedLayer, hessian: torch.Tensor, kind: DecoderKind) -> QuantizedLayer:
        codes, grid = trained.finish()
        grid = fold.grid(grid)
        levels = {width: rounded_levels(grid, width, self.code_bits) for width in self.widths}
        decoders = {width: kind.encode(each, width) for width, each in levels.items()}
        layer = QuantizedLayer(codes << (PARENT_BITS - self.code_bits), decoders)
        part = ranks.own_rows(len(codes))
        own, weight = layer[part], fold.weight()[part]
        sliced = [slice_codes(own.codes, PARENT_BITS, width, self.slicing) for width in self.widths]
        count = len(self.widths)
        return replace(layer, errors=relative_error([weight] * count, own, sliced, [fold.hessian(hessian)] * count))


@dataclass(frozen=True)
class MatQuantOmni(OmniMethod):
    """MatQuant over OmniQuant: clipping learned for the sum of several rounded slices' losses.

    Widths of the model that no term names are slices of the same code, which MatQuant calls interpolated.

    Attributes:
        terms: of the loss, such as ``8,4,2`` or ``8,4,2,8->2`` (:data:`vllm_matquant.quantize.terms.GRAMMAR`, without
            ``:text``); empty for those widths of the model that the paper trains, 8, 4 and 2, or for all if it has none
            of them.
        weights: one for each term, as ``0.1,0.1,1``; empty for 1 where the narrowest width learns and 0.1 elsewhere, as
            the paper has for Gemma 2.
    """

    terms: str = ""
    weights: str = ""

    name: ClassVar[str] = "matquant-omni"
    slicing: ClassVar[Slicing] = "round"

    def __post_init__(self) -> None:
        for term in self.loss:
            if term.teacher is None:
                raise ValueError(f"setting terms: found {term}, expected none of a text: a block predicts no tokens")
            for width in named_widths([term]):
                if width not in self.widths:
                    expected = ", ".join(map(str, self.widths))
                    raise ValueError(f"setting terms: found a width of {width}, expected one of {expected} (--bits)")

    @property
    def code_bits(self) -> int:
        return PARENT_BITS

    @property
    def loss(self) -> dict[Term, float]:
        terms = parse_terms(self.terms) if self.terms else [Term(width) for width in self._published]
        narrowest = trained_widths(terms)[0]
        weights = [1.0 if term.width == narrowest else 0.1 for term in terms]
        if self.weights:
            try:
                weights = list(map(float, self.weights.split(",")))
            except ValueError as cause:
                raise ValueError(f"setting weights: found {self.weights!r}, expected numbers with commas") from cause
        return dict(zip(terms, check_weights(terms, weights), strict=True))

    @property
    def _published(self) -> tuple[int, ...]:
        return tuple(width for width in (8, 4, 2) if width in self.widths) or self.widths


@dataclass(frozen=True)
class MatQuantOmniExtra(MatQuantOmni):
    """MatQuant over OmniQuant with extra precision: what rounds up past a slice's highest code has a level of its own.

    A slice of r bits has 2^r + 1 levels, which r bits do not hold: there to be measured, no server has it. The paper
    counts 2.05 bits for 2, the share of the weights that have the further level on top, and nothing for where they are.

    Attributes:
        terms, weights: of the loss, see :class:`MatQuantOmni`.
    """

    name: ClassVar[str] = "matquant-omni-extra"
    slicing: ClassVar[Slicing] = "round-extra"


@dataclass(frozen=True)
class OmniQuant(OmniMethod):
    """OmniQuant's learned clipping (arXiv 2308.13137, section 3.2) for one width alone on its own grid: what
    :class:`MatQuantOmni` is measured against."""

    name: ClassVar[str] = "omniquant"

    def __post_init__(self) -> None:
        if len(self.widths) != 1:
            raise ValueError(f"method omniquant: found widths {list(self.widths)}, expected one width")

    @property
    def code_bits(self) -> int:
        return self.widths[0]

    @property
    def loss(self) -> dict[Term, float]:
        return {Term(self.widths[0]): 1.0}
