"""Layers with random codes and decoders, and their product computed apart from the package's own reference."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm_matquant.checkpoint.packing import pack_codes
from vllm_matquant.checkpoint.spec import WIDTHS
from vllm_matquant.kernels import layout, ops

# A width, and those whose decoders are in memory with it: all of them, so that planes past the base field are single;
# its own alone, as it is served today, or even ones, so that planes lie in pairs.
EVEN_WIDTHS = (2, 4, 6, 8)
FORMS = [
    *((width, WIDTHS) for width in WIDTHS),
    *((width, (width,)) for width in WIDTHS),
    *((width, EVEN_WIDTHS) for width in EVEN_WIDTHS),
]

# Of the result alone: half a unit in the last place.
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}


@dataclass
class Layer:
    """A layer: parent codes uint8 [N, K], decoders float16 [widths, N, groups], and both as kernels read them."""

    codes: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor
    output_sizes: list[int]
    group_size: int
    decoder_widths: list[int]
    planes: torch.Tensor
    decoders: torch.Tensor

    def run(self, x: torch.Tensor, widths: Sequence[int], bias: torch.Tensor | None = None, **changed) -> torch.Tensor:
        return ops.linear(**(self.arguments(x, widths, bias) | changed))

    def arguments(self, x: torch.Tensor, widths: Sequence[int], bias: torch.Tensor | None = None) -> dict:
        return {
            "x": x,
            "planes": self.planes,
            "decoders": self.decoders,
            "active_width": torch.tensor(widths, dtype=torch.int32),
            "decoder_widths": self.decoder_widths,
            "output_sizes": self.output_sizes,
            "group_size": self.group_size,
            "bias": bias,
            "activation_bits": None,
        }

    def weights(self, widths: Sequence[int], absolute: bool = False) -> np.ndarray:
        """float64 [N, K]; ``absolute`` for |scale| * code + |offset|, what rounding errors are relative to."""
        width_of_row = np.repeat(widths, self.output_sizes)
        decoder = np.searchsorted(WIDTHS, width_of_row)
        row = np.arange(len(self.codes))
        group = np.arange(self.codes.shape[1]) // self.group_size
        scale, offset = (
            values.double().numpy()[decoder[:, None], row[:, None], group[None, :]]
            for values in (self.scales, self.offsets)
        )
        if absolute:
            scale, offset = np.abs(scale), np.abs(offset)
        return scale * (self.codes.numpy().astype(np.int64) >> (8 - width_of_row)[:, None]) + offset

    def check(
        self,
        result: torch.Tensor,
        x: torch.Tensor,
        widths: Sequence[int],
        bias: torch.Tensor | None = None,
        activation_bits: int | None = None,
        rounds: bool = True,
    ) -> None:
        """Compare with products in float64: that of the rounded activations, to within the rounding of sums in float32
        and of the result, and that of the activations themselves, to within what their rounding may change. What does
        not round them has ``rounds`` False."""
        bits = activation_bits or (24 if x.dtype == torch.float32 else 8 if set(widths) == {2} else 16)
        weights, absolute = self.weights(widths), self.weights(widths, absolute=True)
        rounded, largest = round_activations(x.double().numpy(), self.group_size, bits)
        if not rounds:
            rounded = x.double().numpy()
        added = 0.0 if bias is None else bias.double().numpy()
        expected = rounded @ weights.T + added
        assert result.dtype == x.dtype
        assert result.shape == expected.shape
        # Errors of float32 sums grow as the square root of their length; 8 standard deviations.
        magnitude = np.abs(rounded) @ absolute.T + np.abs(added)
        tolerance = magnitude * 2**-24 * 8 + np.abs(expected) * ROUNDING[x.dtype] + 1e-30
        error = np.abs(result.double().numpy() - expected)
        assert (error <= tolerance).all(), f"error up to {(error / tolerance).max():.3g} times the tolerance"

        most = 1 / 254 if bits == 8 else 2.0 ** (1 - bits)  # of the largest
        tolerance += largest @ np.abs(weights).T * most * 1.001
        error = np.abs(result.double().numpy() - (x.double().numpy() @ weights.T + added))
        assert (error <= tolerance).all(), f"error up to {(error / tolerance).max():.3g} times what rounding may change"


def round_activations(x: np.ndarray, group_size: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Activations [M, K] as the kernels round them, and for each the largest of its segment."""
    rounded, largest = np.empty_like(x), np.empty_like(x)
    columns = x.shape[1]
    cuts = sorted({*range(0, columns, group_size), *range(0, columns, 128), columns})
    for begin, end in itertools.pairwise(cuts):
        segment = x[:, begin:end]
        most = np.abs(segment).max(axis=1, keepdims=True)
        largest[:, begin:end] = np.maximum(most, 2.0**-86)  # what is below 2^-100 counts as zero
        if bits == 8:  # computed in float32: a value halfway between two integers may go either way
            scale = np.maximum(most.astype(np.float32) / np.float32(127), np.float32(2.0**-100))
            integers = np.round(segment.astype(np.float32) * (np.float32(1) / scale))
        else:
            scale = 2.0 ** np.maximum(np.ceil(np.log2(np.maximum(most, 2.0**-149) / 32639)), -100)
            steps = 256 if bits == 24 else 1
            integers = np.round(segment / scale * steps) / steps
        rounded[:, begin:end] = integers * scale.astype(np.float64)
    return rounded, largest


def make_layer(
    output_sizes: Sequence[int],
    columns: int,
    group_size: int,
    seed: int = 0,
    decoder_widths: Sequence[int] = WIDTHS,
) -> Layer:
    """Planes are in memory up to the largest of ``decoder_widths``."""
    generator = torch.Generator().manual_seed(seed)
    rows, groups = sum(output_sizes), -(-columns // group_size)
    codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8, generator=generator)
    scales = torch.stack([torch.rand(rows, groups, generator=generator) / 2**width for width in WIDTHS]).half()
    offsets = torch.randn(len(WIDTHS), rows, groups, generator=generator).half()
    planes = ops.repack_codes(*pack_codes(codes, max(decoder_widths)), output_sizes, decoder_widths)
    kept = [WIDTHS.index(width) for width in decoder_widths]
    decoders = layout.repack_decoders(list(scales[kept]), list(offsets[kept]), output_sizes)
    return Layer(codes, scales, offsets, list(output_sizes), group_size, list(decoder_widths), planes, decoders)


def make_input(rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + 1000)).to(dtype)
