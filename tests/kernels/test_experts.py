"""The operator of a mixture of experts, against each expert's product in float64, row by row."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.kernels.random_layers import Layer, make_input, make_layer
from vllm_matquant.checkpoint.spec import WIDTHS
from vllm_matquant.kernels.experts import ACTIVATIONS, experts
from vllm_matquant.kernels.kernel import Kernel
from vllm_matquant.kernels.support import CPU, REFERENCE

HIDDEN, INNER, EXPERTS = 64, 32, 5
FUNCTIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
}


def make_experts(seed: int, kernel: Kernel = CPU) -> list[tuple[Layer, Layer]]:
    """Gate and up projection, and down projection, of each expert."""
    return [
        (
            make_layer([INNER, INNER], HIDDEN, 32, 100 * seed + index, WIDTHS, kernel=kernel),
            make_layer([HIDDEN], INNER, 32, 100 * seed + index + 50, WIDTHS, kernel=kernel),
        )
        for index in range(EXPERTS)
    ]


def expected(
    layers: list[tuple[Layer, Layer]],
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    widths: list[list[int]],
) -> np.ndarray:
    """float64 [rows, HIDDEN], each row at its own widths of gate, up and down projection."""
    rows = []
    for row, (gate, up, down) in zip(x.double().numpy(), widths, strict=True):
        total = np.zeros(HIDDEN)
        for weight, expert in zip(weights[len(rows)].tolist(), ids[len(rows)].tolist(), strict=True):
            if expert >= 0:
                outer, inner = layers[expert]
                both = outer.weights([gate, up]) @ row
                total += weight * (inner.weights([down]) @ (FUNCTIONS["silu"](both[:INNER]) * both[INNER:]))
        rows.append(total)
    return np.stack(rows)


def routing(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and ids of two experts of each row; the last expert is hit by none, and one id is none."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(EXPERTS - 1, generator=generator)[:2] for _ in range(rows)])
    ids[0, 1] = -1
    return torch.rand(rows, 2, generator=generator), ids.to(torch.int32)


@pytest.mark.parametrize("kernel", [CPU, REFERENCE], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("seed", range(3))
def test_each_row_is_the_sum_of_its_experts(kernel: Kernel, seed: int) -> None:
    layers = make_experts(seed, kernel)
    handles = torch.stack([torch.stack([outer.weight.handle, down.weight.handle]) for outer, down in layers])
    x, (weights, ids) = make_input(9, HIDDEN, torch.float32, seed), routing(9, seed)
    for widths in ([8, 8, 8], [2, 5, 3]):
        for outer, down in layers:
            outer.weight.set_active(widths[:2])
            down.weight.set_active(widths[2:])
        found = experts(x, weights, ids, handles, INNER, "silu")
        wanted = expected(layers, x, weights, ids, [widths] * 9)
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("seed", range(3))
def test_each_row_at_its_own_widths(seed: int) -> None:
    layers = make_experts(seed)
    slices = [[8, 8, 8], [2, 3, 4], [5, 2, 6]]
    # Readers, which must outlive their handles, of each product of each expert.
    readers = [
        (outer.weight.readers([each[:2] for each in slices]), down.weight.readers([each[2:] for each in slices]))
        for outer, down in layers
    ]
    handles = torch.tensor([[[int(reader.handle) for reader in own] for own in pair] for pair in readers])
    x, (weights, ids) = make_input(11, HIDDEN, torch.float32, seed), routing(11, seed)
    slots = torch.randint(3, (14,), dtype=torch.int32, generator=torch.Generator().manual_seed(seed))
    found = experts(x, weights, ids, handles, INNER, "silu", slots)
    wanted = expected(layers, x, weights, ids, [slices[slot] for slot in slots[:11].tolist()])
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_graph_for_every_routing(dtype: torch.dtype) -> None:
    layers = make_experts(0)
    handles = torch.stack([torch.stack([outer.weight.handle, down.weight.handle]) for outer, down in layers])
    compiled = torch.compile(
        lambda *given: 2 * experts(*given, handles, INNER, "silu"), fullgraph=True, backend="eager"
    )
    for seed in range(3):
        x, (weights, ids) = make_input(6, HIDDEN, dtype, seed), routing(6, seed)
        assert torch.equal(compiled(x, weights, ids), 2 * experts(x, weights, ids, handles, INNER, "silu"))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_activations(name: str) -> None:
    x = torch.linspace(-6, 6, 100)
    np.testing.assert_allclose(ACTIVATIONS[name](x).numpy(), FUNCTIONS[name](x.double().numpy()), atol=1e-6)
