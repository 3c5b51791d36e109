"""What training by gradients consists of, on one block's outputs as on the whole model's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import ClassVar

import torch

from vllm_matquant.checkpoint.affine import Affine, middle_code
from vllm_matquant.checkpoint.codebook import ENTRIES, PLACES, Codebook, CodebookForm
from vllm_matquant.checkpoint.decoder_form import Decoder, DecoderForm, Values
from vllm_matquant.checkpoint.spec import BASE_BITS
from vllm_matquant.quantize import ranks
from vllm_matquant.quantize.codebook_fit import LinearCodebook
from vllm_matquant.quantize.codebook_sums import codebook_levels

BETAS = 0.9, 0.99  # of Adam
_TINY = 1e-12

Allocate = Callable[[tuple[int, ...]], torch.Tensor]
"""Gives a float32 tensor of a shape, in memory or in a file."""


class TrainedDecoder(ABC):
    """The decoder of one width, while it follows Adam.

    Attributes:
        width: of its codes.
    """

    width: int

    @property
    @abstractmethod
    def values(self) -> Values:
        """What it is now."""

    @abstractmethod
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Weights of codes, uint8 [out_features, in_features], in float32."""

    @abstractmethod
    def slopes(self, gradient: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """The loss's derivatives by relative changes of what is trained, float32.

        Args:
            gradient: of the loss by the decoded weight, floating point [out_features, in_features].
            codes: uint8 of the same shape.
        """

    @abstractmethod
    def step(self, slopes: torch.Tensor, rate: float, step: int) -> None:
        """One step of Adam (arXiv 1412.6980, algorithm 1).

        Args:
            slopes: see :meth:`slopes`.
            rate: of a relative change.
            step: counts from 1.
        """


def begin_training(decoder: Decoder, allocate: Allocate | None, device: str = "cpu") -> TrainedDecoder:
    """The decoder, ready to be trained.

    Args:
        decoder: where to start from.
        allocate: gives the memory for what is kept from step to step.
        device: to train on.
    """
    values = decoder.values.to(device)
    if isinstance(values, Codebook):
        return TrainedCodebook(values, allocate)
    assert isinstance(values, Affine)
    return TrainedAffine(values, decoder.width, allocate)


def kept_bytes(form: DecoderForm, out_features: int, groups: int) -> int:
    """Bytes that are kept of a layer's decoder from step to step."""
    values = (TrainedCodebook if isinstance(form, CodebookForm) else TrainedAffine).VALUES * out_features * groups
    if isinstance(form, CodebookForm):  # what is trained, and two moments
        values += 3 * (form.width - 1) * ENTRIES * PLACES
    return values * torch.float32.itemsize


def _change(moments: torch.Tensor, slopes: torch.Tensor, rate: float, step: int) -> torch.Tensor:
    """By how much one step of Adam changes things; ``moments`` are the two, [2, ...], as of the steps before."""
    first, second = moments
    first.lerp_(slopes, 1 - BETAS[0])
    second.lerp_(slopes.square(), 1 - BETAS[1])
    change = first / (1 - BETAS[0] ** step) / ((second / (1 - BETAS[1] ** step)).sqrt() + _TINY)
    return change.mul_(-rate)


def relative_rate(width: int) -> float:
    """The rate of a width's decoders relative to that at 2 bits: there is less to mend with every bit more."""
    return float(2 ** ((BASE_BITS - width) / 2))


def decode_around(codes: torch.Tensor, scale: torch.Tensor, centre: torch.Tensor, middle: float) -> torch.Tensor:
    """Weights by their scale and the weight in the middle of the codes.

    Args:
        codes: uint8 [out_features, in_features].
        scale, centre: float32 [out_features, groups].
        middle: of the codes, see :func:`vllm_matquant.checkpoint.affine.middle_code`.

    Returns:
        float32 [out_features, in_features].
    """
    grouped = (codes.float() - middle).unflatten(1, (scale.shape[1], -1))
    return grouped.mul_(scale.unsqueeze(2)).add_(centre.unsqueeze(2)).flatten(1)


def slopes_around(
    gradient: torch.Tensor, codes: torch.Tensor, groups: int, middle: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss's derivatives by scale and centre of :func:`decode_around`, float32 [out_features, groups] each.

    Args:
        gradient: of the loss by the weights, float32 [out_features, in_features].
        codes: uint8 of the same shape.
        groups: of columns.
        middle: of the codes.
    """
    by_scale = (gradient * (codes.float() - middle)).unflatten(1, (groups, -1)).sum(dim=2)
    return by_scale, gradient.unflatten(1, (groups, -1)).sum(dim=2)


class TrainedAffine(TrainedDecoder):
    """Scales and offsets of one width, while they follow Adam at a rate relative to the scales that they start with.

    What is trained is the scale and the value at the middle of the codes: these two hardly depend on each other.

    Args:
        start: where to start from.
        width: of its codes.
        allocate: gives the memory for what is kept from step to step; by default on the device of ``start``.
    """

    VALUES: ClassVar[int] = 7  # float32 values kept for each group

    def __init__(self, start: Affine, width: int, allocate: Allocate | None = None) -> None:
        self.width, self.middle = width, middle_code(width)
        allocate = allocate or start.scale.new_empty
        self._start_scale, self._scale, self._centre = allocate((3, *start.scale.shape))
        self._moments = allocate((2, 2, *start.scale.shape)).zero_()
        self._start_scale.copy_(start.scale)
        self._scale.copy_(start.scale)
        self._centre.copy_(start.offset + self.middle * start.scale)

    @property
    def values(self) -> Affine:
        """Scale and offset as they are now."""
        return Affine(self._scale, self._centre - self.middle * self._scale)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return decode_around(codes, self._scale, self._centre, self.middle)

    def slopes(self, gradient: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """float32 [2, out_features, groups], of the scale and the centre."""
        found = slopes_around(gradient.float(), codes, self._scale.shape[1], self.middle)
        return torch.stack(found) * self._start_scale

    def step(self, slopes: torch.Tensor, rate: float, step: int) -> None:
        change = _change(self._moments, slopes, rate, step).mul_(self._start_scale)
        self._scale += change[0]
        self._centre += change[1]


class TrainedCodebook(TrainedDecoder):
    """A codebook and its scales, while they follow Adam at rates relative to what they start with.

    Of the codebook a change is relative to the root mean square of its levels.

    Args:
        start: where to start from.
        allocate: gives the memory for what is kept from step to step; by default on the device of ``start``.
    """

    VALUES: ClassVar[int] = 4  # float32 values kept for each group
    ENTRY_RATE: ClassVar[float] = 1.0  # of the codebook's changes, relative to that of the scales'

    def __init__(self, start: Codebook, allocate: Allocate | None = None) -> None:
        self.width = start.width
        allocate = allocate or start.scale.new_empty
        planes = torch.cat([start.levels[None], start.increments]).float()
        self._start_scale, self._scale = allocate((2, *start.scale.shape))
        self._start_scale.copy_(start.scale)
        self._scale.copy_(start.scale)
        self._planes, self._unit = planes, float(start.levels.square().mean().sqrt())
        self._moments = allocate((2, start.scale.numel() + planes.numel())).zero_()

    @property
    def values(self) -> Codebook:
        return Codebook(self._planes[0], self._planes[1:], self._scale)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return LinearCodebook(codes, self.values).expand(self._planes)

    def slopes(self, gradient: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """float32 [out_features * groups + values of the codebook]."""
        gradient, values = gradient.float(), self.values
        linear = LinearCodebook(codes, values)
        by_scale = codebook_levels(codes, self._planes).mul_(gradient).unflatten(1, (values.groups, -1)).sum(2)
        by_planes = linear.collect(gradient) * self._unit
        return torch.cat([(by_scale * self._start_scale).flatten(), by_planes.flatten()])

    def step(self, slopes: torch.Tensor, rate: float, step: int) -> None:
        change = _change(self._moments, slopes, rate, step)
        scales = self._scale.numel()
        self._scale += change[:scales].view_as(self._scale) * self._start_scale
        self._planes += change[scales:].view_as(self._planes) * (self.ENTRY_RATE * self._unit)


def batches(windows: int, steps: int, size: int, seed: int) -> Iterator[list[int]]:
    """Places of this rank's windows in each step: epochs in random order.

    Args:
        windows: that this rank has.
        steps: how many batches to give.
        size: windows in a step, over all ranks; rounded up to as many on each.
        seed: of the order.
    """
    return epochs(windows, steps, -(-size // ranks.count()), seed)


def epochs(windows: int, steps: int, size: int, seed: int) -> Iterator[list[int]]:
    """Places of windows in each step: epochs in random order, without the few windows that are left at an epoch's end.

    Args:
        windows: how many there are.
        steps: how many batches to give.
        size: windows in a step.
        seed: of the order.
    """
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        if len(order) < min(size, windows):
            order = torch.randperm(windows, generator=generator).tolist()
        batch, order = order[:size], order[size:]
        yield batch
