"""The operator of a mixture of experts, against each expert's product in float64, row by row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.kernels.random_layers import Layer, make_input, make_layer
from vllm_matquant.checkpoint.spec import WIDTHS
from vllm_matquant.kernels import ops
from vllm_matquant.kernels.experts import ACTIVATIONS, experts
from vllm_matquant.kernels.kernel import Kernel
from vllm_matquant.kernels.support import CPU, REFERENCE

HIDDEN, INNER, EXPERTS = 64, 32, 5
REFERENCE_LOOP = replace(CPU, multiply_by_group=None)  # one group after the other
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("counts", [(1, 0, 1, 2), (600, 7, 0, 33), (0, 0, 0, 9)])
def test_groups_have_the_bytes_of_each_product(counts: tuple[int, ...], dtype: torch.dtype) -> None:
    """Whatever its neighbours' numbers of rows and widths are, and however many blocks of tokens there are."""
    widths = [8, 2, 5, 3]
    layers = [make_layer([24, 16], 96, 32, seed, WIDTHS) for seed in range(len(counts))]
    for layer, width in zip(layers, widths, strict=True):
        layer.weight.set_active([width, 4])
    handles = torch.stack([layer.weight.handle for layer in layers])
    groups = torch.arange(len(counts), dtype=torch.int32).repeat_interleave(torch.tensor(counts))
    x = make_input(len(groups), 96, dtype, 0)
    found = CPU.grouped_linear(x, handles, groups, None, 40)
    expected = [ops.linear(x[groups == group], layers[group].weight.handle, 40) for group in range(len(counts))]
    assert torch.equal(found, torch.cat(expected))
    torch.testing.assert_close(found, REFERENCE_LOOP.grouped_linear(x, handles, groups, None, 40), rtol=0, atol=0)


@pytest.mark.parametrize("seed", range(2))
def test_groups_with_slots_have_the_bytes_of_each_product(seed: int) -> None:
    slices = [[8], [2], [5]]
    layers = [make_layer([40], 64, 32, 10 * seed + index, WIDTHS) for index in range(3)]
    readers = [layer.weight.readers(slices) for layer in layers]  # must outlive their handles
    handles = torch.tensor([[int(reader.handle) for reader in own] for own in readers])
    keys = torch.randint(9, (70,), generator=torch.Generator().manual_seed(seed)).sort().values.int()
    groups, slots = keys // 3, keys % 3
    x = make_input(70, 64, torch.bfloat16, seed)
    found = CPU.grouped_linear(x, handles, groups, slots, 40)
    for group, own in enumerate(readers):
        for slot, reader in enumerate(own):
            rows = (groups == group) & (slots == slot)
            assert torch.equal(found[rows], ops.linear(x[rows], reader.handle, 40))
    assert torch.equal(found, REFERENCE_LOOP.grouped_linear(x, handles, groups, slots, 40))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"groups": [1, 0, 1]}, "groups: found 0 for row 1, expected ascending ones below 2"),
        ({"groups": [0, 1, 2]}, "groups: found 2 for row 2, expected ascending ones below 2"),
        ({"groups": [0, 1]}, r"groups: found shape \[2\], expected \[3\]"),
        ({"slots": [0, 1, 0]}, "slots: found 1 for row 1, expected one that has a weight"),
        ({"slots": [0, 0, -1]}, "slots: found -1 for row 2, expected one that has a weight"),
        ({"out_features": 32}, "out_features: found 32, expected the weight's 40"),
    ],
)
def test_groups_that_contradict_the_weights(changed: dict[str, Any], message: str) -> None:
    layers = [make_layer([40], 64, 32, seed, WIDTHS) for seed in range(2)]
    handles = torch.tensor([[int(layer.weight.handle), 0] for layer in layers])
    given = {"groups": [0, 0, 1], "slots": [0, 0, 0], "out_features": 40} | changed
    groups, slots = (torch.tensor(given[name], dtype=torch.int32) for name in ("groups", "slots"))
    with pytest.raises(RuntimeError, match=message):
        ops.grouped_linear(torch.zeros(3, 64), handles, groups, slots, given["out_features"])


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
