"""From the form on disk to the layout of kernels."""

from __future__ import annotations

import pytest
import torch

from vllm_matquant.checkpoint.packing import pack_codes
from vllm_matquant.checkpoint.spec import WIDTHS
from vllm_matquant.kernels import layout, ops


def tile_of_row(row: int, output_sizes: list[int]) -> tuple[int, int]:
    """(tile, lane) of a row, counted by hand."""
    tile = 0
    for size in output_sizes:
        if row < size:
            return tile + row // 16, row % 16
        row -= size
        tile += (size + 15) // 16
    raise IndexError(row)


@pytest.mark.parametrize("output_sizes", [[1], [16], [37], [5, 16, 18]])
@pytest.mark.parametrize("columns", [1, 3, 8, 29, 32, 41, 67])
@pytest.mark.parametrize("resident_width", WIDTHS)
@pytest.mark.parametrize("paired", [True, False])
def test_every_bit_has_its_place(output_sizes, columns, resident_width, paired):
    rows = sum(output_sizes)
    generator = torch.Generator().manual_seed(columns)
    codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8, generator=generator)
    base, planes = pack_codes(codes, resident_width)
    decoder_widths = [resident_width] if paired else WIDTHS
    result = ops.repack_codes(base, planes, output_sizes, decoder_widths)
    assert result.shape == layout.planes_shape(resident_width, output_sizes, columns)
    column_tiles, plane_bytes = result.shape[2], result[0].numel()
    pairs = resident_width // 2 if paired else 1
    expected = torch.zeros(result.numel(), dtype=torch.uint8)
    for row in range(rows):
        tile_row, lane = tile_of_row(row, output_sizes)
        for column in range(columns):
            code, step = int(codes[row, column]) >> (8 - resident_width), column % 32 // 4
            tile, byte = tile_row * column_tiles + column // 32, lane * 4 + column % 4
            for pair in range(pairs):
                field = code >> (resident_width - 2 - 2 * pair) & 3
                place = 2 * pair * plane_bytes + tile * 128 + step // 4 * 64 + byte
                expected[place] |= field << (step % 4 * 2)
            for plane in range(2 * pairs, resident_width):
                bit = code >> (resident_width - 1 - plane) & 1
                expected[plane * plane_bytes + tile * 64 + byte] |= bit << step
    assert torch.equal(result.flatten(), expected)
    unpacked = layout.unpack_tiles(layout.split_planes(result, paired), columns)
    assert torch.equal(layout.strip_padding(unpacked, output_sizes), codes >> (8 - resident_width))


@pytest.mark.parametrize(
    ("decoder_widths", "resident_width", "paired"),
    [
        ([8], 8, True),
        ([7], 7, True),
        ([2, 4, 6, 8], 8, True),
        ([4, 7], 7, True),
        ([7, 8], 8, False),
        ([3, 8], 8, False),
        ([3, 5], 5, False),
        (WIDTHS, 3, True),
        (WIDTHS, 4, False),
    ],
)
def test_planes_lie_in_pairs_where_no_width_parts_them(decoder_widths, resident_width, paired):
    assert layout.are_paired(decoder_widths, resident_width) == paired
    codes = torch.randint(0, 256, (20, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    result = ops.repack_codes(*pack_codes(codes, resident_width), [20], decoder_widths)
    unpacked = layout.unpack_tiles(layout.split_planes(result, paired), 40)
    assert torch.equal(layout.strip_padding(unpacked, [20]), codes >> (8 - resident_width))


@pytest.mark.parametrize("output_sizes", [[1], [16], [37], [5, 16, 18]])
def test_every_decoder_has_its_place(output_sizes):
    rows, groups = sum(output_sizes), 3
    scales = [torch.rand(rows, groups).half() for _ in range(2)]
    offsets = [torch.randn(rows, groups).half() for _ in range(2)]
    result = layout.repack_decoders(scales, offsets, output_sizes)
    assert result.dtype == torch.float16
    assert result.shape == layout.decoders_shape((3, 5), output_sizes, 40, 16)
    assert result.is_contiguous()
    expected = torch.zeros_like(result)
    for row in range(rows):
        tile, lane = tile_of_row(row, output_sizes)
        for index in range(2):
            expected[index, tile, :, 0, lane] = scales[index][row]
            expected[index, tile, :, 1, lane] = offsets[index][row]
    assert torch.equal(result, expected)


@pytest.mark.parametrize(
    ("base", "planes", "output_sizes", "message"),
    [
        (torch.zeros(16), [], [16], "base: found 1 dimensions, expected 2"),
        (torch.zeros(16, 4), [], [16], "base: found dtype Float, expected Byte"),
        (torch.zeros(16, 4).byte(), [], [17], r"base: found shape \[16, 4\], expected \[17, 4\]"),
        (torch.zeros(4, 16).byte().t(), [], [16], "base: found strides .*, expected a contiguous"),
        (torch.zeros(16, 5).byte(), [torch.zeros(16, 2).byte()], [16], r"planes: found shape .*, expected \[16, 3\]"),
        (torch.zeros(16, 4).byte(), [torch.zeros(16, 2).byte()] * 7, [16], "planes: found 7, expected at most 6"),
        (torch.zeros(16, 4).byte(), [], [], "output_sizes: found none"),
        (torch.zeros(16, 4).byte(), [], [20, -4], "output_sizes: found .*, expected positive sizes"),
    ],
)
def test_contradicting_arguments(base, planes, output_sizes, message):
    with pytest.raises(RuntimeError, match=message):
        ops.repack_codes(base, planes, output_sizes, WIDTHS)
