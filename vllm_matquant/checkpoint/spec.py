"""The checkpoint format: what a layer consists of, in which shards it lies, and how many bytes it takes.

A quantized linear layer ``L`` with ``out_features`` rows and ``in_features`` columns is stored as below; so is a
quantized embedding, with a row for each token.

=====================  =======  =====================================  ==========================================
tensor                 dtype    shape                                  content
=====================  =======  =====================================  ==========================================
``L.weight_base``      uint8    [out_features, in_features / 4]        the two most significant bits of each code
``L.weight_plane{r}``  uint8    [out_features, in_features / 8]        the bit that lifts width r - 1 to width r
and of each width r its decoder, see :mod:`vllm_matquant.checkpoint.decoder`
=================================================================================================================

Codes are packed along the input dimension, first column in the least significant bits of the first byte; in_features
is a multiple of 8. With the slicing semantic "truncate" the r-bit code of a weight is ``t = q >> (8 - r)``, which the
decoder of width r makes a weight. With "round" (MatQuant, eq. 6) the r-bit code is the parent rounded to r bits and
clamped, so it also needs the plane r + 1; with "round-extra" it is not clamped. What lifts the checkpoint to width r
(plane and decoder) lies in shards of its own; every tensor that is not quantized lies in the shards of width 2 with the
base.

A recipe, which gives each layer its width, may have decoders of its own: ``recipes/NAME.safetensors`` holds, of each
layer, the decoder of its width under the names above, and they take the place of those in the shards.

A layer may have widths of its own. Where the model is served at a width that the layer does not have, the layer is
served at its next wider one, or else at its widest; what that needs then lies in the shards that the model's width
reads.

The format has three versions: in version 1 all decoders are of the kind ``affine-float16``; later ones name their kind,
which in version 3 may be ``codebook-4d`` or one of those with vectors.
A checkpoint is written in the lowest version that can say what it is, and every version is read for ever.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from vllm_matquant.checkpoint.decoder import AFFINE_INT8, DecoderKind, TensorSpec, part_name
from vllm_matquant.checkpoint.errors import ConfigError, WidthError
from vllm_matquant.checkpoint.names import WEIGHT_BASE, plane_name
from vllm_matquant.checkpoint.slicing import PARENT_BITS as PARENT_BITS
from vllm_matquant.checkpoint.slicing import SLICE_RULES, SliceRule
from vllm_matquant.checkpoint.slicing import Slicing as Slicing

QUANT_METHOD = "matquant"
BASE_BITS = 2
WIDTHS = tuple(range(BASE_BITS, PARENT_BITS + 1))
GROUP_SIZES = (128, 64, 32)  # largest first: the order in which "auto" tries them

CODE_DTYPE = torch.uint8
UNQUANTIZED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

GroupSize = int | Literal["auto", "channel"]


def served_width(widths: Sequence[int], width: int) -> int:
    """Which of a layer's ``widths``, ascending, serves where the model is at ``width``: the next wider, or the last."""
    return next((own for own in widths if own >= width), widths[-1])


@dataclass(frozen=True)
class Format:
    """The ``quantization_config`` of a checkpoint: everything that its tensors' names and shapes follow from.

    Attributes:
        widths: widths that the model is served at, ascending, each in 2..8.
        group_size: columns that share a decoder; "channel" for one group per row; "auto" for the largest of 128, 64, 32
            that divides the layer's in_features.
        ignored_layers: full names of linear layers that are not quantized, as in the source checkpoint.
        slicing: name of the slice rule: "truncate" (native), "round" (MatQuant's semantic) or "round-extra" (the
            same without its clamp, to be measured and not served).
        quantized_embeddings: full name of the input embedding, if it is quantized. An output head that is tied to it is
            quantized exactly if the embedding is, and has no tensors of its own.
        layer_group_sizes: what takes the place of ``group_size`` in single layers, by their full names.
        layer_widths: what takes the place of ``widths`` in single layers, by their full names; each serves some of
            ``widths``.
        recipes: files of the checkpoint's recipes, see :mod:`vllm_matquant.checkpoint.recipe`.
        decoder_kind: how decoders are stored.
    """

    widths: tuple[int, ...] = WIDTHS
    group_size: GroupSize = "auto"
    ignored_layers: tuple[str, ...] = ("lm_head",)
    slicing: Slicing = "truncate"
    quantized_embeddings: tuple[str, ...] = ()
    layer_group_sizes: Mapping[str, GroupSize] = field(default_factory=dict, hash=False)
    layer_widths: Mapping[str, tuple[int, ...]] = field(default_factory=dict, hash=False)
    recipes: tuple[str, ...] = ()
    decoder_kind: DecoderKind = AFFINE_INT8

    @property
    def max_width(self) -> int:
        return self.widths[-1]

    @property
    def slice_rule(self) -> SliceRule:
        """How codes are cut to a width."""
        return SLICE_RULES[self.slicing]

    def stored_width(self, width: int) -> int:
        """How many bits of each code must be read to make the ``width``-bit slice."""
        return self.slice_rule.stored_width(width)

    def widths_of(self, layer: str) -> tuple[int, ...]:
        """The widths that a layer has decoders of, ascending."""
        return self.layer_widths.get(layer, self.widths)

    def width_of(self, layer: str, width: int) -> int:
        """The width that a layer is served at where the model is at ``width``."""
        return served_width(self.widths_of(layer), width)

    def planes_of(self, layer: str) -> tuple[int, ...]:
        """The planes that are stored of a layer: none past those that its widest slice reads."""
        return tuple(range(BASE_BITS + 1, self.stored_width(self.widths_of(layer)[-1]) + 1))

    def check_width(self, width: int, where: Path | str, field: str = "bits") -> None:
        """Refuse a width that the model is not served at.

        Args:
            width: asked for.
            where, field: what to name in an error.

        Raises:
            WidthError: the checkpoint does not offer it.
        """
        if width not in self.widths:
            raise WidthError(where, field, width, f"one of the offered widths {list(self.widths)}")

    def group_size_setting(self, layer: str) -> GroupSize:
        """``group_size``, or what takes its place in this layer."""
        return self.layer_group_sizes.get(layer, self.group_size)

    def group_size_of(self, in_features: int, layer: str, where: Path | str = "group size") -> int:
        """Columns per group in a layer of ``in_features`` columns.

        Raises:
            ConfigError: no such group size divides ``in_features``; the message lists those that would.
        """
        unit = max(8, self.decoder_kind.group_multiple)
        if in_features % unit:
            raise ConfigError(where, f"in_features of {layer}", in_features, f"a multiple of {unit} (ignore the layer)")
        setting = self.group_size_setting(layer)
        if setting == "channel":
            return in_features
        sizes = GROUP_SIZES if setting == "auto" else (setting,)
        for size in sizes:
            if in_features % size == 0 and size % unit == 0:
                return size
        fitting = [size for size in range(unit, min(in_features, GROUP_SIZES[0] + 1), unit) if in_features % size == 0]
        raise ConfigError(
            where,
            f"group_size for {layer}",
            setting,
            f"a divisor of its {in_features} input features"
            + (f" and multiple of {unit}: " if unit > 8 else ": ")
            + ", ".join(map(str, [*fitting, '"channel"'])),
        )

    def tensors_of_layer(
        self, out_features: int, in_features: int, layer: str = "", layers: int = 1
    ) -> dict[int, dict[str, TensorSpec]]:
        """The tensors of one layer by the shards they lie in: ``{shard width: {tensor suffix: spec}}``.

        The decoder of width r lies with the plane of width r, or with what the first width that reads it adds.

        Args:
            out_features: its rows.
            in_features: its columns.
            layer: its full name.
            layers: of so many layers with ``out_features`` rows in all, the tensors of each after those of the other.
        """
        groups = in_features // self.group_size_of(in_features, layer)
        plane = TensorSpec(CODE_DTYPE, (out_features, in_features // 8))
        stored: defaultdict[int, dict[str, TensorSpec]] = defaultdict(dict)
        stored[BASE_BITS][WEIGHT_BASE] = TensorSpec(CODE_DTYPE, (out_features, in_features // 4))
        planes, decoders = BASE_BITS, 0  # how far they are placed
        for width in self.widths:
            own = self.width_of(layer, width)
            while planes < self.stored_width(own):
                planes += 1
                stored[min(planes, self.stored_width(width))][plane_name(planes)] = plane
            if decoders < own:
                decoders = own
                decoder = self.decoder_kind.form(own).parts(out_features, groups, layers)
                stored[min(own, width)] |= {part_name(part, own): spec for part, spec in decoder.items()}
        return dict(stored)

    def resident_bytes(self, out_features: int, in_features: int, width: int, layer: str = "", layers: int = 1) -> int:
        """Bytes of one layer where the model is at ``width``: the codes of its slice, and that slice's decoder.

        Args:
            out_features, in_features, layer, layers: see :meth:`tensors_of_layer`.
            width: of the model.
        """
        groups = in_features // self.group_size_of(in_features, layer)
        own = self.width_of(layer, width)
        codes = out_features * (in_features // 4 + (own - BASE_BITS) * in_features // 8)
        return codes + self.decoder_kind.form(own).nbytes(out_features, groups, layers)
