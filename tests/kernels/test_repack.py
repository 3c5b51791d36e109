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
def test_every_bit_has_its_place(output_sizes, columns, resident_width):
    rows = sum(output_sizes)
    generator = torch.Generator().manual_seed(columns)
    codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8, generator=generator)
    base, planes = pack_codes(codes, resident_width)
    result = ops.repack_codes(base, planes, output_sizes)
    assert result.shape == layout.planes_shape(resident_width, output_sizes, columns)
    base_bytes = torch.zeros(result[:2].numel(), dtype=torch.uint8)
    plane_bytes = torch.zeros_like(result[2:])
    column_tiles = result.shape[2]
    for row in range(rows):
        tile, lane = tile_of_row(row, output_sizes)
        for column in range(columns):
            code, step, byte = int(codes[row, column]), column % 32 // 4, lane * 4 + column % 4
            first_byte = (tile * column_tiles + column // 32) * 128 + step // 4 * 64
            base_bytes[first_byte + byte] |= (code >> 6) << (step % 4 * 2)
            for plane in range(2, resident_width):
                plane_bytes[plane - 2, tile, column // 32, byte] |= (code >> (7 - plane) & 1) << step
    assert torch.equal(result[:2].flatten(), base_bytes)
    assert torch.equal(result[2:], plane_bytes)
    unpacked = layout.unpack_tiles(*layout.split_planes(result), columns)
    assert torch.equal(layout.strip_padding(unpacked, output_sizes), codes >> (8 - resident_width))


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
        ops.repack_codes(base, planes, output_sizes)
