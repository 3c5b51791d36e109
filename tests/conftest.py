"""What all tests share: vLLM's settings, which must stand before its first import, and the real model."""

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
for name, value in SETTINGS.items():
    os.environ.setdefault(name, value)


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
