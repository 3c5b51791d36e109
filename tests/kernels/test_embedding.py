"""Rows of an embedding, against the weights in float64; planes and rows that are not asked for do not matter."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.random_layers import EVEN_WIDTHS, FORMS, KINDS, Layer, make_layer
from vllm_matquant.checkpoint.spec import WIDTHS
from vllm_matquant.kernels import ops
from vllm_matquant.kernels.cpu_layout import split_planes
from vllm_matquant.kernels.support import CPU, DTYPES, REFERENCE

SHAPES = [(1, 8, 8), (16, 64, 32), (53, 70, 32), (40, 41, 64), (160, 96, 96)]  # rows, columns, group size

both_kernels = pytest.mark.parametrize("kernel", [CPU, REFERENCE], ids=lambda kernel: kernel.name)
both_kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


def look_up(layer: Layer, rows: torch.Tensor, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    layer.weight.set_active([width])
    return layer.weight.kernel.embedding(rows, layer.weight.handle, layer.codes.shape[1], dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("width", "decoder_widths"), FORMS)
@both_kinds
@both_kernels
def test_every_row_at_every_width(kernel, kind, shape, width, decoder_widths):
    layer = make_layer([shape[0]], *shape[1:], width, decoder_widths, kind, kernel)
    result = look_up(layer, torch.arange(shape[0]), width)
    expected = torch.from_numpy(layer.weights([width]))
    assert result.shape == expected.shape
    # One multiplication and one addition in float32.
    tolerance = torch.from_numpy(layer.weights([width], absolute=True)) * 2**-23
    assert ((result.double() - expected).abs() <= tolerance).all()
    assert torch.equal(result, look_up(layer.reading(REFERENCE), torch.arange(shape[0]), width))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [[], [3], [[52, 0, 17], [17, 16, 15]]])
@both_kernels
def test_rows_come_in_the_shape_and_dtype_asked_for(kernel, rows, dtype):
    layer = make_layer([53], 70, 32, kernel=kernel)
    rows = torch.tensor(rows, dtype=torch.int64)
    every = look_up(layer, torch.arange(53), 5)
    result = look_up(layer, rows, 5, dtype)
    assert result.dtype == dtype
    assert torch.equal(result, every[rows].to(dtype))


def test_many_rows_are_divided_among_threads():
    layer = make_layer([53], 70, 32)
    rows = torch.arange(2000) % 53
    assert torch.equal(look_up(layer, rows, 5), look_up(layer, torch.arange(53), 5)[rows])


@pytest.mark.parametrize("decoder_widths", [WIDTHS, EVEN_WIDTHS])
@both_kernels
def test_only_the_bytes_of_the_row_matter(kernel, decoder_widths):
    layer = make_layer([53], 70, 32, decoder_widths=decoder_widths, kernel=kernel)
    expected = look_up(layer, torch.tensor([21]), 8)
    spoiled = torch.full_like(layer.planes, 255)
    mine = slice(20, 24)  # row 21 is the sixth of tile row 1
    paired = decoder_widths == EVEN_WIDTHS
    for target, field in zip(split_planes(spoiled, paired), split_planes(layer.planes, paired), strict=True):
        target[1, :, :, mine] = field[1, :, :, mine]
    assert torch.equal(look_up(layer.with_tensors(planes=spoiled), torch.tensor([21]), 8), expected)


@pytest.mark.parametrize(("width", "decoder_widths"), FORMS)
@both_kernels
def test_planes_past_the_active_width_do_not_matter(kernel, width, decoder_widths):
    layer = make_layer([53], 70, 32, decoder_widths=decoder_widths, kernel=kernel)
    rows = torch.tensor([0, 31, 52])
    expected = look_up(layer, rows, width)
    layer.planes[width:] = 255
    assert torch.equal(look_up(layer, rows, width), expected)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@both_kernels
def test_one_compiled_graph_serves_every_width(kernel, backend):
    layers = [make_layer([53], 70, 32, width, [width], kernel=kernel) for width in WIDTHS]
    layers.append(make_layer([53], 70, 32, kernel=kernel))
    rows = torch.tensor([[7, 52], [33, 0]])

    @torch.compile(fullgraph=True, backend=backend)
    def model(rows: torch.Tensor, handle: torch.Tensor) -> torch.Tensor:
        return kernel.embedding(rows, handle, 70, torch.float32) * 2

    for index, layer in enumerate(layers):
        for width in layer.weight.segments[0].resident.decoder_widths:
            expected = look_up(layer, rows, width) * 2
            with torch.compiler.set_stance("fail_on_recompile" if index else "default"):
                assert torch.equal(model(rows, layer.weight.handle), expected)


@both_kernels
def test_a_layer_with_partitions_and_other_columns_are_refused(kernel):
    layer = make_layer([16, 20], 32, 32, kernel=kernel)
    with pytest.raises((RuntimeError, ValueError), match=r"weight: found .* partition"):
        kernel.embedding(torch.tensor([0]), layer.weight.handle, 32, torch.float32)
    layer = make_layer([16], 32, 32, kernel=kernel)
    with pytest.raises((RuntimeError, ValueError), match="columns: found 31, expected the weight's 32"):
        kernel.embedding(torch.tensor([0]), layer.weight.handle, 31, torch.float32)


@pytest.mark.parametrize(
    ("rows", "dtype", "message"),
    [
        (torch.tensor([0, 16]), torch.float32, "rows: found 16, expected 0 to 15"),
        (torch.tensor([-1]), torch.float32, "rows: found -1, expected 0 to 15"),
        (torch.tensor([1.0]), torch.float32, "rows: found dtype Float, expected Long"),
        (torch.tensor([1]), torch.float64, "dtype: found Double, expected BFloat16, Half or Float"),
    ],
)
def test_the_library_refuses_what_is_not_there(rows, dtype, message):
    layer = make_layer([16], 32, 32)
    with pytest.raises(RuntimeError, match=message):
        ops.embedding(rows, layer.weight.handle, 32, dtype)


def test_operator_is_registered_soundly():
    layer = make_layer([20], 70, 32)
    torch.library.opcheck(
        torch.ops.matquant.embedding.default, (torch.tensor([3, 19]), layer.weight.handle, 70, torch.bfloat16)
    )
