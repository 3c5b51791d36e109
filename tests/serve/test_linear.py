"""The linear method on its own: what it allocates, demands, cuts and computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.serve.tiny_models import quantize
from vllm_matquant.checkpoint.errors import ConfigError, MissingTensorError
from vllm_matquant.checkpoint.names import plane_name
from vllm_matquant.checkpoint.packing import pack_codes, slice_codes
from vllm_matquant.checkpoint.spec import Format, offset_name, scale_name
from vllm_matquant.kernels import cuda_layout, reference
from vllm_matquant.kernels.support import KERNELS
from vllm_matquant.serve.linear import MatquantLinearMethod, predicted_bytes, resident_bytes
from vllm_matquant.serve.precision import LayerPrecision, Precision

PARTS = ("a.q_proj", "a.k_proj", "a.v_proj")
SIZES = (40, 16, 9)
COLUMNS = 96


@pytest.fixture(autouse=True)
def _single_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.model_executor.parameter.get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr("vllm.model_executor.parameter.get_tensor_model_parallel_world_size", lambda: 1)


def mixed(*widths: int) -> Precision:
    """A recipe with a width for each of the parts."""
    return Precision(max(widths), recipe=dict(zip(PARTS, widths, strict=True)))


def store(param: Any, loaded: torch.Tensor, shard_id: Any = None, sizes: Sequence[int] = SIZES) -> None:
    """A loader such as vLLM's: copies a part of a fused layer to its rows."""
    if shard_id is None:
        param.data.copy_(loaded)
        return
    place = {"shard_offset": sum(sizes[: "qkv".index(shard_id)]), "shard_size": sizes["qkv".index(shard_id)]}
    param.load_merged_column_weight(loaded, **place)
    param.load_qkv_weight(loaded, **place, shard_id=shard_id, num_heads=1)


def new_layer(
    checkpoint_format: Format, precision: Precision, parts: Sequence[str] = PARTS, sizes: Sequence[int] = SIZES,
    columns: int = COLUMNS, ranks: int = 1,
) -> torch.nn.Module:  # fmt: skip
    layer = torch.nn.Module()
    layer.quant_method = MatquantLinearMethod(checkpoint_format, precision, list(parts))
    layer.quant_method.create_weights(
        layer, columns // ranks, list(sizes), columns, sum(sizes), torch.float32, weight_loader=store
    )
    return layer


class Source:
    """The tensors on disk of a layer's parts, and their weights at each width."""

    def __init__(self, checkpoint_format: Format, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        group_size = checkpoint_format.group_size_of(COLUMNS, "a")
        self.format = checkpoint_format
        self.parts = [
            quantize(torch.randn(size, COLUMNS, generator=generator), group_size, checkpoint_format) for size in SIZES
        ]

    def tensors(self, part: int) -> dict[str, torch.Tensor]:
        codes, decoders = self.parts[part]
        base, planes = pack_codes(codes)
        tensors = {"weight_base": base} | {plane_name(3 + i): plane for i, plane in enumerate(planes)}
        for width, (scale, offset) in decoders.items():
            tensors |= {scale_name(width): scale.half(), offset_name(width): offset.half()}
        return tensors

    def weight(self, part: int, width: int) -> torch.Tensor:
        codes, decoders = self.parts[part]
        scale, offset = (values.half() for values in decoders[width])
        return reference.dequantize(slice_codes(codes, 8, width, self.format.slicing), scale, offset)

    def load(self, layer: torch.nn.Module, without: tuple[str, int] | None = None) -> None:
        for name, param in list(layer.named_parameters()):
            for part in layer.quant_method.owners[name]:
                if (name, part) != without:
                    param.weight_loader(param, self.tensors(part)[name], "qkv"[part])


@pytest.mark.parametrize("group_size", [32, "channel"])
def test_a_group_size_of_the_layers_own(group_size: Any) -> None:
    expected = Source(Format(group_size=group_size))
    own = Format(group_size=16, layer_group_sizes=dict.fromkeys(PARTS, group_size))
    layers = [new_layer(checkpoint_format, Precision(4)) for checkpoint_format in (expected.format, own)]
    for layer in layers:
        expected.load(layer)
        layer.quant_method.process_weights_after_loading(layer)
    assert torch.equal(layers[0].decoders, layers[1].decoders)
    assert layers[0].quant_method.predicted_bytes() == layers[1].quant_method.predicted_bytes()
    x = torch.randn(3, COLUMNS)
    assert torch.equal(*(layer.quant_method.apply(layer, x) for layer in layers))


def test_layers_that_are_computed_as_one_have_one_group_size() -> None:
    own = Format(group_size=16, layer_group_sizes={PARTS[1]: 32})
    with pytest.raises(ConfigError, match=r"layer_group_sizes: found .*: 32.*, expected the same for layers that vLLM"):
        new_layer(own, Precision(4))


@pytest.mark.parametrize("slicing", ["truncate", "round"])
@pytest.mark.parametrize(("bits", "served"), [(2, 3), (3, 3), (4, 6), (6, 6), (8, 6)])
def test_widths_of_the_layers_own(bits: int, served: int, slicing: Any) -> None:
    expected = Source(Format(group_size=32, slicing=slicing))
    own = Format(group_size=32, slicing=slicing, layer_widths=dict.fromkeys(PARTS, (3, 6)))
    layers = [new_layer(expected.format, Precision(served)), new_layer(own, Precision(bits))]
    for layer in layers:
        expected.load(layer)
        layer.quant_method.process_weights_after_loading(layer)
    assert torch.equal(layers[0].planes, layers[1].planes)
    assert layers[0].quant_method.predicted_bytes() == layers[1].quant_method.predicted_bytes()
    x = torch.randn(3, COLUMNS)
    assert torch.equal(*(layer.quant_method.apply(layer, x) for layer in layers))


def test_layers_that_are_computed_as_one_have_the_same_widths() -> None:
    with pytest.raises(
        ConfigError, match=r"layer_widths: found .*: \(4, 8\).*, expected the same for layers that vLLM"
    ):
        new_layer(Format(group_size=16, layer_widths={PARTS[2]: (4, 8)}), Precision(4))


@pytest.mark.parametrize("slicing", ["truncate", "round"])
@pytest.mark.parametrize("group_size", [32, 48, "auto", "channel"])
@pytest.mark.parametrize("width", range(2, 9))
def test_product(width: int, group_size: Any, slicing: Any) -> None:
    source = Source(Format(group_size=group_size, slicing=slicing), seed=width)
    layer = new_layer(source.format, Precision(width))
    source.load(layer)
    layer.quant_method.process_weights_after_loading(layer)

    weight = torch.cat([source.weight(part, width) for part in range(3)])
    x, bias = torch.randn(2, 5, COLUMNS), torch.randn(sum(SIZES))
    for added in (None, bias):
        expected = torch.nn.functional.linear(x, weight, added)
        torch.testing.assert_close(layer.quant_method.apply(layer, x, added), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("slicing", ["truncate", "round"])
@pytest.mark.parametrize("width", range(2, 9))
def test_nothing_past_the_resident_width_is_allocated(width: int, slicing: Any) -> None:
    source = Source(Format(slicing=slicing, group_size=32))
    layer = new_layer(source.format, Precision(width))
    stored = width if slicing == "truncate" else min(width + 1, 8)
    expected = {"weight_base", scale_name(width), offset_name(width)} | {plane_name(w) for w in range(3, stored + 1)}
    assert {name for name, _ in layer.named_parameters()} == expected

    source.load(layer)
    layer.quant_method.process_weights_after_loading(layer)
    assert {name for name, _ in layer.named_parameters()} == {"planes", "decoders"}
    assert layer.planes.shape[0] == width
    assert layer.decoders.shape[0] == 1


@pytest.mark.parametrize("width", range(2, 9))
def test_resident_bytes_are_those_of_the_format_where_rows_fill_the_tiles(width: int) -> None:
    sizes, checkpoint_format = (64, 16, 32), Format(group_size=32)
    layer = new_layer(checkpoint_format, Precision(width), sizes=sizes)
    for param in list(layer.parameters()):
        param.weight_loader(param, torch.zeros_like(param.data))
    layer.quant_method.process_weights_after_loading(layer)
    by_hand = 112 * 96 * width // 8 + 2 * 2 * 112 * 3
    assert resident_bytes(layer) == predicted_bytes(layer) == by_hand


@pytest.mark.parametrize("part", range(3))
@pytest.mark.parametrize("name", ["weight_base", "weight_plane3", "weight_plane4", "weight_scale4", "weight_offset4"])
def test_a_tensor_that_did_not_come_is_named(name: str, part: int) -> None:
    source = Source(Format(group_size=32))
    layer = new_layer(source.format, Precision(4))
    source.load(layer, without=(name, part))
    with pytest.raises(MissingTensorError) as error:
        layer.quant_method.process_weights_after_loading(layer)
    assert PARTS[part] in str(error.value)
    assert name in str(error.value)


@pytest.mark.parametrize("shards", [[None], [0, 1, 2], [(0, 1), 2], [(0, 1, 2)]])
def test_parts_come_whole_or_one_by_one(shards: list[Any]) -> None:
    layer = torch.nn.Module()
    method = MatquantLinearMethod(Format(group_size=32), Precision(2), PARTS)
    method.create_weights(
        layer, COLUMNS, list(SIZES), COLUMNS, sum(SIZES), torch.float32, weight_loader=lambda *args: None
    )
    for param in layer.parameters():
        for shard in shards:
            param.weight_loader(param, param.data, shard)
    method.process_weights_after_loading(layer)


def test_a_layer_that_is_fused_in_the_checkpoint_already() -> None:
    layer = new_layer(Format(group_size=32), Precision(3), parts=["a.qkv_proj"])
    for name, param in layer.named_parameters():
        if name != "weight_plane3":
            param.weight_loader(param, torch.zeros_like(param.data))
    with pytest.raises(MissingTensorError, match=r"a\.qkv_proj: weight_plane3"):
        layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize(
    ("group_size", "columns", "ranks", "expected"),
    [(128, 256, 4, "128"), ("auto", 192, 2, "64"), (32, 96, 2, "32"), ("channel", 24, 2, "8")],
)
def test_tensor_parallelism_must_not_cut_a_group_or_a_byte(
    group_size: Any, columns: int, ranks: int, expected: str
) -> None:
    with pytest.raises(ConfigError) as error:
        new_layer(Format(group_size=group_size), Precision(3), ["a.down_proj"], [16], columns, ranks)
    found = (
        "a.down_proj",
        f"size {ranks}",
        f"{columns} input features",
        str(columns // ranks),
        f"multiple of {expected}",
    )
    for text in found:
        assert text in str(error.value)


@pytest.mark.parametrize(("group_size", "columns", "groups"), [(32, 128, 2), ("auto", 256, 1), ("channel", 128, 1)])
def test_shapes_of_a_ranks_cut(group_size: Any, columns: int, groups: int) -> None:
    layer = new_layer(Format(group_size=group_size), Precision(3), ["a.down_proj"], [16], columns, ranks=2)
    shapes = {name: tuple(param.shape) for name, param in layer.named_parameters()}
    assert shapes == {
        "weight_base": (16, columns // 8),
        "weight_plane3": (16, columns // 16),
        "weight_scale3": (16, groups),
        "weight_offset3": (16, groups),
    }


def test_each_partition_switches_to_a_width_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LayerPrecision, "decoder_widths", (2, 3, 8))
    source = Source(Format(group_size=32))
    layer = new_layer(source.format, Precision(8))
    source.load(layer)
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(3, COLUMNS)
    compiled = torch.compile(layer.quant_method.apply, fullgraph=True, backend="eager")
    for widths in [(8, 8, 8), (3, 8, 2), (2, 3, 8)]:
        layer.active_width.copy_(torch.tensor(widths, dtype=torch.int32))
        weight = torch.cat([source.weight(part, width) for part, width in enumerate(widths)])
        expected = torch.nn.functional.linear(x, weight)
        torch.testing.assert_close(compiled(layer, x), expected, rtol=1e-4, atol=1e-4)


MIXES = [(3, 8, 2), (2, 2, 6), (5, 3, 3), (7, 4, 7), (4, 4, 4)]


@pytest.mark.parametrize("slicing", ["truncate", "round"])
@pytest.mark.parametrize("group_size", [32, "channel"])
@pytest.mark.parametrize("widths", MIXES)
def test_parts_of_a_fused_layer_have_widths_of_their_own(
    widths: tuple[int, ...], group_size: Any, slicing: Any
) -> None:
    source = Source(Format(group_size=group_size, slicing=slicing), seed=sum(widths))
    layer = new_layer(source.format, mixed(*widths))
    source.load(layer)
    layer.quant_method.process_weights_after_loading(layer)
    weight = torch.cat([source.weight(part, width) for part, width in enumerate(widths)])
    x, bias = torch.randn(2, 5, COLUMNS), torch.randn(sum(SIZES))
    torch._dynamo.reset()  # it gives up after some layers that differ
    compiled = torch.compile(layer.quant_method.apply, fullgraph=True, backend="eager")
    for added in (None, bias):
        expected = torch.nn.functional.linear(x, weight, added)
        for apply in (layer.quant_method.apply, compiled):
            torch.testing.assert_close(apply(layer, x, added), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("widths", MIXES)
def test_parts_of_a_fused_layer_pay_for_their_own_bits(widths: tuple[int, ...]) -> None:
    sizes = (64, 16, 32)
    layer = new_layer(Format(group_size=32), mixed(*widths), sizes=sizes)
    method = layer.quant_method
    for name, param in layer.named_parameters():
        if name.startswith("weight_plane"):  # not even before the weights are repacked is more in memory
            plane = int(name.removeprefix("weight_plane"))
            assert len(param) == sum(size for size, width in zip(sizes, widths, strict=True) if width >= plane)
    for name, param in list(layer.named_parameters()):
        for part in method.owners[name]:
            own = torch.zeros(sizes[part], *param.shape[1:], dtype=param.dtype)
            param.load_merged_column_weight(own, shard_offset=sum(sizes[:part]), shard_size=sizes[part])
            method.arrived[name].add(part)
    method.process_weights_after_loading(layer)
    by_hand = sum(size * 96 * width // 8 for size, width in zip(sizes, widths, strict=True)) + 2 * 2 * 112 * 3
    assert resident_bytes(layer) == predicted_bytes(layer) == by_hand


@pytest.mark.parametrize("part", range(3))
def test_a_tensor_of_a_mixed_layer_that_did_not_come_is_named(part: int) -> None:
    source = Source(Format(group_size=32))
    layer = new_layer(source.format, mixed(3, 5, 4))
    name = ("weight_scale3", "weight_plane5", "weight_plane4")[part]
    source.load(layer, without=(name, part))
    with pytest.raises(MissingTensorError) as error:
        layer.quant_method.process_weights_after_loading(layer)
    assert PARTS[part] in str(error.value)
    assert name in str(error.value)


def test_a_width_without_a_decoder_in_memory_is_refused() -> None:
    source = Source(Format(group_size=32))
    layer = new_layer(source.format, Precision(4))
    source.load(layer)
    layer.quant_method.process_weights_after_loading(layer)
    layer.active_width.fill_(3)
    with pytest.raises(RuntimeError, match="active_width"):
        layer.quant_method.apply(layer, torch.randn(1, COLUMNS))


@pytest.mark.parametrize("activation_bits", [8, 16, None])
def test_activations_are_rounded_to_the_bits_of_the_model(activation_bits: int | None) -> None:
    source = Source(Format(group_size=32))
    layer = new_layer(source.format, Precision(4, activation_bits))
    source.load(layer)
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(3, COLUMNS)
    rounded = x if activation_bits is None else reference.round_activations(x, 32, activation_bits)
    weight = torch.cat([source.weight(part, 4) for part in range(3)])
    expected = torch.nn.functional.linear(rounded, weight)
    torch.testing.assert_close(layer.quant_method.apply(layer, x), expected, rtol=1e-5, atol=1e-5)


def product_in_cuda_layout(
    x: torch.Tensor, planes: torch.Tensor, decoders: torch.Tensor, active_width: torch.Tensor,
    decoder_widths: Sequence[int], output_sizes: Sequence[int], group_size: int, *rest: Any,
) -> torch.Tensor:  # fmt: skip
    """What the CUDA kernels compute, in PyTorch."""
    starts, _ = cuda_layout.partition_starts(output_sizes)
    weight = torch.cat(
        [
            cuda_layout.embedding(
                64 * start + torch.arange(size), planes, decoders, active_width[part : part + 1], decoder_widths,
                x.shape[-1], group_size, x.dtype,
            )
            for part, (start, size) in enumerate(zip(starts, output_sizes, strict=True))
        ]
    )  # fmt: skip
    return torch.nn.functional.linear(x, weight)


@pytest.mark.parametrize(
    ("widths", "slicing"),
    [((4, 4, 4), "truncate"), ((3, 8, 2), "truncate"), ((7, 5, 5), "truncate"), ((4, 4, 4), "round")],
)
def test_a_cuda_kernel_gets_its_own_layout(widths: tuple[int, ...], slicing: Any, monkeypatch: Any) -> None:
    [kernel] = [kernel for kernel in KERNELS if kernel.name == "cuda"]
    kernel = dataclasses.replace(kernel, linear=product_in_cuda_layout)
    monkeypatch.setattr("vllm_matquant.serve.linear.select_kernel", lambda *arguments: kernel)
    source = Source(Format(group_size=32, slicing=slicing))
    layer = new_layer(source.format, mixed(*widths))
    source.load(layer)
    layer.quant_method.process_weights_after_loading(layer)
    for segment in layer.quant_method.segments:
        sizes = [SIZES[part] for part in segment.partitions]
        expected_shape = cuda_layout.planes_shape(segment.precision.resident_width, sizes, COLUMNS)
        assert getattr(layer, segment.planes).shape == expected_shape
    x = torch.randn(3, COLUMNS)
    weight = torch.cat([source.weight(part, width) for part, width in enumerate(widths)])
    expected = torch.nn.functional.linear(x, weight)
    torch.testing.assert_close(layer.quant_method.apply(layer, x), expected, rtol=1e-4, atol=1e-4)
