from __future__ import annotations

import pytest
import torch

from vllm_matquant.serve.speculation.sampling import spread


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32, torch.int64])
@pytest.mark.parametrize("counts", [[2], [0, 3, 1], [1, 0, 0, 4, 2], [0, 0]])
def test_each_request_counts_as_often_as_it_has_tokens(dtype: torch.dtype, counts: list[int]) -> None:
    generator = torch.Generator().manual_seed(len(counts))
    values = (torch.rand(len(counts), generator=generator) * 9).to(dtype)
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    found = spread(values, ends, sum(counts))
    assert found.dtype == dtype
    assert found.tolist() == [value for value, count in zip(values.tolist(), counts, strict=True) for _ in range(count)]


def test_the_temperature_of_greedy_requests_is_replaced() -> None:
    temperatures = torch.tensor([0.0, 0.7, 0.0])
    found = spread(temperatures, torch.tensor([1, 3, 5], dtype=torch.int32), 5, replace_from=0, replace_to=1)
    torch.testing.assert_close(found, torch.tensor([1.0, 0.7, 0.7, 1.0, 1.0]))
    assert temperatures.tolist() == pytest.approx([0.0, 0.7, 0.0])
