"""The Hessians that are collected while a block runs."""

from __future__ import annotations

import pytest
import torch

from vllm_matquant.quantize.columns import damp
from vllm_matquant.quantize.hessian import HessianCollector


class Block(torch.nn.Module):
    """Two layers that share an input, one that does not, one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = torch.nn.Linear(6, 5), torch.nn.Linear(6, 5, bias=False)
        self.output, self.idle = torch.nn.Linear(5, 6), torch.nn.Linear(5, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(self.query(x) * self.key(x))


def linears(block: Block) -> dict[str, torch.nn.Linear]:
    return {name: module for name, module in block.named_children() if isinstance(module, torch.nn.Linear)}


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
def test_second_moments(seed: int) -> None:
    torch.manual_seed(seed)
    block = Block()
    batches = [torch.randn(size, 7, 6) for size in (1, 3, 2)]
    collector = HessianCollector(linears(block))
    with collector.collecting():
        for batch in batches:
            block(batch)
    block(torch.randn(4, 7, 6))  # no longer seen
    x = torch.cat(batches).flatten(0, 1).double()
    products = (block.query(x.float()) * block.key(x.float())).double()
    for name, inputs in {"query": x, "key": x, "output": products}.items():
        expected = inputs.T @ inputs / len(inputs)
        torch.testing.assert_close(collector.hessian(name).double(), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
def test_tokens_count_by_their_weights(seed: int) -> None:
    torch.manual_seed(seed)
    block = Block()
    batches = [torch.randn(size, 7, 6) for size in (1, 3, 2)]
    shared, own = torch.rand(6, 7), torch.rand(6, 7)
    collector = HessianCollector(linears(block), {"query": shared, "key": shared, "output": own})
    with collector.collecting():
        for batch in batches:
            block(batch)
    x = torch.cat(batches).flatten(0, 1).double()
    products = (block.query(x.float()) * block.key(x.float())).double()
    for name, inputs, weights in (("query", x, shared), ("key", x, shared), ("output", products, own)):
        expected = (inputs.T * weights.flatten().double()) @ inputs / len(inputs)
        torch.testing.assert_close(collector.hessian(name).double(), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_equal_inputs_in_another_tensor_are_counted_for_themselves() -> None:
    layers = {name: torch.nn.Linear(4, 4) for name in ("first", "second")}
    collector = HessianCollector(layers)
    x = torch.randn(10, 4)
    with collector.collecting():
        layers["first"](x)
        layers["second"](2 * x)
        layers["first"](x)
    torch.testing.assert_close(collector.hessian("first"), x.T @ x / 10)
    torch.testing.assert_close(collector.hessian("second"), 4 * (x.T @ x) / 10)


@torch.no_grad()
def test_a_layer_that_no_token_reaches() -> None:
    block = Block()
    collector = HessianCollector(linears(block))
    with collector.collecting():
        block(torch.randn(2, 6))
    with pytest.raises(ValueError, match="idle: the calibration text never reached this layer"):
        collector.hessian("idle")


@torch.no_grad()
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite(value: float) -> None:
    block = Block()
    collector = HessianCollector(linears(block))
    x = torch.randn(2, 6)
    x[1, 2] = value
    with collector.collecting():
        block(x)
    with pytest.raises(ValueError, match="key: its inputs on the calibration text hold values that are not finite"):
        collector.hessian("key")


def test_hooks_are_removed_after_an_error() -> None:
    block = Block()
    with pytest.raises(RuntimeError), HessianCollector(linears(block)).collecting():
        block(torch.randn(2, 7))
    assert not any(module._forward_pre_hooks for module in block.children())


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
def test_a_hessian_of_weighed_tokens_can_be_taken_apart(seed: int) -> None:
    """Whatever products round factors to: one token counts so much that its outer product must stay one."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(4, 64, 256, generator=generator).bfloat16().float()
    weights = torch.rand(4, 64, generator=generator)
    weights[1, 17] = 3e4
    layer = torch.nn.Linear(256, 8)
    collector = HessianCollector({"a": layer}, {"a": weights})
    with collector.collecting():
        for batch in inputs:
            layer(batch)
    hessian = collector.hessian("a")
    assert torch.linalg.eigvalsh(damp(hessian, 0.01).double()).min() > 0
    x = inputs.flatten(0, 1).double()
    expected = (x.T * weights.flatten().double()) @ x / len(x)
    torch.testing.assert_close(hessian.double(), expected, rtol=0, atol=float(expected.diagonal().max()) / 100)
