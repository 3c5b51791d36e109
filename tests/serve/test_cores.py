from __future__ import annotations

import logging
from collections.abc import Iterable

import pytest
import torch
from vllm.utils import cpu_resource_utils
from vllm.utils.cpu_resource_utils import LogicalCPUInfo

from vllm_matquant.serve import cores


def machine(monkeypatch: pytest.MonkeyPatch, nodes: int, cores_of_node: int, siblings: int) -> None:
    """Pretend to have so many memory nodes, cores on each, and logical processors of each core."""
    processors: Iterable[LogicalCPUInfo] = (
        LogicalCPUInfo(id=(node * cores_of_node + core) * siblings + sibling, physical_core=core, numa_node=node)
        for node in range(nodes)
        for core in range(cores_of_node)
        for sibling in range(siblings)
    )
    found = list(processors)
    monkeypatch.setattr(cpu_resource_utils, "get_allowed_cpu_list", lambda: found)


@pytest.mark.parametrize(("nodes", "ranks", "expected"), [(1, 1, 6), (2, 1, 6), (2, 2, 12), (1, 2, 6)])
def test_cores_are_those_of_a_memory_node_for_each_rank(
    monkeypatch: pytest.MonkeyPatch, nodes: int, ranks: int, expected: int
) -> None:
    machine(monkeypatch, nodes, 6, siblings=2)
    assert cores.usable_cores(ranks) == expected


def test_a_gpu_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores.current_platform, "is_cpu", lambda: False)
    assert cores.usable_cores(1) == 0


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is warned of."""
    handler = logging.Handler()
    messages: list[str] = []
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    monkeypatch.setattr(cores.logger, "handlers", [handler])
    for name in ("VLLM_CPU_OMP_THREADS_BIND", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    return messages


@pytest.mark.parametrize(
    ("threads", "ranks", "available", "idle"),
    [(1, 1, 2, True), (2, 1, 2, False), (15, 1, 16, False), (7, 2, 16, True), (8, 2, 16, False), (1, 1, 0, False)],
)
def test_idle_cores_are_warned_of(
    monkeypatch: pytest.MonkeyPatch, warned: list[str], threads: int, ranks: int, available: int, idle: bool
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    cores.warn_of_idle_cores(available, ranks)
    assert bool(warned) is idle
    if idle:
        assert f"{threads * ranks} of the {available} cores" in warned[0]
        assert "VLLM_CPU_OMP_THREADS_BIND=nobind" in warned[0]


def test_who_binds_nothing_is_told_of_the_number_of_threads(monkeypatch: pytest.MonkeyPatch, warned: list[str]) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    cores.warn_of_idle_cores(8, 2)
    assert "OMP_NUM_THREADS=4" in warned[0]
