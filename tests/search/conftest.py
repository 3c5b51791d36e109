from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.serve.tiny_models import VOCABULARY, write_checkpoint
from vllm_matquant.checkpoint.decoder import AFFINE_INT8, CODEBOOK
from vllm_matquant.checkpoint.reader import Checkpoint, open_checkpoint
from vllm_matquant.checkpoint.spec import Format
from vllm_matquant.measure.sliced import SlicedModel


@pytest.fixture(scope="session", params=[AFFINE_INT8, CODEBOOK], ids=lambda kind: kind.name)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A tiny random Llama; one of its layers has widths of its own."""
    own = {"model.layers.1.mlp.down_proj": (3, 6)}
    format = Format(group_size=32, layer_widths=own, decoder_kind=request.param)
    return open_checkpoint(write_checkpoint(tmp_path_factory.mktemp("search") / "llama", "llama", format))


@pytest.fixture(scope="session")
def new_model(checkpoint: Checkpoint) -> Callable[[], SlicedModel]:
    return lambda: SlicedModel(checkpoint, dtype=torch.float32)


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    return torch.randint(VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(0))
