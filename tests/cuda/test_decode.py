"""The CUDA kernels for scales and offsets, executed by an emulator; test_decode_codebook.py has those for codebooks."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.cuda.emulation import SOURCES, Emulated, compile_ptx, emulator_module, skip_without_tools
from tests.cuda.random_layers import ROUNDING, Layer, make_input, make_layer, make_segments
from vllm_matquant.checkpoint.decoder import AFFINE_FLOAT16, AFFINE_INT8, AFFINE_KINDS, DecoderKind
from vllm_matquant.checkpoint.spec import WIDTHS
from vllm_matquant.kernels.cuda_launch import kernel_definitions

DTYPES = (torch.float16, torch.bfloat16)
SMALLEST = {dtype: torch.finfo(dtype).smallest_normal * ROUNDING[dtype] for dtype in DTYPES}  # that is not rounded away
GROUP_SIZES = (32, 64, 128, 256, 10**6)
REAL_COLUMNS = (576, 640, 1536, 2048)


@pytest.fixture(scope="session", params=AFFINE_KINDS, ids=lambda kind: kind.name)
def kind(request: pytest.FixtureRequest) -> DecoderKind:
    return request.param


@pytest.fixture(scope="session")
def program_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[DecoderKind], Emulated]:
    """All kernels for decoders of a kind."""
    skip_without_tools()

    @functools.cache
    def program(kind: DecoderKind) -> Emulated:
        names = [name for name in kernel_definitions() if kind.name.replace("-", "_") in name]
        return Emulated(compile_ptx(tmp_path_factory.mktemp("ptx"), "sm_80", names))

    return program


@pytest.fixture(scope="session")
def kernels(kind: DecoderKind, program_of: Callable[[DecoderKind], Emulated]) -> Emulated:
    """All kernels for decoders of a kind; of affine-int8 also those that weights of wide slices alone take."""
    own = program_of(kind)
    own.emulators |= program_of(AFFINE_FLOAT16).emulators
    return own


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_width_and_group_size(
    kernels: Emulated, kind: DecoderKind, width: int, group_size: int, dtype: torch.dtype
) -> None:
    # An emulated tile takes a tenth of a second: each type has other shapes.
    for columns, rows in ((320, 70), (8, 3)) if dtype == torch.float16 else ((1100, 64),):
        layer = make_layer([rows], columns, group_size, seed=width, kind=kind)
        for tokens in (1, 7, 13):
            x, bias = make_input(tokens, columns, dtype, seed=tokens), make_input(1, rows, dtype, seed=1)[0]
            layer.check(kernels.multiply(layer, x, [width], bias), x, [width], bias)


@pytest.mark.slow
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_another_architecture(kind: DecoderKind, group_size: int, tmp_path: Path) -> None:
    skip_without_tools()
    name = f"matquant_decode_{kind.name.replace('-', '_')}_float16_8_{128 // group_size}"
    kernels = Emulated(compile_ptx(tmp_path, "sm_90", [name]))
    x = make_input(5, 1100, torch.float16)
    for width in WIDTHS:
        layer = make_layer([70], 1100, group_size, seed=width, kind=kind)
        layer.check(kernels.multiply(layer, x, [width], splits=2), x, [width])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [*range(1, 18), 23, 24, 25, 31, 33, 64])
def test_tokens(kernels: Emulated, kind: DecoderKind, tokens: int, dtype: torch.dtype) -> None:
    for group_size, width in ((128, 3), (64, 6), (32, 4)):
        layer = make_layer([40], 192, group_size, [width], seed=tokens, kind=kind)
        x = make_input(tokens, 192, dtype, seed=tokens)
        layer.check(kernels.multiply(layer, x, [width], splits=2), x, [width])


@pytest.mark.parametrize("columns", REAL_COLUMNS)
@pytest.mark.parametrize("splits", [1, 3])
def test_columns_of_models(kernels: Emulated, kind: DecoderKind, splits: int, columns: int) -> None:
    for width in (2, 5, 8):
        layer = make_layer([192], columns, 64, [width], seed=width, kind=kind)
        x = make_input(4, columns, torch.float16)
        layer.check(kernels.multiply(layer, x, [width], splits=splits), x, [width])


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
def test_many_columns(kernels: Emulated, kind: DecoderKind, width: int) -> None:
    layer = make_layer([64], 11008, 128, [width], seed=width, kind=kind)
    x = make_input(8, 11008, torch.float16)
    layer.check(kernels.multiply(layer, x, [width], splits=4), x, [width])


@pytest.mark.parametrize("widths", [(2, 8, 5), (3, 3, 7), (4, 6, 2)])
def test_each_partition_has_its_own_width(kernels: Emulated, kind: DecoderKind, widths: tuple[int, ...]) -> None:
    layer = make_layer([100, 30, 64], 320, 64, kind=kind)
    x, bias = make_input(5, 320, torch.bfloat16), make_input(1, 194, torch.bfloat16, seed=1)[0]
    layer.check(kernels.multiply(layer, x, widths, bias, splits=2), x, widths, bias)


@pytest.mark.parametrize("tokens", [1, 20, 65])
def test_segments_write_columns_of_one_output(kernels: Emulated, kind: DecoderKind, tokens: int) -> None:
    layer = make_segments([([100, 30], WIDTHS), ([20], (2, 3)), ([65], (6,))], 200, 64, kind=kind)
    widths = [4, 8, 3, 6]
    x, bias = make_input(tokens, 200, torch.float16), make_input(1, 215, torch.float16, seed=1)[0]
    result = kernels.multiply(layer, x.view(1, tokens, 200), widths, bias, splits=2)
    layer.check(result[0], x, widths, bias, rounded_weights=tokens > 64)
    layer.check(kernels.multiply(layer, x, widths, splits=2), x, widths, rounded_weights=tokens > 64)


def test_no_tokens(kernels: Emulated, kind: DecoderKind) -> None:
    layer = make_layer([70], 320, 64, kind=kind)
    assert kernels.multiply(layer, torch.empty(2, 0, 320, dtype=torch.float16), [4]).shape == (2, 0, 70)


@pytest.mark.parametrize("width", WIDTHS)
def test_planes_past_the_active_width_do_not_matter(kernels: Emulated, kind: DecoderKind, width: int) -> None:
    layer = make_layer([70], 320, 64, kind=kind)
    x = make_input(3, 320, torch.float16)
    expected, weights = kernels.multiply(layer, x, [width]), kernels.dequantize(layer, [width], torch.float16)
    poisoned = layer.planes.clone()
    poisoned[:, :, width:] = 255
    for planes in (poisoned, layer.planes[:, :, :width].contiguous()):
        other = layer.with_planes(planes)
        assert torch.equal(kernels.multiply(other, x, [width]), expected)
        assert torch.equal(kernels.dequantize(other, [width], torch.float16), weights)


@pytest.mark.parametrize("width", [0, 1, 5, 9])
def test_a_width_without_decoders_gives_no_number(kernels: Emulated, kind: DecoderKind, width: int) -> None:
    layer = make_layer([20], 128, 64, [2, 4, 8], kind=kind)
    assert kernels.multiply(layer, make_input(3, 128, torch.float16), [width])[:, 0].isnan().all()


def test_a_token_with_nan_leaves_the_others_alone(kernels: Emulated, kind: DecoderKind) -> None:
    layer = make_layer([40], 192, 64, kind=kind)
    x = make_input(9, 192, torch.float16)
    expected = kernels.multiply(layer, x, [4])
    x[5] = float("nan")
    result = kernels.multiply(layer, x, [4])
    assert result[5].isnan().all()
    others = torch.arange(9) != 5
    assert torch.equal(result[others], expected[others])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("width", WIDTHS)
def test_dequantized_weights(
    kernels: Emulated, kind: DecoderKind, width: int, group_size: int, dtype: torch.dtype
) -> None:
    for columns in (40, 320) if dtype == torch.bfloat16 else (1088,):
        layer = make_layer([70, 30], columns, group_size, seed=width, kind=kind)
        check_weights(kernels, layer, [width, 3], dtype)


def check_weights(kernels: Emulated, layer: Layer, widths: list[int], dtype: torch.dtype) -> None:
    """Compare dequantized weights with those in float64."""
    result = kernels.dequantize(layer, widths, dtype).double()
    expected, absolute = layer.weights(widths)
    tolerance = expected.abs() * ROUNDING[dtype] + absolute * 2**-22 + SMALLEST[dtype]
    assert ((result[:, : expected.shape[1]] - expected).abs() <= tolerance).all()
    assert result.isfinite().all()  # what is past the columns meets zeros


def test_dequantized_weights_of_a_width_without_decoders(kernels: Emulated, kind: DecoderKind) -> None:
    layer = make_layer([70], 128, 64, [2, 8], kind=kind)
    assert kernels.dequantize(layer, [5], torch.float16).isnan().all()


def row_slots(tokens: int, slots: int, seed: int) -> torch.Tensor:
    return torch.randint(slots, (tokens + 3,), dtype=torch.int32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("group_size", "splits", "tokens"),
    [
        (32, 1, 1),
        (64, 2, 2),
        (128, 1, 7),
        (256, 2, 7),
        (256, 2, 13),
        (64, 2, 13),
        (32, 1, 24),
        (64, 2, 33),
        (128, 1, 70),
    ],
)
def test_each_row_has_the_bytes_of_its_own_widths(
    kernels: Emulated, kind: DecoderKind, group_size: int, splits: int, tokens: int
) -> None:
    layer = make_segments([([100, 30], WIDTHS), ([20], (2, 3, 8))], 320, group_size, kind=kind)
    widths = [[8, 2, 8], [2, 2, 2], [5, 8, 3], [3, 4, 3], [6, 7, 2]]
    dtype = DTYPES[tokens % 2]
    x, bias = make_input(tokens, 320, dtype, seed=tokens), make_input(1, 150, dtype, seed=1)[0]
    slots = row_slots(tokens, len(widths), tokens)
    result = kernels.multiply_by_row(layer, x, widths, slots, bias, splits)
    for slot, own in enumerate(widths):
        rows = slots[:tokens] == slot
        layer.check(result[rows], x[rows], own, bias)
        if tokens <= 64:  # more are multiplied with dequantized weights where they have one width
            assert torch.equal(result[rows], kernels.multiply(layer, x, own, bias, splits)[rows])


@pytest.mark.parametrize("slot", [-1, 2, 7, 2**31 - 1])
def test_a_row_without_a_reader_gives_no_number(kernels: Emulated, kind: DecoderKind, slot: int) -> None:
    layer = make_layer([70], 320, 64, kind=kind)
    x, slots = make_input(9, 320, torch.float16), torch.tensor([0, 1, 1, 0, slot, 1, 0, 0, 1], dtype=torch.int32)
    for splits in (1, 2):
        result = kernels.multiply_by_row(layer, x, [[8], [3]], slots, splits=splits)
        assert result[4].isnan().all()
        for own, width in ((0, 8), (1, 3)):
            assert torch.equal(result[slots == own], kernels.multiply(layer, x, [width], splits=splits)[slots == own])


CHECKS = [
    {"schedule": seed, "async_early": early, "racecheck": "warp"} for seed in (1, 2, 3) for early in (False, True)
]


@pytest.mark.parametrize(("width", "options"), [(width, each) for width in WIDTHS for each in CHECKS[width % 3 :: 3]])
def test_order_of_warps_and_copies_does_not_matter(
    kernels: Emulated, kind: DecoderKind, width: int, options: dict
) -> None:
    for group_size, dtype, tokens in ((64, torch.float16, 9), (128, torch.bfloat16, 3)):
        layer = make_layer([70, 30], 1400, group_size, seed=width, kind=kind)
        x = make_input(tokens, 1400, dtype)
        expected = kernels.multiply(layer, x, [width, 4], splits=2)
        assert torch.equal(kernels.multiply(layer, x, [width, 4], splits=2, **options), expected)


@pytest.mark.parametrize("options", CHECKS[::3])
def test_order_does_not_matter_to_rows_with_widths_of_their_own(
    kernels: Emulated, kind: DecoderKind, options: dict
) -> None:
    layer = make_layer([70, 30], 1400, 64, kind=kind)
    x, slots, widths = make_input(9, 1400, torch.float16), row_slots(9, 3, 4), [[8, 4], [2, 2], [3, 8]]
    expected = kernels.multiply_by_row(layer, x, widths, slots, splits=2)
    assert torch.equal(kernels.multiply_by_row(layer, x, widths, slots, splits=2, **options), expected)


# What is changed (file, text, text in its place): each must be seen by one of the checks below.
MUTATIONS = {
    "no wait for copies": ("multiply.cuh", "        wait_for_copies<kStageCount - 2>();\n", ""),
    "one copy too few awaited": (
        "multiply.cuh",
        "wait_for_copies<kStageCount - 2>",
        "wait_for_copies<kStageCount - 1>",
    ),
    "no barrier between lanes": ("multiply.cuh", "        __syncwarp();  // all lanes'", "        // all lanes'"),
    "no barrier before sums": ("decode.cuh", "    __syncthreads();  // every warp", "    // every warp"),
    "no barrier between sums": ("decode.cuh", "results);\n    __syncthreads();\n", "results);\n"),
    "rows of all slots": ("decode.cuh", "slots_[token] == slot_ ||", "true ||"),
    "rows of all slots in partial sums": ("decode.cuh", "if (mine.has(value / kTileRows)) {", "{"),
    "a number where there is no slot": ("decode.cuh", "is_known(token) ? sum :", "true ? sum :"),
    "slots of the first tokens": ("decode.cuh", "arguments.slots + first_token", "arguments.slots"),
    "widths of another partition": (
        "decode.cuh",
        "slot * shape.partitions + partition.index",
        "slot * shape.partitions",
    ),
    "widths of the first slot": ("decode.cuh", "slot * shape.partitions + partition.index", "partition.index"),
    "no slot has tokens past the first eight": (
        "decode.cuh",
        "any_of(min(token_tiles * kTokens,",
        "any_of(min(kTokens,",
    ),
    "slots read past the last token": (
        "decode.cuh",
        "mine.any_of(min(token_tiles * kTokens, shape.tokens - first_token))",
        "mine.any_of(token_tiles * kTokens)",
    ),
    "one count of arrivals for all slots": (
        "decode.cuh",
        "arguments.arrivals + blockIdx.z",
        "arguments.arrivals + pass",
    ),
    "sums before all blocks have come": ("decode.cuh", "== gridDim.y - 1;", "== 0;"),
    "arrivals not reset": ("decode.cuh", "        *arrivals = 0;\n", ""),
    "wrong group": ("stage.cuh", "step_ >> shape_.group_shift", "step_ >> (shape_.group_shift + 1)"),
    "groups past the last": (
        "stage.cuh",
        "lane_ / kGroupLanes, shape_.groups - 1)",
        "lane_ / kGroupLanes, shape_.groups)",
    ),
    "tile past the last": ("stage.cuh", "(tile == 0 || !both ? 0 : tile_bytes_)", "(tile == 0 ? 0 : tile_bytes_)"),
    "token past the last": ("stage.cuh", "lane / 4, shape.tokens - 1)", "lane / 4, shape.tokens)"),
    "row past the last": ("decode.cuh", "if (partition.first_row + row <", "if (partition.first_row + row <="),
    "wrong stage": ("multiply.cuh", "        free = current;\n", ""),
    "wrong mask": ("dequantize.cuh", "kOddFields = 0xcccccccc", "kOddFields = 0xccccccc4"),
    "wrong exponent": ("dequantize.cuh", "- last_of(q) + below", "- last_of(q) + below + q / 7"),
    "wrong turn": ("dequantize.cuh", "upper, kUpper), 31)", "upper, kUpper), 1)"),
    "constants without the lower part": ("multiply.cuh", "magic |= 1u", "magic |= 0u"),
    "halves of other codes": ("dequantize.cuh", "0x0fu << ((top - 3) % 8)", "0x0fu << ((top - 1) % 8)"),
    "lower bits in other fields": ("dequantize.cuh", "index < 2 ? lower.odd", "index < 3 ? lower.odd"),
    "a part turned as if it were the first": ("dequantize.cuh", "4 * q - 11) - first;", "4 * q - 11);"),
    "a column of ones too many": ("multiply.cuh", "ones = column % 4 >= 2;", "ones = column % 4 >= 1;"),
    "half of a sum": ("multiply.cuh", "sums.value[0] + sums.value[3];", "sums.value[0];"),
    "sums of another token": ("multiply.cuh", "source_ + index % 2 * 4", "source_ + index / 2 * 4"),
}
# Of what only decoders in int8 have.
INT8_MUTATIONS = {
    "no middle": ("multiply.cuh", "fmaf(-kMiddle<width>, sums[3], sums[1])", "sums[1]"),
    "wrong middle": ("decoders.cuh", "((1 << width) - 1) / 2.0f", "(1 << width) / 2.0f"),
    "centre without its sign": ("decoders.cuh", "first + 1) - kCentreBias", "first + 1)"),
    "steps exchanged": ("decoders.cuh", "centre = {__uint_as_float(words[0] &", "centre = {__uint_as_float(words[1] &"),
    "steps of another row": ("decoders.cuh", "g * kRowTiles + row_tile", "g * kRowTiles + row_tile % 2"),
    "groups where the steps are": (
        "stage.cuh",
        "                    step_bytes(form) + lane",
        "                    lane",
    ),
    "lanes of float16": ("stage.cuh", "lane % kGroupLanes * 16", "lane % 16 * 16"),
    "no steps at 24 tokens": (
        "multiply.cuh",
        "addend = matquant::cuda::multiply(addend, steps.centre)",
        "addend = addend",
    ),
    "no middle in a weight": ("dequantize_layer.cuh", "fmaf(-kMiddle<width>, scaled,", "fmaf(0.0f, scaled,"),
    "steps of another row of tiles": (
        "multiply.cuh",
        "static_cast<size_t>(share.tile_row) * row_bytes",
        "static_cast<size_t>(0) * row_bytes",
    ),
}


def run_checks(kernels: Emulated) -> None:
    def check(
        layer: Layer, tokens: int, widths: list[int], dtype: torch.dtype = torch.float16, **options: object
    ) -> None:
        x = make_input(tokens, layer.codes.shape[1], dtype)
        layer.check(kernels.multiply(layer, x, widths, **options), x, widths)

    race = {"racecheck": "warp", "schedule": 1}
    check(make_layer([64], 832, 256, [4, 8]), 7, [8], **race)
    check(make_layer([64], 300, 256, [4, 8]), 7, [8], torch.bfloat16)
    check(make_layer([64], 300, 256, [4, 7]), 16, [7])
    check(make_layer([64], 2600, 128, [2, 3]), 7, [3], splits=2, **race, async_early=True)
    check(make_layer([64], 2600, 128, [2, 3]), 3, [2], **race)
    for seed in range(4):
        check(make_layer([70, 30], 1600, 64, [4, 5]), 5, [4, 5], splits=2, racecheck="warp", schedule=seed)
    check_rows(kernels)


def check_rows(kernels: Emulated) -> None:
    """Rows with widths of their own: of a pass the first eight have one, those of the next pass another."""
    layer = make_layer([70, 30], 1600, 64, [2, 4, 5])
    widths = [[5, 2], [2, 4], [4, 4]]
    for tokens, seed in ((5, 1), (5, 2), (33, 3)):
        x, slots = make_input(tokens, 1600, torch.float16), row_slots(tokens, 3, seed)[:tokens]
        if tokens > 24:
            slots[:8], slots[24:] = 0, 2
        result = kernels.multiply_by_row(layer, x, widths, slots, splits=2, racecheck="warp", schedule=seed)
        for slot, own in enumerate(widths):
            layer.check(result[slots == slot], x[slots == slot], own)
    slots[1] = 3
    assert kernels.multiply_by_row(layer, x, widths, slots)[1].isnan().all()


def run_int8_checks(kernels: Emulated) -> None:
    for group_size in (64, 128):
        layer = make_layer([150], 300, group_size, [3, 4], kind=AFFINE_INT8)
        for tokens in (7, 16, 20):
            x = make_input(tokens, 300, torch.float16)
            layer.check(kernels.multiply(layer, x, [4]), x, [4])
    weights, absolute = layer.weights([4])
    error = (kernels.dequantize(layer, [4], torch.float16)[:, :300].double() - weights).abs()
    tolerance = weights.abs() * ROUNDING[torch.float16] + absolute * 2**-22 + SMALLEST[torch.float16]
    assert (error <= tolerance).all()


def changed_source(mutation: tuple[str, str, str]) -> str:
    """A source in which one text is replaced."""
    name, before, after = mutation
    text = (SOURCES / "cuda" / name).read_text()
    assert before in text, f"{name} has no longer what is to be changed"
    return text.replace(before, after)


def broken_kernels(mutation: tuple[str, str, str], kernels: list[str], folder: Path) -> Emulated:
    """Kernels of sources of which one is changed."""
    skip_without_tools()
    sources = folder / "csrc"
    shutil.copytree(SOURCES / "cuda", sources / "cuda")
    shutil.copy(SOURCES / "decoder.h", sources)
    (sources / "cuda" / mutation[0]).write_text(changed_source(mutation))
    return Emulated(compile_ptx(folder, "sm_80", kernels, sources))


@pytest.mark.slow
def test_the_checks_pass_on_whole_kernels(kernels: Emulated, kind: DecoderKind) -> None:
    (run_int8_checks if kind is AFFINE_INT8 else run_checks)(kernels)


@pytest.mark.parametrize("mutation", [*MUTATIONS, *INT8_MUTATIONS])
def test_the_sources_have_what_is_to_be_changed(mutation: str) -> None:
    changed_source((MUTATIONS | INT8_MUTATIONS)[mutation])


@pytest.mark.slow
@pytest.mark.mutation
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_broken_kernels_are_noticed(mutation: str, tmp_path: Path) -> None:
    forms = ("float16_8_1", "float16_8_2", "float16_16_1", "float16_24_2", "bfloat16_8_1")
    names = [f"matquant_decode_affine_float16_{form}" for form in forms]
    kernels = broken_kernels(MUTATIONS[mutation], names, tmp_path)
    expect_failure(lambda: run_checks(kernels))


@pytest.mark.slow
@pytest.mark.mutation
@pytest.mark.parametrize("mutation", INT8_MUTATIONS)
def test_broken_kernels_for_int8_decoders_are_noticed(mutation: str, tmp_path: Path) -> None:
    forms = [f"decode_affine_int8_float16_{form}" for form in ("8_1", "8_2", "16_1", "16_2", "24_1", "24_2")]
    names = [f"matquant_{form}" for form in (*forms, "dequantize_affine_int8_float16_1")]
    kernels = broken_kernels(INT8_MUTATIONS[mutation], names, tmp_path)
    expect_failure(lambda: run_int8_checks(kernels))


def expect_failure(check: Callable[[], None]) -> None:
    """A wrong result, or what the emulator finds: races, memory that is not there or not written."""
    try:
        check()
    except (AssertionError, emulator_module().EmuError):
        return
    pytest.fail("the broken kernel passed")
