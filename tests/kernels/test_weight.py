"""Weights in memory: their handles, what is resident and what is active, and one compiled graph for all of them."""

from __future__ import annotations

import copy
import gc
import re
import weakref
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.kernels.random_layers import KINDS, Layer, make_decoder, make_input, make_layer, stored_segment
from vllm_matquant.checkpoint.decoder import AFFINE_FLOAT16, AFFINE_INT8
from vllm_matquant.checkpoint.spec import WIDTHS
from vllm_matquant.kernels import ops
from vllm_matquant.kernels.cpu_layout import PAIRS, PLANES
from vllm_matquant.kernels.plane_store import PlaneStore, SharedPlanes
from vllm_matquant.kernels.support import CPU, REFERENCE
from vllm_matquant.kernels.weight import NotResidentError, PackedWeight, StoredSegment, find_weight

both_kernels = pytest.mark.parametrize("kernel", [CPU, REFERENCE], ids=lambda kernel: kernel.name)
both_kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


def make_mixed(sizes, columns, group_size, resident, kind, kernel=CPU, shared=None) -> tuple[PackedWeight, list[Layer]]:
    """A weight whose partitions are segments of their own, each with its own resident widths, and each partition as a
    layer by itself."""
    layers = [
        make_layer([size], columns, group_size, index, widths, kind)
        for index, (size, widths) in enumerate(zip(sizes, resident, strict=True))
    ]
    stored = [
        stored_segment(layer.codes, layer.decoders, layer.output_sizes, widths)
        for layer, widths in zip(layers, resident, strict=True)
    ]
    return kernel.pack(stored, columns, group_size, "cpu", shared=shared), layers


def one_segment(layers) -> StoredSegment:
    """The layers as the partitions of one segment, with all widths resident."""
    decoders = {
        width: replace(
            layers[0].decoders[width],
            parts={
                name: torch.cat([layer.decoders[width].parts[name] for layer in layers])
                for name in layers[0].decoders[width].parts
            },
        )
        for width in WIDTHS
    }
    sizes = [size for layer in layers for size in layer.output_sizes]
    return stored_segment(torch.cat([layer.codes for layer in layers]), decoders, sizes, WIDTHS)


@both_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize(
    ("sizes", "resident", "active"),
    [
        ([20, 33, 7], [(2,), (4,), (8,)], (2, 4, 8)),
        ([17, 200], [(3,), (2,)], (3, 2)),
        ([64, 5, 40], [WIDTHS, (5,), (2, 6)], (7, 5, 2)),
        ([1, 1], [(2,), (2,)], (2, 2)),
    ],
)
def test_segments_are_computed_in_one_call_as_if_they_were_one(sizes, resident, active, rows, dtype, kind):
    weight, layers = make_mixed(sizes, 264, 64, resident, kind)
    weight.set_active(active)
    whole = CPU.pack([one_segment(layers)], 264, 64, "cpu")
    whole.set_active(active)
    assert weight.active_widths == list(active)
    assert weight.output_sizes == sizes
    x, bias = make_input(rows, 264, dtype), make_input(1, sum(sizes), dtype, seed=3)[0]
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        result = CPU.linear(x, weight.handle, sum(sizes), bias)
        assert torch.equal(result, CPU.linear(x, whole.handle, sum(sizes), bias))
        parts = zip(layers, result.split(sizes, -1), bias.split(sizes), active, strict=True)
        for layer, part, own_bias, width in parts:
            layer.check(part, x, [width], own_bias, widest=max(active))
    torch.set_num_threads(2)


@both_kinds
@both_kernels
def test_a_switch_is_in_place(kernel, kind):
    layer = make_layer([20, 12], 96, 32, decoder_widths=(2, 3, 8), kind=kind, kernel=kernel)
    [segment] = layer.weight.segments
    address = segment.active_width.data_ptr()
    x = make_input(3, 96)
    for widths in ([2, 8], [3, 3], [8, 2]):
        layer.check(layer.run(x, widths), x, widths, rounds=kernel is CPU)
        assert layer.weight.active_widths == widths
        assert segment.active_width.data_ptr() == address


@both_kernels
def test_a_width_that_is_not_resident_is_refused_and_changes_nothing(kernel):
    layer = make_layer([20, 12], 96, 32, decoder_widths=(2, 3, 8), kernel=kernel)
    layer.weight.set_active([3, 8])
    with pytest.raises(NotResidentError, match=r"partition 1: found 4, expected one of the resident \[2, 3, 8\]"):
        layer.weight.set_active([2, 4])
    with pytest.raises(ValueError, match="active widths: found 1, expected one for each of 2 partitions"):
        layer.weight.set_active([2])
    assert layer.weight.active_widths == [3, 8]


def test_a_decoder_without_its_planes_cannot_be_active():
    layer = make_layer([20], 96, 32, decoder_widths=(2, 3, 8))
    [segment] = layer.weight.segments
    resident = replace(segment.resident, planes=layer.planes[:3].clone(), width=3)
    segment.active_width.fill_(8)
    with pytest.raises(NotResidentError, match=r"found 8, expected one of the resident \[2, 3\]"):
        replace(layer.weight, segments=(replace(segment, resident=resident),))


@pytest.mark.parametrize(
    ("width", "message"),
    [
        (9, r"active_width: found 9, expected one of the resident decoder_widths \[2, 3, 8\]"),
        (-1, "active_width: found -1, expected one of the resident"),
        (8, "active_width: found 8, expected at most the resident width 3"),
    ],
)
def test_the_library_refuses_a_width_that_was_written_behind_its_back(width, message):
    layer = make_layer([20], 96, 32, decoder_widths=(2, 3, 8))
    [segment] = layer.weight.segments
    resident = replace(segment.resident, planes=layer.planes[:3].clone(), width=3)
    layer = replace(layer, weight=replace(layer.weight, segments=(replace(segment, resident=resident),)))
    segment.active_width.fill_(width)
    with pytest.raises(RuntimeError, match=message):
        ops.linear(make_input(2, 96), layer.weight.handle, 20)


@both_kernels
def test_memory_goes_with_the_weight(kernel):
    layer = make_layer([20], 96, 32, kernel=kernel)
    handle, planes = layer.weight.handle, weakref.ref(layer.planes)
    assert find_weight(handle) is layer.weight
    del layer
    gc.collect()
    assert planes() is None
    with pytest.raises((RuntimeError, ValueError), match=f"weight: found {handle.item()}, expected the handle of a"):
        kernel.linear(make_input(2, 96), handle, 20)
    with pytest.raises(ValueError, match=f"weight: found {handle.item()}, expected the handle of a"):
        find_weight(handle)
    assert make_layer([20], 96, 32, kernel=kernel).weight.handle != handle


def test_a_weight_is_not_copied():
    with pytest.raises(TypeError, match="a packed weight cannot be copied"):
        copy.deepcopy(make_layer([20], 96, 32).weight)


@both_kinds
def test_users_of_a_layer_share_its_tensors(kind):
    shared = SharedPlanes(PlaneStore(), "checkpoint", "layer")
    resident = [(2, 4), WIDTHS]
    first, _ = make_mixed([20, 30], 96, 32, resident, kind, shared=shared)
    second, layers = make_mixed([20, 30], 96, 32, resident, kind, shared=shared)
    assert len(shared.store) == 2
    for mine, yours in zip(first.segments, second.segments, strict=True):
        assert mine.resident is yours.resident
        assert mine.active_width.data_ptr() != yours.active_width.data_ptr()
    first.set_active([2, 8])
    second.set_active([4, 3])
    assert first.active_widths == [2, 8]
    x = make_input(2, 96)
    del first
    gc.collect()
    result = CPU.linear(x, second.handle, 50)
    for layer, part, width in zip(layers, result.split([20, 30], -1), [4, 3], strict=True):
        layer.check(part, x, [width])
    del second, mine, yours
    gc.collect()
    assert len(shared.store) == 0


@pytest.mark.parametrize(
    "other",
    [
        {"checkpoint": "another"},
        {"layer": "another"},
        {"cut": (1, 2)},
        {"resident": [(2, 4, 5)]},
        {"resident": [(4,)]},
    ],
)
def test_other_layers_cuts_layouts_and_widths_have_tensors_of_their_own(other):
    store = PlaneStore()

    def pack(checkpoint="checkpoint", layer="layer", cut=(), resident=((2, 4),), kind=AFFINE_FLOAT16):
        shared = SharedPlanes(store, checkpoint, layer, cut)
        return make_mixed([20], 96, 32, list(resident), kind, shared=shared)[0]

    first, second = pack(), pack(**other)
    assert len(store) == 2
    assert first.segments[0].resident is not second.segments[0].resident


def test_planes_lie_in_pairs_unless_a_width_of_the_weight_parts_one():
    def layout(*resident):
        return make_mixed([20] * len(resident), 96, 32, resident, AFFINE_FLOAT16)[0].layout

    assert layout((8,)) is PAIRS
    assert layout((2, 4, 6, 7)) is PAIRS
    assert layout((2, 5, 6)) is PLANES
    assert layout((8,), (3,)) is PAIRS
    assert layout((8,), (3, 4)) is PLANES


@both_kinds
def test_bytes_are_those_of_planes_and_decoders(kind):
    weight, _ = make_mixed([32, 16], 128, 64, [(2, 4), (3,)], kind)
    decoder_bytes = sum(kind.form(width).nbytes(rows, 2) for rows, width in ((32, 2), (32, 4), (16, 3)))
    assert weight.resident_bytes == 32 * 128 * 4 // 8 + 16 * 128 * 3 // 8 + decoder_bytes


def test_decoders_of_several_kinds_are_refused():
    layer = make_layer([20], 96, 32)
    odd = make_decoder(AFFINE_INT8, 4, 20, 3, torch.Generator())
    segment = stored_segment(layer.codes, layer.decoders | {4: odd}, [20], [2, 4])
    found = re.escape("decoders: found the forms {2: 'float16', 4: 'int8'} by width, expected those of one kind")
    with pytest.raises(ValueError, match=found):
        CPU.pack([segment], 96, 32, "cpu")


# What the library checks when a weight is made.


def new_weight(in_features=64, group_size=32, decoder_kind="affine-float16", layout="cpu-planes", activation_bits=None):
    return ops.new_weight(in_features, group_size, decoder_kind, layout, activation_bits)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"in_features": -1}, "columns: found -1"),
        ({"group_size": 0}, "group_size: found 0, expected a positive size"),
        (
            {"decoder_kind": "float"},
            'decoder_kind: found "float", expected "affine-float16", "affine-int8" or "codebook-4d"',
        ),
        ({"activation_bits": 12}, "activation_bits: found 12, expected 8, 16 or 24"),
    ],
)
def test_a_weight_that_cannot_be(changed, message):
    with pytest.raises(RuntimeError, match=message):
        new_weight(**changed)


@pytest.mark.parametrize(
    ("weight", "changed", "message"),
    [
        ({}, {"planes": torch.zeros(4, 16, dtype=torch.uint8)}, "planes: found 2 dimensions, expected 4"),
        ({}, {"planes": torch.zeros(8, 4, 2, 64, dtype=torch.int8)}, "planes: found dtype Char, expected Byte"),
        ({}, {"planes": torch.zeros(8, 4, 64, 2).byte().mT}, "planes: found strides .*, expected a contiguous"),
        ({"in_features": 32}, {}, r"planes: found shape \[8, 4, 2, 64\], expected \[8, 4, 1, 64\]"),
        ({}, {"decoders": torch.zeros(7 * 4 * 64).byte()}, r"decoders: found .*, expected \[3584\]"),
        ({}, {"decoders": torch.zeros(3584)}, "decoders: found dtype Float, expected Byte"),
        # Three of width 2 to 4 with 64 bytes of steps and 32 of each group, four wider ones with 64 of each group.
        ({"decoder_kind": "affine-int8", "group_size": 16}, {}, r"decoders: found shape \[3584\], expected \[6400\]"),
        ({}, {"active_width": torch.tensor([4])}, "active_width: found dtype Long, expected Int"),
        (
            {},
            {"active_width": torch.tensor([4], dtype=torch.int32)},
            r"active_width: found shape \[1\], expected \[2\]",
        ),
        (
            {},
            {"decoder_widths": [1, 2, 3, 4, 5, 6, 7]},
            r"decoder_widths: found .*, expected different widths in 2\.\.8",
        ),
        (
            {},
            {"decoder_widths": [2, 2, 3, 4, 5, 6, 7]},
            r"decoder_widths: found .*, expected different widths in 2\.\.8",
        ),
        ({}, {"decoder_widths": [2, 3, 4]}, r"decoders: found shape .*, expected \[1536\]"),
        ({}, {"output_sizes": []}, "output_sizes: found none, expected at least one"),
        ({}, {"output_sizes": [20, 0]}, r"output_sizes: found \[20, 0\], expected positive sizes"),
        ({}, {"output_sizes": [20, 40]}, r"planes: found shape \[8, 4, 2, 64\], expected \[8, 5, 2, 64\]"),
        ({"group_size": 30}, {}, "group_size: found 30, expected a multiple of 4 or at least the 64 columns"),
        ({"layout": "gpu"}, {}, 'layout: found "gpu", expected "cpu-pairs" or "cpu-planes"'),
    ],
)
def test_a_segment_that_contradicts_the_weight(weight, changed, message):
    [segment] = make_layer([20, 32], 64, 32).weight.segments
    arguments = {
        "weight": new_weight(**weight),
        "planes": segment.resident.planes,
        "decoders": segment.resident.decoders,
        "active_width": segment.active_width,
        "decoder_widths": WIDTHS,
        "output_sizes": [20, 32],
    }
    try:
        with pytest.raises(RuntimeError, match=message):
            ops.add_segment(**(arguments | changed))
        with pytest.raises(RuntimeError, match="weight: found one without segments, expected at least one"):
            ops.linear(torch.zeros(1, 64), torch.tensor([arguments["weight"]]), 52)
    finally:
        ops.free_weight(arguments["weight"])


def test_a_weight_is_freed_once():
    number = new_weight()
    ops.free_weight(number)
    with pytest.raises(RuntimeError, match=f"weight: found {number}, expected the handle"):
        ops.free_weight(number)


# One compiled graph.


class Module(torch.nn.Module):
    """A layer of a model, with its weight's handle in a buffer."""

    def __init__(self, weight: PackedWeight) -> None:
        super().__init__()
        self.kernel = weight.kernel
        self.out_features = weight.out_features
        self.register_buffer("handle", weight.handle.clone(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.kernel.linear(x * 2, self.handle, self.out_features) + 1


@both_kernels
@both_kinds
def test_one_compiled_graph_serves_every_width_and_mix(kind, kernel):
    sizes = [20, 12, 32]
    weights = [make_mixed(sizes, 64, 32, [(width,)] * 3, kind, kernel) for width in WIDTHS]
    weights.append(make_mixed(sizes, 64, 32, [(2,), (8,), WIDTHS], kind, kernel))
    one = make_layer(sizes, 64, 32, kind=kind, kernel=kernel)
    module = Module(weights[0][0])
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=False, backend=counter)
    x = make_input(3, 64, torch.bfloat16)
    for weight, layers in weights:
        module.handle.copy_(weight.handle)
        product = kernel.linear(x * 2, weight.handle, sum(sizes))
        assert torch.equal(compiled(x), product + 1)
        widest = max(weight.active_widths)
        for layer, part, width in zip(layers, product.split(sizes, -1), weight.active_widths, strict=True):
            layer.check(part, x * 2, [width], rounds=kernel is CPU, widest=widest)
    module.handle.copy_(one.weight.handle)
    for widths in ([8, 8, 2], [2, 3, 4], [5, 7, 6]):
        one.weight.set_active(widths)
        assert torch.equal(compiled(x), one.run(x * 2, widths) + 1)
    assert counter.frame_count == 1
