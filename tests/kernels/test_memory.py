"""Memory for weights: apart, aligned, alive as long as it is used."""

from __future__ import annotations

import gc
import mmap
import os
import re
from pathlib import Path

import pytest
import torch

from vllm_matquant.kernels import memory
from vllm_matquant.kernels.memory import CHUNK_BYTES, WeightMemory

SHAPES = [(3,), (2, 5, 7), (0, 4), (1000, 1000), (1,)]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16])
def test_tensors_are_apart_and_keep_their_values(dtype: torch.dtype) -> None:
    weights = WeightMemory()
    tensors = [weights.copy(torch.full(shape, index, dtype=dtype)) for index, shape in enumerate(SHAPES)]
    for index, (shape, tensor) in enumerate(zip(SHAPES, tensors, strict=True)):
        assert tensor.shape == shape
        assert tensor.dtype == dtype
        assert tensor.is_contiguous()
        assert (tensor == index).all()
        assert tensor.data_ptr() % 64 == 0


def test_small_tensors_share_a_chunk_and_large_ones_have_their_own() -> None:
    weights = WeightMemory()
    first, large, second = (weights.take((size,), torch.uint8) for size in (100, CHUNK_BYTES, 100))
    assert second.data_ptr() - first.data_ptr() == 128
    assert large.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()


def test_a_full_chunk_is_followed_by_another() -> None:
    weights = WeightMemory()
    tensors = [weights.take((CHUNK_BYTES // 2,), torch.uint8) for _ in range(3)]
    storages = [tensor.untyped_storage().data_ptr() for tensor in tensors]
    assert storages[0] == storages[1] != storages[2]


def test_tensors_outlive_the_memory_they_came_from() -> None:
    weights = WeightMemory()
    tensor = weights.copy(torch.arange(100, dtype=torch.uint8))
    del weights
    gc.collect()
    assert torch.equal(tensor, torch.arange(100, dtype=torch.uint8))


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(), reason="no huge pages here")
def test_huge_pages_are_asked_for() -> None:
    """Whether the system has some to give is its own affair."""
    tensor = WeightMemory().take((CHUNK_BYTES,), torch.uint8)
    # Fresh from the system: memory from the heap may be what the kernels' activations, on huge pages, lay in before.
    plain = torch.frombuffer(mmap.mmap(-1, CHUNK_BYTES, flags=mmap.MAP_PRIVATE), dtype=torch.uint8)
    assert "hg" in mapping_flags(tensor.data_ptr())
    assert "hg" not in mapping_flags(plain.data_ptr())


def test_without_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(memory.mmap, "MADV_HUGEPAGE", raising=False)
    assert not WeightMemory().take((3, 3), torch.uint8).any()


def mapping_flags(address: int) -> list[str]:
    """The flags of the mapping that holds an address, as Linux's proc(5) abbreviates them."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"no mapping holds {address:#x}")


@pytest.mark.skipif(not hasattr(memory._libc, "malloc_trim"), reason="another libc than glibc")
def test_what_was_freed_before_is_given_back() -> None:
    torch.ones(30 * 2**20, dtype=torch.uint8)  # freed at once: from now on such sizes come from the heap
    tensors = [torch.ones(2**20, dtype=torch.uint8) for _ in range(200)]
    last = tensors.pop()  # keeps the heap from shrinking by itself
    tensors.clear()
    before = resident_bytes()
    WeightMemory().take((1,), torch.uint8)
    assert before - resident_bytes() > 150 * 2**20
    assert last.all()


def resident_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * int(Path("/proc/self/statm").read_text().split()[1])
