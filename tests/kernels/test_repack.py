"""From the form on disk to the layout of kernels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.kernels.random_layers import make_decoder
from vllm_matquant.checkpoint.decoder import AFFINE_INT8, FLOAT16, INT8
from vllm_matquant.checkpoint.packing import pack_codes
from vllm_matquant.checkpoint.spec import WIDTHS
from vllm_matquant.kernels import cpu_layout, ops
from vllm_matquant.kernels.cpu_layout import PAIRS, PLANES


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
@pytest.mark.parametrize("paired", [True, False], ids=["pairs", "planes"])
def test_every_bit_has_its_place(output_sizes, columns, resident_width, paired):
    rows = sum(output_sizes)
    generator = torch.Generator().manual_seed(columns)
    codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8, generator=generator)
    base, planes = pack_codes(codes, resident_width)
    result = (PAIRS if paired else PLANES).pack_planes(base, planes, output_sizes)
    assert result.shape == cpu_layout.planes_shape(resident_width, output_sizes, columns)
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
    unpacked = cpu_layout.unpack_tiles(cpu_layout.split_planes(result, paired), columns)
    assert torch.equal(cpu_layout.strip_padding(unpacked, output_sizes), codes >> (8 - resident_width))


@pytest.mark.parametrize(
    ("decoder_widths", "resident_width", "layout"),
    [
        ([8], 8, PAIRS),
        ([7], 7, PAIRS),
        ([2, 4, 6, 8], 8, PAIRS),
        ([4, 7], 7, PAIRS),
        ([7, 8], 8, PLANES),
        ([3, 8], 8, PLANES),
        ([3, 5], 5, PLANES),
        (WIDTHS, 3, PAIRS),
        (WIDTHS, 4, PLANES),
    ],
)
def test_planes_lie_in_pairs_where_no_width_parts_them(decoder_widths, resident_width, layout):
    assert cpu_layout.choose_layout([(resident_width, decoder_widths)]) is layout
    assert cpu_layout.choose_layout([(8, [8]), (resident_width, decoder_widths)]) is layout


@pytest.mark.parametrize("output_sizes", [[1], [16], [37], [5, 16, 18]])
def test_every_float16_decoder_has_its_place(output_sizes):
    rows, groups = sum(output_sizes), 3
    generator = torch.Generator().manual_seed(rows)
    decoders = [make_decoder(FLOAT16, width, rows, groups, generator) for width in (3, 5)]
    result = PAIRS.pack_decoders(decoders, output_sizes)
    assert result.dtype == torch.uint8
    assert result.is_contiguous()
    expected = torch.zeros(2, tile_of_row(rows - 1, output_sizes)[0] + 1, groups, 2, 16, dtype=torch.float16)
    for row in range(rows):
        tile, lane = tile_of_row(row, output_sizes)
        for index, decoder in enumerate(decoders):
            expected[index, tile, :, 0, lane] = decoder.parts["scale"][row]
            expected[index, tile, :, 1, lane] = decoder.parts["offset"][row]
    assert torch.equal(result, expected.flatten().view(torch.uint8))


@pytest.mark.parametrize("output_sizes", [[1], [16], [37], [5, 16, 18]])
def test_every_8_bit_decoder_has_its_place(output_sizes):
    rows, groups = sum(output_sizes), 3
    generator = torch.Generator().manual_seed(rows)
    decoders = [make_decoder(INT8, width, rows, groups, generator) for width in (3, 5)]
    result = PAIRS.pack_decoders(decoders, output_sizes)
    assert result.dtype == torch.uint8
    assert result.is_contiguous()
    tiles = tile_of_row(rows - 1, output_sizes)[0] + 1
    expected = np.zeros((2, tiles, 64 + 32 * groups), dtype=np.uint8)
    for row in range(rows):
        tile, lane = tile_of_row(row, output_sizes)
        for index, decoder in enumerate(decoders):
            steps = decoder.parts["step"][row].view(torch.uint8).numpy()
            expected[index, tile, 2 * lane : 2 * lane + 2] = steps[:2]
            expected[index, tile, 32 + 2 * lane : 34 + 2 * lane] = steps[2:]
            for group in range(groups):
                begin = 64 + 32 * group + lane
                expected[index, tile, begin] = decoder.parts["scale"][row, group]
                expected[index, tile, begin + 16] = int(decoder.parts["centre"][row, group]) % 256
    assert np.array_equal(result.numpy(), expected.ravel())


def test_decoders_of_several_forms_lie_one_after_the_other():
    generator = torch.Generator().manual_seed(0)
    decoders = [make_decoder(AFFINE_INT8, width, 20, 3, generator) for width in (8, 2, 5, 4)]
    alone = [PAIRS.pack_decoders([decoder], [20]) for decoder in decoders]
    assert [len(part) for part in alone] == [2 * 3 * 64, 2 * (64 + 3 * 32), 2 * 3 * 64, 2 * (64 + 3 * 32)]
    assert torch.equal(PAIRS.pack_decoders(decoders, [20]), torch.cat(alone))


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
        ops.repack_codes(base, planes, output_sizes, "cpu-planes", torch.zeros(0))


def test_the_layout_and_the_result_are_checked():
    base, result = torch.zeros(16, 8).byte(), torch.zeros(2, 1, 1, 64).byte()
    with pytest.raises(RuntimeError, match='layout: found "cuda", expected "cpu-pairs" or "cpu-planes"'):
        ops.repack_codes(base, [], [16], "cuda", result)
    with pytest.raises(RuntimeError, match=r"out: found shape \[2, 1, 2, 64\], expected \[2, 1, 1, 64\]"):
        ops.repack_codes(base, [], [16], "cpu-pairs", torch.zeros(2, 1, 2, 64).byte())
