"""The definition in PyTorch, against float64 and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.kernels.random_layers import KINDS, ROUNDING, make_input, make_layer
from vllm_matquant.checkpoint.spec import WIDTHS
from vllm_matquant.kernels import reference
from vllm_matquant.kernels.support import DTYPES, REFERENCE


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_linear_on_the_disk_form(width, dtype):
    layer = make_layer([21], 72, 32)
    x, bias = make_input(5, 72, dtype), make_input(1, 21, dtype, seed=1)[0]
    affine = layer.decoders[width].affine
    result = reference.linear(x, layer.codes >> (8 - width), affine.scale, affine.offset, bias, group_size=32)
    layer.check(result, x, [width], bias, rounds=False)


@pytest.mark.parametrize("widths", [(2, 8, 5), (3, 3, 7), (4, 6, 2)])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_operator_takes_what_the_kernels_take(kind, widths):
    layer = make_layer([21, 3, 16], 70, 32, kind=kind, kernel=REFERENCE)
    x, bias = make_input(4, 70), make_input(1, 40, seed=1)[0]
    layer.check(layer.run(x, widths, bias), x, widths, bias, rounds=False)
    torch.library.opcheck(torch.ops.matquant.reference_linear.default, (x, layer.weight.handle, 40, bias))


def test_operator_refuses_other_features():
    layer = make_layer([21], 70, 32, kernel=REFERENCE)
    with pytest.raises(ValueError, match="found 70 of x and 20 of the result, expected the weight's 70 and 21"):
        REFERENCE.linear(make_input(4, 70), layer.weight.handle, 20)


@pytest.mark.parametrize("activation_bits", [8, 16])
@pytest.mark.parametrize(("columns", "group_size"), [(9, 4), (96, 32), (300, 300), (416, 96)])
def test_activations_are_rounded_as_kernels_do(columns, group_size, activation_bits):
    layer = make_layer([20], columns, group_size).rounding_to(activation_bits)
    x = make_input(7, columns)
    rounded = reference.round_activations(x, group_size, reference.Rounding(activation_bits))
    layer.check(layer.run(x, [5]), rounded, [5], rounds=False)
    with pytest.raises(AssertionError, match="times the tolerance"):
        layer.check(layer.run(x, [5]), x, [5], rounds=False)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("columns", "group_size"), [(640, 64), (416, 96), (1024, 128)])
def test_default_rounding_is_that_of_the_kernels(columns, group_size, width):
    layer = make_layer([20], columns, group_size)
    x = make_input(9, columns, torch.float16)
    rounded = reference.round_activations(x.float(), group_size, reference.default_rounding(width)).double().numpy()
    expected = rounded @ layer.weights([width]).T
    magnitude = np.abs(rounded) @ layer.weights([width], absolute=True).T
    error = np.abs(layer.run(x, [width]).double().numpy() - expected)
    assert (error <= magnitude * 2**-21 + np.abs(expected) * ROUNDING[x.dtype]).all()
