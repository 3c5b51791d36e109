"""A tiny source model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.quantize.tiny_sources import write_source


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Llama; not to be changed."""
    return write_source(tmp_path_factory.mktemp("source") / "llama")
