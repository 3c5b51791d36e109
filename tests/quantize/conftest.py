"""Tiny source models, and layers whose inputs are correlated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.quantize.tiny_sources import write_source

Layer = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Llama; not to be changed."""
    return write_source(tmp_path_factory.mktemp("source") / "llama")


@pytest.fixture(scope="session")
def random_layer() -> Callable[..., Layer]:
    """Function that makes a weight [rows, columns] and the Hessian of correlated inputs, one column of them large."""

    def make(rows: int, columns: int, seed: int, tokens: int | None = None) -> Layer:
        generator = torch.Generator().manual_seed(seed)
        weight = 0.1 * torch.randn(rows, columns, generator=generator)
        mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + 0.5 * torch.eye(columns)
        inputs = torch.randn(tokens or 4 * columns, columns, generator=generator) @ mixing
        inputs[:, columns // 3] *= 6
        return weight, inputs.T @ inputs / len(inputs)

    return make
