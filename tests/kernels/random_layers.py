"""Layers with random codes and decoders, and their product computed apart from the package's own reference."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from vllm_matquant.checkpoint import decoder
from vllm_matquant.checkpoint.decoder import Decoder, DecoderForm, DecoderKind
from vllm_matquant.checkpoint.packing import pack_codes
from vllm_matquant.checkpoint.spec import WIDTHS
from vllm_matquant.kernels.kernel import Kernel
from vllm_matquant.kernels.support import CPU
from vllm_matquant.kernels.weight import PackedWeight, StoredSegment

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


KINDS = tuple(decoder.KINDS.values())

# Of widths whose activations have 8 bits by default, in bfloat16 and float16: from how many times the average of a
# token's spans the largest activation makes its span take 16.
DEFAULT_ROUNDINGS = {2: (8, np.inf), 3: (8, 3.0), 4: (8, 1.5)}

SMALLEST = {torch.bfloat16: 1e-30, torch.float16: 2**-25, torch.float32: 1e-30}  # half of the smallest number


@dataclass
class Layer:
    """A layer: parent codes uint8 [N, K], decoders of all widths, and both as kernels read them."""

    codes: torch.Tensor
    decoders: dict[int, Decoder]
    output_sizes: list[int]
    group_size: int
    weight: PackedWeight

    def run(self, x: torch.Tensor, widths: Sequence[int], bias: torch.Tensor | None = None) -> torch.Tensor:
        self.weight.set_active(widths)
        return self.weight.kernel.linear(x, self.weight.handle, sum(self.output_sizes), bias)

    def rounding_to(self, activation_bits: int | None) -> Layer:
        """The same layer, which rounds activations to so many bits."""
        return replace(self, weight=replace(self.weight, activation_bits=activation_bits))

    def reading(self, kernel: Kernel) -> Layer:
        """The same layer, for another kernel that reads the same layout."""
        return replace(self, weight=replace(self.weight, kernel=kernel))

    def with_tensors(self, **changed: torch.Tensor) -> Layer:
        """The same layer, of one segment, with other planes or decoders."""
        [segment] = self.weight.segments
        resident = replace(segment.resident, **changed)
        return replace(self, weight=replace(self.weight, segments=(replace(segment, resident=resident),)))

    @property
    def planes(self) -> torch.Tensor:
        [segment] = self.weight.segments
        return segment.resident.planes

    def weights(self, widths: Sequence[int], absolute: bool = False) -> np.ndarray:
        """float64 [N, K]; ``absolute`` for |scale| * code + |offset|, what rounding errors are relative to."""
        if not self.weight.decoder_kind.affine:
            return self._levels(widths, absolute)
        width_of_row = np.repeat(widths, self.output_sizes)
        group = np.arange(self.codes.shape[1]) // self.group_size
        scale, offset = np.empty((2, *self.codes.shape))
        for width in set(widths):
            rows = width_of_row == width
            for target, values in zip((scale, offset), affine_of(self.decoders[width]), strict=True):
                target[rows] = values[rows][:, group]
        if absolute:
            scale, offset = np.abs(scale), np.abs(offset)
        return scale * (self.codes.numpy().astype(np.int64) >> (8 - width_of_row)[:, None]) + offset

    def _levels(self, widths: Sequence[int], absolute: bool) -> np.ndarray:
        """float64 [N, K] by codebooks, one for each partition: scale times level; ``absolute`` for the scale times
        bytes, of which 128 is taken off, and that."""
        rows = np.cumsum([0, *self.output_sizes])
        group = np.arange(self.codes.shape[1]) // self.group_size
        parts = []
        for partition, width in enumerate(widths):
            own = slice(rows[partition], rows[partition + 1])
            stored = {name: part.numpy() for name, part in self.decoders[width].map(torch.Tensor.float).parts.items()}
            scale = (stored["scale"] * stored["step"])[own][:, group].astype(np.float64)
            planes = stored["codebook"].reshape(len(widths), -1, 64, 4)[partition].astype(np.float64)
            levels = look_up(self.codes.numpy()[own] >> (8 - width), planes, width)
            parts.append(scale * (np.abs(levels) + 300 if absolute else levels))
        return np.concatenate(parts)

    def check(
        self,
        result: torch.Tensor,
        x: torch.Tensor,
        widths: Sequence[int],
        bias: torch.Tensor | None = None,
        activation_bits: int | None = None,
        rounds: bool = True,
        widest: int | None = None,
    ) -> None:
        """Compare with products in float64: that of the rounded activations, to within the rounding of sums in float32
        and of the result, and that of the activations themselves, to within what their rounding may change. What does
        not round them has ``rounds`` False; of a part of a weight ``widest`` is the widest of all its parts."""
        if activation_bits is not None:
            bits, outlier = activation_bits, np.inf
        elif x.dtype == torch.float32:
            bits, outlier = 24, np.inf
        else:
            bits, outlier = DEFAULT_ROUNDINGS.get(widest or max(widths), (16, np.inf))
        weights, absolute = self.weights(widths), self.weights(widths, absolute=True)
        rounded, lost = round_activations(x.double().numpy(), self.group_size, bits, outlier)
        if not rounds:
            rounded = x.double().numpy()
        added = 0.0 if bias is None else bias.double().numpy()
        expected = rounded @ weights.T + added
        assert result.dtype == x.dtype
        assert result.shape == expected.shape
        # Errors of float32 sums grow as the square root of their length; 8 standard deviations.
        magnitude = np.abs(rounded) @ absolute.T + np.abs(added)
        tolerance = magnitude * 2**-24 * 8 + np.abs(expected) * ROUNDING[x.dtype] + SMALLEST[x.dtype]
        error = np.abs(result.double().numpy() - expected)
        assert (error <= tolerance).all(), f"error up to {(error / tolerance).max():.3g} times the tolerance"

        tolerance += lost @ np.abs(weights).T * 1.001
        error = np.abs(result.double().numpy() - (x.double().numpy() @ weights.T + added))
        assert (error <= tolerance).all(), f"error up to {(error / tolerance).max():.3g} times what rounding may change"


def look_up(codes: np.ndarray, planes: np.ndarray, width: int) -> np.ndarray:
    """Levels of codes of ``width`` bits by the definition of the format, weight by weight."""
    padded = np.pad(codes.astype(np.int64), ((0, 0), (0, -codes.shape[1] % 16)))
    levels = np.empty(codes.shape)
    for column in range(codes.shape[1]):
        first, place = column // 16 * 16 + column % 4, column % 16 // 4
        top = padded[:, first : first + 16 : 4] >> (width - 2)
        index = top[:, 0] + 4 * top[:, 1] + 16 * top[:, 2] + 64 * top[:, 3]
        entry, changed = index % 64, index & (128 if place < 2 else 64) != 0
        bits = [padded[:, column] >> (width - 3 - bit) & 1 for bit in range(width - 2)]
        levels[:, column] = planes[0, entry, place] - 128
        for bit, is_set in enumerate(bits[:4]):
            levels[:, column] += planes[1 + bit, entry, place] * is_set
        if width > 4:
            first = min(width, 6) - 1
            levels[:, column] += (planes[first, entry, place] - 128) / 16
            for bit, is_set in enumerate(bits):
                levels[:, column] += planes[first + 1 + bit, entry, place] / 16 * is_set
        levels[changed, column] *= -1
    return levels


def affine_of(stored: Decoder) -> tuple[np.ndarray, np.ndarray]:
    """Scale and offset in float64 [N, groups], by the definition of the forms; offsets rounded to float32."""
    parts = {name: part.double().numpy() for name, part in stored.parts.items()}
    if stored.form.name == "float16":
        return parts["scale"], parts["offset"]
    scale, centre = (
        parts[name] * parts["step"][:, column : column + 1] for column, name in enumerate(("scale", "centre"))
    )
    return scale, (centre - (2**stored.width - 1) / 2 * scale).astype(np.float32).astype(np.float64)


def round_activations(
    x: np.ndarray, group_size: int, bits: int, outlier: float = np.inf
) -> tuple[np.ndarray, np.ndarray]:
    """Activations [M, K] as the kernels round them, and the most that each may have lost."""
    rounded, lost = np.empty_like(x), np.empty_like(x)
    columns = x.shape[1]
    cuts = sorted({*range(0, columns, group_size), *range(0, columns, 128), columns})
    spans = [slice(begin, end) for begin, end in itertools.pairwise(cuts)]
    sums = np.zeros((len(x), 1), np.float32)
    for span in spans:
        sums += np.abs(x[:, span]).max(axis=1, keepdims=True).astype(np.float32)
    for span in spans:
        largest = np.abs(x[:, span]).max(axis=1, keepdims=True)
        # Computed in float32: a value halfway between two integers may go either way.
        scale8 = np.maximum(largest.astype(np.float32) / np.float32(127), np.float32(2.0**-100))
        rounded8 = np.round(x[:, span].astype(np.float32) * (np.float32(1) / scale8)) * scale8.astype(np.float64)
        scale = 2.0 ** np.maximum(np.ceil(np.log2(np.maximum(largest, 2.0**-149) / 32639)), -100)
        integers = np.round(x[:, span] / scale)
        if bits == 24:  # 8 bits of the remainder, of which half a unit has no byte
            integers += np.minimum(np.round((x[:, span] / scale - integers) * 256), 127) / 256
        rounded[:, span] = integers * scale
        most = np.full_like(largest, 2.0**-22 if bits == 24 else 2.0**-15)  # of the largest
        if bits == 8:
            with np.errstate(invalid="ignore"):  # infinity times zero
                narrow = ~(largest > np.float32(outlier) * (sums / np.float32(len(spans))))
            rounded[:, span] = np.where(narrow, rounded8, rounded[:, span])
            most[narrow] = 1 / 254
        lost[:, span] = np.maximum(largest, 2.0**-86) * most  # what is below 2^-100 counts as zero
    return rounded, lost


def make_codebook(planes: int, generator: torch.Generator) -> torch.Tensor:
    """uint8 [planes, 64, 4] whose sums are from 1 to 255, some of them just that."""
    ends = torch.randint(1, 256, (planes, 64, 4), generator=generator).sort(0).values
    ends[0, ::5] = 1
    steps = torch.diff(ends, dim=0, prepend=torch.zeros(1, 64, 4, dtype=ends.dtype))
    steps[planes - 1, ::7] += 255 - ends[-1, ::7]
    return steps.to(torch.uint8)


def make_decoder(
    kind: DecoderKind | DecoderForm, width: int, rows: int, groups: int, generator: torch.Generator, layers: int = 1
) -> Decoder:
    """Every value that a decoder of the kind or form can store, within reason; of ``layers`` partitions."""
    form = kind.form(width) if isinstance(kind, DecoderKind) else kind
    if form.name == "codebook":
        planes = [width - 1] if width <= 4 else [min(width, 6) - 1, width - 1]
        codebooks = [make_codebook(each, generator) for _ in range(layers) for each in planes]
        scale = torch.randint(0, 256, (rows, groups), dtype=torch.uint8, generator=generator)
        step = torch.rand(rows, 1, generator=generator).bfloat16() / 2**14
        return Decoder(form, width, {"scale": scale, "step": step, "codebook": torch.cat(codebooks)})
    if form.name == "float16":
        scale = torch.rand(rows, groups, generator=generator) / 2**width
        return Decoder(
            form, width, {"scale": scale.half(), "offset": torch.randn(rows, groups, generator=generator).half()}
        )
    step = torch.rand(rows, 2, generator=generator) / torch.tensor([255 * 2**width, 127])
    return Decoder(
        form,
        width,
        {
            "scale": torch.randint(0, 256, (rows, groups), dtype=torch.uint8, generator=generator),
            "centre": torch.randint(-128, 128, (rows, groups), dtype=torch.int8, generator=generator),
            "step": step.bfloat16(),
        },
    )


def make_layer(
    output_sizes: Sequence[int],
    columns: int,
    group_size: int,
    seed: int = 0,
    decoder_widths: Sequence[int] = WIDTHS,
    kind: DecoderKind = decoder.AFFINE_FLOAT16,
    kernel: Kernel | None = None,
) -> Layer:
    """One segment, with planes in memory up to the largest of ``decoder_widths``; for the CPU's kernel by default."""
    generator = torch.Generator().manual_seed(seed)
    rows, groups = sum(output_sizes), -(-columns // group_size)
    codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8, generator=generator)
    decoders = {width: make_decoder(kind, width, rows, groups, generator, len(output_sizes)) for width in WIDTHS}
    segment = stored_segment(codes, decoders, output_sizes, decoder_widths)
    weight = (kernel or CPU).pack([segment], columns, group_size, "cpu")
    return Layer(codes, decoders, list(output_sizes), group_size, weight)


def stored_segment(
    codes: torch.Tensor, decoders: dict[int, Decoder], output_sizes: Sequence[int], decoder_widths: Sequence[int]
) -> StoredSegment:
    """What a kernel packs, active at the first of ``decoder_widths``."""
    base, planes = pack_codes(codes, max(decoder_widths))
    resident = [decoders[width] for width in decoder_widths]
    return StoredSegment(base, planes, resident, output_sizes, [decoder_widths[0]] * len(output_sizes))


def make_input(rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Random numbers, a few of them outliers, so that some spans of a token are far larger than others."""
    generator = torch.Generator().manual_seed(seed + 1000)
    x = torch.randn(rows, columns, generator=generator)
    outliers = torch.rand(rows, columns, generator=generator) < 1 / 256
    return torch.where(outliers, 16 * x, x).to(dtype)
