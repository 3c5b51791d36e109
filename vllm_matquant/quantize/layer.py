"""One layer, quantized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from vllm_matquant.checkpoint import decoder as stored
from vllm_matquant.checkpoint.decoder import Decoder
from vllm_matquant.checkpoint.packing import slice_codes
from vllm_matquant.checkpoint.spec import PARENT_BITS, Slicing, served_width
from vllm_matquant.quantize import ranks
from vllm_matquant.quantize.columns import shared


@dataclass(frozen=True)
class QuantizedLayer:
    """One layer, quantized.

    Attributes:
        codes: uint8 [out_features, in_features], parent codes.
        decoders: for each width of the layer, ascending, as they will be stored.
        errors: relative output error on the calibration text at each width, see :func:`relative_error`, before decoders
            are trained end to end; empty for a method without Hessians.
    """

    codes: torch.Tensor
    decoders: dict[int, Decoder]
    errors: dict[int, float] = field(default_factory=dict)

    def __getitem__(self, rows: slice | torch.Tensor) -> QuantizedLayer:
        """Some of its rows, without errors."""
        return QuantizedLayer(self.codes[rows], {width: decoder[rows] for width, decoder in self.decoders.items()})

    def decode(self, width: int, slicing: Slicing) -> torch.Tensor:
        """The weight, as served where the model is at ``width``: float32 [out_features, in_features]."""
        own = served_width(list(self.decoders), width)
        return self.decoders[own].decode(slice_codes(self.codes, PARENT_BITS, own, slicing))

    def gathered(self, rows: int) -> QuantizedLayer:
        """The whole layer, of ``rows`` rows, where each rank has its :func:`vllm_matquant.quantize.ranks.own_rows`."""
        decoders = {
            width: each.map(lambda part: ranks.gather_rows(part, rows)) for width, each in self.decoders.items()
        }
        return QuantizedLayer(ranks.gather_rows(self.codes, rows), decoders, self.errors)


def join_rows(parts: Sequence[QuantizedLayer]) -> QuantizedLayer:
    """The layer whose rows are those of ``parts``, one after the other; without errors."""
    decoders = {width: stored.join_rows([part.decoders[width] for part in parts]) for width in parts[0].decoders}
    return QuantizedLayer(torch.cat([part.codes for part in parts]), decoders)


def relative_error(
    weights: Sequence[torch.Tensor],
    layer: QuantizedLayer,
    sliced: Sequence[torch.Tensor],
    hessians: Sequence[torch.Tensor],
) -> dict[int, float]:
    """The layer's output error at each width, ``tr(E H E^T) / tr(W H W^T)`` with E the error of the decoded weight.

    Where there are several ranks, each gives its own rows, and both sums are over all of them.

    Args:
        weights: for each width float32 [out_features, in_features], what its slice was to come close to.
        sliced: for each width its codes.
        hessians: for each width float32 [in_features, in_features].
    """
    energies = output_energies(weights, layer, sliced, hessians)
    return {width: error / (whole or 1.0) for width, (error, whole) in energies.items()}


def output_energies(
    weights: Sequence[torch.Tensor],
    layer: QuantizedLayer,
    sliced: Sequence[torch.Tensor],
    hessians: Sequence[torch.Tensor],
) -> dict[int, tuple[float, float]]:
    """``tr(E H E^T)`` and ``tr(W H W^T)`` of :func:`relative_error` at each width: sums over the rows of all ranks."""

    def energy(matrix: torch.Tensor, hessian: torch.Tensor) -> float:
        return float(((matrix @ hessian) * matrix).sum())

    given = list(zip(layer.decoders.values(), weights, sliced, hessians, strict=True))
    lost = ranks.totals([energy(weight - decoder.decode(codes), hessian) for decoder, weight, codes, hessian in given])
    whole = ranks.totals(shared(energy, weights, hessians))
    return dict(zip(layer.decoders, zip(lost, whole, strict=True), strict=True))
