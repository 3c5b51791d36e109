"""A tiny source model, its parent, and a function that trains that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.quantize.tiny_sources import write_source
from vllm_matquant.cli import main
from vllm_matquant.jobs.train import Train
from vllm_matquant.train.pipeline import Outcome

Run = Callable[..., Outcome]
SMALL = {
    "terms": "8,4,2",
    "sequence_length": 32,
    "batch": 2,
    "steps": 6,
    "warmup": 2,
    "precision": "fp32",
    "code_rate": 1.0,
}


def make_parent(source: Path, folder: Path, *options: str) -> Path:
    """Quantize a model by rounding to the nearest."""
    assert main(["quantize", str(source), "--output", str(folder), "--method", "rtn", "--no-report", *options]) == 0
    return folder


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Llama; not to be changed."""
    return write_source(tmp_path_factory.mktemp("train") / "llama", hidden_size=64, num_hidden_layers=2)


@pytest.fixture(scope="session")
def parent(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of its checkpoint of 2, 3, 4 and 8 bits in groups of 32; not to be changed."""
    folder = tmp_path_factory.mktemp("train") / "parent"
    return make_parent(source, folder, "--bits", "2,3,4,8", "--group-size", "32")


@pytest.fixture(scope="session")
def short_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of some ten windows of 32 tokens: an epoch is over after a few steps."""
    path = tmp_path_factory.mktemp("train") / "short.txt"
    path.write_text(" ".join(f"the cat {number} sat on the mat" for number in range(24)))
    return path


@pytest.fixture(scope="session")
def train(source: Path, parent: Path, short_text: Path) -> Run:
    """A function that trains the parent on the short text, in float32, for a few steps."""

    def run(output: Path, **options: Any) -> Outcome:
        given = {"parent": parent, "source": source, "text": short_text} | SMALL | options
        return Train(output=output, **given).run()

    return run
