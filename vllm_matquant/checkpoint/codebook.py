"""Codebooks: the two top bits of four columns name one of 64 fours of weights, and the signs of its halves.

Each further bit of a weight's code adds an increment to its size, which depends on the four and on the weight's place
in it. So the code of a width is a prefix of that of every wider one, as it is where each weight has a scale and an
offset, and the planes hold the same bits. A layer has one codebook for each width; a row and group of columns has a
scale.

Of each 16 columns, those that are the same modulo four are a four: where four steps of four columns lie in the bits of
four bytes, as in the tiles that kernels read, each byte is the index of a four.

Fours of weights are about as likely as their mirror images, so that signs for halves save three quarters of a codebook
for 2 or 3 % of the error, and 64 bytes are one register of a processor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import embedding

from vllm_matquant.checkpoint.decoder_form import Decoder, DecoderForm, TensorSpec
from vllm_matquant.checkpoint.multiples import least_steps, multiples

PLACES = 4  # columns whose two top bits are one index
BLOCK_COLUMNS = 16  # so many are four fours: columns 0, 4, 8 and 12, then 1, 5, 9 and 13, and so on
ENTRIES = 64
_SIGNS = torch.tensor([[1, 1, 1, 1], [1, 1, -1, -1], [-1, -1, 1, 1], [-1, -1, -1, -1]], dtype=torch.int8)
WIDEST_WHOLE = 4  # widths up to this one have levels of 8 bits; csrc/decoder.h has it too
COARSE_BITS = 6  # of wider ones so many bits count in whole units too; csrc/decoder.h has it too
FINE = 16  # so many units of what is added to the levels of wider ones are one of the others


def entry_index(codes: torch.Tensor, width: int) -> torch.Tensor:
    """Which entry of the codebook each four of columns has, and with which signs.

    Args:
        codes: uint8 [..., in_features] of ``width`` bits; columns past the last one count as codes of 0.
        width: of the codes.

    Returns:
        int32 [..., fours], below 256: the two top bits of the first column in the lowest bits. Those up to the sixth
        are the number of the entry; the seventh is set where the last two places change their signs, the eighth where
        the first two do.
    """
    first, second, third, last = by_four(codes >> (width - 2)).unbind(-1)
    return (first | second << 2 | third << 4 | last << 6).int()


def by_four(columns: torch.Tensor) -> torch.Tensor:
    """Columns in fours: [..., in_features] to [..., fours, 4]; those past the last one are zeros."""
    padded = torch.nn.functional.pad(columns, (0, -columns.shape[-1] % BLOCK_COLUMNS))
    return padded.unflatten(-1, (-1, PLACES, BLOCK_COLUMNS // PLACES)).transpose(-1, -2).flatten(-3, -2)


def by_column(fours: torch.Tensor, in_features: int) -> torch.Tensor:
    """The inverse of :func:`by_four`: [..., fours, 4] to [..., in_features]."""
    blocks = fours.unflatten(-2, (-1, BLOCK_COLUMNS // PLACES)).transpose(-1, -2)
    return blocks.flatten(-3)[..., :in_features]


def with_signs(entries: torch.Tensor) -> torch.Tensor:
    """What each index of :func:`entry_index` stands for.

    Args:
        entries: floating point [..., 64, 4].

    Returns:
        [..., 256, 4] of the same dtype.
    """
    return (entries.unsqueeze(-3) * signs(entries).unsqueeze(1)).flatten(-3, -2)


def collect_signs(indexed: torch.Tensor) -> torch.Tensor:
    """The transpose of :func:`with_signs`: [..., 256, 4] to sums [..., 64, 4]."""
    return (indexed.unflatten(-2, (-1, ENTRIES)) * signs(indexed).unsqueeze(1)).sum(-3)


def signs(like: torch.Tensor) -> torch.Tensor:
    """The signs of the places, 1 or -1, for each value of the seventh and eighth bit: [4, 4] as ``like`` is stored."""
    return _SIGNS.to(like.device).to(like.dtype)


@dataclass(frozen=True, eq=False)
class Codebook:
    """The decoder of a layer at one width, as numbers: what solvers and trainers work with.

    Attributes:
        levels: floating point [64, 4], the weights of each entry where all further bits are 0, before scaling and
            without the signs that an index has.
        increments: floating point [width - 2, 64, 4], what each further bit of a place adds before the sign, the most
            significant first; none is negative.
        scale: floating point [out_features, groups].
    """

    levels: torch.Tensor
    increments: torch.Tensor
    scale: torch.Tensor

    @property
    def width(self) -> int:
        """Bits of the codes."""
        return 2 + len(self.increments)

    @property
    def groups(self) -> int:
        """Groups of columns."""
        return self.scale.shape[1]

    def to(self, device: torch.device | str) -> Codebook:
        """Copies on another device."""
        return Codebook(self.levels.to(device), self.increments.to(device), self.scale.to(device))

    def unscaled(self, codes: torch.Tensor) -> torch.Tensor:
        """Levels of codes, increments and signs included.

        Args:
            codes: uint8 [out_features, in_features].

        Returns:
            float32 [out_features, in_features].
        """
        index, fours = entry_index(codes, self.width), by_four(codes)
        levels = embedding(index, with_signs(self.levels.float()))
        for bit, increments in enumerate(with_signs(self.increments.float()), start=1):
            levels += embedding(index, increments).mul_(fours >> (len(self.increments) - bit) & 1)
        return by_column(levels, codes.shape[-1])

    def decode(self, codes: torch.Tensor, group_size: int | None = None) -> torch.Tensor:
        """The level of each code times the scale of its row and group, in float32.

        Args:
            codes: uint8 [out_features, in_features], each of ``width`` bits.
            group_size: columns that share a scale, the last group may have fewer; by default in_features / groups.

        Returns:
            float32 [out_features, in_features].

        Raises:
            ValueError: the groups do not cover the columns.
        """
        columns = codes.shape[-1]
        size = columns // self.groups if group_size is None else group_size
        if -(-columns // max(1, size)) != self.groups:
            raise ValueError(f"groups: found {self.groups}, expected {columns} columns / {size}, rounded up")
        scale = self.scale.float().repeat_interleave(size, dim=-1)[..., :columns]
        return self.unscaled(codes).mul_(scale)


@dataclass(frozen=True)
class CodebookForm(DecoderForm):
    """Levels as whole numbers, and scales as multiples, of 8 bits, of a step that a row has.

    The tensor ``codebook`` is uint8 [planes, 64, 4]. At widths up to 4, the first plane has the levels plus 128, each
    of the others the increments of one further bit. Wider ones have levels that are finer than that: their first planes
    are such a level and the increments of the bits up to the sixth, and a level plus 128 and increments of all bits
    follow, which count sixteenths. What is added up for a weight of the former, and of the latter, is from 1 to 255, so
    that a byte holds it, and what 256 less it is, the level of the other sign.

    Attributes:
        width: bits of the codes.
    """

    width: int

    name = "codebook"
    shared = frozenset({"codebook"})
    LARGEST_STEP: ClassVar[float] = 2.0**111  # 255 times 255 such steps are less than 2^127: finite in float32
    LARGEST: ClassVar[int] = 255
    MIDDLE: ClassVar[int] = 128  # the byte of level 0

    @property
    def whole_planes(self) -> int:
        """Planes whose bytes count whole units."""
        return min(self.width, COARSE_BITS) - 1

    @property
    def planes(self) -> int:
        """Bytes that an entry has for each of its places."""
        return self.whole_planes + (self.width - 1 if self.width > WIDEST_WHOLE else 0)

    def parts(self, out_features: int, groups: int, layers: int = 1) -> dict[str, TensorSpec]:
        return {
            "scale": TensorSpec(torch.uint8, (out_features, groups)),
            "step": TensorSpec(torch.bfloat16, (out_features, 1)),
            "codebook": TensorSpec(torch.uint8, (layers * self.planes, ENTRIES, PLACES)),
        }

    def axes(self, part: str) -> tuple[str, ...]:
        return ("plane", "entry", "place") if part == "codebook" else super().axes(part)

    def encode(self, values: Codebook, width: int, offsets_for: None = None) -> Decoder:
        ends = torch.cat([values.levels[None], values.increments]).double().cumsum(0)
        unit = ends.abs().amax() / self.reach
        codebook = self.whole_levels(ends / torch.where(unit > 0, unit, 1.0))
        scale = values.scale.double() * unit
        step = least_steps(scale.amax(1, keepdim=True) / self.LARGEST)
        step = torch.where((scale >= 0).all(1, keepdim=True), step, -1.0)
        codes = multiples(scale, step).clamp_(0, self.LARGEST).to(torch.uint8)
        return Decoder(self, width, {"scale": codes, "step": step, "codebook": codebook})

    @property
    def reach(self) -> int:
        """The largest level, in units; of wide slices the sixteenths take some of what bytes can say."""
        return 127 if self.width <= WIDEST_WHOLE else 120

    def whole_levels(self, ends: torch.Tensor) -> torch.Tensor:
        """The tensor that is nearest to levels.

        Args:
            ends: floating point [width - 1, 64, 4], in units: the levels, and what they become with each further bit,
                the most significant first; at most ``reach`` off 0 and none less than the one before.

        Returns:
            uint8 [planes, 64, 4].
        """
        count, ends = self.whole_planes, ends.nan_to_num().clamp(-self.reach, self.reach)
        if self.planes == count:
            return _differences((ends + self.MIDDLE).round()).to(torch.uint8)
        steps = _differences(((ends + self.MIDDLE) * FINE).round() + self.MIDDLE)
        steps[0] -= 1  # so that what remains of it for the sixteenths is from 1 to 16
        whole = (steps[:count] / FINE).floor()
        rest = torch.cat([steps[:count] - FINE * whole, steps[count:]])
        rest[0] += 1
        return torch.cat([whole, _differences(rest.cumsum(0).clamp_(1, self.LARGEST))]).to(torch.uint8)

    def values(self, parts: Mapping[str, torch.Tensor], width: int) -> Codebook:
        planes, fine = parts["codebook"].float().split([self.whole_planes, self.planes - self.whole_planes])
        if len(fine):
            fine = fine / FINE
            fine[: len(planes)] += planes
            planes = fine
            planes[0] -= self.MIDDLE / FINE
        return Codebook(planes[0] - self.MIDDLE, planes[1:], parts["scale"].float() * parts["step"].float())

    def faults(self, parts: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Tensor, str]]:
        step, split = parts["step"], [self.whole_planes, self.planes - self.whole_planes]
        bad = []
        for planes in parts["codebook"].split(split):
            too_large = planes.sum(0, keepdim=True) > self.LARGEST
            bad.append(too_large.expand_as(planes).clone())
            bad[-1][:1] |= planes[:1] == 0
        return [
            ("step", ~((step >= 0) & (step <= self.LARGEST_STEP)), "finite values from 0 up to 2^111"),
            (
                "codebook",
                torch.cat(bad),
                f"levels from 1 up that with all increments add up to at most {self.LARGEST}",
            ),
        ]


def _differences(ends: torch.Tensor) -> torch.Tensor:
    """The first, and what each is more than the one before; 0 where it is less."""
    ends = ends.cummax(0).values
    return torch.cat([ends[:1], torch.diff(ends, dim=0)])
