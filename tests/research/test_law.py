"""The scaling law: known constants come back, files go round, and what cannot be fitted is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from tests.random_models import randomized
from vllm_matquant.research.degeneration import MixedModel, round_to_nearest
from vllm_matquant.research.law import Law, LawError, Observation, fit_law, read_law

SIZES = {"small": 10**6, "middle": 10**7, "large": 10**8}


def observations(
    seed: int, noise: float = 0.05, models: tuple[str, ...] = tuple(SIZES), blocks: tuple[int, ...] = (16, 64, 256)
) -> list[Observation]:
    """Of the law C = 0.5, A = 2.5, gamma_n = 0.2, gamma_c = 0.4, d = 20."""
    random = np.random.default_rng(seed)
    found = []
    for name in models:
        for block in blocks:
            for ratio in np.linspace(0.05, 1, 12):
                delta = 0.5 * math.exp(2.5 * ratio) * SIZES[name] ** -0.2 * (block + 20) ** 0.4
                delta *= math.exp(noise * random.standard_normal())
                found.append(Observation(name, SIZES[name], float(ratio), block, (0.8 * delta, 1.2 * delta)))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_known_constants_come_back(seed: int) -> None:
    law = fit_law(observations(seed), 4, 16, seed)
    assert law.a == pytest.approx(2.5, abs=0.1)
    assert law.gamma_n == pytest.approx(0.2, abs=0.02)
    assert law.r2 > 0.98
    assert law.held_out_r2 > 0.98
    assert law.held_out_error < 0.1
    assert law.mix_error == pytest.approx(0.2, abs=0.07)  # what each mix here lies off the mean
    for name, true in (("a", 2.5), ("gamma_n", 0.2), ("gamma_c", 0.4)):
        low, high = law.intervals[name]
        assert low < high
        assert low - 0.05 <= true <= high + 0.05
    for ratio, size, block in ((0.3, 3e6, 32), (0.8, 5e7, 128)):
        true = 0.5 * math.exp(2.5 * ratio) * size**-0.2 * (block + 20) ** 0.4
        assert law.predict(ratio, size, block) == pytest.approx(true, rel=0.05)


def test_outliers_do_not_pull_it_far() -> None:
    spoilt = observations(0)
    for index in range(0, len(spoilt), 12):
        spoilt[index] = Observation(**(vars(spoilt[index]) | {"mixes": (50 * spoilt[index].degeneration,)}))
    assert fit_law(spoilt, 4, 16).a == pytest.approx(2.5, abs=0.3)


def test_what_is_not_varied_is_not_fitted() -> None:
    law = fit_law(observations(0, models=("small",), blocks=(64,)), 2, 8)
    assert (law.gamma_n, law.gamma_c) == (0, 0)
    assert law.predict(0.5, 10**6, 64) == law.predict(0.5, 10**9, 16)
    assert law.r2 > 0.98


def test_the_same_observations_give_the_same_law() -> None:
    assert fit_law(observations(1), 4, 16, 3) == fit_law(observations(1), 4, 16, 3)


def test_observations_without_a_logarithm_are_left_out_and_counted() -> None:
    none = [Observation("small", 10**6, 0.1, 16, (-0.003, 0.001))] * 5
    law = fit_law(observations(0) + none, 4, 16)
    assert (law.observations, law.left_out) == (108, 5)
    with pytest.raises(LawError, match="found 0 with a positive"):
        fit_law(none, 4, 16)


def test_budgets() -> None:
    law = fit_law(observations(0), 2, 8)
    assert law.ratio_for_budget(2) == 1
    assert law.ratio_for_budget(5) == 0.5
    expected = math.log1p(law.predict(0.5, 10**7, 64))
    assert law.predict_for_budget(5, 10**7, 64) == expected
    with pytest.raises(LawError, match="found 9 bits, expected 2 to 8"):
        law.ratio_for_budget(9)


def test_files(tmp_path: Path) -> None:
    law = fit_law(observations(0), 4, 16)
    path = tmp_path / "law.json"
    path.write_text(json.dumps({"law": law.to_dict()}))
    again = read_law(path)
    assert isinstance(again, Law)
    assert again.predict(0.4, 1e7, 64) == law.predict(0.4, 1e7, 64)
    path.write_text(json.dumps({"law": law.to_dict() | {"law_version": 2}}))
    with pytest.raises(LawError, match="no scaling law of version 1"):
        read_law(path)
    path.write_text("{}")
    with pytest.raises(LawError, match="no scaling law"):
        read_law(path)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("block", [8, 24, 40, 96, 128])
def test_rounding_to_the_nearest(bits: int, block: int) -> None:
    weight = torch.randn(5, 96, generator=torch.Generator().manual_seed(bits))
    rounded = round_to_nearest(weight, bits, block)
    for start in range(0, 96, block):
        for row in range(5):
            group, found = weight[row, start : start + block], rounded[row, start : start + block]
            step = (group.max() - group.min()) / (2**bits - 1)
            assert len(found.unique()) <= 2**bits
            assert float((found - group).abs().max()) <= float(step) * 0.5001
            assert float(found.min()) == pytest.approx(float(group.min()), abs=1e-6)
    assert torch.equal(round_to_nearest(weight, 16, block), weight)
    assert torch.equal(round_to_nearest(torch.ones(2, 8), bits, block), torch.ones(2, 8))


def test_mixes_of_a_model() -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = randomized(config, 0)
    source = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layers = [
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    tokens = torch.randint(64, (4, 32), generator=torch.Generator().manual_seed(0))
    mixed = MixedModel("tiny", model, layers, tokens, 2)
    found = list(mixed.observe([0.25, 0.5, 1.0], [16, 32], 2, seed=1))
    assert len(found) == 6
    assert [len(item.mixes) for item in found] == [2, 2, 1, 2, 2, 1]
    assert found == list(
        MixedModel("tiny", randomized(config, 0), layers, tokens, 2).observe([0.25, 0.5, 1.0], [16, 32], 2, 1)
    )
    whole = [item for item in found if item.ratio == pytest.approx(1)]
    assert len(whole) == 2
    assert all(abs(item.ratio - 0.25) < 0.1 for item in found[::3])
    assert found[0].degeneration == pytest.approx(sum(found[0].mixes) / 2)
    # By hand: every layer rounded, on the model itself.
    model.load_state_dict(source)
    with torch.no_grad():
        base = float(model(tokens, labels=tokens).loss)
        for layer in layers:
            weight = model.get_parameter(f"{layer}.weight")
            weight.copy_(round_to_nearest(weight, 2, 16))
        lost = float(model(tokens, labels=tokens).loss)
    assert whole[0].degeneration == pytest.approx(math.exp(lost - base) - 1, rel=1e-3)
