"""The definition in PyTorch, against float64 and by hand."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.random_layers import make_input, make_layer
from vllm_matquant.checkpoint.spec import WIDTHS
from vllm_matquant.kernels import reference
from vllm_matquant.kernels.support import DTYPES


def test_dequantize_by_hand():
    codes = torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8)
    scale, offset = torch.tensor([[2.0, 0.5]]).half(), torch.tensor([[-1.0, 4.0]]).half()
    assert reference.dequantize(codes, scale, offset).tolist() == [[-1.0, 1.0, 5.0, 5.5]]
    assert reference.dequantize(codes, scale, offset, group_size=3).tolist() == [[-1.0, 1.0, 3.0, 5.5]]


@pytest.mark.parametrize(("groups", "group_size"), [(3, None), (3, 2), (1, 3)])
def test_groups_must_cover_the_columns(groups, group_size):
    decoder = torch.ones(1, groups)
    with pytest.raises(ValueError, match=f"groups: found {groups}, expected"):
        reference.dequantize(torch.zeros(1, 4, dtype=torch.uint8), decoder, decoder, group_size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_linear_on_the_disk_form(width, dtype):
    layer = make_layer([21], 72, 32)
    x, bias = make_input(5, 72, dtype), make_input(1, 21, dtype, seed=1)[0]
    index = WIDTHS.index(width)
    codes = layer.codes >> (8 - width)
    result = reference.linear(x, codes, layer.scales[index], layer.offsets[index], bias, group_size=32)
    layer.check(result, x, [width], bias, rounds=False)


@pytest.mark.parametrize("widths", [(2, 8, 5), (3, 3, 7), (4, 6, 2)])
def test_operator_takes_what_the_kernels_take(widths):
    layer = make_layer([21, 3, 16], 70, 32)
    x = make_input(4, 70)
    arguments = layer.arguments(x, widths)
    layer.check(reference.reference_linear(**arguments), x, widths, rounds=False)
    torch.library.opcheck(torch.ops.matquant.reference_linear.default, tuple(arguments.values()))


@pytest.mark.parametrize(("width", "resident"), [(9, 8), (1, 8), (5, 4)])
def test_operator_refuses_widths_that_are_not_there(width, resident):
    layer = make_layer([21], 70, 32)
    arguments = layer.arguments(make_input(4, 70), [width]) | {"planes": layer.planes[:resident]}
    with pytest.raises(ValueError, match=f"active_width: found {width}, expected one of"):
        reference.reference_linear(**arguments)


@pytest.mark.parametrize("activation_bits", [8, 16])
@pytest.mark.parametrize(("columns", "group_size"), [(9, 4), (96, 32), (300, 300), (416, 96)])
def test_activations_are_rounded_as_kernels_do(columns, group_size, activation_bits):
    layer = make_layer([20], columns, group_size)
    x = make_input(7, columns)
    rounded = reference.round_activations(x, group_size, activation_bits)
    layer.check(layer.run(x, [5], activation_bits=activation_bits), rounded, [5], rounds=False)
    with pytest.raises(AssertionError, match="times the tolerance"):
        layer.check(layer.run(x, [5], activation_bits=activation_bits), x, [5], rounds=False)
