"""A tiny source model, and a checkpoint that the command line made of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.quantize.tiny_sources import write_source
from tests.serve.tiny_models import requantize
from vllm_matquant.checkpoint.decoder import CODEBOOK
from vllm_matquant.checkpoint.reader import open_checkpoint
from vllm_matquant.cli import main


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Llama; not to be changed."""
    return write_source(tmp_path_factory.mktemp("tools") / "llama")


@pytest.fixture(scope="session")
def nested(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a checkpoint of 2, 4 and 8 bits; not to be changed."""
    folder = tmp_path_factory.mktemp("tools") / "nested"
    main(["quantize", str(source), "--output", str(folder), "--bits", "2,4,8", "--method", "rtn", "--no-report"])
    return folder


@pytest.fixture(scope="session")
def codebooks(nested: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a checkpoint of the same model and widths, with codebooks; not to be changed."""
    return requantize(open_checkpoint(nested), CODEBOOK, tmp_path_factory.mktemp("tools") / "codebooks")
