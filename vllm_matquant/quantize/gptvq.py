"""GPTVQ: vectors of one, two or four columns for one width, what nested codebooks are measured against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_matquant.checkpoint.decoder import VECTORS_1D, VECTORS_2D, VECTORS_4D, DecoderKind
from vllm_matquant.checkpoint.spec import PARENT_BITS, Format
from vllm_matquant.checkpoint.vectors import VectorForm, vector_codes
from vllm_matquant.quantize.columns import damp
from vllm_matquant.quantize.layer import QuantizedLayer
from vllm_matquant.quantize.method import WeighedMethod
from vllm_matquant.quantize.vector_fit import VectorFit
from vllm_matquant.quantize.vector_solver import VectorSolver

_KINDS = (VECTORS_2D, VECTORS_4D, VECTORS_1D)  # by default the first
_WIDTHS = sorted({width for kind in _KINDS for width in kind.widths})


@dataclass(frozen=True)
class GPTVQ(WeighedMethod):
    """GPTVQ (arXiv 2402.15319) for one width; how many columns a vector has is the kind of the decoders.

    Attributes:
        iterations: of the k-means that a group's codebooks come from, at the most.
        fit_steps: of conjugate gradients that fit all codebooks to the chosen entries.
    """

    iterations: int = 30
    fit_steps: int = 25

    name: ClassVar[str] = "gptvq"
    rows_apart: ClassVar[bool] = False  # rows share codebooks
    decoder_kinds: ClassVar[tuple[DecoderKind, ...]] = _KINDS

    def __post_init__(self) -> None:
        if len(self.widths) != 1 or self.widths[0] not in _WIDTHS:
            raise ValueError(f"method gptvq: found widths {list(self.widths)}, expected one of {_WIDTHS} (--bits)")

    def layer_bytes(self, rows: int, columns: int) -> int:
        # The weight, what is left of it and the entries chosen; or three products of the fit beside the last two.
        return max(36 * columns**2, 12 * columns**2 + 44 * rows * columns)

    def quantize(
        self, weight: torch.Tensor, hessian: torch.Tensor, group_size: int, kind: DecoderKind
    ) -> QuantizedLayer:
        (width,) = self.widths
        form = kind.form(width)
        if not isinstance(form, VectorForm):
            raise TypeError(f"method gptvq: found decoders of the kind {kind.name}, expected vectors")
        solver = VectorSolver(width, form.places, group_size, self.iterations)
        index, books = solver.solve(weight, damp(hessian, self.damping))
        books = VectorFit(weight, hessian, index, group_size)(books, self.fit_steps)
        codes = vector_codes(index, width, form.places) << (PARENT_BITS - width)
        return QuantizedLayer(codes, {width: form.encode(books, width)})


def counted_bits(format_: Format, shapes: Mapping[str, tuple[int, int]]) -> float:
    """Bits of a weight as GPTVQ counts them, ``log2(k) / d + 8 k d / l``: the codes, and levels that l weights share.

    Args:
        format_: of a checkpoint with vectors.
        shapes: (out_features, in_features) of its quantized layers.
    """
    bits = 0
    for name, (rows, columns) in shapes.items():
        width = format_.width_of(name, format_.widths[0])
        form = format_.decoder_kind.form(width)
        assert isinstance(form, VectorForm)
        bits += width * rows * columns + form.codebook_bits(rows, columns // format_.group_size_of(columns, name))
    return bits / sum(rows * columns for rows, columns in shapes.values())
