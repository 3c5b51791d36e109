"""The layout of codes and decoders in a GPU's memory; csrc/cuda/tile.cuh and dequantize.cuh say why it is so.

A tile is 64 rows by 64 columns, held by the 32 lanes of a warp: lane ``4 g + t`` has rows ``16 i + 8 h + g`` (row tile
i, half h) and columns ``8 t .. 8 t + 7`` and ``32 + 8 t .. 32 + 8 t + 7``, its k = 0..15, or with codebooks columns
``16 t .. 16 t + 15``, four whole fours. Each part of a fused layer is padded to whole tiles of its own, columns to
whole tiles.

=========  =======  ============================================  ==================================================
tensor     dtype    shape                                         order
=========  =======  ============================================  ==================================================
planes     uint8    [tile rows, tile columns, resident width,     most significant plane first; the first two are one,
                    512]                                          the base field: [2 (i / 2), 32 lanes, 2 (i % 2),
                                                                  2 (h)] words of 32 bits; a plane is [32 lanes, 4 (i)]
                                                                  words
decoders   uint8    [bytes]                                       those of each width, one after the other, of each
                                                                  row of tiles; in float16 float16 [groups, 8, 2, 8]:
                                                                  row g; scale, offset; 2 i + h; in int8 steps,
                                                                  bfloat16 [8 (g), 8 (2 i + h), 2]: of scale, of
                                                                  centre; then for each group [8, 2, 8]: row g; the
                                                                  multiples: of scale, of centre + 128; 2 i + h;
                                                              codebooks: that of each partition, then of each row of
                                                              tiles steps, bfloat16 [8 (g), 8 (2 i + h)], and for each
                                                              group [8, 8]: the scales' multiples
=========  =======  ============================================  ==================================================

A word of the base field has a row's 16 columns as 2-bit fields. With f = (1, 3, 5, 7, 2, 4, 6, 0)[k / 2], column k's is
in the half k % 2 of the word (the other one for f = 0), at its bits 2 f and 2 f + 1. Planes 2 and 3, 4 and 5, 6 and 7
make two words like it, h = 0, 1, with the bits of the first of the two planes in the upper bits: of the word h = 0 the
upper bits are those of the first plane's word, the lower bits those of the second one's. The word h = 1 is turned
right by one bit first, so that its bits fill the places left. These words are turned right by two, four and six bits
more, so that the bits of a code follow each other.

With codebooks column k = 4 p + j is place p of four j. Its field in a base word is ``4 j + p``, so that the index of
four j is byte j. In the words of planes, which are not turned any further, places 0, 2, 1 and 3 follow each other.

A lane reads the decoders of its 8 rows in one run: 32 bytes of a group in float16, 16 in int8. So 16 lanes, or 8, copy
a group's to shared memory, 16 bytes each, side by side.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from vllm_matquant.checkpoint.codebook import CodebookForm
from vllm_matquant.checkpoint.decoder import FLOAT16, INT8, Affine, Decoder, DecoderForm, DecoderKind, dequantize
from vllm_matquant.checkpoint.spec import BASE_BITS
from vllm_matquant.kernels.layout import ceil_div, pack_shared, pad_to_tiles, tile_count, unpack_shared
from vllm_matquant.kernels.weight import PackedWeight, StoredSegment

TILE_ROWS = 64
TILE_COLUMNS = 64
PLANE_BYTES = TILE_ROWS * TILE_COLUMNS // 8  # of a tile
STEP_BYTES = 2 * TILE_ROWS * 2  # of the steps of a row of tiles: two for each row, bfloat16
CENTRE_BIAS = 128  # what bytes with a sign are more in memory: their first bit is the other one
FIELDS = (1, 3, 5, 7, 2, 4, 6, 0)  # of the pairs of a lane's columns
REPACKED_ROWS = 1024  # at a time: while they are taken apart into bits, codes take several times their bytes


def place_of(k: int) -> int:
    """Where the lower bit of a column's field is in a word of the base field."""
    field = FIELDS[k // 2]
    half = k % 2 if field else 1 - k % 2
    return 16 * half + 2 * field


@dataclass(frozen=True)
class CodeOrder:
    """Where the bits of a lane's columns are.

    Attributes:
        runs: of columns next to each other that a lane has.
        base: for each column the place of its field's lower bit in a word of the base field.
        further: the same in the words that two planes make.
        turn: by how many bits more the words of planes are turned right, for each two planes.
    """

    runs: int
    base: tuple[int, ...]
    further: tuple[int, ...]
    turn: int


def _place_in_fours(k: int, in_base: bool) -> int:
    place, four = divmod(k, 4)
    return 2 * (4 * four + (place if in_base else place // 2 + 2 * (place % 2)))


_PLACES = tuple(place_of(k) for k in range(16))
AFFINE_ORDER = CodeOrder(2, _PLACES, _PLACES, 2)
FOURS_ORDER = CodeOrder(
    1, tuple(_place_in_fours(k, True) for k in range(16)), tuple(_place_in_fours(k, False) for k in range(16)), 0
)


def planes_shape(resident_width: int, output_sizes: Sequence[int], in_features: int) -> tuple[int, int, int, int]:
    """Shape of the planes tensor (uint8)."""
    return tile_count(output_sizes, TILE_ROWS), ceil_div(in_features, TILE_COLUMNS), resident_width, PLANE_BYTES


def pack_codes(
    codes: torch.Tensor, width: int, output_sizes: Sequence[int], order: CodeOrder = AFFINE_ORDER
) -> torch.Tensor:
    """Codes to the planes that kernels read.

    Args:
        codes: uint8 [sum(output_sizes), in_features], of ``width`` bits.
        width: the resident width.
        output_sizes: rows of each partition.
        order: of their bits.

    Returns:
        uint8 [tile rows, tile columns, width, 512], on the device of ``codes``.
    """
    tile_columns = ceil_div(codes.shape[1], TILE_COLUMNS)
    padded = torch.nn.functional.pad(codes, (0, tile_columns * TILE_COLUMNS - codes.shape[1]))
    tiles = pad_to_tiles(padded, output_sizes, TILE_ROWS)
    # [tile rows, i, h, g, tile columns, runs, t, 16 / runs] -> [tile rows, tile columns, g, t, i, h, k]
    tiles = tiles.view(len(tiles), 4, 2, 8, tile_columns, order.runs, 4, -1).permute(0, 4, 3, 6, 1, 2, 5, 7).flatten(-2)

    def words(bit: int, places: Sequence[int]) -> torch.Tensor:
        """Of one bit of each code: int64 [tile rows, tile columns, g, t, i, h], at the lower bits of the fields."""
        result = torch.zeros(tiles.shape[:-1], dtype=torch.int64, device=codes.device)
        for k, place in enumerate(places):
            result |= (tiles[..., k] >> bit & 1).long() << place
        return result

    def turn_right(word: torch.Tensor, bits: int) -> torch.Tensor:
        return (word >> bits | word << (32 - bits)) & 0xFFFFFFFF

    def to_bytes(word: torch.Tensor) -> torch.Tensor:
        """[tile rows, tile columns, ...] to [tile rows, tile columns, bytes], little end first."""
        parts = [(word >> shift & 0xFF).to(torch.uint8) for shift in (0, 8, 16, 24)]
        return torch.stack(parts, -1).flatten(2)

    base = words(width - 1, order.base) << 1 | words(width - 2, order.base)
    base = base.flatten(2, 3).unflatten(3, (2, 2)).transpose(2, 3)  # [..., i / 2, lane, i % 2, h]
    result = [to_bytes(base)]
    for plane in range(BASE_BITS, width):
        word = words(width - 1 - plane, order.further) << (1 if plane % 2 == 0 else 0)
        word = turn_right(word, plane // 2 * order.turn)
        result.append(to_bytes(word[..., 0] | turn_right(word[..., 1], 1)))
    return torch.cat(result, -1).view(planes_shape(width, output_sizes, codes.shape[1]))


def pack_decoders(decoders: Sequence[Decoder], output_sizes: Sequence[int]) -> torch.Tensor:
    """Decoders as stored to the decoders that kernels read.

    Args:
        decoders: for each decoder width that of all rows.
        output_sizes: rows of each partition.

    Returns:
        uint8 [bytes], as this module's table says.
    """
    packed = [part for each in decoders for part in (pack_shared(each), _pack_rows(each, output_sizes))]
    return torch.cat([part.flatten() for part in packed])


def _pack_rows(decoder: Decoder, output_sizes: Sequence[int]) -> torch.Tensor:
    """What each row has of the decoders of one width: uint8 [tile rows, bytes of a row of tiles]."""
    if isinstance(decoder.form, CodebookForm):
        return _pack_scales(decoder.parts, output_sizes)
    return _PACK[decoder.form](decoder.parts, output_sizes)


def _in_lanes(values: torch.Tensor, output_sizes: Sequence[int]) -> torch.Tensor:
    """[rows, groups, n] to [tile rows, groups, 8 (g), n, 8 (2 i + h)]."""
    tiles = pad_to_tiles(values, output_sizes, TILE_ROWS)
    return tiles.unflatten(1, (8, 8)).permute(0, 3, 2, 4, 1)


def _pack_float16(parts: Mapping[str, torch.Tensor], output_sizes: Sequence[int]) -> torch.Tensor:
    return _in_lanes(torch.stack([parts["scale"], parts["offset"]], -1), output_sizes).flatten(1).view(torch.uint8)


def _pack_int8(parts: Mapping[str, torch.Tensor], output_sizes: Sequence[int]) -> torch.Tensor:
    multiples = torch.stack([parts["scale"], parts["centre"].view(torch.uint8) ^ CENTRE_BIAS], -1)
    steps = _in_lanes(parts["step"].unsqueeze(1), output_sizes).transpose(3, 4).flatten(1)
    return torch.cat([steps.view(torch.uint8), _in_lanes(multiples, output_sizes).flatten(1)], 1)


def _pack_scales(parts: Mapping[str, torch.Tensor], output_sizes: Sequence[int]) -> torch.Tensor:
    steps = _in_lanes(parts["step"].unsqueeze(1), output_sizes).flatten(1)
    return torch.cat([steps.view(torch.uint8), _in_lanes(parts["scale"].unsqueeze(-1), output_sizes).flatten(1)], 1)


_PACK = {FLOAT16: _pack_float16, INT8: _pack_int8}


def _decoder_of_rows(packed: torch.Tensor, form: DecoderForm, rows: torch.Tensor, width: int) -> Affine:
    """Scale and offset, float32 [len(rows), groups] each, of rows of a layer with one partition.

    Args:
        packed: uint8 [tile rows, bytes of a row of tiles], of one width.
        form: of the decoders.
        rows: int64 [n].
        width: bits of the codes.
    """
    tile, g, place = rows // TILE_ROWS, rows % 8, rows % TILE_ROWS // 8
    if form == FLOAT16:
        scale, offset = packed.view(torch.float16).unflatten(-1, (-1, 8, 2, 8))[tile, :, g, :, place].unbind(-1)
        return FLOAT16.values({"scale": scale, "offset": offset}, width)
    steps = packed[:, :STEP_BYTES].unflatten(-1, (8, 8, 4))[tile, g, place]
    scale, centre = packed[:, STEP_BYTES:].unflatten(-1, (-1, 8, 2, 8))[tile, :, g, :, place].unbind(-1)
    step = steps.view(torch.bfloat16)
    return INT8.values({"scale": scale, "centre": (centre ^ CENTRE_BIAS).view(torch.int8), "step": step}, width)


def _scales_of_rows(packed: torch.Tensor, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """The stored scales and steps of rows of a layer with one partition, which has codebooks."""
    tile, g, place = rows // TILE_ROWS, rows % 8, rows % TILE_ROWS // 8
    step = packed[:, : STEP_BYTES // 2].contiguous().view(torch.bfloat16).unflatten(-1, (8, 8, 1))
    scale = packed[:, STEP_BYTES // 2 :].unflatten(-1, (-1, 8, 8))
    return {"scale": scale[tile, :, g, place], "step": step[tile, g, place]}


def partition_starts(output_sizes: Sequence[int]) -> tuple[list[int], list[int]]:
    """Where each partition begins, in rows of tiles and in outputs."""
    tiles = [ceil_div(size, TILE_ROWS) for size in output_sizes]
    return [0, *itertools.accumulate(tiles)][:-1], [0, *itertools.accumulate(output_sizes)][:-1]


def pack_planes(
    base: torch.Tensor,
    planes: Sequence[torch.Tensor],
    output_sizes: Sequence[int],
    order: CodeOrder = AFFINE_ORDER,
) -> torch.Tensor:
    """Codes as on disk to the planes that kernels read, on the device that they are on.

    Args:
        base: uint8 [sum(output_sizes), ceil(in_features/4)], the two most significant bits of each code.
        planes: for each further bit uint8 [sum(output_sizes), ceil(in_features/8)].
        output_sizes: rows of each partition.
        order: of the bits in memory.

    Returns:
        uint8 [tile rows, tile columns, 2 + len(planes), 512].
    """
    columns, width = 4 * base.shape[1], BASE_BITS + len(planes)
    column = torch.arange(columns, device=base.device)

    def bits(packed: torch.Tensor, count: int) -> torch.Tensor:
        """uint8 [rows, columns] of fields of ``count`` bits."""
        per_byte = 8 // count
        return packed[:, column // per_byte] >> (column % per_byte * count).to(torch.uint8) & (2**count - 1)

    result = torch.empty(planes_shape(width, output_sizes, columns), dtype=torch.uint8, device=base.device)
    tile = first = 0
    for size in output_sizes:
        for begin in range(first, first + size, REPACKED_ROWS):
            rows = slice(begin, min(begin + REPACKED_ROWS, first + size))
            codes = bits(base[rows], BASE_BITS)
            for plane in planes:
                codes = codes << 1 | bits(plane[rows], 1)
            packed = pack_codes(codes, width, [len(codes)], order)
            result[tile : tile + len(packed)] = packed
            tile += len(packed)
        first += size
    return result


@dataclass(frozen=True)
class CudaLayout:
    """The layout as kernels ask for it, see :class:`vllm_matquant.kernels.kernel.Layout`.

    Attributes:
        name: what the library calls it.
        order: of the bits of codes.
    """

    name: str
    order: CodeOrder
    packs_on_cpu = False
    pack_decoders = staticmethod(pack_decoders)

    def pack_planes(
        self, base: torch.Tensor, planes: Sequence[torch.Tensor], output_sizes: Sequence[int]
    ) -> torch.Tensor:
        """See :func:`pack_planes`."""
        return pack_planes(base, planes, output_sizes, self.order)


CUDA_LAYOUT = CudaLayout("cuda", AFFINE_ORDER)
CODEBOOK_LAYOUT = CudaLayout("cuda-codebook", FOURS_ORDER)


def layout_of(kind: DecoderKind) -> CudaLayout:
    """The layout of weights with a kind of decoders."""
    return CUDA_LAYOUT if kind.affine else CODEBOOK_LAYOUT


def choose_layout(segments: Sequence[StoredSegment]) -> CudaLayout:
    """The layout of a weight."""
    decoders = (decoder for segment in segments for decoder in segment.decoders)
    return CODEBOOK_LAYOUT if any(isinstance(each.form, CodebookForm) for each in decoders) else CUDA_LAYOUT


def look_up(rows: torch.Tensor, weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """The rows asked for of a weight with one partition, decoded at the active width.

    Planes past the active width do not matter to the result. The host does not wait for the device, so that a captured
    graph follows a switch.

    Args:
        rows: int64 [...], each below the weight's rows.
        weight: in this layout.
        dtype: of the result.

    Returns:
        [..., in_features] of ``dtype``, rounded once from float32.

    Raises:
        RuntimeError: the active width has no decoder (on a GPU: when the host next waits for it).
    """
    shape, rows = rows.shape, rows.flatten()
    [segment] = weight.segments
    resident, active_width = segment.resident, segment.active_width
    slot = active_slot(active_width, resident.decoder_widths)
    # Of every resident width, for the host does not know which one is active.
    decoders = weight.decoders_of(segment, TILE_ROWS)
    if weight.decoder_kind.affine:
        codes = _codes_of_rows(resident.planes, rows, AFFINE_ORDER)[..., : weight.in_features]
        codes = codes >> (resident.width - active_width)
        each = [_decoder_of_rows(packed, weight.decoder_kind.form(w), rows, w) for w, packed in decoders.items()]
        [scale] = torch.stack([affine.scale for affine in each])[slot]
        [offset] = torch.stack([affine.offset for affine in each])[slot]
        result = dequantize(codes, scale, offset, weight.group_size)
    else:
        codes = _codes_of_rows(resident.planes, rows, FOURS_ORDER)[..., : weight.in_features]
        shared = weight.shared_of(segment, TILE_ROWS)
        levels = []
        for width, packed in decoders.items():
            form = weight.decoder_kind.form(width)
            values = form.values(_scales_of_rows(packed, rows) | unpack_shared(form, shared[width][0]), width)
            # A width whose planes are not there cannot be active.
            levels.append(values.decode(codes >> max(0, resident.width - width), weight.group_size))
        [result] = torch.stack(levels)[slot]
    return result.to(dtype).view(*shape, weight.in_features)


def _codes_of_rows(planes: torch.Tensor, rows: torch.Tensor, order: CodeOrder) -> torch.Tensor:
    """The codes of some rows: uint8 [rows, columns of whole tiles]."""
    device, (_, tile_columns, width, _) = planes.device, planes.shape
    tile, row_tile, half, lane = rows // 64, rows % 64 // 16, rows % 16 // 8, rows % 8
    # The four lanes that share a row have its words: bytes [rows, tile columns, t, 4].
    base_bytes = planes[:, :, :BASE_BITS].reshape(-1, tile_columns, 2, 8, 4, 2, 2, 4)
    base = base_bytes[tile, :, row_tile // 2, lane, :, row_tile % 2, half]
    plane_bytes = planes[:, :, BASE_BITS:].unflatten(-1, (8, 4, 4, 4))
    further = plane_bytes[tile, :, :, lane, :, row_tile]  # [rows, tile columns, planes, t, 4]

    shifts = torch.arange(0, 32, 8, device=device)
    places = torch.tensor(order.base, device=device)
    word = (base.long() << shifts).sum(-1, keepdim=True)
    codes = word >> places & 3  # [rows, tile columns, t, 16]
    places = torch.tensor(order.further, device=device)
    for plane in range(BASE_BITS, width):
        word = (further[..., plane - BASE_BITS, :, :].long() << shifts).sum(-1, keepdim=True)
        place = places + (1 if plane % 2 == 0 else 0) - plane // 2 * order.turn
        codes = codes << 1 | word >> ((place - half[..., None, None, None]) % 32) & 1
    return codes.unflatten(-1, (order.runs, -1)).transpose(-3, -2).flatten(-4).to(torch.uint8)


def active_slot(active_width: torch.Tensor, decoder_widths: Sequence[int]) -> torch.Tensor:
    """Where in ``decoder_widths`` the active width [1] is, int64 [1].

    Raises:
        RuntimeError: nowhere (on a GPU: when the host next waits for it).
    """
    matches = torch.stack([active_width == width for width in decoder_widths])
    torch._assert_async(matches.any(), f"active_width: expected one of {list(decoder_widths)}")
    return matches.int().argmax(0)
