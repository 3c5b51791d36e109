"""The layout of codes and decoders in the CPU's memory, which the reference reads on every device.

A tile is 16 rows (outputs) by 32 columns (inputs) of weights, taken as 8 steps of 4 columns. A byte of a tile belongs
to one row and to one column of each step: byte ``row * 4 + column % 4``. A plane of a tile is 64 bytes, whose bit
``step`` is that of step 0..7; the base field is twice 64 bytes of 2-bit fields, the first with steps 0..3, the second
with 4..7. Each partition of a fused layer (q, k, v; gate, up) is padded to whole tiles of its own, so that each can
have its own active width.

Two planes in a pair are stored as the base field is, for a core reads few streams faster than many. There are two
layouts: in ``cpu-pairs`` all planes lie in pairs (but the last of an odd number), in ``cpu-planes`` only the first two,
so that every width can be read.

========  =====================================  =====================================================
tensor    dtype, shape                           order
========  =====================================  =====================================================
planes    uint8 [resident width, tile rows,      most significant plane first; the memory of two in a
          tile columns, 64]                      pair, as the first two always are, is [tile rows,
                                                 tile columns, 2, 64]
decoders  uint8 [bytes]                          those of each width, one after the other: in float16
                                                 float16 [tile rows, groups, 2, 16], scale and offset
                                                 of the 16 rows of a tile; in int8 of each row of
                                                 tiles bfloat16 [2, 16], the steps of scales and of
                                                 centres, then for each group uint8 [16], the scales'
                                                 multiples, and int8 [16], the centres'; codebooks:
                                                 that of each partition, then of each row of tiles
                                                 bfloat16 [16], the steps, and for each group uint8
                                                 [16], the scales' multiples
========  =====================================  =====================================================
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_matquant.checkpoint.codebook import CodebookForm
from vllm_matquant.checkpoint.decoder import FLOAT16, INT8, Decoder, DecoderForm
from vllm_matquant.checkpoint.spec import BASE_BITS
from vllm_matquant.kernels import ops
from vllm_matquant.kernels.layout import ceil_div, pack_shared, pad_to_tiles, tile_count
from vllm_matquant.kernels.memory import WeightMemory

TILE_ROWS = 16
TILE_COLUMNS = 32
STEP_COLUMNS = 4
TILE_STEPS = TILE_COLUMNS // STEP_COLUMNS
PLANE_BYTES = TILE_ROWS * STEP_COLUMNS  # of a tile
STEP_BYTES = 4 * TILE_ROWS  # of two bfloat16 steps for each row of a tile

_memory = WeightMemory()  # of all weights on the CPU


@dataclass(frozen=True)
class CpuLayout:
    """One of the two layouts.

    Attributes:
        name: what the library calls it.
        paired: whether planes past the base field lie in pairs too.
    """

    name: str
    paired: bool
    packs_on_cpu = True

    def pack_planes(
        self, base: torch.Tensor, planes: Sequence[torch.Tensor], output_sizes: Sequence[int]
    ) -> torch.Tensor:
        """Codes as on disk to planes as in memory.

        Args:
            base: uint8 [sum(output_sizes), ceil(in_features/4)], the two most significant bits of each code.
            planes: for each further bit uint8 [sum(output_sizes), ceil(in_features/8)].
            output_sizes: rows of each partition.

        Returns:
            uint8 [2 + len(planes), tile rows, tile columns, 64].

        Raises:
            RuntimeError: an argument contradicts another.
        """
        shape = planes_shape(BASE_BITS + len(planes), output_sizes, STEP_COLUMNS * base.shape[-1])
        result = _memory.take(shape, torch.uint8)
        ops.repack_codes(base, planes, output_sizes, self.name, result)
        return result

    def pack_decoders(self, decoders: Sequence[Decoder], output_sizes: Sequence[int]) -> torch.Tensor:
        """Decoders as on disk to decoders as in memory.

        Args:
            decoders: of the resident widths, with sum(output_sizes) rows.
            output_sizes: rows of each partition.

        Returns:
            uint8 [bytes], as this module's table says.
        """
        packed = [part for each in decoders for part in (pack_shared(each), pack_decoder(each, output_sizes))]
        return _memory.copy(torch.cat([part.flatten() for part in packed]))


PAIRS = CpuLayout("cpu-pairs", True)
PLANES = CpuLayout("cpu-planes", False)


def choose_layout(resident: Sequence[tuple[int, Sequence[int]]]) -> CpuLayout:
    """The fastest layout that serves all widths of a weight: pairs, unless a width parts one.

    Args:
        resident: for each segment its resident width and the widths that have decoders.
    """
    parted = any(width < most and width % 2 for most, widths in resident for width in widths)
    return PLANES if parted else PAIRS


def planes_shape(resident_width: int, output_sizes: Sequence[int], in_features: int) -> tuple[int, int, int, int]:
    """Shape of the planes tensor (uint8)."""
    return resident_width, tile_count(output_sizes, TILE_ROWS), ceil_div(in_features, TILE_COLUMNS), PLANE_BYTES


def strip_padding(tiles: torch.Tensor, output_sizes: Sequence[int]) -> torch.Tensor:
    """Put the rows of tiles [tiles, 16, ...] back together, without those that pad: [sum(output_sizes), ...]."""
    parts = tiles.split([ceil_div(size, TILE_ROWS) for size in output_sizes])
    return torch.cat([part.flatten(0, 1)[:size] for part, size in zip(parts, output_sizes, strict=True)])


def pack_decoder(decoder: Decoder, output_sizes: Sequence[int]) -> torch.Tensor:
    """What each row has of the decoders of one width: uint8 [tile rows, bytes of a row of tiles].

    Raises:
        ValueError: the layout has nothing for the form of the decoder.
    """
    if decoder.form == FLOAT16:
        pairs = torch.stack([decoder.parts["scale"], decoder.parts["offset"]], -1)
        packed = pad_to_tiles(pairs, output_sizes, TILE_ROWS).permute(0, 2, 3, 1).flatten(1)
        return packed.contiguous().view(torch.uint8)
    if decoder.form == INT8:
        codes = torch.stack([decoder.parts["scale"], decoder.parts["centre"].view(torch.uint8)], -1)
        codes = pad_to_tiles(codes, output_sizes, TILE_ROWS).permute(0, 2, 3, 1).flatten(1)
        steps = pad_to_tiles(decoder.parts["step"], output_sizes, TILE_ROWS).transpose(1, 2).flatten(1)
        return torch.cat([steps.contiguous().view(torch.uint8), codes], 1)
    if isinstance(decoder.form, CodebookForm):
        codes = pad_to_tiles(decoder.parts["scale"], output_sizes, TILE_ROWS).transpose(1, 2).flatten(1)
        steps = pad_to_tiles(decoder.parts["step"], output_sizes, TILE_ROWS).flatten(1)
        return torch.cat([steps.contiguous().view(torch.uint8), codes], 1)
    raise ValueError(f"decoder: found the form {decoder.form.name}, expected float16, int8 or codebook")


def unpack_decoder(form: DecoderForm, packed: torch.Tensor) -> dict[str, torch.Tensor]:
    """The stored parts of decoders of some rows of tiles, as their form names them.

    Args:
        form: of the decoders.
        packed: uint8 [tile rows, bytes of a row of tiles], of one width.

    Returns:
        Parts [tile rows, 16, groups] or, for steps, [tile rows, 16, 2 or 1]; those that rows share are not among them.
    """
    if isinstance(form, CodebookForm):
        steps = packed[:, : 2 * TILE_ROWS].contiguous().view(torch.bfloat16).unsqueeze(2)
        return {"scale": packed[:, 2 * TILE_ROWS :].unflatten(1, (-1, TILE_ROWS)).transpose(1, 2), "step": steps}
    if form == FLOAT16:
        scale, offset = packed.view(torch.float16).unflatten(1, (-1, 2, TILE_ROWS)).permute(2, 0, 3, 1)
        return {"scale": scale, "offset": offset}
    steps = packed[:, :STEP_BYTES].contiguous().view(torch.bfloat16).unflatten(1, (2, TILE_ROWS))
    scale, centre = packed[:, STEP_BYTES:].unflatten(1, (-1, 2, TILE_ROWS)).permute(2, 0, 3, 1)
    return {"scale": scale, "centre": centre.contiguous().view(torch.int8), "step": steps.transpose(1, 2)}


def split_planes(planes: torch.Tensor, paired: bool) -> list[torch.Tensor]:
    """The fields of a planes tensor or of its first planes, most significant first.

    Args:
        planes: uint8 [width, tile rows, tile columns, 64], contiguous.
        paired: whether planes past the base field lie in pairs too.

    Returns:
        For each pair uint8 [tile rows, tile columns, 2, 64], for each single plane [tile rows, tile columns, 1, 64];
        all views.
    """
    width = len(planes)
    pairs = 2 * (width // 2) if paired else BASE_BITS
    starts = [*range(0, pairs, 2), *range(pairs, width), width]
    return [planes[begin:end].view(*planes.shape[1:3], -1, PLANE_BYTES) for begin, end in itertools.pairwise(starts)]


def unpack_steps(fields: Sequence[torch.Tensor]) -> torch.Tensor:
    """The codes of tiles, or of some of their bytes.

    Args:
        fields: for each pair of planes uint8 [..., 2, bytes], for each single plane [..., 1, bytes].

    Returns:
        uint8 [..., 8 steps, bytes].
    """
    codes = torch.zeros((), dtype=torch.uint8, device=fields[0].device)
    for field in fields:
        bits = field.shape[-2]
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=field.device).unsqueeze(-1)
        values = (field.unsqueeze(-2) >> shifts) & (2**bits - 1)  # [..., bits, 8 / bits, bytes]
        codes = (codes << bits) | values.flatten(-3, -2)
    return codes


def unpack_tiles(fields: Sequence[torch.Tensor], in_features: int) -> torch.Tensor:
    """The codes of rows of tiles.

    Args:
        fields: as :func:`split_planes` returns them, or those of some rows of tiles.
        in_features: columns.

    Returns:
        uint8 [tile rows, 16, in_features].
    """
    steps = unpack_steps(fields).flatten(1, 2)  # [tile rows, steps, 64]
    return steps.unflatten(-1, (TILE_ROWS, STEP_COLUMNS)).transpose(1, 2).flatten(2)[..., :in_features]
