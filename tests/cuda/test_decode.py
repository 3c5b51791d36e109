"""The CUDA kernels for few tokens, executed by an emulator."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.cuda.emulation import SOURCES, Emulated, compile_ptx, skip_without_tools
from tests.cuda.random_layers import ROUNDING, Layer, make_input, make_layer
from vllm_matquant.checkpoint.spec import WIDTHS

DTYPES = (torch.float16, torch.bfloat16)
GROUP_SIZES = (32, 64, 128, 256, 10**6)
REAL_COLUMNS = (576, 640, 1536, 2048)


@pytest.fixture(scope="session", params=["sm_80", "sm_90"])
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    skip_without_tools()
    return Emulated(compile_ptx(tmp_path_factory.mktemp("ptx"), request.param))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_width_and_group_size(kernels: Emulated, width: int, group_size: int, dtype: torch.dtype) -> None:
    for columns, rows in ((320, 70), (8, 3), (1100, 64)):
        layer = make_layer([rows], columns, group_size, seed=width)
        for tokens in (1, 7, 13):
            x, bias = make_input(tokens, columns, dtype, seed=tokens), make_input(1, rows, dtype, seed=1)[0]
            layer.check(kernels.multiply(layer, x, [width], bias), x, [width], bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [*range(1, 18), 23, 24, 25, 31, 33, 64])
def test_tokens(kernels: Emulated, tokens: int, dtype: torch.dtype) -> None:
    for group_size, width in ((128, 3), (64, 6), (32, 4)):
        layer = make_layer([40], 192, group_size, [width], seed=tokens)
        x = make_input(tokens, 192, dtype, seed=tokens)
        layer.check(kernels.multiply(layer, x, [width], splits=2), x, [width])


@pytest.mark.parametrize("columns", REAL_COLUMNS)
@pytest.mark.parametrize("splits", [1, 3])
def test_columns_of_models(kernels: Emulated, splits: int, columns: int) -> None:
    for width in (2, 5, 8):
        layer = make_layer([192], columns, 64, [width], seed=width)
        x = make_input(4, columns, torch.float16)
        layer.check(kernels.multiply(layer, x, [width], splits=splits), x, [width])


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
def test_many_columns(kernels: Emulated, width: int) -> None:
    layer = make_layer([64], 11008, 128, [width], seed=width)
    x = make_input(8, 11008, torch.float16)
    layer.check(kernels.multiply(layer, x, [width], splits=4), x, [width])


@pytest.mark.parametrize("widths", [(2, 8, 5), (3, 3, 7), (4, 6, 2)])
def test_each_partition_has_its_own_width(kernels: Emulated, widths: tuple[int, ...]) -> None:
    layer = make_layer([100, 30, 64], 320, 64)
    x, bias = make_input(5, 320, torch.bfloat16), make_input(1, 194, torch.bfloat16, seed=1)[0]
    layer.check(kernels.multiply(layer, x, widths, bias, splits=2), x, widths, bias)


@pytest.mark.parametrize("width", WIDTHS)
def test_planes_past_the_active_width_do_not_matter(kernels: Emulated, width: int) -> None:
    layer = make_layer([70], 320, 64)
    x = make_input(3, 320, torch.float16)
    expected = kernels.multiply(layer, x, [width])
    poisoned = layer.planes.clone()
    poisoned[:, :, width:] = 255
    assert torch.equal(kernels.multiply(layer, x, [width], planes=poisoned), expected)
    assert torch.equal(kernels.multiply(layer, x, [width], planes=layer.planes[:, :, :width].contiguous()), expected)


@pytest.mark.parametrize("width", [0, 1, 5, 9])
def test_a_width_without_decoders_gives_no_number(kernels: Emulated, width: int) -> None:
    layer = make_layer([20], 128, 64, [2, 4, 8])
    assert kernels.multiply(layer, make_input(3, 128, torch.float16), [width])[:, 0].isnan().all()


def test_a_token_with_nan_leaves_the_others_alone(kernels: Emulated) -> None:
    layer = make_layer([40], 192, 64)
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
def test_dequantized_weights(kernels: Emulated, width: int, group_size: int, dtype: torch.dtype) -> None:
    for columns in (40, 320, 1088):
        layer = make_layer([70, 30], columns, group_size, seed=width)
        result = kernels.dequantize(layer, [width, 3], dtype).double()
        expected, absolute = layer.weights([width, 3])
        tolerance = expected.abs() * ROUNDING[dtype] + absolute * 2**-22
        assert ((result[:, :columns] - expected).abs() <= tolerance).all()
        assert result.isfinite().all()  # what is past the columns meets zeros


def test_dequantized_weights_of_a_width_without_decoders(kernels: Emulated) -> None:
    layer = make_layer([70], 128, 64, [2, 8])
    assert kernels.dequantize(layer, [5], torch.float16).isnan().all()


CHECKS = [
    {"schedule": seed, "async_early": early, "racecheck": "warp"} for seed in (1, 2, 3) for early in (False, True)
]


@pytest.mark.parametrize("options", CHECKS)
@pytest.mark.parametrize("width", WIDTHS)
def test_order_of_warps_and_copies_does_not_matter(kernels: Emulated, width: int, options: dict) -> None:
    for group_size, dtype, tokens in ((64, torch.float16, 9), (128, torch.bfloat16, 3)):
        layer = make_layer([70, 30], 1400, group_size, seed=width)
        x = make_input(tokens, 1400, dtype)
        expected = kernels.multiply(layer, x, [width, 4], splits=2)
        assert torch.equal(kernels.multiply(layer, x, [width, 4], splits=2, **options), expected)


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
    "sums before all blocks have come": ("decode.cuh", "== gridDim.y - 1;", "== 0;"),
    "arrivals not reset": ("decode.cuh", "        *arrivals = 0;\n", ""),
    "wrong group": ("stage.cuh", "step_ >> shape_.group_shift", "step_ >> (shape_.group_shift + 1)"),
    "groups past the last": ("stage.cuh", "lane_ / 16, shape_.groups - 1)", "lane_ / 16, shape_.groups)"),
    "tile past the last": ("stage.cuh", "(tile == 0 || !both ? 0 : tile_bytes_)", "(tile == 0 ? 0 : tile_bytes_)"),
    "token past the last": ("stage.cuh", "lane / 4, shape.tokens - 1)", "lane / 4, shape.tokens)"),
    "row past the last": ("decode.cuh", "if (partition.first_row + row <", "if (partition.first_row + row <="),
    "wrong stage": ("multiply.cuh", "        free = current;\n", ""),
    "wrong mask": ("dequantize.cuh", "kOddFields = 0xcccccccc", "kOddFields = 0xccccccc4"),
    "wrong exponent": ("dequantize.cuh", "- last_of(q) + below", "- last_of(q) + below + q / 7"),
    "wrong turn": ("dequantize.cuh", "upper, kUpper), 31)", "upper, kUpper), 1)"),
    "constants without the lower part": ("multiply.cuh", "magic |= 1u", "magic |= 0u"),
}


def run_checks(kernels: Emulated) -> None:
    def check(layer: Layer, tokens: int, widths: list[int], **options: object) -> None:
        x = make_input(tokens, layer.codes.shape[1], torch.float16)
        layer.check(kernels.multiply(layer, x, widths, **options), x, widths)

    race = {"racecheck": "warp", "schedule": 1}
    check(make_layer([64], 832, 256, [4, 8]), 7, [8], **race)
    check(make_layer([64], 2600, 128, [2, 3]), 7, [3], splits=2, **race, async_early=True)
    check(make_layer([64], 2600, 128, [2, 3]), 3, [2], **race)
    for seed in range(4):
        check(make_layer([70, 30], 1600, 64, [4, 5]), 5, [4, 5], splits=2, racecheck="warp", schedule=seed)


@pytest.mark.slow
@pytest.mark.parametrize("mutation", ["none", *MUTATIONS])
def test_broken_kernels_are_noticed(mutation: str, tmp_path: Path) -> None:
    skip_without_tools()
    sources = tmp_path / "csrc"
    shutil.copytree(SOURCES / "cuda", sources / "cuda")
    instances = sources / "cuda" / "instances.h"
    lines = instances.read_text().splitlines()
    kept = [line.rstrip("\\ ") for line in lines if "float16_8_1" in line or "_float16_8_2" in line]
    kept = [line for line in kept if "bfloat16" not in line]
    instances.write_text(
        "#pragma once\n#define MATQUANT_CUDA_INSTANCES(INSTANCE) "
        + " ".join(kept)
        + "\n#define MATQUANT_CUDA_DEQUANTIZERS(INSTANCE)\n"
    )
    if mutation != "none":
        name, before, after = MUTATIONS[mutation]
        file = sources / "cuda" / name
        text = file.read_text()
        assert before in text, f"{name} has no longer what is to be changed"
        file.write_text(text.replace(before, after))
    kernels = Emulated(compile_ptx(tmp_path, "sm_80", sources))
    if mutation == "none":
        run_checks(kernels)
        return
    expect_failure(lambda: run_checks(kernels))


def expect_failure(check: Callable[[], None]) -> None:
    """A wrong result, or what the emulator finds: races, memory that is not there or not written."""
    try:
        check()
    except Exception as error:
        if not isinstance(error, AssertionError) and type(error).__name__ != "EmuError":
            raise
    else:
        pytest.fail("the broken kernel passed")
