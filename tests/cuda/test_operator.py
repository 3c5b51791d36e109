"""The operator of the library with CUDA code: what can be seen of it without a GPU, and what it computes with one."""

from __future__ import annotations

import pytest
import torch

from tests.cuda.random_layers import Layer, make_input, make_layer
from vllm_matquant.checkpoint.spec import WIDTHS
from vllm_matquant.kernels import ops

needs_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def has_cuda_code() -> bool:
    ops.load_library()
    return torch._C._dispatch_has_kernel_for_dispatch_key("matquant::linear", "CUDA")


def run(layer: Layer, x: torch.Tensor, widths: list[int], bias: torch.Tensor | None = None) -> torch.Tensor:
    arguments = [tensor.cuda() for tensor in (x, layer.planes, layer.decoders, torch.tensor(widths, dtype=torch.int32))]
    added = None if bias is None else bias.cuda()
    return ops.linear(*arguments, layer.decoder_widths, layer.output_sizes, layer.group_size, added).cpu()


def test_the_library_loads_without_a_device_and_knows_the_shape_of_a_result() -> None:
    ops.load_library()
    layer = make_layer([20, 30], 128, 64)
    with torch.device("meta"):
        x = torch.empty(3, 5, 128, dtype=torch.float16)
        active = torch.empty(2, dtype=torch.int32)
    result = ops.linear(
        x, layer.planes.to("meta"), layer.decoders.to("meta"), active, list(WIDTHS), layer.output_sizes, 64
    )
    assert result.shape == (3, 5, 50)
    assert result.dtype == torch.float16
    assert result.device.type == "meta"


@pytest.mark.cuda
@needs_device
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", [32, 64, 128, 10**6])
@pytest.mark.parametrize("width", WIDTHS)
def test_product(width: int, group_size: int, dtype: torch.dtype) -> None:
    layer = make_layer([100, 30], 1100, group_size, seed=width)
    for tokens in (1, 5, 9, 24, 33, 64, 65, 200):
        x, bias = make_input(tokens, 1100, dtype, seed=tokens), make_input(1, 130, dtype)[0]
        rounded = tokens > 64  # weights are rounded to the activations' type for a library's product
        layer.check(run(layer, x, [width, 2], bias), x, [width, 2], bias, rounded_weights=rounded)


@pytest.mark.cuda
@needs_device
def test_a_captured_graph_follows_a_switch() -> None:
    layer = make_layer([128], 1024, 128)
    x = make_input(4, 1024, torch.float16).cuda()
    planes, decoders, active = layer.planes.cuda(), layer.decoders.cuda(), torch.tensor([2], dtype=torch.int32).cuda()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        ops.linear(x, planes, decoders, active, list(WIDTHS), [128], 128)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            result = ops.linear(x, planes, decoders, active, list(WIDTHS), [128], 128)
    for width in (2, 8, 5):
        active.fill_(width)
        graph.replay()
        torch.cuda.synchronize()
        layer.check(result.cpu(), x.cpu(), [width])
