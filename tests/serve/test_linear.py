"""The linear method on its own: what it allocates, demands, cuts and computes."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import get_and_maybe_dequant_weights
from vllm.model_executor.utils import replace_parameter

from tests.checkpoint.samples import decoder_bytes, decoder_names
from tests.serve.tiny_models import quantize, served_at, served_widths
from vllm_matquant.checkpoint.decoder import AFFINE_INT8, CODEBOOK, KINDS
from vllm_matquant.checkpoint.errors import ConfigError, MissingTensorError
from vllm_matquant.checkpoint.names import plane_name
from vllm_matquant.checkpoint.packing import pack_codes, slice_codes
from vllm_matquant.checkpoint.slicing import SLICE_RULES
from vllm_matquant.checkpoint.spec import Format
from vllm_matquant.kernels import cuda_layout, reference
from vllm_matquant.kernels.support import KERNELS
from vllm_matquant.serve.config import MatquantConfig
from vllm_matquant.serve.linear import MatquantLinearMethod, predicted_bytes, resident_bytes, set_active
from vllm_matquant.serve.served import Served

PARTS = ("a.q_proj", "a.k_proj", "a.v_proj")
SIZES = (40, 16, 9)
COLUMNS = 96
EVERY_KIND = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
KINDS_SLICED = pytest.mark.parametrize(
    ("kind", "slicing"),
    [
        (kind, name)
        for kind in KINDS.values()
        for name, rule in SLICE_RULES.items()
        if rule.fits_width and (kind.affine or name == "truncate")
    ],
    ids=lambda value: getattr(value, "name", value),
)


@pytest.fixture(autouse=True)
def _single_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("vllm.model_executor.parameter", "vllm_matquant.serve.linear"):
        monkeypatch.setattr(f"{module}.get_tensor_model_parallel_rank", lambda: 0)
        monkeypatch.setattr(f"{module}.get_tensor_model_parallel_world_size", lambda: 1)


def mixed(*widths: int) -> Served:
    """A recipe with a width for each of the parts."""
    return served_widths(dict(zip(PARTS, widths, strict=True)))


def store(param: Any, loaded: torch.Tensor, shard_id: Any = None, sizes: Sequence[int] = SIZES) -> None:
    """A loader such as vLLM's: copies a part of a fused layer to its rows."""
    if shard_id is None:
        param.data.copy_(loaded)
        return
    place = {"shard_offset": sum(sizes[: "qkv".index(shard_id)]), "shard_size": sizes["qkv".index(shard_id)]}
    param.load_merged_column_weight(loaded, **place)
    param.load_qkv_weight(loaded, **place, shard_id=shard_id, num_heads=1)


def new_layer(
    checkpoint_format: Format, served: Served, parts: Sequence[str] = PARTS, sizes: Sequence[int] = SIZES,
    columns: int = COLUMNS, ranks: int = 1,
) -> torch.nn.Module:  # fmt: skip
    layer = torch.nn.Module()
    layer.quant_method = MatquantLinearMethod(checkpoint_format, served, list(parts))
    layer.quant_method.create_weights(
        layer,
        columns // ranks,
        list(sizes),
        columns,
        sum(sizes),
        torch.float32,
        weight_loader=functools.partial(store, sizes=sizes),
    )
    return layer


class Source:
    """The tensors on disk of a layer's parts, and their weights at each width."""

    def __init__(self, checkpoint_format: Format, seed: int = 0, sizes: Sequence[int] = SIZES) -> None:
        generator = torch.Generator().manual_seed(seed)
        group_size = checkpoint_format.group_size_of(COLUMNS, "a")
        self.format, self.sizes = checkpoint_format, sizes
        self.parts = [
            quantize(torch.randn(size, COLUMNS, generator=generator), group_size, checkpoint_format) for size in sizes
        ]

    def tensors(self, part: int) -> dict[str, torch.Tensor]:
        codes, decoders = self.parts[part]
        base, planes = pack_codes(codes)
        tensors = {"weight_base": base} | {plane_name(3 + i): plane for i, plane in enumerate(planes)}
        for decoder in decoders.values():
            tensors |= {name.removeprefix("."): tensor for name, tensor in decoder.named("").items()}
        return tensors

    def weight(self, part: int, width: int) -> torch.Tensor:
        codes, decoders = self.parts[part]
        return decoders[width].decode(slice_codes(codes, 8, width, self.format.slicing))

    def load(self, layer: torch.nn.Module, without: tuple[str, int] | None = None) -> None:
        for name, param in list(layer.named_parameters()):
            for part in layer.quant_method.stored.owners[name]:
                if (name, part) != without:
                    param.weight_loader(param, self.tensors(part)[name], "qkv"[part])


@pytest.mark.parametrize("width", range(2, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@EVERY_KIND
def test_vllm_finds_the_dense_weight(width: int, dtype: torch.dtype, kind: Any) -> None:
    """As attention with latent keys and values asks for it."""
    source = Source(Format(group_size=16, decoder_kind=kind), seed=width)
    layer = new_layer(source.format, served_at(width))
    layer.input_size_per_partition = COLUMNS
    source.load(layer)
    layer.quant_method.process_weights_after_loading(layer)
    expected = torch.cat([source.weight(part, width) for part in range(len(PARTS))])
    torch.testing.assert_close(get_and_maybe_dequant_weights(layer, dtype), expected.to(dtype), rtol=0, atol=0)
    replace_parameter(layer, "weight", layer.weight.new_empty(0))  # as it releases it then, on processors with AMX
    torch.testing.assert_close(get_and_maybe_dequant_weights(layer, dtype), expected.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("group_size", [32, "channel"])
@EVERY_KIND
def test_a_group_size_of_the_layers_own(group_size: Any, kind: Any) -> None:
    expected = Source(Format(group_size=group_size, decoder_kind=kind))
    own = Format(group_size=16, layer_group_sizes=dict.fromkeys(PARTS, group_size), decoder_kind=kind)
    layers = [new_layer(checkpoint_format, served_at(4)) for checkpoint_format in (expected.format, own)]
    for layer in layers:
        expected.load(layer)
        layer.quant_method.process_weights_after_loading(layer)
    assert layers[0].quant_method.predicted_bytes() == layers[1].quant_method.predicted_bytes()
    x = torch.randn(3, COLUMNS)
    assert torch.equal(*(layer.quant_method.apply(layer, x) for layer in layers))


def test_layers_that_are_computed_as_one_have_one_group_size() -> None:
    own = Format(group_size=16, layer_group_sizes={PARTS[1]: 32})
    with pytest.raises(ConfigError, match=r"layer_group_sizes: found .*: 32.*, expected the same for layers that vLLM"):
        new_layer(own, served_at(4))


def test_layers_that_are_computed_as_one_have_the_same_widths() -> None:
    with pytest.raises(
        ConfigError, match=r"layer_widths: found .*: \(4, 8\).*, expected the same for layers that vLLM"
    ):
        new_layer(Format(group_size=16, layer_widths={PARTS[2]: (4, 8)}), served_at(4))


@KINDS_SLICED
@pytest.mark.parametrize("group_size", [32, 48, "auto", "channel"])
@pytest.mark.parametrize("width", range(2, 9))
def test_product(width: int, group_size: Any, slicing: Any, kind: Any) -> None:
    source = Source(Format(group_size=group_size, slicing=slicing, decoder_kind=kind), seed=width)
    layer = new_layer(source.format, served_at(width))
    source.load(layer)
    layer.quant_method.process_weights_after_loading(layer)

    weight = torch.cat([source.weight(part, width) for part in range(3)])
    x, bias = torch.randn(2, 5, COLUMNS), torch.randn(sum(SIZES))
    for added in (None, bias):
        expected = torch.nn.functional.linear(x, weight, added)
        torch.testing.assert_close(layer.quant_method.apply(layer, x, added), expected, rtol=1e-4, atol=1e-4)


@KINDS_SLICED
@pytest.mark.parametrize("width", range(2, 9))
def test_nothing_past_the_resident_width_is_allocated(width: int, slicing: Any, kind: Any) -> None:
    source = Source(Format(slicing=slicing, group_size=32, decoder_kind=kind))
    layer = new_layer(source.format, served_at(width))
    stored = width if slicing == "truncate" else min(width + 1, 8)
    expected = {"weight_base"} | decoder_names(kind, width) | {plane_name(w) for w in range(3, stored + 1)}
    assert {name for name, _ in layer.named_parameters()} == expected

    source.load(layer)
    layer.quant_method.process_weights_after_loading(layer)
    assert not list(layer.named_parameters())
    [segment] = layer.quant_method.weight.segments
    assert (segment.resident.width, segment.resident.decoder_widths) == (width, (width,))


@EVERY_KIND
@pytest.mark.parametrize("width", range(2, 9))
def test_resident_bytes_are_those_of_the_format_where_rows_fill_the_tiles(width: int, kind: Any) -> None:
    sizes, checkpoint_format = (64, 16, 32), Format(group_size=32, decoder_kind=kind)
    layer = new_layer(checkpoint_format, served_at(width), sizes=sizes)
    for name, param in list(layer.named_parameters()):
        for part, size in enumerate(sizes):
            rows = size if "codebook" not in name else len(param) // 3
            param.weight_loader(param, torch.zeros(rows, *param.shape[1:], dtype=param.dtype), "qkv"[part])
    layer.quant_method.process_weights_after_loading(layer)
    decoders = sum(decoder_bytes(kind.form(width), size, 3) for size in sizes)
    assert resident_bytes(layer) == predicted_bytes(layer) == 112 * 96 * width // 8 + decoders


@pytest.mark.parametrize("part", range(3))
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for kind in KINDS.values()
        for name in ("weight_base", "weight_plane3", "weight_plane4", *sorted(decoder_names(kind, 4)))
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_tensor_that_did_not_come_is_named(name: str, part: int, kind: Any) -> None:
    source = Source(Format(group_size=32, decoder_kind=kind))
    layer = new_layer(source.format, served_at(4))
    source.load(layer, without=(name, part))
    with pytest.raises(MissingTensorError) as error:
        layer.quant_method.process_weights_after_loading(layer)
    assert PARTS[part] in str(error.value)
    assert name in str(error.value)


@pytest.mark.parametrize("shards", [[None], [0, 1, 2], [(0, 1), 2], [(0, 1, 2)]])
@EVERY_KIND
def test_parts_come_whole_or_one_by_one(shards: list[Any], kind: Any) -> None:
    layer = torch.nn.Module()
    method = MatquantLinearMethod(Format(group_size=32, decoder_kind=kind), served_at(2), PARTS)
    method.create_weights(
        layer, COLUMNS, list(SIZES), COLUMNS, sum(SIZES), torch.float32, weight_loader=lambda *args: None
    )
    for name, param in layer.named_parameters():
        for shard in shards:
            param.weight_loader(param, param.data[: len(param) // 3] if "codebook" in name else param.data, shard)
    method.process_weights_after_loading(layer)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("weight_plane3", CODEBOOK), ("weight_plane3", AFFINE_INT8), ("weight_codebook3", CODEBOOK)],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_layer_that_is_fused_in_the_checkpoint_already(name: str, kind: Any) -> None:
    layer = new_layer(Format(group_size=32, decoder_kind=kind), served_at(3), parts=["a.qkv_proj"])
    for each, param in layer.named_parameters():
        if each != name:
            loaded = torch.zeros_like(param.data)
            param.weight_loader(param, loaded[: len(loaded) // 3] if "codebook" in each else loaded)
    with pytest.raises(MissingTensorError, match=rf"a\.qkv_proj: {name}"):
        layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize(
    ("kind", "group_size", "columns", "ranks", "expected"),
    [
        (AFFINE_INT8, 128, 256, 4, "128"),
        (AFFINE_INT8, "auto", 192, 2, "64"),
        (AFFINE_INT8, 32, 96, 2, "32"),
        (AFFINE_INT8, "channel", 24, 2, "8"),
        (CODEBOOK, "channel", 48, 2, "16"),
        (CODEBOOK, 48, 96, 4, "48"),
    ],
)
def test_tensor_parallelism_must_not_cut_a_group_or_a_byte_or_a_four(
    kind: Any, group_size: Any, columns: int, ranks: int, expected: str
) -> None:
    format_ = Format(group_size=group_size, decoder_kind=kind)
    with pytest.raises(ConfigError) as error:
        new_layer(format_, served_at(3), ["a.down_proj"], [16], columns, ranks)
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
@pytest.mark.parametrize("kind", [AFFINE_INT8, CODEBOOK], ids=lambda kind: kind.name)
def test_shapes_of_a_ranks_cut(group_size: Any, columns: int, groups: int, kind: Any) -> None:
    checkpoint_format = Format(group_size=group_size, decoder_kind=kind)
    layer = new_layer(checkpoint_format, served_at(3), ["a.down_proj"], [16], columns, ranks=2)
    shapes = {name: tuple(param.shape) for name, param in layer.named_parameters()}
    of_decoder = {
        AFFINE_INT8: {"weight_centre3": (16, groups), "weight_step3": (16, 2)},
        CODEBOOK: {"weight_step3": (16, 1), "weight_codebook3": (2, 64, 4)},
    }
    assert shapes == {
        "weight_base": (16, columns // 8),
        "weight_plane3": (16, columns // 16),
        "weight_scale3": (16, groups),
        **of_decoder[kind],
    }


@EVERY_KIND
def test_each_partition_switches_to_a_width_of_its_own(kind: Any) -> None:
    source = Source(Format(group_size=32, decoder_kind=kind))
    layer = new_layer(source.format, served_at(8, resident=(2, 3)))
    source.load(layer)
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(3, COLUMNS)
    compiled = torch.compile(layer.quant_method.apply, fullgraph=True, backend="eager")
    addresses = [segment.active_width.data_ptr() for segment in layer.quant_method.weight.segments]
    for widths in [(8, 8, 8), (3, 8, 2), (2, 3, 8)]:
        set_active(layer, dict(zip(PARTS, widths, strict=True)))
        weight = torch.cat([source.weight(part, width) for part, width in enumerate(widths)])
        expected = torch.nn.functional.linear(x, weight)
        torch.testing.assert_close(compiled(layer, x), expected, rtol=1e-4, atol=1e-4)
    assert addresses == [segment.active_width.data_ptr() for segment in layer.quant_method.weight.segments]


MIXES = [(3, 8, 2), (2, 2, 6), (5, 3, 3), (7, 4, 7), (4, 4, 4)]


@pytest.mark.parametrize(
    ("kind", "slicing"),
    [(AFFINE_INT8, "truncate"), (AFFINE_INT8, "round"), (CODEBOOK, "truncate")],
    ids=lambda value: getattr(value, "name", value),
)
@pytest.mark.parametrize("group_size", [32, "channel"])
@pytest.mark.parametrize("widths", MIXES)
def test_parts_of_a_fused_layer_have_widths_of_their_own(
    widths: tuple[int, ...], group_size: Any, slicing: Any, kind: Any
) -> None:
    source = Source(Format(group_size=group_size, slicing=slicing, decoder_kind=kind), seed=sum(widths))
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
@EVERY_KIND
def test_parts_of_a_fused_layer_pay_for_their_own_bits(widths: tuple[int, ...], kind: Any) -> None:
    sizes = (64, 16, 32)
    layer = new_layer(Format(group_size=32, decoder_kind=kind), mixed(*widths), sizes=sizes)
    method = layer.quant_method
    for name, param in layer.named_parameters():
        if name.startswith("weight_plane"):  # not even before the weights are repacked is more in memory
            plane = int(name.removeprefix("weight_plane"))
            assert len(param) == sum(size for size, width in zip(sizes, widths, strict=True) if width >= plane)
    for name, param in list(layer.named_parameters()):
        owners = method.stored.owners[name]
        for part in owners:
            rows = sizes[part] if "codebook" not in name else len(param) // len(owners)
            param.weight_loader(param, torch.zeros(rows, *param.shape[1:], dtype=param.dtype), "qkv"[part])
    method.process_weights_after_loading(layer)
    by_hand = sum(
        size * 96 * width // 8 + decoder_bytes(kind.form(width), size, 3)
        for size, width in zip(sizes, widths, strict=True)
    )
    assert resident_bytes(layer) == predicted_bytes(layer) == by_hand


@pytest.mark.parametrize(
    ("part", "name", "kind"),
    [
        (0, "weight_scale3", AFFINE_INT8),
        (1, "weight_plane5", AFFINE_INT8),
        (2, "weight_plane4", AFFINE_INT8),
        (0, "weight_codebook3", CODEBOOK),
        (1, "weight_codebook5", CODEBOOK),
        (2, "weight_step4", CODEBOOK),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_tensor_of_a_mixed_layer_that_did_not_come_is_named(part: int, name: str, kind: Any) -> None:
    source = Source(Format(group_size=32, decoder_kind=kind))
    layer = new_layer(source.format, mixed(3, 5, 4))
    source.load(layer, without=(name, part))
    with pytest.raises(MissingTensorError) as error:
        layer.quant_method.process_weights_after_loading(layer)
    assert PARTS[part] in str(error.value)
    assert name in str(error.value)


def test_a_width_that_is_not_resident_is_refused() -> None:
    source = Source(Format(group_size=32))
    layer = new_layer(source.format, served_at(4, resident=(2,)))
    source.load(layer)
    layer.quant_method.process_weights_after_loading(layer)
    before = layer.quant_method.apply(layer, torch.ones(1, COLUMNS))
    with pytest.raises(ValueError, match=r"3.*2, 4"):
        set_active(layer, dict(zip(PARTS, (2, 3, 4), strict=True)))
    assert torch.equal(layer.quant_method.apply(layer, torch.ones(1, COLUMNS)), before)


@pytest.mark.parametrize("activation_bits", [8, 16, None])
@EVERY_KIND
def test_activations_are_rounded_to_the_bits_of_the_model(activation_bits: int | None, kind: Any) -> None:
    source = Source(Format(group_size=32, decoder_kind=kind))
    layer = new_layer(source.format, served_at(4, activation_bits))
    source.load(layer)
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(3, COLUMNS)
    rounding = activation_bits and reference.Rounding(activation_bits)
    rounded = reference.round_activations(x, 32, rounding) if rounding else x
    weight = torch.cat([source.weight(part, 4) for part in range(3)])
    expected = torch.nn.functional.linear(rounded, weight)
    torch.testing.assert_close(layer.quant_method.apply(layer, x), expected, rtol=1e-5, atol=1e-5)


@KINDS_SLICED
@pytest.mark.parametrize("widths", [(4, 4, 4), (3, 8, 2), (7, 5, 5)])
def test_a_cuda_kernel_gets_its_own_layout(widths: tuple[int, ...], kind: Any, slicing: Any, monkeypatch: Any) -> None:
    [kernel] = [kernel for kernel in KERNELS if kernel.name == "cuda-jit"]
    monkeypatch.setattr("vllm_matquant.serve.linear.select_kernel", lambda request: kernel)
    source = Source(Format(group_size=32, slicing=slicing, decoder_kind=kind))
    layer = new_layer(source.format, mixed(*widths))
    source.load(layer)
    layer.quant_method.process_weights_after_loading(layer)
    weight = layer.quant_method.weight
    assert weight.layout.name == ("cuda" if kind.affine else "cuda-codebook")
    for segment in weight.segments:
        resident = segment.resident
        assert resident.planes.shape == cuda_layout.planes_shape(resident.width, resident.output_sizes, COLUMNS)


@EVERY_KIND
def test_two_users_of_a_layer_share_its_planes_and_not_what_is_active(kind: Any) -> None:
    source = Source(Format(group_size=32, decoder_kind=kind))
    served = served_at(8, resident=(3,))
    own = dataclasses.replace(served.active, decoders_file="recipes/own.safetensors")
    layers = []
    for user, checkpoint in [
        (served, "a"),
        (served, "a"),
        (served, "b"),
        (Served(own, (own, *served.resident[1:])), "a"),
    ]:
        layer = new_layer(source.format, user)
        layer.quant_method.checkpoint = checkpoint
        source.load(layer)
        layer.quant_method.process_weights_after_loading(layer)
        layers.append(layer)
    [first, second, other, with_own] = [layer.quant_method.weight.segments[0].resident for layer in layers]
    assert first is second
    assert first is not other
    assert first is not with_own
    layers[0].quant_method.set_active(dict.fromkeys(PARTS, 3))
    assert layers[0].quant_method.weight.active_widths == [3, 3, 3]
    assert layers[1].quant_method.weight.active_widths == [8, 8, 8]


# vLLM's own layers, and how they cut and fuse

HEAD = 8
LAYERS: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {  # of each layer the parts, and the rows of these
    "a.qkv_proj": (("a.q_proj", "a.k_proj", "a.v_proj"), (8 * HEAD, 2 * HEAD, 2 * HEAD)),
    "a.gate_up_proj": (("a.gate_proj", "a.up_proj"), (48, 48)),
    "a.o_proj": (("a.o_proj",), (24,)),
    "a.fc1": (("a.fc1",), (48,)),
    "a.router": (("a.router",), (24,)),
}
WIDTHS_OF_PARTS = [(4, 4, 4), (3, 6, 2), (5, 5, 8)]


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Function that makes what comes next a rank of some."""

    def set_rank(rank: int, ranks: int) -> None:
        for module in (
            "vllm.model_executor.parameter",
            "vllm_matquant.serve.linear",
            "vllm.model_executor.layers.linear",
        ):
            monkeypatch.setattr(f"{module}.get_tensor_model_parallel_rank", lambda: rank)
            monkeypatch.setattr(f"{module}.get_tensor_model_parallel_world_size", lambda: ranks)

    return set_rank


def vllm_layer(checkpoint_format: Format, served: Served, name: str, *, fused: bool = False) -> Any:
    """A layer of vLLM's; ``fused`` for one that is a single layer in the checkpoint, of whatever parts."""
    config = MatquantConfig(checkpoint_format)
    config.served = served
    if not fused:
        config.packed_modules_mapping = {
            layer.removeprefix("a."): [part.removeprefix("a.") for part in parts]
            for layer, (parts, _) in LAYERS.items()
            if len(parts) > 1
        }
    rows = LAYERS[name][1]
    options: Any = {"bias": False, "params_dtype": torch.float32, "quant_config": config, "prefix": name}
    with set_current_vllm_config(VllmConfig()):
        match name:
            case "a.qkv_proj":
                return QKVParallelLinear(COLUMNS, HEAD, rows[0] // HEAD, rows[1] // HEAD, **options)
            case "a.gate_up_proj":
                return MergedColumnParallelLinear(COLUMNS, list(rows), **options)
            case "a.fc1":
                return ColumnParallelLinear(COLUMNS, rows[0], **options)
            case "a.router":
                return ReplicatedLinear(COLUMNS, rows[0], **options)
        return RowParallelLinear(COLUMNS, rows[0], reduce_results=False, **options)


def load_parts(layer: Any, source: Source, shards: Sequence[Any]) -> None:
    """Load each part of a layer by vLLM's loader, under the name that this has for it."""
    for name, param in list(layer.named_parameters()):
        for part in layer.quant_method.stored.owners[name] if shards != [None] else [0]:
            tensor = source.tensors(part)[name]
            param.weight_loader(param, tensor, *([] if shards == [None] else [shards[part]]))
    layer.quant_method.process_weights_after_loading(layer)


def rows_of_rank(name: str, rank: int, ranks: int) -> list[range]:
    """Which rows of each part of a layer a rank has; key and value heads may be on several ranks."""
    cuts = []
    for part, size in enumerate(LAYERS[name][1]):
        replicas = max(1, ranks * HEAD // size) if name == "a.qkv_proj" and part else 1
        own = size * replicas // ranks
        cuts.append(range(rank // replicas * own, (rank // replicas + 1) * own))
    return cuts


@EVERY_KIND
@pytest.mark.parametrize("widths", WIDTHS_OF_PARTS)
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", ["a.qkv_proj", "a.gate_up_proj", "a.fc1"])
def test_ranks_cut_rows(name: str, ranks: int, widths: tuple[int, ...], kind: Any, as_rank: Any) -> None:
    parts, sizes = LAYERS[name]
    source = Source(Format(group_size=32, decoder_kind=kind), sizes=sizes)
    served = served_widths(dict(zip(parts, widths, strict=False)))
    x = torch.randn(5, COLUMNS)
    for rank in range(ranks):
        as_rank(rank, ranks)
        layer = vllm_layer(source.format, served, name)
        shards = {"a.qkv_proj": "qkv", "a.gate_up_proj": [0, 1], "a.fc1": [None]}[name]
        load_parts(layer, source, shards)
        cuts = rows_of_rank(name, rank, ranks)
        weight = torch.cat([source.weight(part, widths[part])[list(cut)] for part, cut in enumerate(cuts)])
        assert len(weight) == sum(layer.output_partition_sizes)
        torch.testing.assert_close(layer(x)[0], x @ weight.T, rtol=1e-4, atol=1e-4)


@EVERY_KIND
@pytest.mark.parametrize("group_size", [16, "channel"])
@pytest.mark.parametrize("width", [2, 4, 5, 8])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_cut_columns(ranks: int, width: int, group_size: Any, kind: Any, as_rank: Any) -> None:
    source = Source(Format(group_size=group_size, decoder_kind=kind), sizes=LAYERS["a.o_proj"][1])
    x = torch.randn(5, COLUMNS)
    total = torch.zeros(5, sum(source.sizes))
    for rank in range(ranks):
        as_rank(rank, ranks)
        layer = vllm_layer(source.format, served_at(width), "a.o_proj")
        load_parts(layer, source, [None])
        own = slice(rank * COLUMNS // ranks, (rank + 1) * COLUMNS // ranks)
        product = layer(x[:, own])[0]
        torch.testing.assert_close(product, x[:, own] @ source.weight(0, width)[:, own].T, rtol=1e-4, atol=1e-4)
        total += product
    torch.testing.assert_close(total, x @ source.weight(0, width).T, rtol=1e-4, atol=1e-4)


@EVERY_KIND
@pytest.mark.parametrize("width", [3, 6])
def test_a_layer_that_every_rank_has_whole(width: int, kind: Any, as_rank: Any) -> None:
    source = Source(Format(group_size=32, decoder_kind=kind), sizes=LAYERS["a.router"][1])
    as_rank(1, 2)
    layer = vllm_layer(source.format, served_at(width), "a.router")
    load_parts(layer, source, [None])
    x = torch.randn(5, COLUMNS)
    torch.testing.assert_close(layer(x)[0], x @ source.weight(0, width).T, rtol=1e-4, atol=1e-4)


@EVERY_KIND
@pytest.mark.parametrize("width", [2, 4, 7])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", ["a.qkv_proj", "a.gate_up_proj"])
def test_ranks_cut_a_layer_that_is_fused_in_the_checkpoint(
    name: str, ranks: int, width: int, kind: Any, as_rank: Any
) -> None:
    """As Phi-3 has them: all partitions have the one decoder."""
    sizes = LAYERS[name][1]
    source = Source(Format(group_size=32, decoder_kind=kind), sizes=(sum(sizes),))
    x = torch.randn(5, COLUMNS)
    for rank in range(ranks):
        as_rank(rank, ranks)
        layer = vllm_layer(source.format, served_widths({name: width}), name, fused=True)
        load_parts(layer, source, [None])
        rows = [sum(sizes[:part]) + row for part, cut in enumerate(rows_of_rank(name, rank, ranks)) for row in cut]
        torch.testing.assert_close(layer(x)[0], x @ source.weight(0, width)[rows].T, rtol=1e-4, atol=1e-4)


def test_parts_of_a_fused_layer_have_codebooks_of_their_own() -> None:
    """What the tests of fused layers rely on: one in the place of another would show."""
    source = Source(Format(group_size=32, decoder_kind=CODEBOOK))
    stored = [decoders[4].parts["codebook"] for _, decoders in source.parts]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(stored, 2))
    codes, decoders = source.parts[0]
    swapped = dataclasses.replace(decoders[4], parts={**decoders[4].parts, "codebook": stored[1]})
    assert (swapped.decode(codes >> 4) - source.weight(0, 4)).abs().max() > 0.05
