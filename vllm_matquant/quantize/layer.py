"""One layer, quantized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from vllm_matquant.checkpoint.packing import slice_codes
from vllm_matquant.checkpoint.spec import PARENT_BITS, Slicing
from vllm_matquant.quantize.decoders import Decoder


@dataclass(frozen=True)
class QuantizedLayer:
    """One layer, quantized.

    Attributes:
        codes: uint8 [out_features, in_features], parent codes.
        decoders: for each width, with values that float16 holds exactly.
        errors: relative output error on the calibration text at each width, see :func:`relative_error`; empty for a
            method without Hessians.
    """

    codes: torch.Tensor
    decoders: dict[int, Decoder]
    errors: dict[int, float] = field(default_factory=dict)

    def __getitem__(self, rows: slice | torch.Tensor) -> QuantizedLayer:
        """Some of its rows, without errors."""
        return QuantizedLayer(self.codes[rows], {width: decoder[rows] for width, decoder in self.decoders.items()})

    def decode(self, width: int, slicing: Slicing) -> torch.Tensor:
        """The weight of a slice: float32 [out_features, in_features]."""
        return self.decoders[width].decode(slice_codes(self.codes, PARENT_BITS, width, slicing))


def join_rows(parts: Sequence[QuantizedLayer]) -> QuantizedLayer:
    """The layer whose rows are those of ``parts``, one after the other; without errors."""
    decoders = {
        width: Decoder(
            torch.cat([part.decoders[width].scale for part in parts]),
            torch.cat([part.decoders[width].offset for part in parts]),
        )
        for width in parts[0].decoders
    }
    return QuantizedLayer(torch.cat([part.codes for part in parts]), decoders)


def relative_error(
    weights: Sequence[torch.Tensor],
    layer: QuantizedLayer,
    sliced: Sequence[torch.Tensor],
    hessians: Sequence[torch.Tensor],
) -> dict[int, float]:
    """The layer's output error at each width, ``tr(E H E^T) / tr(W H W^T)`` with E the error of the decoded weight.

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
    """``tr(E H E^T)`` and ``tr(W H W^T)`` of :func:`relative_error` at each width: sums over the rows."""

    def energy(matrix: torch.Tensor, hessian: torch.Tensor) -> float:
        return float(((matrix @ hessian) * matrix).sum())

    return {
        width: (energy(weight - decoder.decode(codes), hessian), energy(weight, hessian))
        for (width, decoder), weight, codes, hessian in zip(
            layer.decoders.items(), weights, sliced, hessians, strict=True
        )
    }
