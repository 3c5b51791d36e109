"""What `matquant bench kernel` multiplies."""

from __future__ import annotations

import pytest
import torch

from vllm_matquant.bench.kernel import random_activations


@pytest.mark.parametrize(("outlier", "least", "most"), [(1.5, 0.13, 0.19), (3.0, 0.01, 0.03)])
def test_activations_have_about_as_many_outliers_as_real_ones(outlier: float, least: float, most: float) -> None:
    torch.manual_seed(0)
    largest = random_activations(256, 4096).float().view(256, 64, 64).abs().amax(-1)
    share = (largest > outlier * largest.mean(-1, keepdim=True)).float().mean()
    assert least < share < most


def test_columns_that_are_no_whole_blocks() -> None:
    assert random_activations(3, 100).shape == (3, 100)
    assert random_activations(3, 100).dtype == torch.bfloat16
