"""Vectors: the codes of some adjacent columns are together the index of an entry in a codebook, as GPTVQ has it.

The codes of ``places`` adjacent columns, of ``width`` bits each, lie one after the other, the first column's in the
lowest bits: they name one of ``2^(width * places)`` entries, each with a level for every place. What the entries of one
width are has nothing to do with those of another, so a checkpoint has one width (arXiv 2402.15319).

A codebook belongs to a group of columns in a *band*: adjacent rows that share codebooks. How many rows a band has
follows from the shape alone, see :func:`band_rows`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vllm_matquant.checkpoint.decoder_form import Decoder, DecoderForm, TensorSpec
from vllm_matquant.checkpoint.multiples import least_steps, multiples

LEVEL_BITS = 8  # that a level of a codebook is stored in


def entry_count(width: int, places: int) -> int:
    """Entries of a codebook."""
    return int(2 ** (width * places))


def band_rows(out_features: int, entries: int, places: int) -> int:
    """Rows of each band but the last, which may have fewer.

    At least ``places * entries`` where the layer has so many, so that levels of 8 bits take at most ``8 / group_size``
    bits a weight, whatever the width and the number of places: 1/8 with groups of 64 columns. A layer of fewer rows is
    one band, and pays more.

    Args:
        out_features: rows of the layer.
        entries: of a codebook.
        places: columns of a vector.
    """
    bands = max(1, out_features // (places * entries))
    return max(1, -(-out_features // bands))


def band_count(out_features: int, entries: int, places: int) -> int:
    """Bands of a layer of so many rows, see :func:`band_rows`."""
    return max(1, -(-out_features // band_rows(out_features, entries, places)))


def vector_index(codes: torch.Tensor, width: int, places: int) -> torch.Tensor:
    """Which entry each vector has.

    Args:
        codes: uint8 [..., in_features] of ``width`` bits; in_features is a multiple of ``places``.
        width: of the codes.
        places: columns of a vector.

    Returns:
        int64 [..., vectors].
    """
    shifts = width * torch.arange(places, device=codes.device)
    return (codes.unflatten(-1, (-1, places)).long() << shifts).sum(-1)


def vector_codes(index: torch.Tensor, width: int, places: int) -> torch.Tensor:
    """The codes that :func:`vector_index` makes ``index`` (integers [..., vectors]) of: uint8 [..., in_features]."""
    shifts = width * torch.arange(places, device=index.device)
    return (index.unsqueeze(-1) >> shifts & (2**width - 1)).flatten(-2).to(torch.uint8)


@dataclass(frozen=True, eq=False)
class VectorBooks:
    """The codebooks of a layer, as numbers: what solvers work with.

    Attributes:
        levels: floating point [bands, groups, entries, places].
    """

    levels: torch.Tensor

    @property
    def places(self) -> int:
        """Columns of a vector."""
        return self.levels.shape[3]

    @property
    def entries(self) -> int:
        """Entries of a codebook."""
        return self.levels.shape[2]

    @property
    def width(self) -> int:
        """Bits of the codes."""
        return (self.entries.bit_length() - 1) // self.places

    def to(self, device: torch.device | str) -> VectorBooks:
        """A copy on another device."""
        return VectorBooks(self.levels.to(device))

    def rows(self, out_features: int) -> torch.Tensor:
        """The band of each row of a layer: int64 [out_features].

        Raises:
            ValueError: a layer of so many rows has another number of bands; codebooks are of all its rows.
        """
        bands = band_count(out_features, self.entries, self.places)
        if bands != len(self.levels):
            raise ValueError(f"bands: found {len(self.levels)}, expected {bands} for all of {out_features} rows")
        each = band_rows(out_features, self.entries, self.places)
        return torch.arange(out_features, device=self.levels.device) // each

    def places_of(self, index: torch.Tensor, group_size: int) -> torch.Tensor:
        """Where the entry of each vector lies among all entries of the layer, counted band by band, group by group.

        Args:
            index: int64 [out_features, vectors], see :func:`vector_index`.
            group_size: columns of a group.

        Returns:
            int64 [out_features, vectors].
        """
        groups = torch.arange(index.shape[1], device=index.device) // (group_size // self.places)
        books = self.rows(len(index)).unsqueeze(1) * self.levels.shape[1] + groups
        return books * self.entries + index

    def decode(self, codes: torch.Tensor, group_size: int | None = None) -> torch.Tensor:
        """The levels of the entries that codes name, in float32.

        Args:
            codes: uint8 [out_features, in_features] of all rows, each of ``width`` bits.
            group_size: columns that share a codebook; by default in_features / groups.

        Returns:
            float32 [out_features, in_features].

        Raises:
            ValueError: the groups do not cover the columns, or the bands not the rows.
        """
        groups, columns = self.levels.shape[1], codes.shape[1]
        size = columns // groups if group_size is None else group_size
        if size % self.places or -(-columns // max(1, size)) != groups:
            raise ValueError(f"groups: found {groups}, expected {columns} columns / {size}, rounded up")
        where = self.places_of(vector_index(codes, self.width, self.places), size)
        return self.levels.float().flatten(0, 2)[where].flatten(1)


@dataclass(frozen=True)
class VectorForm(DecoderForm):
    """Levels as whole numbers of 8 bits, of which a codebook has a scale: a multiple of a step that a band has.

    Attributes:
        width: bits of the codes.
        places: columns of a vector.
    """

    width: int
    places: int

    LARGEST_STEP: ClassVar[float] = 2.0**111  # 255 times 128 such steps are less than 2^127: finite in float32
    LARGEST: ClassVar[int] = 127

    name = "vectors"
    shared = frozenset({"scale", "step", "codebook"})

    @property
    def entries(self) -> int:
        """Entries of a codebook."""
        return entry_count(self.width, self.places)

    def parts(self, out_features: int, groups: int, layers: int = 1) -> dict[str, TensorSpec]:
        # Several layers are only where some are computed as one, and no kernel computes with vectors.
        bands = band_count(out_features, self.entries, self.places)
        return {
            "scale": TensorSpec(torch.uint8, (bands, groups)),
            "step": TensorSpec(torch.bfloat16, (bands, 1)),
            "codebook": TensorSpec(torch.int8, (bands, groups, self.entries, self.places)),
        }

    def codebook_bits(self, out_features: int, groups: int) -> int:
        """Bits of the codebooks' levels, all that GPTVQ counts of a decoder (its section 3.2)."""
        return LEVEL_BITS * math.prod(self.parts(out_features, groups)["codebook"].shape)

    def axes(self, part: str) -> tuple[str, ...]:
        return ("band", "group", "entry", "place") if part == "codebook" else ("band", "column")

    def encode(self, values: VectorBooks, width: int, offsets_for: Any = None) -> Decoder:
        levels = values.levels.double()
        wanted = levels.abs().amax((2, 3)) / self.LARGEST  # a scale that reaches the largest level of each codebook
        step = least_steps(wanted.amax(1, keepdim=True) / 255)
        scale = (wanted / torch.where(step > 0, step.double(), 1.0)).nan_to_num_().ceil_().clamp_(0, 255)
        codebook = multiples(levels, (scale * step)[..., None, None]).clamp_(-self.LARGEST, self.LARGEST)
        return Decoder(self, width, {"scale": scale.to(torch.uint8), "step": step, "codebook": codebook.to(torch.int8)})

    def values(self, parts: Mapping[str, torch.Tensor], width: int) -> VectorBooks:
        scale = parts["scale"].float() * parts["step"].float()
        return VectorBooks(parts["codebook"].float() * scale[..., None, None])

    def faults(self, parts: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Tensor, str]]:
        step = parts["step"]
        return [("step", ~((step >= 0) & (step <= self.LARGEST_STEP)), "finite values from 0 up to 2^111")]
