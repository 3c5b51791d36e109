"""Rows of an embedding, against the weights in float64; planes and rows that are not asked for do not matter."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.random_layers import EVEN_WIDTHS, FORMS, Layer, make_layer
from vllm_matquant.checkpoint.spec import WIDTHS
from vllm_matquant.kernels.embedding import embedding
from vllm_matquant.kernels.layout import split_planes
from vllm_matquant.kernels.support import DTYPES

SHAPES = [(1, 8, 8), (16, 64, 32), (53, 70, 32), (40, 41, 64), (160, 96, 96)]  # rows, columns, group size


def look_up(layer: Layer, rows: torch.Tensor, width: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    columns = layer.codes.shape[1]
    widths = layer.decoder_widths
    return embedding(rows, layer.planes, layer.decoders, width, widths, columns, layer.group_size, dtype)


def active(width: int) -> torch.Tensor:
    return torch.tensor([width], dtype=torch.int32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("width", "decoder_widths"), FORMS)
def test_every_row_at_every_width(shape, width, decoder_widths):
    layer = make_layer([shape[0]], *shape[1:], width, decoder_widths)
    result = look_up(layer, torch.arange(shape[0]), active(width))
    expected = torch.from_numpy(layer.weights([width]))
    assert result.shape == expected.shape
    # One multiplication and one addition in float32.
    tolerance = torch.from_numpy(layer.weights([width], absolute=True)) * 2**-23
    assert ((result.double() - expected).abs() <= tolerance).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [[], [3], [[52, 0, 17], [17, 16, 15]]])
def test_rows_come_in_the_shape_and_dtype_asked_for(rows, dtype):
    layer = make_layer([53], 70, 32)
    rows = torch.tensor(rows, dtype=torch.int64)
    every = look_up(layer, torch.arange(53), active(5))
    result = look_up(layer, rows, active(5), dtype)
    assert result.dtype == dtype
    assert torch.equal(result, every[rows].to(dtype))


@pytest.mark.parametrize("decoder_widths", [WIDTHS, EVEN_WIDTHS])
def test_only_the_bytes_of_the_row_matter(decoder_widths):
    layer = make_layer([53], 70, 32, decoder_widths=decoder_widths)
    expected = look_up(layer, torch.tensor([21]), active(8))
    spoiled = torch.full_like(layer.planes, 255)
    mine = slice(20, 24)  # row 21 is the sixth of tile row 1
    paired = decoder_widths == EVEN_WIDTHS
    for target, field in zip(split_planes(spoiled, paired), split_planes(layer.planes, paired), strict=True):
        target[1, :, :, mine] = field[1, :, :, mine]
    layer.planes = spoiled
    assert torch.equal(look_up(layer, torch.tensor([21]), active(8)), expected)


@pytest.mark.parametrize(("width", "decoder_widths"), FORMS)
def test_planes_past_the_active_width_do_not_matter(width, decoder_widths):
    layer = make_layer([53], 70, 32, decoder_widths=decoder_widths)
    rows = torch.tensor([0, 31, 52])
    expected = look_up(layer, rows, active(width))
    layer.planes[width:] = 255
    assert torch.equal(look_up(layer, rows, active(width)), expected)
    layer.planes = layer.planes[:width].clone()
    assert torch.equal(look_up(layer, rows, active(width)), expected)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_one_compiled_graph_serves_every_width(backend):
    layer = make_layer([53], 70, 32)
    rows, width = torch.tensor([[7, 52], [33, 0]]), active(2)
    compiled = torch.compile(look_up, fullgraph=True, backend=backend)
    for value in (2, 7, 4, 8):
        width.fill_(value)
        expected = torch.from_numpy(layer.weights([value]))[rows].float()
        with torch.compiler.set_stance("fail_on_recompile" if value != 2 else "default"):
            torch.testing.assert_close(compiled(layer, rows, width), expected, rtol=1e-6, atol=1e-6)
    width.fill_(9)
    with pytest.raises(RuntimeError, match="active_width: expected one of"):
        compiled(layer, rows, width)


@pytest.mark.parametrize("width", [0, 1, 9])
def test_a_width_without_a_decoder_is_refused(width):
    with pytest.raises(RuntimeError, match=r"active_width: expected one of \[2, 3, 4, 5, 6, 7, 8\]"):
        look_up(make_layer([16], 32, 32), torch.tensor([0]), active(width))
