"""Methods to compare with: MatGPTQ, GPTQ for one width, and rounding to the nearest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_matquant.checkpoint.decoder import Affine, DecoderKind
from vllm_matquant.checkpoint.spec import PARENT_BITS, Slicing
from vllm_matquant.quantize.columns import ColumnSolver, damp, inverse_factor
from vllm_matquant.quantize.decoders import cell_centres, parent_grid, rounded_levels
from vllm_matquant.quantize.layer import QuantizedLayer
from vllm_matquant.quantize.method import LayerMethod, WeighedMethod


@dataclass(frozen=True)
class MatGPTQ(WeighedMethod):
    """MatGPTQ (arXiv 2602.03537, algorithm 1): rounded slices on the parent's grid, one weight compensated for the mean
    of the widths' errors; here on the asymmetric min-max grid of each group, as every other method."""

    name: ClassVar[str] = "matgptq"
    slicing: ClassVar[Slicing] = "round"

    def quantize(
        self, weight: torch.Tensor, hessian: torch.Tensor, group_size: int, kind: DecoderKind
    ) -> QuantizedLayer:
        grid = parent_grid(weight, group_size)
        decoders = [kind.encode(rounded_levels(grid, width), width) for width in self.widths]
        factor = inverse_factor(damp(hessian, self.damping))
        lambdas = [1.0] * len(self.widths)
        solver = ColumnSolver(self.widths, lambdas, self.slicing, mean_error=True)
        count = len(self.widths)
        codes = solver.gptq([weight] * count, [factor] * count, [decoder.affine for decoder in decoders])
        return QuantizedLayer(codes, dict(zip(self.widths, decoders, strict=True)))


@dataclass(frozen=True)
class GPTQ(WeighedMethod):
    """GPTQ (arXiv 2210.17323) for one width alone on its own min-max grid: what a slice is measured against."""

    name: ClassVar[str] = "gptq"

    def __post_init__(self) -> None:
        if len(self.widths) != 1:
            raise ValueError(f"method gptq: found widths {list(self.widths)}, expected one width")

    def quantize(
        self, weight: torch.Tensor, hessian: torch.Tensor, group_size: int, kind: DecoderKind
    ) -> QuantizedLayer:
        (width,) = self.widths
        parent = parent_grid(weight, group_size)
        levels = 2**width - 1
        decoder = kind.encode(Affine(parent.scale * (2**PARENT_BITS - 1) / levels, parent.offset), width)
        factor = inverse_factor(damp(hessian, self.damping))
        codes = ColumnSolver(self.widths, [1.0]).gptq([weight], [factor], [decoder.affine])
        return QuantizedLayer(codes, {width: decoder})


def nearest_levels(weight: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Numbers of the levels, ``offset + scale * number``, that are nearest to weights; 0 where the scale is 0.

    Args:
        weight: floating point [...].
        scale: from 0 up, of a shape that broadcasts to that of ``weight``.
        offset: of such a shape too.

    Returns:
        Whole numbers as floating point [...], not limited to those that a code can have.
    """
    return torch.where(scale > 0, (weight - offset) / scale, 0).round()


def nearest_parents(weight: torch.Tensor, grid: Affine, group_size: int) -> torch.Tensor:
    """The parent codes on a grid that are nearest to a weight: uint8 [out_features, in_features].

    Args:
        weight: float32 [out_features, in_features].
        grid: see :func:`vllm_matquant.quantize.decoders.parent_grid`.
        group_size: columns that share a scale.
    """
    scale, offset = (part.repeat_interleave(group_size, dim=1) for part in (grid.scale, grid.offset))
    return nearest_levels(weight, scale, offset).clamp(0, 2**PARENT_BITS - 1).to(torch.uint8)


@dataclass(frozen=True)
class RoundToNearest(LayerMethod):
    """Each weight to the nearest parent on the min-max grid; slices decode to the centres of their cells."""

    name: ClassVar[str] = "rtn"
    needs_calibration: ClassVar[bool] = False

    def quantize(
        self, weight: torch.Tensor, hessian: torch.Tensor, group_size: int, kind: DecoderKind
    ) -> QuantizedLayer:
        grid = parent_grid(weight, group_size)
        codes = nearest_parents(weight, grid, group_size)
        return QuantizedLayer(codes, {width: kind.encode(cell_centres(grid, width), width) for width in self.widths})
