"""A layer while it is trained: positions, decoders, and the straight-through derivative between them and its weight.

Every weight has a *position*, a real number in units of the parent's code. It starts somewhere in the code's cell, and
the parent's code is its floor. The r-bit code is the parent's prefix,
``floor(position / 2^(8 - r))``, so that all slices are prefixes of one code at every step. The weight of a slice is
``scale_r * (code_r - middle_r) + centre_r``. Its derivative passes straight through the floor (MatQuant, arXiv
2502.06786, section 3.1): by the position it is ``scale_r / 2^(8 - r)``.

What an optimizer moves is how far things are from the parent: the shift of each position from the middle of the cell
that it started in, and changes of scales and centres relative to the scale that they started with. So a decay of what
is moved pulls it back to the parent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllm_matquant.checkpoint.affine import Affine, middle_code
from vllm_matquant.checkpoint.packing import slice_codes
from vllm_matquant.checkpoint.spec import PARENT_BITS, Slicing, served_width
from vllm_matquant.quantize.terms import SOURCE
from vllm_matquant.quantize.training import decode_around, slopes_around

_LEVELS = 2**PARENT_BITS
_REACH = 0.45  # from the middle of its cell, where a position starts, in cells
_HIGHEST = _LEVELS - 2.0**-8  # of a position: the largest float32 below 256 with some room for rounding


Whole = Callable[[torch.Tensor], torch.Tensor]
"""Gives the whole of a tensor of which this process has a part."""


@dataclass
class Switch:
    """What a model's layers are now: a width, or SOURCE for the weights of the model that was quantized.

    One switch is shared by all layers of a model.

    Attributes:
        width: of the model; a layer without it takes its next wider one, or else its widest.
    """

    width: int = SOURCE


@dataclass(frozen=True)
class Parent:
    """A layer of the parent.

    Attributes:
        codes: uint8 [out_features, in_features], parent codes; bits that the parent does not store are zero.
        stored: how many bits of each code the parent stores.
        widths: of the layer, ascending.
        decoders: scales and offsets of the widths that will be run, [out_features, groups].
        finest: those of the widest width, [out_features, groups].
        slicing: how codes are cut; what is trained so has truncated slices.
    """

    codes: torch.Tensor
    stored: int
    widths: Sequence[int]
    decoders: Mapping[int, Affine]
    finest: Affine
    slicing: Slicing = "truncate"


def moved_codes(codes: torch.Tensor, shift: torch.Tensor, stored: int, widest: int) -> torch.Tensor:
    """Parent codes of positions.

    Bits below the widest trained width follow no gradient. They stay as near to what they were as the bits above them
    allow, so that wider slices pay for those codes alone whose leading bits have changed.

    Args:
        codes: uint8 [out_features, in_features], where the positions started.
        shift: float32 of the same shape, how far they are from the middle of the cell that they started in, in units of
            the parent's code.
        stored: bits of ``codes`` that are known: the cell is what these leave open.
        widest: the widest width that is trained.

    Returns:
        uint8 of the same shape.
    """
    positions = codes + 2 ** (PARENT_BITS - stored) / 2 + shift
    moved = positions.floor_().clamp_(0, _LEVELS - 1).to(torch.uint8)
    if widest == PARENT_BITS:
        return moved
    cell = 2 ** (PARENT_BITS - widest)
    lowest = moved & (_LEVELS - cell)
    return codes.clamp(lowest, lowest + (cell - 1))


def scatter_in(parent: Parent, seed: int) -> torch.Tensor:
    """A random place in its cell for each position, as far from the middle as it is.

    Where all positions start in the middle, those that follow a steady gradient leave their cells in the same step.

    Args:
        parent: the layer.
        seed: of the places.

    Returns:
        float32 [out_features, in_features], in units of the parent's code.
    """
    drawn = torch.rand(parent.codes.shape, generator=torch.Generator().manual_seed(seed))
    return (drawn - 0.5).mul_(2 * _REACH * 2 ** (PARENT_BITS - parent.stored))


def place_in(parent: Parent, weight: torch.Tensor) -> torch.Tensor:
    """How far from the middle of its cell each weight lies, next to the border where it lies outside.

    Args:
        parent: the layer.
        weight: floating point [out_features, in_features], the source's.

    Returns:
        float32 [out_features, in_features], in units of the parent's code.
    """
    cell, groups = 2 ** (PARENT_BITS - parent.stored), (parent.finest.groups, -1)
    scale, offset = (each.float().unsqueeze(2) for each in (parent.finest.scale, parent.finest.offset))
    exact = (weight.float().unflatten(1, groups) - offset) / scale.clamp(min=torch.finfo(torch.float32).tiny)
    codes = (parent.codes >> (PARENT_BITS - parent.stored)).unflatten(1, groups)
    return (exact - codes).clamp_(-_REACH, _REACH).nan_to_num_(0.0).mul_(cell).flatten(1)


class _StraightThrough(torch.autograd.Function):
    """The weight of a slice, whose derivative takes the floor between positions and codes for the identity."""

    @staticmethod
    def forward(
        context: Any,
        shift: torch.Tensor,
        scale: torch.Tensor,
        centre: torch.Tensor,
        codes: torch.Tensor,
        width: int,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        context.save_for_backward(scale, codes)
        context.width = width
        return decode_around(_sliced(codes, width), scale, centre, middle_code(width)).to(dtype)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scale, codes = context.saved_tensors
        gradient, groups, width = gradients[0].float(), scale.shape[1], context.width
        by_scale, by_centre = slopes_around(gradient, _sliced(codes, width), groups, middle_code(width))
        per_code = (scale / 2 ** (PARENT_BITS - width)).unsqueeze(2)
        by_shift = (gradient.unflatten(1, (groups, -1)) * per_code).flatten(1)
        return by_shift, by_scale, by_centre, None, None, None


class LatentWeight(torch.nn.Module, ABC):
    """The weight of one layer at every width that is run: takes the place of a layer's ``weight``.

    Attributes:
        codes: uint8 [out_features, in_features], parent codes at the start.
        shift: float32 [out_features, in_features], how far each position is from the middle of the cell that it started
            in; None of a layer that is not trained.
        changes: for each trained width, as a text, float32 [out_features, groups, 2]: by how much scale and centre have
            changed, relative to the scale at the start; empty where decoders follow from positions.
        trained: the widths of the layer that are trained, ascending.

    Args:
        codes: see the attribute.
        widths: of the layer, ascending.
        trained: the widths of the model that are trained; none for a layer that stays as it is.
        switch: of the model.
    """

    codes: torch.Tensor

    def __init__(self, codes: torch.Tensor, widths: Sequence[int], trained: Iterable[int], switch: Switch) -> None:
        super().__init__()
        self.switch, self.widths = switch, tuple(widths)
        self.trained = sorted({served_width(self.widths, width) for width in trained})
        self.register_buffer("codes", codes)
        self.shift: torch.nn.Parameter | None = None
        self.changes = torch.nn.ParameterDict()

    def forward(self, source: torch.Tensor) -> torch.Tensor:
        """The weight at the switch's width, in the dtype of ``source``, the layer's weight in the source."""
        if self.switch.width == SOURCE:
            return source
        return self.decode(served_width(self.widths, self.switch.width), source.dtype)

    @abstractmethod
    def decode(self, width: int, dtype: torch.dtype) -> torch.Tensor:
        """The weight at one of the layer's widths: [out_features, in_features]."""

    @abstractmethod
    def project(self, rows: slice = slice(None)) -> None:
        """Put what is trained back where it may be, after a step.

        Args:
            rows: of the layer, those that ``shift`` has: of several processes each may have a part.
        """

    @abstractmethod
    def changed_codes(self, width: int, rows: slice = slice(None)) -> int:
        """How many codes of a width are others than at the start, in some rows."""

    @abstractmethod
    def finished(self, whole: Whole) -> tuple[torch.Tensor, dict[int, Affine]]:
        """What was trained.

        Args:
            whole: gives the whole of a tensor of which ``shift`` and ``changes`` may be parts.

        Returns:
            Parent codes, uint8 [out_features, in_features], and scales and offsets of the widths that have others than
            at the start, float32 [out_features, groups]; on the CPU.
        """


class NestedWeight(LatentWeight):
    """A weight whose slices are prefixes, with a decoder for each width.

    Args:
        parent: the layer.
        trained: the widths of the model that are trained; none for a layer that stays as it is.
        switch: of the model.
        start: how far from the middle of its cell each position starts, float32 [out_features, in_features]; None for
            all of them in the middle.
    """

    def __init__(
        self, parent: Parent, trained: Iterable[int], switch: Switch, start: torch.Tensor | None = None
    ) -> None:
        super().__init__(parent.codes, parent.widths, trained, switch)
        self.stored, self._slicing = parent.stored, parent.slicing
        for width, values in parent.decoders.items():
            self.register_buffer(f"scale{width}", values.scale.float())
            self.register_buffer(f"centre{width}", values.centre(width).float())
        self._moved: torch.Tensor | None = None  # parent codes as they are now, once they were asked for
        if self.trained:
            self.shift = torch.nn.Parameter(
                torch.zeros_like(parent.codes, dtype=torch.float32) if start is None else start
            )
            for width in self.trained:
                scale = parent.decoders[width].scale
                self.changes[str(width)] = torch.nn.Parameter(
                    torch.zeros(*scale.shape, 2, dtype=torch.float32, device=scale.device)
                )

    def decode(self, width: int, dtype: torch.dtype) -> torch.Tensor:
        """The weight at one of the layer's widths: [out_features, in_features].

        Codes are cut once after each step: :meth:`project` tells that positions have moved.
        """
        scale, centre = self.decoder(width)
        if self._moved is None:
            with torch.no_grad():
                self._moved = self.parent_codes()
        if width in self.trained:
            weight: torch.Tensor = _StraightThrough.apply(self.shift, scale, centre, self._moved, width, dtype)
            return weight
        sliced = slice_codes(self._moved, PARENT_BITS, width, self._slicing)
        return decode_around(sliced, scale, centre, middle_code(width)).to(dtype)

    def parent_codes(self, rows: slice = slice(None)) -> torch.Tensor:
        """Parent codes as they are now: uint8 [rows, in_features].

        Args:
            rows: of the layer, those that ``shift`` has: of several processes each may have a part.
        """
        if self.shift is None:
            return self.codes[rows]
        return moved_codes(self.codes[rows], local(self.shift), self.stored, self.trained[-1])

    def decoder(self, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale, and weight in the middle of the codes, as they are now: float32 [out_features, groups] each."""
        scale, centre = getattr(self, f"scale{width}"), getattr(self, f"centre{width}")
        if width not in self.trained:
            return scale, centre
        return changed(scale, centre, self.changes[str(width)])

    @torch.no_grad()
    def project(self, rows: slice = slice(None)) -> None:
        """Put positions back between the first and the last code, and scales back from below zero, after a step."""
        if self.shift is None:
            return
        self._moved = None
        start = self.codes[rows] + 2 ** (PARENT_BITS - self.stored) / 2
        shift = local(self.shift)
        shift.copy_(shift.clamp(-start, _HIGHEST - start))
        for change in self.changes.values():
            local(change)[..., 0].clamp_(min=-1)

    @torch.no_grad()
    def changed_codes(self, width: int, rows: slice = slice(None)) -> int:
        """How many codes of a width are others than the parent's, in some rows."""
        if self.shift is None:
            return 0
        drop = PARENT_BITS - served_width(self.widths, width)
        return int(((self.parent_codes(rows) ^ self.codes[rows]) >> drop).count_nonzero())

    @torch.no_grad()
    def finished(self, whole: Whole) -> tuple[torch.Tensor, dict[int, Affine]]:
        """Codes and the decoders of the trained widths, see :meth:`LatentWeight.finished`."""
        codes, decoders = self.codes.cpu(), dict[int, Affine]()
        if self.shift is None:
            return codes, decoders
        for width in self.trained:
            start = getattr(self, f"scale{width}").cpu(), getattr(self, f"centre{width}").cpu()
            scale, centre = changed(*start, whole(self.changes[str(width)]).cpu())
            decoders[width] = Affine(scale, centre - middle_code(width) * scale)
        return moved_codes(codes, whole(self.shift).cpu(), self.stored, self.trained[-1]), decoders


def changed(scale: torch.Tensor, centre: torch.Tensor, change: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and centre after a change.

    Args:
        scale, centre: at the start, float32 [out_features, groups].
        change: see :attr:`NestedWeight.changes`.
    """
    return scale * (1 + change[..., 0]), centre + scale * change[..., 1]


def _sliced(codes: torch.Tensor, width: int) -> torch.Tensor:
    return slice_codes(codes, PARENT_BITS, width)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor that several share; the tensor itself if they do not."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
