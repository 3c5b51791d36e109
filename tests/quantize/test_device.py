"""Lower precision where it is faster, and only where it may be."""

from __future__ import annotations

import pytest
import torch

from vllm_matquant.quantize.device import fast_moments, fast_products, products_dtype


def pretend(monkeypatch: pytest.MonkeyPatch, **capabilities: bool | str) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, **capabilities})


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({}, torch.float32),
        ({"amx_bf16": True, "avx512_bf16": True, "cpu_name": "Intel Xeon"}, torch.bfloat16),
        ({"avx512_bf16": True, "cpu_name": "AMD EPYC"}, torch.bfloat16),
        ({"avx512_bf16": True, "cpu_name": "Intel Xeon"}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
    ],
)
def test_bfloat16_where_it_is_faster(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool | str], dtype: torch.dtype
) -> None:
    layer, inputs = torch.nn.Linear(8, 4), torch.randn(2, 8)
    pretend(monkeypatch, **capabilities)
    with fast_products(), torch.no_grad():
        assert layer(inputs).dtype == products_dtype() == dtype


def test_moments_are_exact_where_bfloat16_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    values = torch.randn(512, 96, generator=torch.Generator().manual_seed(0))
    with fast_moments():
        assert torch.backends.mkldnn.matmul.fp32_precision != "bf16"
        found = values.T @ values
    torch.testing.assert_close(found.double(), values.double().T @ values.double(), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_moments_sum_products_of_rounded_factors_in_float32(seed: int) -> None:
    """Of factors that bfloat16 holds nothing is lost, whatever the machine: the sums are not rounded."""
    values = torch.randn(4096, 96, generator=torch.Generator().manual_seed(seed)).bfloat16().float()
    total = torch.zeros(96, 96)
    with fast_moments():
        total.addmm_(values.T, values)
    torch.testing.assert_close(total.double(), values.double().T @ values.double(), rtol=1e-5, atol=5e-3)


def test_the_setting_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, avx512_bf16=True)
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision

    def fail() -> None:
        with fast_moments():
            assert matmul.fp32_precision == "bf16"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert matmul.fp32_precision == before
