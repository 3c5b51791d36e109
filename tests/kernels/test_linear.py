"""The product on the CPU, for the instruction set in use (test_isa.py runs this file for the others)."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.kernels.random_layers import EVEN_WIDTHS, FORMS, KINDS, make_input, make_layer, stored_segment
from vllm_matquant.checkpoint.decoder import AFFINE_FLOAT16, FLOAT16, INT8, Decoder
from vllm_matquant.checkpoint.spec import WIDTHS
from vllm_matquant.kernels import ops
from vllm_matquant.kernels.support import DTYPES

ROWS = (*range(18), 31, 33, 64, 65)
FEW_ROWS = (1, 2, 7, 8, 9, 30)
SHAPES = [  # output_sizes, columns, group size
    ([1], 8, 8),
    ([15], 36, 12),
    ([16], 64, 64),
    ([33], 9, 4),
    ([77], 1032, 64),
    ([16], 130, 32),
    ([17], 416, 96),
    ([20], 300, 300),
    ([48], 7, 512),
    ([40], 256, 128),
]


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def test_the_instruction_set_is_the_fastest_or_the_one_that_is_forced():
    assert ops.cpu_isa() == os.environ.get("MATQUANT_CPU_ISA", ops.cpu_isas()[-1])


@pytest.mark.parametrize(("width", "decoder_widths"), FORMS)
@pytest.mark.parametrize(("output_sizes", "columns", "group_size"), SHAPES)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_product(kind, output_sizes, columns, group_size, width, decoder_widths):
    layer = make_layer(output_sizes, columns, group_size, width, decoder_widths, kind)
    some_rows = ROWS if kind == AFFINE_FLOAT16 else FEW_ROWS
    for dtype in DTYPES:
        inputs = [make_input(rows, columns, dtype, seed=rows) for rows in some_rows]
        result = torch.cat([layer.run(x, [width]) for x in inputs])
        layer.check(result, torch.cat(inputs), [width])


@pytest.mark.parametrize(("width", "decoder_widths"), FORMS)
@pytest.mark.parametrize(("output_sizes", "columns", "group_size"), SHAPES)
@pytest.mark.parametrize("activation_bits", [8, 16, 24])
def test_bits_of_activations(activation_bits, output_sizes, columns, group_size, width, decoder_widths):
    kind = KINDS[width % 2]
    layer = make_layer(output_sizes, columns, group_size, width, decoder_widths, kind).rounding_to(activation_bits)
    for dtype in DTYPES:
        inputs = [make_input(rows, columns, dtype, seed=rows) for rows in FEW_ROWS]
        result = torch.cat([layer.run(x, [width]) for x in inputs])
        layer.check(result, torch.cat(inputs), [width], activation_bits=activation_bits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [511, 512, 513, 1100])
def test_more_rows_than_a_block(rows, dtype):
    layer = make_layer([35], 200, 64)
    x = make_input(rows, 200, dtype)
    layer.check(layer.run(x, [5]), x, [5])


@pytest.mark.parametrize("activation_bits", [8, 16, 24])
def test_the_largest_codes_and_activations_do_not_overflow(activation_bits):
    layer = make_layer([16], 1024, 1024).rounding_to(activation_bits)
    layer.codes.fill_(255)
    layer.planes.fill_(255)
    for sign in (1, -1):
        x = torch.full((9, 1024), sign * 32639 / 32768)
        layer.check(layer.run(x, [8]), x, [8], activation_bits=activation_bits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("activation_bits", [8, 16, 24])
@pytest.mark.parametrize("exponent", [-140, -120, -90, -20, 100])
def test_scales_of_activations(exponent, activation_bits, dtype):
    """From values that count as zero, below 2^-100, to large ones; far apart from one group to the next."""
    layer = make_layer([20], 96, 32).rounding_to(activation_bits)
    x = make_input(5, 96).double() * torch.tensor([1.0, 2.0**-30, 0.0]).repeat_interleave(32)
    x = (x * 2.0**exponent).to(dtype)
    layer.check(layer.run(x, [6]), x, [6], activation_bits=activation_bits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("widths", "decoder_widths"),
    [
        ((2, 8, 3), WIDTHS),
        ((4, 4, 2), WIDTHS),
        ((7, 5, 6), (5, 6, 7)),
        ((4, 7, 2), (2, 4, 7)),
        ((8, 2, 8), EVEN_WIDTHS),
        ((4, 6, 2), EVEN_WIDTHS),
    ],
)
@pytest.mark.parametrize("rows", [1, 9])
def test_each_partition_has_its_own_width(rows, widths, decoder_widths, dtype):
    layer = make_layer([33, 7, 16], 96, 32, decoder_widths=decoder_widths)
    x = make_input(rows, 96, dtype)
    layer.check(layer.run(x, widths), x, widths)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 20])
def test_bias(rows, dtype):
    layer = make_layer([18, 5], 64, 32)
    x, bias = make_input(rows, 64, dtype), make_input(1, 23, dtype, seed=1)[0]
    layer.check(layer.run(x, [3, 6], bias), x, [3, 6], bias)


def test_leading_dimensions_and_strides():
    layer = make_layer([20], 64, 32)
    x = make_input(6, 64)
    flat = layer.run(x, [4])
    assert torch.equal(layer.run(x.view(2, 3, 64), [4]), flat.view(2, 3, 20))
    assert torch.equal(layer.run(x[0], [4]), flat[0])
    assert torch.equal(layer.run(x.t().contiguous().t(), [4]), flat)
    assert torch.equal(layer.run(torch.cat([x, x], 1)[:, :64], [4]), flat)


def test_no_input_features():
    bias = make_input(1, 20)[0]
    for kind in KINDS:
        layer = make_layer([20], 0, 8, kind=kind)
        assert torch.equal(layer.run(torch.empty(3, 0), [4], bias), bias.expand(3, 20))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("width", "decoder_widths"), [(width, widths) for width, widths in FORMS if max(widths) == WIDTHS[-1]]
)
def test_planes_past_the_active_width_change_nothing(width, decoder_widths, dtype):
    layer = make_layer([40], 264, 64, decoder_widths=decoder_widths)
    for rows in (1, 20):
        x = make_input(rows, 264, dtype)
        expected = bytes_of(layer.run(x, [width]))
        poisoned = layer.planes.clone()
        poisoned[width:] = torch.randint(0, 256, poisoned[width:].shape)
        assert bytes_of(layer.with_tensors(planes=poisoned).run(x, [width])) == expected


def test_planes_past_the_active_width_and_memory_past_the_input_are_not_read():
    """They lie in memory that may not be read: a read of one byte there ends the process."""
    program = """
import ctypes, mmap
import torch
from tests.kernels.random_layers import EVEN_WIDTHS, make_input, make_layer
from vllm_matquant.checkpoint.spec import WIDTHS

libc = ctypes.CDLL(None, use_errno=True)

def map_memory(size):
    memory = mmap.mmap(-1, size)
    return memory, ctypes.addressof(ctypes.c_char.from_buffer(memory))

def forbid(address, size):
    assert libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), 0) == 0

input_memory, input_address = map_memory(17 * mmap.PAGESIZE)
forbid(input_address + 16 * mmap.PAGESIZE, mmap.PAGESIZE)
for decoder_widths in (WIDTHS, EVEN_WIDTHS):
    layer = make_layer([256], 128 * mmap.PAGESIZE // 4096, 32, decoder_widths=decoder_widths)
    plane_bytes = layer.planes[0].nbytes
    assert plane_bytes % mmap.PAGESIZE == 0
    memory, address = map_memory(layer.planes.nbytes)
    planes = torch.frombuffer(memory, dtype=torch.uint8).view(layer.planes.shape)
    planes.copy_(layer.planes)
    guarded = layer.with_tensors(planes=planes)
    for width in reversed(decoder_widths):
        if width < 8:
            forbid(address + width * plane_bytes, (8 - width) * plane_bytes)
        for dtype in (torch.float32, torch.bfloat16):
            for rows in (1, 20):
                values = make_input(rows, layer.codes.shape[1], dtype)
                begin = 16 * mmap.PAGESIZE - values.nbytes
                x = torch.frombuffer(input_memory, dtype=dtype, count=values.numel(), offset=begin).view(values.shape)
                x.copy_(values)
                assert torch.equal(guarded.run(x, [width]), layer.run(values, [width]))
    print("read", width)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "read 2\n" * 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_depend_on_neither_threads_nor_other_rows(dtype):
    layer = make_layer([150, 70], 384, 64)
    x = make_input(150, 384, dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(layer.run(x, [3, 6]))
    finally:
        torch.set_num_threads(before)
    assert len({bytes_of(result) for result in results}) == 1
    for row in (0, 7, 128, 149):
        assert bytes_of(layer.run(x[row : row + 1], [3, 6])) == bytes_of(results[0][row : row + 1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_with_nan_leaves_the_others_alone(dtype):
    layer = make_layer([40], 96, 32)
    x = make_input(19, 96, dtype)
    expected = layer.run(x, [4])
    spoiled = x.clone()
    spoiled[5] = float("nan")
    result = layer.run(spoiled, [4])
    assert result[5].isnan().all()
    others = torch.arange(19) != 5
    assert torch.equal(result[others], expected[others])


def test_float16_decoders_are_read_exactly():
    special = torch.tensor([0.0, 6e-8, 6.1e-5, -6.1e-5, 65504.0, -65504.0, -0.0, 1.0, 1 / 3, 5e-7])
    offset, scale = (values.repeat(2)[:16].half().view(16, 1) for values in (special, special.flip(0)))
    check_decoder(Decoder(FLOAT16, 8, {"scale": scale, "offset": offset}))


@pytest.mark.parametrize("width", [2, 3, 4])
def test_8_bit_decoders_are_read_exactly(width):
    scale = torch.tensor([0, 1, 127, 128, 254, 255, 7, 85] * 2, dtype=torch.uint8).view(16, 1)
    centre = torch.tensor([-128, -127, -1, 0, 1, 127, 5, -77] * 2, dtype=torch.int8).view(16, 1)
    step = torch.tensor([[0.0, 1e30], [1e-30, 3.0], [1.0, 0.0], [255.0, 1 / 3]]).repeat_interleave(4, 0)
    check_decoder(Decoder(INT8, width, {"scale": scale, "centre": centre, "step": step.bfloat16()}))


def check_decoder(decoder: Decoder) -> None:
    """A layer of 16 rows and one group with this decoder, multiplied with single activations."""
    layer = make_layer([16], 8, 8)
    segment = stored_segment(layer.codes, layer.decoders | {decoder.width: decoder}, [16], [decoder.width])
    weight = layer.weight.kernel.pack([segment], 8, 8, "cpu")
    layer = replace(layer, decoders={decoder.width: decoder}, weight=weight)
    x = torch.eye(8)
    layer.check(layer.run(x, [decoder.width]), x, [decoder.width])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(2, 64, dtype=torch.float64)}, "x: found dtype Double, expected BFloat16, Half or Float"),
        ({"x": torch.tensor(1.0)}, "x: found a scalar, expected at least one dimension"),
        ({"x": torch.zeros(2, 32)}, "x: found 32 columns, expected the weight's 64"),
        ({"out_features": 51}, "out_features: found 51, expected the weight's 52"),
        ({"handle": torch.zeros(1)}, "weight: found dtype Float, expected Long"),
        ({"handle": torch.zeros(2).long()}, r"weight: found shape \[2\], expected \[1\]"),
        ({"bias": torch.zeros(51)}, r"bias: found shape \[51\], expected \[52\]"),
        ({"bias": torch.zeros(52).half()}, "bias: found dtype Half, expected Float"),
    ],
)
def test_contradicting_arguments(changed, message):
    layer = make_layer([20, 32], 64, 32)
    arguments = {"x": make_input(2, 64), "handle": layer.weight.handle, "out_features": 52, "bias": None}
    with pytest.raises(RuntimeError, match=message):
        ops.linear(**(arguments | changed))


def test_operator_is_registered_soundly():
    layer = make_layer([20, 32], 64, 32)
    for bias in (None, make_input(1, 52)[0]):
        torch.library.opcheck(torch.ops.matquant.linear.default, (make_input(3, 64), layer.weight.handle, 52, bias))
