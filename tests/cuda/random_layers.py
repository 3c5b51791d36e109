"""Layers with random codes in the layout of the CUDA kernels, and their product in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from tests.kernels.random_layers import ROUNDING, affine_of, look_up, make_decoder, make_input, stored_segment
from vllm_matquant.checkpoint.decoder import AFFINE_FLOAT16, Decoder, DecoderKind
from vllm_matquant.checkpoint.spec import WIDTHS
from vllm_matquant.kernels.kernel import Kernel
from vllm_matquant.kernels.support import CUDA, KERNELS
from vllm_matquant.kernels.weight import PackedWeight

__all__ = ["CUDA", "KINDS", "ROUNDING", "TRITON", "Layer", "make_input", "make_layer", "make_segments"]

KINDS = CUDA.decoder_kinds
[TRITON] = [kernel for kernel in KERNELS if kernel.name == "triton"]


@dataclass
class Layer:
    """Parent codes uint8 [N, K], decoders of all widths, and both as kernels read them."""

    codes: torch.Tensor
    decoders: dict[int, Decoder]
    output_sizes: list[int]
    group_size: int
    weight: PackedWeight

    def activate(self, widths: Sequence[int]) -> None:
        """Set the active widths, whether or not they are resident."""
        remaining = list(widths)
        for segment in self.weight.segments:
            count = len(segment.active_width)
            segment.active_width.copy_(torch.tensor(remaining[:count], dtype=torch.int32))
            remaining = remaining[count:]
        assert not remaining

    @property
    def planes(self) -> torch.Tensor:
        [segment] = self.weight.segments
        return segment.resident.planes

    def with_planes(self, planes: torch.Tensor) -> Layer:
        """The same layer, of one segment, with other planes."""
        [segment] = self.weight.segments
        self.activate([min(segment.resident.usable_widths)] * len(self.output_sizes))
        resident = replace(segment.resident, planes=planes, width=planes.shape[2])
        return replace(self, weight=replace(self.weight, segments=(replace(segment, resident=resident),)))

    def weights(self, widths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """float64 [N, K], and the same of |scale| * code + |offset|, what rounding errors are relative to."""
        parts, first = [], 0
        group = torch.arange(self.codes.shape[1]) // self.group_size
        for partition, (size, width) in enumerate(zip(self.output_sizes, widths, strict=True)):
            rows = slice(first, first + size)
            if not self.weight.decoder_kind.affine:
                parts.append(self._levels(partition, rows, width, group))
                first += size
                continue
            codes = (self.codes[rows] >> (8 - width)).double()
            scale, offset = (torch.from_numpy(values[rows])[:, group] for values in affine_of(self.decoders[width]))
            parts.append((scale * codes + offset, scale.abs() * codes + offset.abs()))
            first += size
        return torch.cat([weight for weight, _ in parts]), torch.cat([absolute for _, absolute in parts])

    def _levels(
        self, partition: int, rows: slice, width: int, group: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of a partition with a codebook: scale times level, and |scale| times what is looked up for it."""
        stored = self.decoders[width].parts
        planes = stored["codebook"].unflatten(0, (len(self.output_sizes), -1))[partition].double().numpy()
        scale = (stored["scale"].double() * stored["step"].double())[rows][:, group]
        levels = torch.from_numpy(look_up(self.codes[rows].numpy() >> (8 - width), planes, width))
        return scale * levels, scale * (levels.abs() + 255)

    def check(
        self,
        result: torch.Tensor,
        x: torch.Tensor,
        widths: Sequence[int],
        bias: torch.Tensor | None = None,
        rounded_weights: bool = False,
        truncates: bool = False,
    ) -> None:
        """Compare with the product in float64, to within the rounding of sums in float32 and of the result, and of
        weights where these were rounded too; rounding to the nearest, unless it is said that it ``truncates``."""
        weights, absolute = self.weights(widths)
        added = torch.zeros(len(weights)).double() if bias is None else bias.double()
        expected = x.double() @ weights.T + added
        assert result.dtype == x.dtype
        assert result.shape == expected.shape
        # Within a group the sums of code + magic value, up to 2^7 times the codes themselves, are rounded by the tensor
        # core, which cuts off.
        unit = ROUNDING[x.dtype] * (2 if truncates else 1)
        tolerance = expected.abs() * unit + (x.double().abs() @ absolute.T + added.abs()) * 2**-17
        if rounded_weights:
            smallest = torch.finfo(x.dtype).smallest_normal  # rounding errors shrink no further
            tolerance += x.double().abs() @ weights.abs().clamp(min=smallest).T * unit
        error = (result.double() - expected).abs()
        assert (error <= tolerance).all(), f"error up to {(error / tolerance).max():.3g} times the tolerance"


def make_layer(
    output_sizes: Sequence[int],
    columns: int,
    group_size: int,
    decoder_widths: Sequence[int] = WIDTHS,
    seed: int = 0,
    kind: DecoderKind = AFFINE_FLOAT16,
    kernel: Kernel = CUDA,
) -> Layer:
    """A layer whose partitions are one segment, with planes in memory up to the largest of ``decoder_widths``."""
    return make_segments([(output_sizes, decoder_widths)], columns, group_size, seed, kind, kernel)


def make_segments(
    segments: Sequence[tuple[Sequence[int], Sequence[int]]],
    columns: int,
    group_size: int,
    seed: int = 0,
    kind: DecoderKind = AFFINE_FLOAT16,
    kernel: Kernel = CUDA,
    device: str = "cpu",
) -> Layer:
    """A layer of segments with these output sizes and decoder widths."""
    generator = torch.Generator().manual_seed(seed)
    output_sizes = [size for sizes, _ in segments for size in sizes]
    rows, groups = sum(output_sizes), -(-columns // group_size)
    codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8, generator=generator)
    decoders = {width: make_decoder(kind, width, rows, groups, generator, len(output_sizes)) for width in WIDTHS}
    stored, first, partition = [], 0, 0
    for sizes, widths in segments:
        own = slice(first, first + sum(sizes))
        layers = range(partition, partition + len(sizes)), len(output_sizes)
        parts = {width: of_layers(decoders[width][own], *layers) for width in WIDTHS}
        stored.append(stored_segment(codes[own], parts, list(sizes), widths))
        first, partition = own.stop, partition + len(sizes)
    # One group is as good as groups of any size to a kernel.
    weight = kernel.pack(stored, columns, min(group_size, max(columns, 128)), device)
    return Layer(codes, decoders, output_sizes, group_size, weight)


def of_layers(decoder: Decoder, layers: range, count: int) -> Decoder:
    """The decoder with the codebooks of some of ``count`` layers, if it has any."""
    own = slice(layers.start, layers.stop)
    shared = {name: decoder.parts[name].unflatten(0, (count, -1))[own].flatten(0, 1) for name in decoder.form.shared}
    return replace(decoder, parts={**decoder.parts, **shared})
