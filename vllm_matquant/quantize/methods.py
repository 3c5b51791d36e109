"""The quantization methods: from one layer's weight and Hessian to parent codes and a decoder for each width."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_matquant.checkpoint.packing import slice_codes
from vllm_matquant.checkpoint.spec import PARENT_BITS, Slicing
from vllm_matquant.quantize.columns import ColumnSolver, damp, inverse_factor
from vllm_matquant.quantize.decoders import Decoder, cell_centres, parent_grid, refit, rounded_levels


@dataclass(frozen=True)
class QuantizedLayer:
    """One layer, quantized.

    Attributes:
        codes: uint8 [out_features, in_features], parent codes.
        decoders: for each width, with values that float16 holds exactly.
    """

    codes: torch.Tensor
    decoders: dict[int, Decoder]


@dataclass(frozen=True)
class Method(ABC):
    """A way to quantize a linear layer to all ``widths`` at once.

    Attributes:
        widths: ascending, each in 2..8.
        damping: added to the Hessian's diagonal, relative to its mean.
    """

    widths: tuple[int, ...]
    damping: float = 0.01

    name: ClassVar[str]
    slicing: ClassVar[Slicing] = "truncate"
    needs_hessian: ClassVar[bool] = True

    @abstractmethod
    def quantize(self, weight: torch.Tensor, hessian: torch.Tensor, group_size: int) -> QuantizedLayer:
        """Quantize a layer.

        Args:
            weight: float32 [out_features, in_features].
            hessian: float32 [in_features, in_features], mean of x^T x over the calibration tokens.
            group_size: columns that share a decoder; divides in_features.
        """

    def slices(self, codes: torch.Tensor) -> list[torch.Tensor]:
        return [slice_codes(codes, PARENT_BITS, width, self.slicing) for width in self.widths]


@dataclass(frozen=True)
class Nested(Method):
    """Truncated slices, error feedback of its own for each width, decoders refitted to their codes.

    A pass of GPTQ over all widths at once gives the first codes; the decoders are refitted to them; then sweeps of
    coordinate descent on the true objective, each followed by a refit, mend what the greedy pass could not foresee.

    Attributes:
        growth: lambda_r, the weight of width r in the choice of codes, is ``growth ** (r - 2)``: errors shrink fourfold
            or more with each bit, so equal weights would leave the wide slices to chance.
        widest_factor: on top of that, for the widest width, which must stay next to lossless.
        sweeps: of coordinate descent.
    """

    growth: float = 2.0
    widest_factor: float = 3.0
    sweeps: int = 2

    name: ClassVar[str] = "nested"

    def quantize(self, weight: torch.Tensor, hessian: torch.Tensor, group_size: int) -> QuantizedLayer:
        # Columns that carry most of the error first, while all others are still free to make up for it.
        order = hessian.diagonal().argsort(descending=True, stable=True)
        damped = damp(hessian, self.damping)
        solver = ColumnSolver(self.widths, self.lambdas())
        grid = parent_grid(weight, group_size)
        decoders = [cell_centres(grid, width) for width in self.widths]
        codes = solver.gptq(weight, inverse_factor(damped[order][:, order]), decoders, order)
        decoders = self._refit(weight, codes, hessian, decoders)
        for _ in range(self.sweeps):
            codes = solver.descend(weight, damped, decoders, codes, order)
            decoders = self._refit(weight, codes, hessian, decoders)
        return QuantizedLayer(codes, dict(zip(self.widths, decoders, strict=True)))

    def lambdas(self) -> list[float]:
        """The weight of each width."""
        weights = [self.growth ** (width - self.widths[0]) for width in self.widths]
        weights[-1] *= self.widest_factor
        return weights

    def _refit(
        self, weight: torch.Tensor, codes: torch.Tensor, hessian: torch.Tensor, decoders: list[Decoder]
    ) -> list[Decoder]:
        return [
            refit(weight, sliced, hessian, decoder, width)
            for sliced, decoder, width in zip(self.slices(codes), decoders, self.widths, strict=True)
        ]


@dataclass(frozen=True)
class MatGPTQ(Method):
    """MatGPTQ (arXiv 2602.03537, algorithm 1): rounded slices on the parent's grid, one weight compensated for the mean
    of the widths' errors; here on the asymmetric min-max grid of each group, as every other method."""

    name: ClassVar[str] = "matgptq"
    slicing: ClassVar[Slicing] = "round"

    def quantize(self, weight: torch.Tensor, hessian: torch.Tensor, group_size: int) -> QuantizedLayer:
        grid = parent_grid(weight, group_size)
        decoders = [rounded_levels(grid, width).stored() for width in self.widths]
        factor = inverse_factor(damp(hessian, self.damping))
        lambdas = [1.0] * len(self.widths)
        solver = ColumnSolver(self.widths, lambdas, self.slicing, mean_error=True)
        codes = solver.gptq(weight, factor, decoders)
        return QuantizedLayer(codes, dict(zip(self.widths, decoders, strict=True)))


@dataclass(frozen=True)
class GPTQ(Method):
    """GPTQ (arXiv 2210.17323) for one width alone on its own min-max grid: what a slice is measured against."""

    name: ClassVar[str] = "gptq"

    def __post_init__(self) -> None:
        if len(self.widths) != 1:
            raise ValueError(f"method gptq: found widths {list(self.widths)}, expected one width")

    def quantize(self, weight: torch.Tensor, hessian: torch.Tensor, group_size: int) -> QuantizedLayer:
        (width,) = self.widths
        parent = parent_grid(weight, group_size)
        levels = 2**width - 1
        grid = Decoder(parent.scale * (2**PARENT_BITS - 1) / levels, parent.offset).stored()
        codes = ColumnSolver(self.widths, [1.0]).gptq(weight, inverse_factor(damp(hessian, self.damping)), [grid])
        return QuantizedLayer(codes, {width: grid})


@dataclass(frozen=True)
class RoundToNearest(Method):
    """Each weight to the nearest parent on the min-max grid; slices decode to the centres of their cells."""

    name: ClassVar[str] = "rtn"
    needs_hessian: ClassVar[bool] = False

    def quantize(self, weight: torch.Tensor, hessian: torch.Tensor, group_size: int) -> QuantizedLayer:
        grid = parent_grid(weight, group_size)
        scale, offset = (part.repeat_interleave(group_size, dim=1) for part in (grid.scale, grid.offset))
        # A group of equal weights has scale 0: any code will do.
        steps = torch.where(scale > 0, (weight - offset) / scale, 0)
        codes = steps.round().clamp(0, 2**PARENT_BITS - 1).to(torch.uint8)
        return QuantizedLayer(codes, {width: cell_centres(grid, width).stored() for width in self.widths})


METHODS: dict[str, type[Method]] = {method.name: method for method in (Nested, MatGPTQ, GPTQ, RoundToNearest)}


def relative_error(
    weight: torch.Tensor, layer: QuantizedLayer, sliced: Sequence[torch.Tensor], hessian: torch.Tensor
) -> dict[int, float]:
    """The layer's output error at each width, ``tr(E H E^T) / tr(W H W^T)`` with E the weight's error."""

    def energy(matrix: torch.Tensor) -> float:
        return float(((matrix @ hessian) * matrix).sum())

    total = energy(weight) or 1.0
    return {
        width: energy(weight - decoder.decode(codes)) / total
        for (width, decoder), codes in zip(layer.decoders.items(), sliced, strict=True)
    }
