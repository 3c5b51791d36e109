"""Decoders: how the r-bit codes of a layer become its weights, and how that is stored.

The weight of code t in a row and group of columns is ``scale * t + offset``. A :class:`DecoderForm` is one way to store
that for a layer and width r:

===========  ==================================================  ======================================================
form         tensors of a layer ``L``                            what they mean
===========  ==================================================  ======================================================
``FLOAT16``  ``L.weight_scale{r}``, ``L.weight_offset{r}``       scale and offset
             float16 [out_features, groups]
``INT8``     ``L.weight_scale{r}`` uint8,                        multiples of the row's two steps: the scale, and the
             ``L.weight_centre{r}`` int8                         centre, which is the weight in the middle of the codes,
             [out_features, groups],                             ``offset + (2^r - 1) / 2 * scale``
             ``L.weight_step{r}`` bfloat16 [out_features, 2]
===========  ==================================================  ======================================================

A centre hardly depends on the scale, where an offset does, so that few bits are enough for it. The steps have float32's
range; their low precision costs nothing, since the multiples are taken of the step as it is stored.

A :class:`DecoderKind`, which the checkpoint's format names, says which form the decoders of each width have:
``affine-float16`` gives all of them FLOAT16; ``affine-int8`` gives INT8 to widths up to 4, and FLOAT16 to wider ones,
whose codes are so fine that the rounding of a centre to 8 bits would be as coarse. Whoever needs to know what decoders
consist of asks the kind: the writer and the reader for names, dtypes and shapes, the quantizer for the nearest values
that can be stored, the kernels for what they read.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch

from vllm_matquant.checkpoint.errors import DecoderValueError


@dataclass(frozen=True)
class TensorSpec:
    """What the format prescribes for one tensor.

    Attributes:
        dtype: of its values.
        shape: its sizes.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's values."""
        return math.prod(self.shape) * self.dtype.itemsize


def dequantize(
    codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, group_size: int | None = None
) -> torch.Tensor:
    """``scale * code + offset`` in float32.

    Args:
        codes: uint8 [out_features, in_features], each of the decoder's width.
        scale: floating point [out_features, groups].
        offset: floating point [out_features, groups].
        group_size: columns that share a decoder, the last group may have fewer; by default in_features / groups.

    Returns:
        float32 [out_features, in_features].

    Raises:
        ValueError: the groups do not cover the columns.
    """
    in_features, groups = codes.shape[-1], scale.shape[-1]
    if group_size is None:
        if in_features % groups:
            raise ValueError(f"groups: found {groups}, expected a divisor of {in_features} columns or a group_size")
        group_size = in_features // groups
    elif -(-in_features // group_size) != groups:
        raise ValueError(f"groups: found {groups}, expected {in_features} columns / {group_size}, rounded up")

    def per_column(values: torch.Tensor) -> torch.Tensor:
        return values.float().repeat_interleave(group_size, dim=-1)[..., :in_features]

    return per_column(scale) * codes + per_column(offset)


def middle_code(width: int) -> float:
    """The middle of the codes of ``width`` bits, halfway between 0 and ``2^width - 1``."""
    return (2**width - 1) / 2


@dataclass(frozen=True, eq=False)
class Affine:
    """Scales and offsets of a layer at one width, as numbers: what solvers and trainers work with.

    Attributes:
        scale: floating point [out_features, groups].
        offset: floating point [out_features, groups], the weight of code 0.
    """

    scale: torch.Tensor
    offset: torch.Tensor

    def __getitem__(self, rows: slice | torch.Tensor) -> Affine:
        """Those of some rows."""
        return Affine(self.scale[rows], self.offset[rows])

    def to(self, device: torch.device | str) -> Affine:
        """Copies on another device."""
        return Affine(self.scale.to(device), self.offset.to(device))

    def centre(self, width: int) -> torch.Tensor:
        """The weight in the middle of the codes of ``width`` bits: [out_features, groups]."""
        return self.offset + middle_code(width) * self.scale

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Weights of ``codes`` (uint8 [out_features, in_features]): float32 [out_features, in_features]."""
        return dequantize(codes, self.scale, self.offset)


OffsetsFor = Callable[[torch.Tensor], torch.Tensor]
"""Gives the best offsets for scales, both float32 [out_features, groups]."""


@dataclass(frozen=True, eq=False)
class Decoder:
    """The decoder of a layer at one width, as it is stored: what a checkpoint holds and what is served.

    Attributes:
        form: how it is stored.
        width: bits of the codes that it decodes.
        parts: its tensors by the names that the form gives them; rows are the first dimension of each.
    """

    form: DecoderForm
    width: int
    parts: Mapping[str, torch.Tensor]

    @cached_property
    def affine(self) -> Affine:
        """Scale and offset that the stored values mean, float32 [out_features, groups] each."""
        return self.form.affine(self.parts, self.width)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Weights of ``codes`` (uint8 [out_features, in_features]): float32 [out_features, in_features]."""
        return self.affine.decode(codes)

    def __getitem__(self, rows: slice | torch.Tensor) -> Decoder:
        """The decoder of some rows."""
        return self.map(lambda part: part[rows])

    def to(self, device: torch.device | str) -> Decoder:
        """A copy on another device."""
        return self.map(lambda part: part.to(device))

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Decoder:
        """A decoder of the same form and width whose parts are those that ``change`` makes of this one's."""
        return Decoder(self.form, self.width, {name: change(part) for name, part in self.parts.items()})

    def named(self, layer: str) -> dict[str, torch.Tensor]:
        """The stored tensors by their names in a checkpoint."""
        return {f"{layer}.{part_name(part, self.width)}": tensor for part, tensor in self.parts.items()}

    def check(self, layer: str, where: Path) -> None:
        """Refuse values that give no weights.

        Args:
            layer: the layer to name in an error.
            where: the file to name in an error.

        Raises:
            DecoderValueError: a value is not finite or too large, or a scale or step is negative.
        """
        for part, wrong, expected in self.form.faults(self.parts):
            if wrong.any():
                values, place = self.parts[part], wrong.nonzero()[0].tolist()
                found = f"{values[tuple(place)].item()} in row {place[0]}, column {place[1]} (as {values.dtype})"
                raise DecoderValueError(where, f"{layer}.{part_name(part, self.width)}", found, expected)


def part_name(part: str, width: int) -> str:
    """Name, within its layer, of a tensor that the decoders of ``width`` consist of."""
    return f"weight_{part}{width}"


def join_rows(decoders: list[Decoder]) -> Decoder:
    """The decoder whose rows are those of ``decoders``, one after the other; all of one form and width."""
    first = decoders[0]
    parts = {name: torch.cat([decoder.parts[name] for decoder in decoders]) for name in first.parts}
    return Decoder(first.form, first.width, parts)


class DecoderForm(ABC):
    """A way to store a width's decoders: names, dtypes, shapes and validity of their tensors, and what these mean."""

    name: ClassVar[str]  # in messages

    @abstractmethod
    def parts(self, out_features: int, groups: int) -> dict[str, TensorSpec]:
        """The tensors of one width's decoders in a layer of ``out_features`` rows and ``groups`` groups of columns."""

    @abstractmethod
    def encode(self, values: Affine, width: int, offsets_for: OffsetsFor | None = None) -> Decoder:
        """The decoder of this form that is nearest to ``values``.

        What it stores is no fixed point: to encode the values of a decoder may give another one. Keep the decoder.

        Args:
            values: floating point; what no decoder may have, values that are not finite and negative scales, gives a
                decoder that :meth:`Decoder.check` refuses.
            width: bits of the codes.
            offsets_for: gives the offsets that suit the scales as they are stored, to take the place of those in
                ``values``.
        """

    @abstractmethod
    def affine(self, parts: Mapping[str, torch.Tensor], width: int) -> Affine:
        """Scale and offset that stored tensors mean, float32 [out_features, groups] each.

        Args:
            parts: the stored tensors by their part's name.
            width: bits of the codes.
        """

    @abstractmethod
    def faults(self, parts: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Tensor, str]]:
        """What could be wrong with stored values: (part, bool mask of its wrong values, what is expected)."""

    def nbytes(self, out_features: int, groups: int) -> int:
        """Bytes of one width's decoders in a layer."""
        return sum(spec.nbytes for spec in self.parts(out_features, groups).values())

    def from_tensors(self, tensor: Callable[[str], torch.Tensor], width: int) -> Decoder:
        """A decoder from the tensors of a layer.

        Args:
            tensor: gives the tensor of a name such as ``weight_scale4``.
            width: bits of the codes.
        """
        return Decoder(self, width, {part: tensor(part_name(part, width)) for part in self.parts(1, 1)})


_FINITE = "finite values"
_NOT_NEGATIVE = "finite values from 0 up"
_STEPS = "finite values from 0 up to 2^111"


@dataclass(frozen=True)
class Float16Form(DecoderForm):
    """Scale and offset in float16."""

    name = "float16"

    def parts(self, out_features: int, groups: int) -> dict[str, TensorSpec]:
        spec = TensorSpec(torch.float16, (out_features, groups))
        return {"scale": spec, "offset": spec}

    def encode(self, values: Affine, width: int, offsets_for: OffsetsFor | None = None) -> Decoder:
        scale = values.scale.to(torch.float16)
        offset = offsets_for(scale.float()) if offsets_for else values.offset
        return Decoder(self, width, {"scale": scale, "offset": offset.to(torch.float16)})

    def affine(self, parts: Mapping[str, torch.Tensor], width: int) -> Affine:
        return Affine(parts["scale"].float(), parts["offset"].float())

    def faults(self, parts: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Tensor, str]]:
        scale, offset = parts["scale"], parts["offset"]
        return [
            ("scale", ~(scale.isfinite() & (scale >= 0)), _NOT_NEGATIVE),
            ("offset", ~offset.isfinite(), _FINITE),
        ]


@dataclass(frozen=True)
class Int8Form(DecoderForm):
    """Scale and centre as whole multiples, of 8 bits, of two steps that a row has."""

    name = "int8"

    SCALE_LEVELS: ClassVar[int] = 255  # a scale is 0 to 255 steps
    CENTRE_LEVELS: ClassVar[int] = 127  # a centre is -127 to 127 steps
    LARGEST_STEP: ClassVar[float] = 2.0**111  # 255 codes of 255 such steps are less than 2^127: finite in float32

    def parts(self, out_features: int, groups: int) -> dict[str, TensorSpec]:
        return {
            "scale": TensorSpec(torch.uint8, (out_features, groups)),
            "centre": TensorSpec(torch.int8, (out_features, groups)),
            "step": TensorSpec(torch.bfloat16, (out_features, 2)),
        }

    def encode(self, values: Affine, width: int, offsets_for: OffsetsFor | None = None) -> Decoder:
        exact = Affine(values.scale.double(), values.offset.double())
        step = self.steps(exact, width)
        scale = self.scale_multiples(exact.scale, step)
        if offsets_for:
            stored = (scale * step[:, :1].double()).float()
            exact = Affine(stored.double(), offsets_for(stored).double())
            step = torch.cat([step[:, :1], self.steps(exact, width)[:, 1:]], dim=1)
        centre = self.centre_multiples(exact.centre(width), step)
        return Decoder(self, width, {"scale": scale, "centre": centre, "step": step})

    def steps(self, values: Affine, width: int) -> torch.Tensor:
        """The smallest steps that reach the largest scale and the largest centre of each row.

        The step of a row with a negative scale is negative, which no checkpoint may have.

        Args:
            values: [out_features, groups].
            width: bits of the codes.

        Returns:
            bfloat16 [out_features, 2].
        """
        scale, centre = values.scale.double(), values.offset.double() + middle_code(width) * values.scale.double()
        reach = torch.stack([scale.abs().amax(1) / self.SCALE_LEVELS, centre.abs().amax(1) / self.CENTRE_LEVELS], dim=1)
        reach[:, 0].masked_fill_((scale < 0).any(1), -1.0)
        step = reach.to(torch.bfloat16)
        return torch.where(step < reach, torch.nextafter(step, step.new_full((), math.inf)), step)

    def scale_multiples(self, scale: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """The nearest multiples of the rows' steps: uint8 [out_features, groups]."""
        return _multiples(scale, step[:, :1]).clamp_(0, self.SCALE_LEVELS).to(torch.uint8)

    def centre_multiples(self, centre: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """The nearest multiples of the rows' steps: int8 [out_features, groups]."""
        return _multiples(centre, step[:, 1:]).clamp_(-self.CENTRE_LEVELS, self.CENTRE_LEVELS).to(torch.int8)

    def affine(self, parts: Mapping[str, torch.Tensor], width: int) -> Affine:
        # Multiples of 8 bits of steps of 8 bits are exact in float32. In double precision the offset is exact, save
        # where one of its terms is so small that it does not show in float32. Rounded to float32 it is thus what a
        # fused multiplication and addition gives.
        step = parts["step"].double()
        scale, centre = parts["scale"] * step[:, :1], parts["centre"] * step[:, 1:]
        return Affine(scale.float(), (centre - middle_code(width) * scale).float())

    def faults(self, parts: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Tensor, str]]:
        step = parts["step"]
        return [("step", ~((step >= 0) & (step <= self.LARGEST_STEP)), _STEPS)]


def _multiples(values: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """How many steps the values are, rounded to whole numbers; 0 where the step is none."""
    step = step.double()
    return (values.double() / torch.where(step > 0, step, 1.0)).nan_to_num_().round()


FLOAT16 = Float16Form()
INT8 = Int8Form()


@dataclass(frozen=True)
class DecoderKind:
    """How a checkpoint stores decoders: a form for each width.

    Attributes:
        name: in config.json.
        format_version: the first version of the format that has this kind.
        narrow: form of the decoders of widths up to 4.
        wide: form of those of wider ones.
    """

    name: str
    format_version: int
    narrow: DecoderForm
    wide: DecoderForm

    def form(self, width: int) -> DecoderForm:
        """How the decoders of a width are stored."""
        return self.narrow if width <= WIDEST_NARROW else self.wide

    def encode(self, values: Affine, width: int, offsets_for: OffsetsFor | None = None) -> Decoder:
        """The decoder of a width that is nearest to ``values``, see :meth:`DecoderForm.encode`."""
        return self.form(width).encode(values, width, offsets_for)


WIDEST_NARROW = 4  # csrc/decoder.h has it too

AFFINE_FLOAT16 = DecoderKind("affine-float16", 1, FLOAT16, FLOAT16)
AFFINE_INT8 = DecoderKind("affine-int8", 2, INT8, FLOAT16)
KINDS: dict[str, DecoderKind] = {kind.name: kind for kind in (AFFINE_FLOAT16, AFFINE_INT8)}
"""The kinds of decoders that the format has, by their names in config.json."""

FORMS: tuple[DecoderForm, ...] = (FLOAT16, INT8)
"""The forms that there are."""
