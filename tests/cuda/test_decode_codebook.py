"""The CUDA kernels for codebooks, executed by an emulator.

What they have in common with those for scales and offsets is tested in test_decode.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.cuda.emulation import Emulated, compile_ptx, skip_without_tools
from tests.cuda.random_layers import Layer, make_input, make_layer, make_segments
from tests.cuda.test_decode import broken_kernels, changed_source, check_weights, expect_failure, row_slots
from vllm_matquant.checkpoint.decoder import CODEBOOK
from vllm_matquant.checkpoint.spec import WIDTHS

HALF, BFLOAT = torch.float16, torch.bfloat16
FORMS = {
    HALF: ("decode", ["8_1", "8_2", "8_4", "16_2", "24_1"], "dequantize", ["1", "4"]),
    BFLOAT: ("decode", ["8_1", "8_2", "16_1", "16_4", "24_2"], "dequantize", ["2", "1"]),
}
# Each kernel, ragged layers, and partitions with widths of their own: dtype, group size, columns, rows, tokens, splits.
CASES = [
    (HALF, 10**6, 320, [70], 5, 1),
    (HALF, 256, 1100, [100, 30], 7, 2),
    (HALF, 32, 200, [3], 8, 1),
    (HALF, 64, 320, [70], 13, 1),
    (HALF, 128, 1100, [64], 20, 2),
    (BFLOAT, 64, 1100, [65, 3], 3, 2),
    (BFLOAT, 128, 320, [70], 8, 1),
    (BFLOAT, 32, 176, [40], 13, 1),
    (BFLOAT, 512, 1600, [64], 9, 2),
    (BFLOAT, 64, 40, [30], 24, 1),
]


def layer_of(*arguments: object, **options: object) -> Layer:
    return make_layer(*arguments, kind=CODEBOOK, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    skip_without_tools()
    names = []
    for dtype, (decode, forms, dequantize, groups) in FORMS.items():
        kind = f"codebook_4d_{str(dtype).removeprefix('torch.')}"
        names += [f"matquant_{decode}_{kind}_{form}" for form in forms]
        names += [f"matquant_{dequantize}_{kind}_{each}" for each in groups]
    return Emulated(compile_ptx(tmp_path_factory.mktemp("ptx"), "sm_80", names))


@pytest.mark.parametrize("width", WIDTHS)
def test_every_width(kernels: Emulated, width: int) -> None:
    for seed, (dtype, group_size, columns, rows, tokens, splits) in enumerate(CASES):
        layer = layer_of(rows, columns, group_size, seed=10 * width + seed)
        widths = [width, 2 + (width + seed) % 7][: len(rows)]
        x, bias = make_input(tokens, columns, dtype, seed=seed), make_input(1, sum(rows), dtype, seed=1)[0]
        result = kernels.multiply(layer, x, widths, bias, splits)
        layer.check(result, x, widths, bias)
        if len(rows) == 1 and width < 8:  # planes past the active width do not matter
            poisoned = layer.planes.clone()
            poisoned[:, :, width:] = 255
            assert torch.equal(kernels.multiply(layer.with_planes(poisoned), x, widths, bias, splits), result)


@pytest.mark.parametrize("width", WIDTHS)
def test_dequantized_weights(kernels: Emulated, width: int) -> None:
    for dtype, group_size, columns in ((HALF, 10**6, 320), (HALF, 32, 176), (BFLOAT, 64, 1088), (BFLOAT, 128, 40)):
        check_weights(kernels, layer_of([70, 30], columns, group_size, seed=width), [width, 3], dtype)


@pytest.mark.parametrize("tokens", [1, 20, 65])
def test_segments_write_columns_of_one_output(kernels: Emulated, tokens: int) -> None:
    layer = make_segments([([100, 30], WIDTHS), ([20], (2, 3)), ([65], (6,))], 200, 128, kind=CODEBOOK)
    widths = [4, 8, 3, 6]
    x, bias = make_input(tokens, 200, HALF), make_input(1, 215, HALF, seed=1)[0]
    result = kernels.multiply(layer, x.view(1, tokens, 200), widths, bias, splits=2)
    layer.check(result[0], x, widths, bias, rounded_weights=tokens > 64)


def test_a_width_without_decoders_gives_no_number(kernels: Emulated) -> None:
    layer = layer_of([20], 128, 128, [2, 4, 8])
    for width in (0, 1, 5, 9):
        assert kernels.multiply(layer, make_input(3, 128, HALF), [width])[:, 0].isnan().all()
        assert kernels.dequantize(layer, [width], HALF).isnan().all()


def test_a_token_with_nan_leaves_the_others_alone(kernels: Emulated) -> None:
    for group_size, tokens in ((32, 7), (128, 7)):
        layer, x = layer_of([40], 192, group_size), make_input(tokens, 192, HALF)
        expected = kernels.multiply(layer, x, [4])
        x[5] = float("nan")
        result = kernels.multiply(layer, x, [4])
        assert result[5].isnan().all()
        others = torch.arange(tokens) != 5
        assert torch.equal(result[others], expected[others])


@pytest.mark.parametrize(("tokens", "dtype"), [(7, HALF), (13, BFLOAT), (70, HALF)])
def test_each_row_has_the_bytes_of_its_own_widths(kernels: Emulated, tokens: int, dtype: torch.dtype) -> None:
    layer = make_segments([([100, 30], WIDTHS), ([20], (2, 3, 8))], 320, 128, kind=CODEBOOK)
    widths = [[8, 2, 8], [2, 2, 2], [5, 8, 3], [3, 4, 3], [6, 7, 2]]
    x, bias = make_input(tokens, 320, dtype, seed=tokens), make_input(1, 150, dtype, seed=1)[0]
    slots = row_slots(tokens, len(widths), tokens)
    result = kernels.multiply_by_row(layer, x, widths, slots, bias, splits=2)
    for slot, own in enumerate(widths):
        rows = slots[:tokens] == slot
        layer.check(result[rows], x[rows], own, bias)
        if tokens <= 64:  # more are multiplied with dequantized weights where they have one width
            assert torch.equal(result[rows], kernels.multiply(layer, x, own, bias, splits=2)[rows])


@pytest.mark.parametrize("schedule", [1, 2])
def test_order_of_warps_does_not_matter(kernels: Emulated, schedule: int) -> None:
    for width, group_size, dtype in ((2, 128, HALF), (2, 64, BFLOAT), (3, 64, HALF), (4, 32, HALF), (8, 128, BFLOAT)):
        layer = layer_of([70, 30], 700, group_size, seed=width)
        x = make_input(3, 700, dtype)
        expected = kernels.multiply(layer, x, [width, 4], splits=2)
        other = kernels.multiply(layer, x, [width, 4], splits=2, schedule=schedule, racecheck="warp")
        assert torch.equal(other, expected)


@pytest.mark.slow
def test_another_architecture(tmp_path: Path) -> None:
    skip_without_tools()
    kernels = Emulated(compile_ptx(tmp_path, "sm_90", ["matquant_decode_codebook_4d_float16_8_1"]))
    x = make_input(5, 1100, HALF)
    for width in WIDTHS:
        layer = layer_of([70], 1100, 128, seed=width)
        layer.check(kernels.multiply(layer, x, [width], splits=2), x, [width])


# What is changed (file, text, text in its place): each must be seen by one of the checks below.
MUTATIONS = {
    "bits of another four": ("codebook.cuh", "(4 + four) << 4", "(7 - four) << 4"),
    "signs in the place of zeros": ("codebook.cuh", "(12 + four) * 0x1100", "(4 + four) * 0x1100"),
    "third bits of the first row": ("codebook.cuh", "third_bits(word << 1, word >> 4)", "third_bits(word, word >> 5)"),
    "a sign of the wrong half": ("levels.cuh", "kPlaces - 1) ? 0x80000000u", "0) ? 0x80000000u"),
    "a carry between bytes": ("levels.cuh", "0x10100 - last", "0x10000 - last"),
    "increments that there are not": ("levels.cuh", "first_bit + 1 < bits", "first_bit < bits"),
    "sixteenths as units": ("levels.cuh", "entry, pair, kFineUnit)", "entry, pair, 1.0f)"),
    "a wrong excess": ("levels.cuh", "kExcess = 0x64806480", "kExcess = 0x64816481"),
    "signs in the number of an entry": ("levels.cuh", "row.indices & 0x3f3f3f3f", "row.indices & 0x7f7f7f7f"),
    "one table for all bits": ("levels.cuh", "(2 * two + pair) * kEntries", "pair * kEntries"),
    "no barrier after the tables": ("multiply_codebook.cuh", "    __syncthreads();\n", ""),
    "the first partition's codebook": ("multiply_codebook.cuh", "partition * kBookBytes", "0 * kBookBytes"),
    "a tile past the last": (
        "multiply_codebook.cuh",
        "min(tile_ + index, shape_.tile_columns - 1)",
        "tile_ + index",
    ),
    "a wrong group": (
        "multiply_codebook.cuh",
        "tile / kStepTiles >> shape_.group_shift",
        "tile >> shape_.group_shift",
    ),
    "columns of the other group": ("multiply_codebook.cuh", "lane % 4 / 2 == part", "lane % 4 / 2 != part"),
    "bits in another order": ("dequantize_layer.cuh", "place % 2 * 4 + place / 2 * 2", "place * 2"),
    "the scale of another row": ("dequantize_layer.cuh", "scales[2 * row_tile + 1]", "scales[2 * row_tile]"),
}


DECODE = ("decode_codebook_4d_float16_8_1", "decode_codebook_4d_bfloat16_8_4")
DEQUANTIZE = ("dequantize_codebook_4d_float16_1",)


def check_products(kernels: Emulated) -> None:
    for dtype, group_size, columns, widths in ((HALF, 256, 832, (3, 2, 4, 7)), (BFLOAT, 32, 320, (3, 2, 6))):
        for width in widths:
            layer, x = layer_of([40, 3], columns, group_size, seed=width), make_input(3, columns, dtype)
            race = {"racecheck": "warp", "schedule": 1} if width == 3 else {}
            layer.check(kernels.multiply(layer, x, [width, 3], **race), x, [width, 3])


def run_checks(kernels: Emulated, forms: tuple[str, ...]) -> None:
    """Those that concern some of the kernels DECODE and DEQUANTIZE."""
    if forms != DEQUANTIZE:
        check_products(kernels)
    if forms != DECODE:
        check_weights(kernels, layer_of([40], 320, 256), [8], HALF)


@pytest.mark.slow
def test_the_checks_pass_on_whole_kernels(tmp_path: Path) -> None:
    skip_without_tools()
    names = [f"matquant_{form}" for form in DECODE + DEQUANTIZE]
    run_checks(Emulated(compile_ptx(tmp_path, "sm_80", names)), DECODE + DEQUANTIZE)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_sources_have_what_is_to_be_changed(mutation: str) -> None:
    changed_source(MUTATIONS[mutation])


@pytest.mark.slow
@pytest.mark.mutation
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_broken_kernels_are_noticed(mutation: str, tmp_path: Path) -> None:
    forms = DEQUANTIZE if MUTATIONS[mutation][0] == "dequantize_layer.cuh" else DECODE
    kernels = broken_kernels(MUTATIONS[mutation], [f"matquant_{form}" for form in forms], tmp_path)
    expect_failure(lambda: run_checks(kernels, forms))
