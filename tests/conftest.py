"""What all tests share: vLLM's settings, which must stand before its first import, the real model, and the order of the
files for pytest-xdist.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SETTINGS = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "passive",  # threads that spin while they wait slow tests manyfold on a busy machine
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
# Of each worker of pytest-xdist, and of what it starts: threads of several that take turns on a processor wait for each
# other most of the time.
if (workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) > 1:
    SETTINGS["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // workers))
for name, value in SETTINGS.items():
    os.environ.setdefault(name, value)

WORKER_BYTES = 4 * 2**30  # of memory for a worker and what it starts
# Dealt first, for each of them takes minutes: a worker that got one last would work on alone.
LONGEST = (
    "tests/end_to_end/test_real_model.py",
    "tests/serve/test_engine.py",
    "tests/test_packaging.py",
    "tests/kernels/test_compare_kernels.py",
    "tests/serve/elastic/test_elastic_engine.py",
    "tests/serve/elastic/test_server.py",
    "tests/serve/speculation/test_speculation_engine.py",
    "tests/serve/test_adapters.py",
    "tests/cuda/test_static.py",
    "tests/kernels/test_isa.py",
    "tests/cuda/test_decode.py",
    "tests/end_to_end/test_lm_eval.py",
    "tests/cuda/test_triton.py",
    "tests/test_python_guide.py",
    "tests/cuda/test_decode_codebook.py",
)


@pytest.hookimpl(optionalhook=True)  # there is none without pytest-xdist
def pytest_xdist_auto_num_workers() -> int:
    """A worker for each processor that this process may run on, two threads of a core being two."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(len(os.sched_getaffinity(0)), memory // WORKER_BYTES))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In a worker of pytest-xdist, put the longest files first."""
    if hasattr(config, "workerinput"):
        places = {path: place for place, path in enumerate(LONGEST)}
        items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(places)))


@pytest.fixture(scope="session")
def real_model() -> Path:
    """Folder of SmolLM2-135M-Instruct as a bfloat16 Hugging Face checkpoint; fetched once and kept in .cache."""
    from fetch_model import fetch_model

    return fetch_model()


@pytest.fixture(scope="session")
def real_text() -> Path:
    """English news that no calibration text holds, about 76,000 tokens; fetched once and kept in .cache."""
    from fetch_model import fetch_text

    return fetch_text()


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of some 9,000 bytes."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(f"The {number} cats of house {number * 7} sat there." for number in range(220)))
    return path
