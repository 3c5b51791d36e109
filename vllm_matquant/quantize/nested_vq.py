"""Nested codebooks: four columns share an entry at two bits, which the further bits of each column refine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_matquant.checkpoint.codebook import ENTRIES, PLACES, Codebook
from vllm_matquant.checkpoint.decoder import CODEBOOK, DecoderKind
from vllm_matquant.checkpoint.spec import BASE_BITS
from vllm_matquant.quantize.codebook_fit import SAMPLE, CodebookFit, start_books
from vllm_matquant.quantize.columns import damp
from vllm_matquant.quantize.fours import FourSolver
from vllm_matquant.quantize.layer import QuantizedLayer
from vllm_matquant.quantize.method import TrainedMethod, growing_weights


@dataclass(frozen=True)
class NestedVQ(TrainedMethod):
    """Nested codes of four columns at a time, with a codebook and error feedback of its own for each width.

    A pass of GPTQ over vectors for all widths at once gives the first codes; codebooks and scales are refitted to them;
    then sweeps of descent over fours on the true objective, each followed by a refit.

    Attributes:
        growth: lambda_r, the weight of width r in the choice of codes, is ``growth ** (r - 2)``.
        widest_factor: on top of that, for the widest width: the entries' reach limits it more than the choice of codes.
        sweeps: of descent.
    """

    growth: float = 2.5
    widest_factor: float = 0.5
    sweeps: int = 2

    name: ClassVar[str] = "nested-vq"
    rows_apart: ClassVar[bool] = False
    decoder_kinds: ClassVar[tuple[DecoderKind, ...]] = (CODEBOOK,)

    def layer_bytes(self, rows: int, columns: int) -> int:
        weights = rows * columns
        # Three tables of the distances of a sample of fours to all entries with all signs; or each further bit of a
        # weight.
        starting = 3 * torch.float32.itemsize * 4 * ENTRIES * min(weights // PLACES, SAMPLE) + 24 * weights
        solving = (36 + 7 * (self.widths[-1] - BASE_BITS)) * weights
        return max(36 * columns**2, 12 * columns**2 + max(starting, solving))

    def quantize(
        self, weight: torch.Tensor, hessian: torch.Tensor, group_size: int, kind: DecoderKind
    ) -> QuantizedLayer:
        solver = FourSolver(self.widths, self.lambdas())
        fit = CodebookFit(weight, hessian, kind)
        damped = damp(hessian, self.damping)
        books = start_books(weight, hessian, group_size, self.widths)
        codes = solver.gptq(weight, damped, books)
        for sweep in range(self.sweeps + 1):
            if sweep:
                codes = solver.descend(weight, damped, books, codes)
            decoders = [fit(sliced, book) for sliced, book in zip(self.slices(codes), books, strict=True)]
            books = [values for decoder in decoders if isinstance(values := decoder.values, Codebook)]
        return QuantizedLayer(codes, dict(zip(self.widths, decoders, strict=True)))

    def lambdas(self) -> list[float]:
        """The weight of each width."""
        return growing_weights(self.widths, self.growth, self.widest_factor)
