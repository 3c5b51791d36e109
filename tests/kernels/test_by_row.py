"""Rows with weights of their own, against the same rows each multiplied alone: the bytes are those of the product."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.random_layers import EVEN_WIDTHS, KINDS, Layer, make_input, make_layer
from vllm_matquant.checkpoint.spec import WIDTHS
from vllm_matquant.kernels import ops
from vllm_matquant.kernels.kernel import Kernel
from vllm_matquant.kernels.support import CPU, DTYPES, REFERENCE
from vllm_matquant.kernels.weight import NotResidentError, PackedWeight

UNUSED = 2  # slots past the last weight
both_kernels = pytest.mark.parametrize("kernel", [CPU, REFERENCE], ids=lambda kernel: kernel.name)
both_kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


def readers_of(layer: Layer, widths: list[list[int]]) -> tuple[list[PackedWeight], torch.Tensor]:
    """Readers of one layer at these widths of its partitions, and their handles."""
    readers = layer.weight.readers(widths)
    return readers, torch.cat([*(reader.handle for reader in readers), torch.zeros(UNUSED, dtype=torch.int64)])


def slots_of(rows: int, slots: int, seed: int) -> torch.Tensor:
    return torch.randint(slots, (rows + 3,), dtype=torch.int32, generator=torch.Generator().manual_seed(seed))


def check(kernel: Kernel, layer: Layer, widths: list[list[int]], x: torch.Tensor, slots: torch.Tensor) -> None:
    readers, handles = readers_of(layer, widths)
    features = sum(layer.output_sizes)
    bias = make_input(1, features, x.dtype, seed=5)[0]
    result = kernel.linear_by_row(x, handles, slots, features, bias)
    for row, slot in enumerate(slots[: len(x)].tolist()):
        alone = kernel.linear(x[row], readers[slot].handle, features, bias)
        assert kernel is REFERENCE or torch.equal(result[row], alone), row
        layer.check(result[row : row + 1], x[row : row + 1], widths[slot], bias, rounds=kernel is CPU)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 8, 9, 33])
@pytest.mark.parametrize("decoder_widths", [WIDTHS, EVEN_WIDTHS])
@both_kinds
def test_each_row_has_the_bytes_of_a_product_alone(kind, decoder_widths, rows, dtype):
    layer = make_layer([33, 16, 70], 200, 64, rows, decoder_widths, kind)
    widths = [[width] * 3 for width in reversed(decoder_widths)]
    for seed in range(3):
        check(CPU, layer, widths, make_input(rows, 200, dtype, seed), slots_of(rows, len(widths), seed))


@both_kinds
def test_slices_that_mix_widths(kind):
    layer = make_layer([20, 64, 5], 136, 32, 7, WIDTHS, kind)
    widths = [[8, 2, 5], [2, 2, 2], [3, 8, 2], [4, 4, 7]]
    for seed in range(4):
        check(CPU, layer, widths, make_input(12, 136, torch.bfloat16, seed), slots_of(12, 4, seed))


@pytest.mark.parametrize("rows", [1, 7])
def test_the_reference_computes_the_same(rows):
    layer = make_layer([20, 12], 96, 32, kernel=REFERENCE)
    check(REFERENCE, layer, [[8, 8], [3, 2]], make_input(rows, 96), slots_of(rows, 2, rows))


@pytest.mark.parametrize("rows", [513, 1100])
def test_blocks_of_rows(rows):
    layer = make_layer([35], 72, 24)
    widths = [[6], [2], [3]]
    slots = torch.zeros(rows, dtype=torch.int32)  # more than a block of one, few of the others, and a run of one
    slots[5::200], slots[100:130] = 1, 2
    check(CPU, layer, widths, make_input(rows, 72, torch.bfloat16), slots)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_no_thread_changes_a_byte(threads):
    layer = make_layer([160, 17], 264, 64)
    _, handles = readers_of(layer, [[8, 8], [2, 2], [5, 3]])
    x, slots = make_input(10, 264, torch.bfloat16), slots_of(10, 3, 1)
    expected = ops.linear_by_row(x, handles, slots, 177)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(ops.linear_by_row(x, handles, slots, 177), expected)
    finally:
        torch.set_num_threads(before)


def test_no_rows():
    layer = make_layer([35], 72, 24)
    _, handles = readers_of(layer, [[8], [2]])
    assert ops.linear_by_row(torch.empty(0, 72), handles, slots_of(0, 2, 0), 35).shape == (0, 35)


@both_kernels
@both_kinds
def test_embedding(kind, kernel):
    layer = make_layer([53], 70, 32, kind=kind, kernel=kernel)
    readers, handles = readers_of(layer, [[8], [2], [3]])
    rows = torch.arange(50).view(5, 10) % 53
    slots = slots_of(50, 3, 2)
    result = kernel.embedding_by_row(rows, handles, slots, 70, torch.bfloat16)
    assert result.shape == (5, 10, 70)
    for index, (row, slot) in enumerate(zip(rows.flatten(), slots.tolist(), strict=False)):
        expected = kernel.embedding(row, readers[slot].handle, 70, torch.bfloat16)
        assert torch.equal(result.view(50, 70)[index], expected)


@both_kernels
def test_compiled_once_for_all_slots(kernel):
    torch._dynamo.reset()  # of what it knows of the other kernel
    layer = make_layer([35], 72, 24, kernel=kernel)
    readers, handles = readers_of(layer, [[8], [2], [3]])
    compiled = torch.compile(
        lambda x, slots: kernel.linear_by_row(x, handles, slots, 35), fullgraph=True, backend="aot_eager"
    )
    slots = torch.zeros(16, dtype=torch.int32)
    x = make_input(4, 72)
    for slot in (0, 2, 1, 0):
        slots.fill_(slot)
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert torch.equal(compiled(x, slots), kernel.linear(x, readers[slot].handle, 35))


@pytest.mark.parametrize("slot", [-1, 2, 3, 4])
def test_a_slot_without_a_weight_is_refused(slot):
    layer = make_layer([35], 72, 24)
    _, handles = readers_of(layer, [[8], [2]])
    slots = torch.tensor([0, slot], dtype=torch.int32)
    with pytest.raises(RuntimeError, match=f"slots: found {slot} for row 1"):
        ops.linear_by_row(make_input(2, 72), handles, slots, 35)
    with pytest.raises(RuntimeError, match=f"slots: found {slot} for row 1"):
        ops.embedding_by_row(torch.tensor([0, 1]), handles, slots, 72, torch.float32)


def test_contradicting_arguments():
    layer, other = make_layer([35], 72, 24), make_layer([35], 72, 24)
    _, handles = readers_of(layer, [[8], [2]])
    slots, x = torch.tensor([0, 1], dtype=torch.int32), make_input(2, 72)
    with pytest.raises(RuntimeError, match="slots: found 1, expected one for each of 2 rows"):
        ops.linear_by_row(x, handles, slots[:1], 35)
    with pytest.raises(RuntimeError, match="slots: found dtype Long"):
        ops.linear_by_row(x, handles, slots.long(), 35)
    with pytest.raises(RuntimeError, match="out_features: found 36, expected the weight's 35"):
        ops.linear_by_row(x, handles, slots, 36)
    with pytest.raises(RuntimeError, match="weights: found some with different planes"):
        ops.linear_by_row(x, torch.cat([layer.weight.handle, other.weight.handle]), slots, 35)
    with pytest.raises(NotResidentError):
        make_layer([35], 72, 24, decoder_widths=(2, 4)).weight.readers([[2], [3]])
