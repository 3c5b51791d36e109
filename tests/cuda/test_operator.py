"""The operator of the library with CUDA code: what can be seen of it without a GPU, and what it computes with one."""

from __future__ import annotations

import pytest
import torch

from tests.cuda.random_layers import KINDS, Layer, make_input, make_segments
from vllm_matquant.checkpoint.decoder import DecoderKind
from vllm_matquant.checkpoint.spec import WIDTHS
from vllm_matquant.kernels import ops

needs_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def run(layer: Layer, x: torch.Tensor, widths: list[int], bias: torch.Tensor | None = None) -> torch.Tensor:
    layer.weight.set_active(widths)
    added = None if bias is None else bias.cuda()
    return layer.weight.kernel.linear(x.cuda(), layer.weight.handle, layer.weight.out_features, added).cpu()


def test_the_library_knows_the_shape_of_a_result() -> None:
    ops.load_library()
    with torch.device("meta"):
        result = ops.linear(torch.empty(3, 5, 128, dtype=torch.float16), torch.empty(1, dtype=torch.int64), 50)
    assert result.shape == (3, 5, 50)
    assert result.dtype == torch.float16
    assert result.device.type == "meta"


@pytest.mark.cuda
@needs_device
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", [32, 64, 128, 10**6])
@pytest.mark.parametrize("width", WIDTHS)
def test_product(width: int, group_size: int, dtype: torch.dtype, kind: DecoderKind) -> None:
    segments = [([100, 30], WIDTHS), ([70], (3, width))]
    layer = make_segments(segments, 1100, group_size, seed=width, kind=kind, device="cuda")
    widths = [width, 2, 3]
    for tokens in (1, 5, 9, 24, 33, 64, 65, 200):
        x, bias = make_input(tokens, 1100, dtype, seed=tokens), make_input(1, 200, dtype)[0]
        rounded = tokens > 64  # weights are rounded to the activations' type for a library's product
        layer.check(run(layer, x, widths, bias), x, widths, bias, rounded_weights=rounded)


@pytest.mark.cuda
@needs_device
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_captured_graph_follows_a_switch(kind: DecoderKind) -> None:
    layer = make_segments([([128], WIDTHS)], 1024, 128, kind=kind, device="cuda")
    x = make_input(4, 1024, torch.float16).cuda()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        ops.linear(x, layer.weight.handle, 128)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            result = ops.linear(x, layer.weight.handle, 128)
    for width in (2, 8, 5):
        layer.weight.set_active([width])
        graph.replay()
        torch.cuda.synchronize()
        layer.check(result.cpu(), x.cpu(), [width])


@pytest.mark.cuda
@needs_device
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_captured_graph_follows_the_slots_of_rows(kind: DecoderKind) -> None:
    layer = make_segments([([128, 70], WIDTHS)], 1024, 128, kind=kind, device="cuda")
    widths = [[8, 4], [2, 2], [3, 8]]
    readers = layer.weight.readers(widths)
    handles = torch.cat([reader.handle for reader in readers])
    for tokens in (4, 30, 100):
        x, slots = make_input(tokens, 1024, torch.float16).cuda(), torch.zeros(tokens, dtype=torch.int32).cuda()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            ops.linear_by_row(x, handles, slots, 198)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                result = ops.linear_by_row(x, handles, slots, 198)
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            slots.copy_(torch.randint(3, (tokens,), dtype=torch.int32, generator=generator))
            graph.replay()
            torch.cuda.synchronize()
            for slot, own in enumerate(widths):
                rows = (slots == slot).cpu()
                layer.check(result.cpu()[rows], x.cpu()[rows], own)


@pytest.mark.cuda
@needs_device
def test_activations_and_weight_on_two_devices() -> None:
    layer = make_segments([([128], WIDTHS)], 1024, 128, device="cpu")
    with pytest.raises(RuntimeError, match="x: found it on cuda:0, expected it where the weight's planes are"):
        ops.linear(make_input(4, 1024, torch.float16).cuda(), layer.weight.handle, 128)
