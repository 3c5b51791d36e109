"""Decoders: how the r-bit codes of a layer become its weights, and how that is stored.

The weight of code t in a row and group of columns is ``scale * t + offset``, or a scale times the level that a codebook
(:mod:`vllm_matquant.checkpoint.codebook`) gives it. A :class:`DecoderForm` is one way to store that for a layer and
width r:

===========  ==================================================  ======================================================
form         tensors of a layer ``L``                            what they mean
===========  ==================================================  ======================================================
``FLOAT16``  ``L.weight_scale{r}``, ``L.weight_offset{r}``       scale and offset
             float16 [out_features, groups]
``INT8``     ``L.weight_scale{r}`` uint8,                        multiples of the row's two steps: the scale, and the
             ``L.weight_centre{r}`` int8                         centre, which is the weight in the middle of the codes,
             [out_features, groups],                             ``offset + (2^r - 1) / 2 * scale``
             ``L.weight_step{r}`` bfloat16 [out_features, 2]
codebook     ``L.weight_scale{r}`` uint8                         multiples of the row's step, and a table that all
             [out_features, groups],                             rows share
             ``L.weight_step{r}`` bfloat16 [out_features, 1],
             ``L.weight_codebook{r}`` uint8 [planes, 64, 4]
vectors      see :mod:`vllm_matquant.checkpoint.vectors`         the index of a vector's entry is made of the codes of
                                                                 its columns
===========  ==================================================  ======================================================

A centre hardly depends on the scale, where an offset does, so that few bits are enough for it. The steps have float32's
range; their low precision costs nothing, since the multiples are taken of the step as it is stored.

A :class:`DecoderKind`, which the checkpoint's format names, says which form the decoders of each width have:
``affine-float16`` gives all of them FLOAT16; ``affine-int8`` gives INT8 to widths up to 4, and FLOAT16 to wider ones,
whose codes are so fine that the rounding of a centre to 8 bits would be as coarse; ``codebook-4d`` gives codebooks to
all; ``vectors-1d``, ``vectors-2d`` and ``vectors-4d`` have vectors of so many columns, at one width of up to 4, or of
just 2. Whoever needs to know what decoders consist of asks the kind: the writer and the reader for names, dtypes and
shapes, the quantizer for the nearest values that can be stored, the kernels for what they read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vllm_matquant.checkpoint.affine import Affine as Affine
from vllm_matquant.checkpoint.affine import dequantize as dequantize
from vllm_matquant.checkpoint.affine import middle_code as middle_code
from vllm_matquant.checkpoint.codebook import BLOCK_COLUMNS, CodebookForm
from vllm_matquant.checkpoint.decoder_form import Decoder as Decoder
from vllm_matquant.checkpoint.decoder_form import DecoderForm as DecoderForm
from vllm_matquant.checkpoint.decoder_form import TensorSpec as TensorSpec
from vllm_matquant.checkpoint.decoder_form import join_rows as join_rows
from vllm_matquant.checkpoint.decoder_form import part_name as part_name
from vllm_matquant.checkpoint.multiples import least_steps, multiples
from vllm_matquant.checkpoint.vectors import VectorForm

OffsetsFor = Callable[[torch.Tensor], torch.Tensor]
"""Gives the best offsets for scales, both float32 [out_features, groups]."""

_FINITE = "finite values"
_NOT_NEGATIVE = "finite values from 0 up"
_STEPS = "finite values from 0 up to 2^111"


@dataclass(frozen=True)
class Float16Form(DecoderForm):
    """Scale and offset in float16."""

    name = "float16"

    def parts(self, out_features: int, groups: int, layers: int = 1) -> dict[str, TensorSpec]:
        spec = TensorSpec(torch.float16, (out_features, groups))
        return {"scale": spec, "offset": spec}

    def encode(self, values: Affine, width: int, offsets_for: OffsetsFor | None = None) -> Decoder:
        scale = values.scale.to(torch.float16)
        offset = offsets_for(scale.float()) if offsets_for else values.offset
        return Decoder(self, width, {"scale": scale, "offset": offset.to(torch.float16)})

    def values(self, parts: Mapping[str, torch.Tensor], width: int) -> Affine:
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

    def parts(self, out_features: int, groups: int, layers: int = 1) -> dict[str, TensorSpec]:
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
        return least_steps(reach)

    def scale_multiples(self, scale: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """The nearest multiples of the rows' steps: uint8 [out_features, groups]."""
        return multiples(scale, step[:, :1]).clamp_(0, self.SCALE_LEVELS).to(torch.uint8)

    def centre_multiples(self, centre: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """The nearest multiples of the rows' steps: int8 [out_features, groups]."""
        return multiples(centre, step[:, 1:]).clamp_(-self.CENTRE_LEVELS, self.CENTRE_LEVELS).to(torch.int8)

    def values(self, parts: Mapping[str, torch.Tensor], width: int) -> Affine:
        # Multiples of 8 bits of steps of 8 bits are exact in float32. In double precision the offset is exact, save
        # where one of its terms is so small that it does not show in float32. Rounded to float32 it is thus what a
        # fused multiplication and addition gives.
        step = parts["step"].double()
        scale, centre = parts["scale"] * step[:, :1], parts["centre"] * step[:, 1:]
        return Affine(scale.float(), (centre - middle_code(width) * scale).float())

    def faults(self, parts: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Tensor, str]]:
        step = parts["step"]
        return [("step", ~((step >= 0) & (step <= self.LARGEST_STEP)), _STEPS)]


FLOAT16 = Float16Form()
INT8 = Int8Form()


@dataclass(frozen=True)
class DecoderKind:
    """How a checkpoint stores decoders: a form for each width.

    Attributes:
        name: in config.json.
        format_version: the first version of the format that has this kind.
        forms: of the decoders of each width from 2 up.
        affine: whether decoders are scales and offsets.
        group_multiple: what the columns of a group must be a multiple of.
        one_width: whether codes of one width are no prefix of those of another, so that a checkpoint has one width. No
            kernel reads such decoders: they are there to compare with.
    """

    name: str
    format_version: int
    forms: tuple[DecoderForm, ...]
    affine: bool = True
    group_multiple: int = 1
    one_width: bool = False

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths that it has a form for, ascending."""
        return tuple(range(2, 2 + len(self.forms)))

    def form(self, width: int) -> DecoderForm:
        """How the decoders of a width are stored."""
        return self.forms[width - 2]

    def encode(self, values: Any, width: int, offsets_for: OffsetsFor | None = None) -> Decoder:
        """The decoder of a width that is nearest to ``values``, see :meth:`DecoderForm.encode`."""
        return self.form(width).encode(values, width, offsets_for)


AFFINE_FLOAT16 = DecoderKind("affine-float16", 1, 7 * (FLOAT16,))
AFFINE_INT8 = DecoderKind("affine-int8", 2, 3 * (INT8,) + 4 * (FLOAT16,))  # csrc/decoder.h has it too
CODEBOOK = DecoderKind(
    "codebook-4d", 3, tuple(map(CodebookForm, range(2, 9))), affine=False, group_multiple=BLOCK_COLUMNS
)
KINDS: dict[str, DecoderKind] = {kind.name: kind for kind in (AFFINE_FLOAT16, AFFINE_INT8, CODEBOOK)}
"""The kinds of decoders for nested codes, by their names in config.json."""


def _vectors(name: str, places: int, widest: int) -> DecoderKind:
    forms = tuple(VectorForm(width, places) for width in range(2, widest + 1))
    return DecoderKind(name, 3, forms, affine=False, one_width=True)


VECTORS_1D = _vectors("vectors-1d", 1, 4)
VECTORS_2D = _vectors("vectors-2d", 2, 4)
VECTORS_4D = _vectors("vectors-4d", 4, 2)
VECTOR_KINDS: dict[str, DecoderKind] = {kind.name: kind for kind in (VECTORS_1D, VECTORS_2D, VECTORS_4D)}
"""Those for codes of one width, see :mod:`vllm_matquant.checkpoint.vectors`."""

EVERY_KIND = KINDS | VECTOR_KINDS
"""The kinds of decoders that the format has, by their names in config.json."""

AFFINE_KINDS = tuple(kind for kind in KINDS.values() if kind.affine)
"""Those whose decoders are scales and offsets."""

FORMS: tuple[DecoderForm, ...] = tuple(dict.fromkeys(form for kind in EVERY_KIND.values() for form in kind.forms))
"""The forms that there are."""
