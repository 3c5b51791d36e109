"""The host's plan for the CUDA kernels: what it chooses and what it refuses. It needs neither CUDA nor an emulator."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable

import pytest
import torch

from tests.cuda.emulation import SOURCES, Recorder
from tests.cuda.random_layers import CUDA, KINDS, Layer, make_input, make_layer, make_segments
from vllm_matquant.checkpoint.decoder import AFFINE_FLOAT16, AFFINE_INT8, CODEBOOK
from vllm_matquant.kernels import cuda_launch, ops
from vllm_matquant.kernels.cuda_launch import Launch, Memory, kernel_definitions
from vllm_matquant.kernels.support import KERNELS
from vllm_matquant.kernels.weight import PackedWeight

MAX_PARTITIONS = 8


def launches_of(layer: Layer, tokens: int, dtype: torch.dtype = torch.float16, processors: int = 1) -> list[Launch]:
    recorder = Recorder(processors)
    cuda_launch.multiply(recorder, torch.zeros(tokens, layer.codes.shape[1], dtype=dtype), layer.weight)
    return recorder.launched


def launch_of(layer: Layer, tokens: int, dtype: torch.dtype = torch.float16, processors: int = 1) -> Launch:
    [launch] = launches_of(layer, tokens, dtype, processors)
    return launch


def size_of(memory: Memory | None) -> int:
    return 0 if memory is None else memory.size


def test_every_kernel_is_listed_once() -> None:
    forms = [*((tokens, groups) for tokens in (8, 16, 24) for groups in (1, 2, 4) if (tokens, groups) != (24, 4))]
    expected = [
        *(f"matquant_decode_{kind}_{dtype}_{tokens}_{groups}" for kind, dtype in VARIANTS for tokens, groups in forms),
        *(f"matquant_dequantize_{kind}_{dtype}_{groups}" for kind, dtype in VARIANTS for groups in (1, 2, 4)),
    ]
    ops.load_library()
    names, definitions = torch.ops.matquant.cuda_instances()
    assert names == expected
    for name, definition in zip(names, definitions, strict=True):
        assert re.fullmatch(rf"MATQUANT_(DECODE|DEQUANTIZE)_KERNEL\({name}, [\w, ]+\)", definition)


VARIANTS = [
    (kind, dtype) for kind in ("affine_float16", "affine_int8", "codebook_4d") for dtype in ("float16", "bfloat16")
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("tokens", "group_size", "chosen"),
    [
        (1, 128, "decode_{}_8_1"),
        (8, 256, "decode_{}_8_1"),
        (9, 64, "decode_{}_16_2"),
        (17, 512, "decode_{}_24_1"),
        (64, 128, "decode_{}_24_1"),
        (17, 32, "decode_{}_16_4"),
        (65, 32, "dequantize_{}_4"),
        (1000, 1000, "dequantize_{}_1"),
    ],
)
def test_the_kernel_for_the_fewest_tokens_that_are_enough(tokens, group_size, chosen, dtype, kind) -> None:
    layer = make_layer([40], 600, group_size, [4], kind=kind)
    launch = launch_of(layer, tokens, getattr(torch, dtype))
    assert launch.kernel == "matquant_" + chosen.format(f"{kind.name.replace('-', '_')}_{dtype}")
    assert launch.kernel in kernel_definitions()
    assert launch.threads == 128
    assert launch.dequantizes == (tokens > 64)
    # Columns are padded to whole steps.
    assert launch.pointers[3 if launch.dequantizes else 0].size == 2 * 640 * (40 if launch.dequantizes else tokens)


@pytest.mark.parametrize(
    ("rows", "columns", "tokens", "grid"),
    [
        (64, 8192, 1, [1, 16, 1]),  # no more blocks than leave a step to each of their warps
        (4096, 8192, 1, [64, 5, 1]),  # 3 blocks for each of 100 multiprocessors
        (64 * 400, 1024, 1, [400, 1, 1]),
        (4096, 8192, 64, [64, 2, 3]),
        (4096, 8192, 65, [64, 32, 1]),
    ],
)
def test_columns_are_divided_until_the_device_is_full(rows, columns, tokens, grid) -> None:
    layer = make_layer([rows], columns, 128, [2])
    launch = launch_of(layer, tokens, processors=100)
    assert list(launch.grid) == grid
    assert len(launch.pointers) == (4 if launch.dequantizes else 9)  # no scratch memory where weights are written
    if not launch.dequantizes:
        splits, passes = grid[1], grid[2]
        partial_sums, arrivals = (splits * rows * tokens, passes * rows // 64) if splits > 1 else (0, 0)
        assert [size_of(memory) for memory in launch.pointers[6:8]] == [4 * partial_sums, 4 * arrivals]


@pytest.mark.parametrize(
    ("kind", "group_size", "tokens", "width", "expected"),
    [
        (AFFINE_FLOAT16, 128, 1, 2, 4 * 3 * (2 * 1024 + 256)),
        (AFFINE_INT8, 128, 1, 4, 4 * 3 * (4 * 1024 + 128)),
        (AFFINE_FLOAT16, 64, 1, 5, 4 * 3 * (4 * 1024 + 2 * 256)),  # slices of 4 bits take more than those of 5
        (AFFINE_INT8, 32, 1, 8, 4 * 2 * (8 * 1024 + 4 * 256)),
        (AFFINE_INT8, 64, 1, 5, 4 * 3 * (4 * 1024 + 2 * 128)),
        (AFFINE_INT8, 128, 24, 2, 4 * 3 * (2 * 1024 + 128)),
        (AFFINE_FLOAT16, 128, 65, 8, 0),
        (CODEBOOK, 128, 1, 4, 32 * 1024),
        (CODEBOOK, 32, 24, 6, 32 * 1024),  # the sums of 24 tokens, or 16, take less
        (CODEBOOK, 64, 1, 7, 48 * 1024),
        (CODEBOOK, 64, 65, 8, 0),
    ],
)
def test_shared_memory(kind, group_size, tokens, width, expected) -> None:
    layer = make_layer([70], 600, group_size, sorted({2, width}), kind=kind)
    assert layer.weight.decoder_kind is kind
    assert launch_of(layer, tokens).shared_bytes == expected


def test_the_shape_that_kernels_are_passed() -> None:
    none = 2**32 - 1
    layer = make_segments([([100, 30], (2, 5)), ([70], (4,))], 1100, 256)
    first, second = launches_of(layer, 3)
    assert second.pointers[5].address == first.pointers[5].address + 2 * 130
    # Rows, tokens, output stride, tile rows, tile columns, resident width, groups, shift, slots, partitions; where
    # partitions begin; the byte where the decoders of a width begin.
    numbers = list(struct.unpack("<10i8i8i7I", first.shape))
    assert numbers[:26] == [130, 3, 200, 3, 18, 5, 5, 1, 1, 2, *[0, 2], *[0] * 6, *[0, 100], *[0] * 6]
    assert numbers[26:] == [0, none, none, 3 * 5 * 256, none, none, none]
    numbers = list(struct.unpack("<10i8i8i7I", second.shape))
    assert numbers[:26] == [70, 3, 200, 2, 18, 4, 5, 1, 1, 1, *[0] * 16]
    assert numbers[26:] == [none, none, 0, none, none, none, none]

    mixed = make_segments([([100], (5, 3, 8))], 1100, 256, kind=AFFINE_INT8)
    launch = launch_of(mixed, 3)
    wide, narrow = 2 * 5 * 256, 2 * (256 + 5 * 128)
    numbers = list(struct.unpack("<10i8i8i7I", launch.shape))
    assert numbers[26:] == [none, wide, none, 0, none, none, wide + narrow]

    # Two codebooks, of 1 and of 12 planes, then rows of tiles.
    launch = launch_of(make_segments([([100, 30], (2, 8, 3))], 1100, 256, kind=CODEBOOK), 3)
    rows = 3 * (128 + 5 * 64)
    numbers = list(struct.unpack("<10i8i8i7I", launch.shape))
    assert numbers[26:] == [0, 2 * 256 * 13 + 2 * rows, none, none, none, none, 2 * 256 + rows]


@pytest.mark.parametrize(
    ("group_size", "columns", "groups", "shift"),
    [(32, 4096, 4, 0), (64, 64, 2, 0), (128, 4096, 1, 0), (512, 4096, 1, 2), (100, 100, 1, 31)],
)
def test_groups_of_a_step(group_size, columns, groups, shift) -> None:
    launch = launch_of(make_layer([64], columns, group_size, [2]), 1)
    assert launch.kernel.endswith(f"_{groups}")
    assert struct.unpack_from("<10i", launch.shape)[7] == shift


@pytest.mark.parametrize("group_size", [16, 96])
def test_groups_that_kernels_do_not_serve(group_size) -> None:
    with pytest.raises(RuntimeError, match=f"group_size: found {group_size}, expected 32, 64, 128 or a greater power"):
        make_layer([64], 4096, group_size, [2])


def test_more_partitions_than_kernels_take() -> None:
    make_layer([1] * MAX_PARTITIONS, 64, 32, [2])
    with pytest.raises(RuntimeError, match="output_sizes: found 9 partitions, expected at most 8"):
        make_layer([1] * (MAX_PARTITIONS + 1), 64, 32, [2])


def changed(tensor: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Layer], None]:
    """Adds a segment of which a tensor is another one."""

    def add(layer: Layer) -> None:
        [segment] = layer.weight.segments
        resident = segment.resident
        tensors = {"planes": resident.planes, "decoders": resident.decoders, "active_width": segment.active_width}
        tensors[tensor] = change(tensors[tensor])
        weight = layer.weight
        number = ops.new_weight(weight.in_features, layer.group_size, weight.decoder_kind.name, weight.layout.name)
        ops.add_segment(number, *tensors.values(), resident.decoder_widths, resident.output_sizes)

    return add


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize(
    ("add", "message"),
    [
        (changed("planes", lambda planes: planes.short()), "planes: found dtype Short, expected Byte"),
        (changed("planes", lambda planes: planes[0]), "planes: found 3 dimensions, expected 4"),
        (
            changed("planes", lambda planes: planes[:1]),
            r"planes: found shape \[1, 4, 6, 512\], expected \[2, 4, 6, 512\]",
        ),
        (changed("planes", lambda planes: planes[:, :, :1]), "planes: found 1 planes, expected 2 to 8"),
        (
            changed("planes", lambda planes: planes.transpose(0, 1).contiguous().transpose(0, 1)),
            "planes: found strides .* expected a contiguous tensor",
        ),
        (changed("decoders", lambda decoders: decoders.int()), "decoders: found dtype Int, expected"),
        (changed("decoders", lambda decoders: decoders[:-1]), "decoders: found shape"),
        (changed("active_width", lambda width: width.long()), "active_width: found dtype Long, expected Int"),
        (changed("active_width", lambda width: width.repeat(2)), r"active_width: found shape \[2\], expected \[1\]"),
    ],
)
def test_a_segment_that_contradicts_its_weight(add, message, kind) -> None:
    layer = make_layer([70], 200, 64, [2, 6], kind=kind)
    with pytest.raises(RuntimeError, match=message):
        add(layer)


@pytest.mark.parametrize("tensor", ["decoders", "active_width"])
def test_a_segment_on_two_devices(tensor) -> None:
    layer = make_layer([70], 200, 64, [4])
    [segment] = layer.weight.segments
    resident = segment.resident
    tensors = {"planes": resident.planes, "decoders": resident.decoders, "active_width": segment.active_width}
    tensors[tensor] = tensors[tensor].to("meta")
    number = ops.new_weight(200, 64, "affine-float16", "cuda")
    # What a GPU's tensors are dispatched to.
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(RuntimeError, match=f"{tensor}: found it on .*, expected it where the weight's planes are"):
        torch.ops.matquant.add_segment.default.redispatch(keys, number, *tensors.values(), [4], [70])


def test_decoders_of_another_kind() -> None:
    layer = make_layer([70], 200, 64, [4], kind=AFFINE_INT8)
    [segment] = layer.weight.segments
    number = ops.new_weight(200, 64, "affine-float16", "cuda")
    with pytest.raises(RuntimeError, match=r"decoders: found shape \[1536\], expected \[2048\]"):
        ops.add_segment(number, segment.resident.planes, segment.resident.decoders, segment.active_width, [4], [70])


STARTED = 1  # the address of a launcher, which is never called
X, BIAS = make_input(3, 200, torch.float16), make_input(1, 70, torch.float16)[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X.float(), 70, None, STARTED, 1, None), "x: found dtype Float, expected BFloat16 or Half"),
        ((X[:, :199], 70, None, STARTED, 1, None), "x: found 199 columns, expected the weight's 200"),
        ((X[0, 0], 70, None, STARTED, 1, None), "x: found a scalar"),
        (
            (X.to("meta"), 70, None, STARTED, 1, None),
            "x: found it on another:-?[0-9]+, expected it where the weight's planes are",
        ),
        ((X, 71, None, STARTED, 1, None), "out_features: found 71, expected the weight's 70"),
        ((X, 70, BIAS.bfloat16(), STARTED, 1, None), "bias: found dtype BFloat16, expected Half"),
        ((X, 70, BIAS[1:], STARTED, 1, None), r"bias: found shape \[69\], expected \[70\]"),
        ((X, 70, BIAS.repeat(2)[::2], STARTED, 1, None), "bias: found strides"),
        ((X, 70, BIAS.to("meta"), STARTED, 1, None), "bias: found it on"),
        ((X, 70, None, 0, 1, None), "launcher: found the address 0, expected a function's"),
        ((X, 70, None, STARTED, 0, None), "processors: found 0"),
        ((X, 70, None, STARTED, 1, 0), "splits: found 0, expected 1 to 65535"),
    ],
)
def test_a_product_that_contradicts_its_weight(arguments, message) -> None:
    layer = make_layer([70], 200, 64, [4])
    x, rows, *rest = arguments
    with pytest.raises(RuntimeError, match=message):
        torch.ops.matquant.cuda_linear(x, layer.weight.handle, None, rows, *rest)


ROWS = torch.tensor([0, 1, 0], dtype=torch.int32)


def readers_of(layer: Layer, *widths: int) -> torch.Tensor:
    """The handles of a weight's readers, whose layer must live as long."""
    readers = layer.weight.readers([[width] for width in widths])
    KEPT.extend(readers)
    return torch.cat([*(reader.handle for reader in readers), torch.zeros(1, dtype=torch.int64)])


KEPT: list[PackedWeight] = []


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        (ROWS.long(), "slots: found dtype Long, expected Int"),
        (ROWS[:2], "slots: found 2, expected one for each of 3 rows"),
        (ROWS.to("meta"), "slots: found it on .*, expected it where the weight's planes are"),
        (ROWS.repeat(2)[::2], "slots: found strides"),
    ],
)
def test_slots_that_contradict_the_rows(slots, message) -> None:
    handles = readers_of(make_layer([70], 200, 64, [4, 8]), 8, 4)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.matquant.cuda_linear(X, handles, slots, 70, None, STARTED, 1, None)


def test_readers_that_are_not_of_one_layer() -> None:
    layer, other = make_layer([70], 200, 64, [4, 8]), make_layer([70], 200, 64, [4, 8])
    handles = readers_of(layer, 8, 4)
    alone = readers_of(layer, 4)  # its widths lie elsewhere
    none = torch.zeros(1, dtype=torch.int64)
    for wrong, message in (
        (torch.cat([handles[:1], other.weight.handle]), "weights: found slot 1 with planes, decoders or a place"),
        (torch.cat([handles[:1], alone[:1]]), "weights: found slot 1 with planes, decoders or a place"),
        (torch.cat([handles[1:2], handles[:1]]), "weights: found slot 1 with planes, decoders or a place"),
        (torch.cat([handles[:1], none, handles[1:2]]), "weights: found some after a slot that has none"),
        (none, "weights: found none, expected those of the first slots"),
        (handles.int(), "weights: found dtype Int"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.matquant.cuda_linear(X, wrong, ROWS, 70, None, STARTED, 1, None)


@pytest.mark.parametrize(("tokens", "passes"), [(8, 1), (33, 2), (64, 3), (65, 3), (1000, 42)])
def test_rows_at_widths_of_their_own_are_never_dequantized(tokens: int, passes: int) -> None:
    layer, recorder = make_layer([70], 200, 64, [4, 8]), Recorder()
    slots = torch.zeros(tokens, dtype=torch.int32)
    x = torch.zeros(tokens, 200, dtype=torch.float16)
    cuda_launch.multiply_by_row(recorder, x, readers_of(layer, 8, 4), slots, 70)
    [launch] = recorder.launched
    assert not launch.dequantizes
    assert launch.grid[2] == 2 * passes
    widths, given = launch.pointers[3], launch.pointers[8]
    assert (size_of(widths), given.address, size_of(given)) == (2 * 4, slots.data_ptr(), 4 * tokens)
    assert struct.unpack_from("<10i", launch.shape)[8] == 2


def test_a_weight_for_another_device_is_refused() -> None:
    on_cpu = make_layer([70], 200, 64, [4], kernel=KERNELS[0])
    with pytest.raises(RuntimeError, match='weight: found the layout "cpu-pairs", expected "cuda"'):
        torch.ops.matquant.cuda_linear(X, on_cpu.weight.handle, None, 70, None, STARTED, 1, None)
    [segment] = make_layer([70], 200, 64, [4]).weight.segments
    number = ops.new_weight(200, 64, "affine-float16", "cpu-pairs")
    with pytest.raises(RuntimeError, match="planes: found shape"):
        ops.add_segment(number, segment.resident.planes, segment.resident.decoders, segment.active_width, [4], [70])


@pytest.mark.parametrize(("kind", "layout"), [("codebook-4d", "cuda"), ("affine-int8", "cuda-codebook")])
def test_a_weight_in_the_order_of_another_kind_is_refused(kind, layout) -> None:
    [segment] = make_layer([70], 200, 64, [4]).weight.segments
    number = ops.new_weight(200, 64, kind, layout)
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    tensors = (segment.resident.planes, segment.resident.decoders, segment.active_width)
    with pytest.raises(RuntimeError, match=f'weight: found the layout "{layout}", expected "cuda'):
        torch.ops.matquant.add_segment.default.redispatch(keys, number, *tensors, [4], [70])


def test_the_cpu_refuses_a_weight_for_a_gpu() -> None:
    layer = make_layer([70], 200, 64, [4])
    with pytest.raises(RuntimeError, match='weight: found the layout "cuda", expected "cpu-pairs" or "cpu-planes"'):
        ops.linear(X, layer.weight.handle, 70)


def test_a_weight_without_segments_and_one_that_was_freed() -> None:
    number = ops.new_weight(200, 64, "affine-int8", "cuda")
    with pytest.raises(RuntimeError, match="weight: found one without segments"):
        torch.ops.matquant.cuda_linear(X, torch.tensor([number]), None, 70, None, STARTED, 1, None)
    ops.free_weight(number)
    with pytest.raises(RuntimeError, match=f"weight: found {number}, expected the handle of a packed weight"):
        torch.ops.matquant.cuda_linear(X, torch.tensor([number]), None, 70, None, STARTED, 1, None)


def test_the_sources_are_part_of_the_package() -> None:
    from vllm_matquant.kernels import cuda_jit

    for file in ("cuda/kernels.cuh", "cuda/plan.cpp", "decoder.h"):
        assert (cuda_jit.SOURCES / file).read_text() == (SOURCES / file).read_text()


def test_the_kernel_packs_for_the_library() -> None:
    assert CUDA.in_library
    assert make_layer([70], 200, 64, [4]).weight.handle.item() > 0
