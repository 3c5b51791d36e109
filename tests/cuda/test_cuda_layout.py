"""Codes and decoders in the layout of the CUDA kernels: every bit where it is said to be, and rows of an embedding."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.cuda.random_layers import CUDA, KINDS, make_layer
from tests.kernels.random_layers import make_decoder
from vllm_matquant.checkpoint.codebook import entry_index
from vllm_matquant.checkpoint.decoder import AFFINE_KINDS, CODEBOOK, FLOAT16, INT8, DecoderKind
from vllm_matquant.checkpoint.packing import pack_codes
from vllm_matquant.checkpoint.spec import WIDTHS
from vllm_matquant.kernels import cuda_layout
from vllm_matquant.kernels.cuda_layout import CODEBOOK_LAYOUT

FIELDS = [1, 3, 5, 7, 2, 4, 6, 0]


def bit_of_plane(planes: torch.Tensor, plane: int, row: int, column: int) -> int:
    """A bit of a code, looked up as the module's text says; ``row`` is counted with the padding of partitions."""
    tile = planes[row // 64, column // 64]
    i, h, g = row % 64 // 16, row % 16 // 8, row % 8
    c = column % 64
    t, k = c % 32 // 8, c % 8 + c // 32 * 8
    field = FIELDS[k // 2]
    place = 16 * (k % 2 if field else 1 - k % 2) + 2 * field + (1 if plane % 2 == 0 else 0)
    if plane < 2:
        word = ((i // 2 * 32 + 4 * g + t) * 2 + i % 2) * 2 + h
        stored = tile[:2].flatten()
    else:
        word = (4 * g + t) * 4 + i
        stored = tile[plane]
        place = (place - h - (0, 2, 4, 6)[plane // 2]) % 32
    return int(stored[4 * word + place // 8]) >> (place % 8) & 1


@pytest.mark.parametrize("output_sizes", [[1], [64], [70, 3]])
@pytest.mark.parametrize("columns", [1, 30, 64, 67])
@pytest.mark.parametrize("width", WIDTHS)
def test_every_bit_has_its_place(width: int, columns: int, output_sizes: list[int]) -> None:
    rows = sum(output_sizes)
    codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(columns))
    planes = cuda_layout.pack_planes(*pack_codes(codes, width), output_sizes)
    assert planes.shape == cuda_layout.planes_shape(width, output_sizes, columns)
    assert torch.equal(planes, cuda_layout.pack_codes(codes >> (8 - width), width, output_sizes))
    for row in range(0, rows, 7):
        padded = padded_row(row, output_sizes)
        for column in range(columns):
            for plane in range(width):
                expected = int(codes[row, column]) >> (7 - plane) & 1
                assert bit_of_plane(planes, plane, padded, column) == expected


@pytest.mark.parametrize("width", WIDTHS)
def test_an_index_and_what_is_added_to_it_follow_each_other(width: int) -> None:
    codes = torch.randint(0, 256, (70, 100), dtype=torch.uint8, generator=torch.Generator().manual_seed(width))
    planes = CODEBOOK_LAYOUT.pack_planes(*pack_codes(codes, width), [70])
    words = planes.view(torch.int32).long() & 0xFFFFFFFF  # [tile rows, tile columns, width, 128]
    index = entry_index(codes, 8)  # four after four, of four of each 16 columns
    for row, four in itertools.product(range(0, 70, 9), range(25)):
        tile, (i, h, g) = words[row // 64, four // 16], (row % 64 // 16, row % 16 // 8, row % 8)
        t, j = four % 16 // 4, four % 4

        base = int(tile[:2].flatten()[((i // 2 * 32 + 4 * g + t) * 2 + i % 2) * 2 + h])
        assert base >> 8 * j & 0xFF == index[row, four]
        for plane in range(2, width):
            word = int(tile[plane, (4 * g + t) * 4 + i])
            word = (word | word << 32) >> (32 - h) & 0xFFFFFFFF  # turned left by h
            for place in range(4):
                column = four // 4 * 16 + j + 4 * place
                found = word >> (8 * j + (0, 4, 2, 6)[place] + 1 - plane % 2) & 1
                assert found == int(codes[row, column]) >> (7 - plane) & 1 if column < 100 else found == 0


def test_rows_are_repacked_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(0, 256, (300, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = cuda_layout.pack_planes(*pack_codes(codes), [200, 100])
    monkeypatch.setattr(cuda_layout, "REPACKED_ROWS", 64)
    assert torch.equal(cuda_layout.pack_planes(*pack_codes(codes), [200, 100]), expected)


def padded_row(row: int, output_sizes: list[int]) -> int:
    """A row, counted with the padding of the partition before its own."""
    return row if row < output_sizes[0] else row - output_sizes[0] + -(-output_sizes[0] // 64) * 64


@pytest.mark.parametrize("output_sizes", [[1], [64], [70, 3]])
@pytest.mark.parametrize("groups", [1, 3])
def test_every_value_of_a_decoder_has_its_place(groups: int, output_sizes: list[int]) -> None:
    generator, rows = torch.Generator().manual_seed(groups), sum(output_sizes)
    for kind in AFFINE_KINDS:
        decoders = [make_decoder(kind, width, rows, groups, generator) for width in (2, 5)]
        packed = cuda_layout.pack_decoders(decoders, output_sizes)
        sizes = [256 + 128 * groups if decoder.form is INT8 else 256 * groups for decoder in decoders]
        tiles = padded_row(rows - 1, output_sizes) // 64 + 1
        each = [part.view(tiles, -1) for part in packed.split([tiles * size for size in sizes])]
        for slot, row, group in itertools.product((0, 1), range(0, rows, 5), range(groups)):
            parts, padded = decoders[slot].parts, padded_row(row, output_sizes)
            of_tile, g, place = each[slot][padded // 64], padded % 8, padded % 64 // 8
            if decoders[slot].form is FLOAT16:
                expected = [parts["scale"][row, group], parts["offset"][row, group]]
                assert of_tile.view(torch.float16).view(groups, 8, 2, 8)[group, g, :, place].tolist() == expected
                continue
            at = 256 + 128 * group + 16 * g + place
            assert of_tile[at] == parts["scale"][row, group]
            assert of_tile[at + 8].item() - 128 == parts["centre"][row, group]
            steps = of_tile[32 * g + 4 * place : 32 * g + 4 * place + 4]
            assert steps.view(torch.bfloat16).tolist() == parts["step"][row].tolist()


@pytest.mark.parametrize("output_sizes", [[1], [64], [70, 3]])
@pytest.mark.parametrize("groups", [1, 3])
def test_every_scale_of_codebooks_has_its_place(groups: int, output_sizes: list[int]) -> None:
    generator, rows = torch.Generator().manual_seed(groups), sum(output_sizes)
    decoders = [make_decoder(CODEBOOK, width, rows, groups, generator, len(output_sizes)) for width in (3, 8)]
    packed = cuda_layout.pack_decoders(decoders, output_sizes)
    tiles = padded_row(rows - 1, output_sizes) // 64 + 1
    sizes = [size for planes in (2, 12) for size in (len(output_sizes) * planes * 256, tiles * (128 + 64 * groups))]
    books, rows_of_tiles = (packed.split(sizes)[first::2] for first in (0, 1))
    for decoder, book, each in zip(decoders, books, rows_of_tiles, strict=True):
        assert torch.equal(book, decoder.parts["codebook"].flatten())
        for row, group in itertools.product(range(0, rows, 5), range(groups)):
            padded = padded_row(row, output_sizes)
            of_tile, g, place = each.view(tiles, -1)[padded // 64], padded % 8, padded % 64 // 8
            assert of_tile[128 + 64 * group + 8 * g + place] == decoder.parts["scale"][row, group]
            at = 16 * g + 2 * place
            assert of_tile[at : at + 2].view(torch.bfloat16) == decoder.parts["step"][row]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("group_size", [32, 64, 10**6])
@pytest.mark.parametrize("decoder_widths", [WIDTHS, (3, 6)])
def test_rows_of_an_embedding(decoder_widths: tuple[int, ...], group_size: int, kind: DecoderKind) -> None:
    layer = make_layer([150], 200, group_size, decoder_widths, kind=kind)
    rows = torch.tensor([[0, 149, 7], [64, 63, 72]])
    for width in decoder_widths:
        layer.activate([width])
        result = CUDA.embedding(rows, layer.weight.handle, 200, torch.float32)
        weights, absolute = layer.weights([width])
        assert result.shape == (2, 3, 200)
        assert ((result.double() - weights[rows]).abs() <= absolute[rows] * 2**-23).all()
        assert torch.equal(CUDA.embedding(rows[1, 2], layer.weight.handle, 200, torch.float32), result[1, 2])
        poisoned = layer.planes.clone()
        poisoned[:, :, width:] = 255
        other = layer.with_planes(poisoned)
        other.activate([width])
        assert torch.equal(CUDA.embedding(rows, other.weight.handle, 200, torch.float32), result)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_rows_of_an_embedding_at_widths_of_their_own(kind: DecoderKind) -> None:
    layer = make_layer([150], 200, 64, kind=kind)
    widths = (8, 2, 5)
    readers = layer.weight.readers([[width] for width in widths])
    handles = torch.cat([*(reader.handle for reader in readers), torch.zeros(2, dtype=torch.int64)])
    rows = torch.arange(12).view(2, 6) * 12
    slots = torch.tensor([0, 1, 2, 2, 1, 0, 3, 0, 1, -1, 2, 2, 7], dtype=torch.int32)
    result = CUDA.embedding_by_row(rows, handles, slots, 200, torch.bfloat16)
    assert result.shape == (2, 6, 200)
    for row, slot, found in zip(rows.flatten(), slots.tolist(), result.view(12, 200), strict=False):
        if 0 <= slot < len(widths):
            assert torch.equal(found, CUDA.embedding(row, readers[slot].handle, 200, torch.bfloat16))
        else:
            assert found.isnan().all()
    with pytest.raises(ValueError, match="slots: found 11, expected one for each of 12 rows"):
        CUDA.embedding_by_row(rows, handles, slots[:11], 200, torch.bfloat16)


def test_an_embedding_refuses_a_width_without_a_decoder() -> None:
    layer = make_layer([20], 64, 32, [2, 8])
    layer.activate([5])
    with pytest.raises(RuntimeError, match=r"active_width: expected one of \[2, 8\]"):
        CUDA.embedding(torch.tensor([3]), layer.weight.handle, 64, torch.float32)
