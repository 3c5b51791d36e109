"""MatQuant's own form of training (arXiv 2502.06786, section 3), there to compare with the paper.

Latent weights are quantized anew at every step, to the asymmetric min-max grid of each group; a slice is the parent
divided by 2^(8 - r), rounded and clamped (eq. 6), and decoded on the parent's grid. A rounded slice of r bits cannot be
read from r bits: it reads one more.

A layer of one width alone has that width's own min-max grid (eq. 1), which no slice is cut from: what the paper
compares each slice with.

Latent weights are positions too: in units of the 8-bit grid that each group started with. On that scale a grid is from
the lowest to the highest position of a group, so that scales and offsets follow from positions and are not trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from vllm_matquant.checkpoint.affine import Affine
from vllm_matquant.checkpoint.packing import slice_codes
from vllm_matquant.checkpoint.slicing import SLICE_RULES
from vllm_matquant.checkpoint.spec import PARENT_BITS, Slicing, served_width
from vllm_matquant.quantize.decoders import parent_grid, rounded_levels
from vllm_matquant.train.latent import LatentWeight, Switch, Whole, local

_TINY = torch.finfo(torch.float32).tiny
_HIGHEST = 2**PARENT_BITS - 1  # position of a group's maximum at the start


class _RoundedThrough(torch.autograd.Function):
    """The weight of a rounded slice; its derivative takes rounding for the identity, clamping and grid for constant."""

    @staticmethod
    def forward(
        context: Any, shift: torch.Tensor, latent: RoundedWeight, width: int, dtype: torch.dtype
    ) -> torch.Tensor:
        codes, grid = latent.quantized(shift)
        sliced = slice_codes(codes, PARENT_BITS, width, latent.slicing)
        # Those that a clamp to 2^width - 1 has cut: rounding alone would have given 2^width.
        rounded_up = 2**PARENT_BITS - 2 ** (PARENT_BITS - width) // 2
        cuts = width < PARENT_BITS and SLICE_RULES[latent.slicing].highest(width) < 2**width
        clamped = codes >= rounded_up if cuts else codes < 0
        context.save_for_backward(clamped, latent.unit)
        return rounded_levels(grid, width, latent.bits).decode(sliced).to(dtype)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        clamped, unit = context.saved_tensors
        gradient = gradients[0].float().masked_fill(clamped, 0.0).unflatten(1, (unit.shape[1], -1))
        return (gradient * unit.unsqueeze(2)).flatten(1), None, None, None


class RoundedWeight(LatentWeight):
    """A latent weight, quantized at every step.

    Attributes:
        bits: of the codes that are made of latent weights; they stand in a parent code's first bits.
        unit: float32 [out_features, groups], the scale of the 8-bit grid that a group started with.
        low: float32 [out_features, groups], its lowest weight at the start.

    Args:
        weight: [out_features, in_features], the source's, where the latent weight starts.
        group_size: columns that share a grid.
        widths, trained, switch: as of :class:`LatentWeight`.
        slicing: how codes are cut; with extra precision they are not clamped.
    """

    unit: torch.Tensor
    low: torch.Tensor

    def __init__(
        self,
        weight: torch.Tensor,
        group_size: int,
        widths: Sequence[int],
        trained: Iterable[int],
        switch: Switch,
        slicing: Slicing = "round",
    ) -> None:
        grid = parent_grid(weight.float(), group_size)
        grouped = weight.float().unflatten(1, (-1, group_size))
        positions = (grouped - grid.offset.unsqueeze(2)) / grid.scale.unsqueeze(2).clamp(min=_TINY)
        self.slicing = slicing
        self.bits = widths[0] if len(widths) == 1 else PARENT_BITS
        levels = 2**self.bits - 1
        codes = (positions * (levels / _HIGHEST)).round().clamp(0, levels).to(torch.uint8)
        super().__init__(codes.flatten(1) << (PARENT_BITS - self.bits), widths, trained, switch)
        self.register_buffer("unit", grid.scale)
        self.register_buffer("low", grid.offset)
        self.shift = torch.nn.Parameter((positions - codes * (_HIGHEST / levels)).flatten(1))

    def decode(self, width: int, dtype: torch.dtype) -> torch.Tensor:
        """The weight at one of the layer's widths: [out_features, in_features]."""
        weight: torch.Tensor = _RoundedThrough.apply(self.shift, self, width, dtype)
        return weight

    def quantized(self, shift: torch.Tensor, rows: slice = slice(None)) -> tuple[torch.Tensor, Affine]:
        """Parent codes of positions, uint8 [rows, in_features], and the grid that their first ``bits`` bits are on.

        Args:
            shift: of the rows, float32 [rows, in_features].
            rows: of the layer.
        """
        codes, unit, low = (each[rows].to(shift.device) for each in (self.codes, self.unit, self.low))
        levels, unused = 2**self.bits - 1, PARENT_BITS - self.bits
        positions = ((codes >> unused) * (_HIGHEST / levels) + shift).unflatten(1, (unit.shape[1], -1))
        lowest, highest = positions.amin(dim=2), positions.amax(dim=2)
        step = (highest - lowest) / levels
        found = positions.sub_(lowest.unsqueeze(2)).div_(step.clamp(min=_TINY).unsqueeze(2))
        found = found.round_().clamp_(0, levels).to(torch.uint8) << unused
        return found.flatten(1), Affine(unit * step, low + unit * lowest)

    def project(self, rows: slice = slice(None)) -> None:
        """Nothing: a latent weight may be anywhere."""

    @torch.no_grad()
    def changed_codes(self, width: int, rows: slice = slice(None)) -> int:
        """How many codes of a width are others than at the start, in some rows."""
        assert self.shift is not None
        own = served_width(self.widths, width)
        now, start = (
            slice_codes(each, PARENT_BITS, own, self.slicing)
            for each in (self.quantized(local(self.shift), rows)[0], self.codes[rows])
        )
        return int((now != start).count_nonzero())

    @torch.no_grad()
    def finished(self, whole: Whole) -> tuple[torch.Tensor, dict[int, Affine]]:
        """Codes, and the decoders of all widths, see :meth:`LatentWeight.finished`."""
        assert self.shift is not None
        codes, grid = self.quantized(whole(self.shift).cpu())
        return codes, {width: rounded_levels(grid, width, self.bits) for width in self.widths}
