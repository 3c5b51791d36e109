"""What a decoder is as it is stored, whatever it consists of: a form, a width and tensors."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from typing_extensions import Self

from vllm_matquant.checkpoint.affine import Affine
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


class Values(Protocol):
    """A decoder as numbers, whatever it consists of."""

    def decode(self, codes: torch.Tensor, group_size: int | None = None) -> torch.Tensor:
        """Weights of codes.

        Args:
            codes: uint8 [out_features, in_features], each of the decoder's width.
            group_size: columns that share a scale, the last group may have fewer; by default in_features / groups.

        Returns:
            float32 [out_features, in_features].
        """

    def to(self, device: torch.device | str) -> Self:
        """Copies on another device."""


@dataclass(frozen=True, eq=False)
class Decoder:
    """The decoder of a layer at one width, as it is stored: what a checkpoint holds and what is served.

    Attributes:
        form: how it is stored.
        width: bits of the codes that it decodes.
        parts: its tensors by the names that the form gives them. Rows of the layer are the first dimension of each, but
            of those that all rows share (:attr:`DecoderForm.shared`).
    """

    form: DecoderForm
    width: int
    parts: Mapping[str, torch.Tensor]

    @cached_property
    def values(self) -> Values:
        """The numbers that the stored tensors mean."""
        return self.form.values(self.parts, self.width)

    @property
    def affine(self) -> Affine:
        """Scale and offset that the stored values mean, float32 [out_features, groups] each.

        Raises:
            TypeError: the decoder is none of an affine kind.
        """
        if not isinstance(self.values, Affine):
            raise TypeError(f"decoder: found the form {self.form.name}, expected one with scales and offsets")
        return self.values

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Weights of ``codes`` (uint8 [out_features, in_features]): float32 [out_features, in_features]."""
        return self.values.decode(codes)

    def __getitem__(self, rows: slice | torch.Tensor) -> Decoder:
        """The decoder of some rows."""
        return self.map_rows(lambda part: part[rows])

    def to(self, device: torch.device | str) -> Decoder:
        """A copy on another device."""
        return self.map(lambda part: part.to(device))

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Decoder:
        """A decoder of the same form and width whose parts are those that ``change`` makes of this one's."""
        return Decoder(self.form, self.width, {name: change(part) for name, part in self.parts.items()})

    def map_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Decoder:
        """As :meth:`map`, with the parts that all rows share as they are."""
        shared = self.form.shared
        return Decoder(
            self.form,
            self.width,
            {name: part if name in shared else change(part) for name, part in self.parts.items()},
        )

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
                at = ", ".join(f"{axis} {index}" for axis, index in zip(self.form.axes(part), place, strict=True))
                found = f"{values[tuple(place)].item()} in {at} (as {values.dtype})"
                raise DecoderValueError(where, f"{layer}.{part_name(part, self.width)}", found, expected)


def part_name(part: str, width: int) -> str:
    """Name, within its layer, of a tensor that the decoders of ``width`` consist of."""
    return f"weight_{part}{width}"


def join_rows(decoders: list[Decoder]) -> Decoder:
    """The decoder whose rows are those of ``decoders``, one after the other; all of one form, width and layer."""
    first = decoders[0]
    parts = {
        name: part if name in first.form.shared else torch.cat([decoder.parts[name] for decoder in decoders])
        for name, part in first.parts.items()
    }
    return Decoder(first.form, first.width, parts)


class DecoderForm(ABC):
    """A way to store a width's decoders: names, dtypes, shapes and validity of their tensors, and what these mean."""

    name: ClassVar[str]  # in messages
    shared: ClassVar[frozenset[str]] = frozenset()  # parts that all rows of a layer share

    @abstractmethod
    def parts(self, out_features: int, groups: int, layers: int = 1) -> dict[str, TensorSpec]:
        """The tensors of one width's decoders.

        Args:
            out_features: rows of all layers.
            groups: groups of columns.
            layers: so many, whose rows and whose shared parts lie one after the other's.
        """

    @abstractmethod
    def encode(self, values: Any, width: int, offsets_for: Any = None) -> Decoder:
        """The decoder of this form that is nearest to ``values``.

        What it stores is no fixed point: to encode the values of a decoder may give another one. Keep the decoder.

        Args:
            values: floating point, of the class that :meth:`values` gives; what no decoder may have, values that are
                not finite and negative scales, gives a decoder that :meth:`Decoder.check` refuses.
            width: bits of the codes.
            offsets_for: where values are scales and offsets, gives the offsets that suit the scales as they are stored,
                to take the place of those in ``values``.
        """

    @abstractmethod
    def values(self, parts: Mapping[str, torch.Tensor], width: int) -> Values:
        """The numbers that stored tensors mean, in float32.

        Args:
            parts: the stored tensors by their part's name.
            width: bits of the codes.
        """

    @abstractmethod
    def faults(self, parts: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Tensor, str]]:
        """What could be wrong with stored values: (part, bool mask of its wrong values, what is expected)."""

    def axes(self, part: str) -> tuple[str, ...]:
        """What the dimensions of a part are called in messages."""
        return ("row", "column")

    def nbytes(self, out_features: int, groups: int, layers: int = 1) -> int:
        """Bytes of one width's decoders of ``layers`` layers, with ``out_features`` rows in all."""
        return sum(spec.nbytes for spec in self.parts(out_features, groups, layers).values())

    def from_tensors(self, tensor: Callable[[str], torch.Tensor], width: int) -> Decoder:
        """A decoder from the tensors of a layer.

        Args:
            tensor: gives the tensor of a name such as ``weight_scale4``.
            width: bits of the codes.
        """
        return Decoder(self, width, {part: tensor(part_name(part, width)) for part in self.parts(1, 1)})
