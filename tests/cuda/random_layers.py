"""Layers with random codes in the layout of the CUDA kernels, and their product in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tests.kernels.random_layers import ROUNDING, make_input
from vllm_matquant.checkpoint.spec import WIDTHS
from vllm_matquant.kernels import cuda_layout

__all__ = ["ROUNDING", "Layer", "make_input", "make_layer"]


@dataclass
class Layer:
    """Codes uint8 [N, K] of the widest decoder's width, decoders float16 [widths, N, groups], and both as kernels read
    them."""

    codes: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor
    output_sizes: list[int]
    group_size: int
    decoder_widths: list[int]
    planes: torch.Tensor
    decoders: torch.Tensor

    @property
    def kernel_group_size(self) -> int:
        """One group is as good as groups of any size to the kernel."""
        return 128 if self.group_size >= self.codes.shape[1] else self.group_size

    def weights(self, widths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """float64 [N, K], and the same of |scale| * code + |offset|, what rounding errors are relative to."""
        parts, first = [], 0
        for size, width in zip(self.output_sizes, widths, strict=True):
            rows, index = slice(first, first + size), self.decoder_widths.index(width)
            codes = (self.codes[rows] >> (max(self.decoder_widths) - width)).double()
            scale, offset = (
                values[index, rows].double().repeat_interleave(self.group_size, 1)[:, : codes.shape[1]]
                for values in (self.scales, self.offsets)
            )
            parts.append((scale * codes + offset, scale.abs() * codes + offset.abs()))
            first += size
        return torch.cat([weight for weight, _ in parts]), torch.cat([absolute for _, absolute in parts])

    def check(
        self,
        result: torch.Tensor,
        x: torch.Tensor,
        widths: Sequence[int],
        bias: torch.Tensor | None = None,
        rounded_weights: bool = False,
    ) -> None:
        """Compare with the product in float64, to within the rounding of sums in float32 and of the result, and of
        weights where these were rounded too."""
        weights, absolute = self.weights(widths)
        added = torch.zeros(len(weights)).double() if bias is None else bias.double()
        expected = x.double() @ weights.T + added
        assert result.dtype == x.dtype
        assert result.shape == expected.shape
        # Within a group the sums of code + magic value, up to 2^7 times the codes themselves, are rounded by the tensor
        # core, which cuts off.
        tolerance = expected.abs() * ROUNDING[x.dtype] + (x.double().abs() @ absolute.T + added.abs()) * 2**-17
        if rounded_weights:
            tolerance += x.double().abs() @ weights.abs().T * ROUNDING[x.dtype]
        error = (result.double() - expected).abs()
        assert (error <= tolerance).all(), f"error up to {(error / tolerance).max():.3g} times the tolerance"


def make_layer(
    output_sizes: Sequence[int],
    columns: int,
    group_size: int,
    decoder_widths: Sequence[int] = WIDTHS,
    seed: int = 0,
) -> Layer:
    generator = torch.Generator().manual_seed(seed)
    rows, groups, width = sum(output_sizes), -(-columns // group_size), max(decoder_widths)
    codes = torch.randint(0, 2**width, (rows, columns), dtype=torch.uint8, generator=generator)
    scales = torch.stack([torch.rand(rows, groups, generator=generator) / 2**bits for bits in decoder_widths]).half()
    offsets = torch.randn(len(decoder_widths), rows, groups, generator=generator).half()
    planes = cuda_layout.pack_codes(codes, width, output_sizes)
    decoders = cuda_layout.pack_decoders(list(scales), list(offsets), output_sizes)
    return Layer(codes, scales, offsets, list(output_sizes), group_size, list(decoder_widths), planes, decoders)
