from __future__ import annotations

import pytest

from vllm_matquant.serve.speculation.payoff import Payoff


def measured(tokens: int, accepted: int, requests: int = 1, **seconds: float) -> Payoff:
    payoff = Payoff(tokens, wanted=4)
    for _ in range(4):
        assert not payoff.is_settled()
        payoff.add(requests, accepted, **seconds)
    assert payoff.is_settled()
    return payoff


@pytest.mark.parametrize("requests", [1, 3])
def test_gain(requests: int) -> None:
    # Two drafts for 0.5 of a plain step each, and a step that checks them as dear as a plain one: 2 tokens in 2 steps.
    payoff = measured(2, requests, requests, drafting=0.02, checking=0.02, plain=0.02)
    assert payoff.acceptance == 0.5
    assert payoff.gain == pytest.approx(1.0)
    assert measured(2, 2 * requests, requests, drafting=0.02, checking=0.02, plain=0.02).gain == pytest.approx(1.5)
    assert measured(4, 0, requests, drafting=0.03, checking=0.03, plain=0.02).gain == pytest.approx(1 / 3)


def test_it_pays() -> None:
    assert str(measured(3, 2, drafting=0.01, checking=0.012, plain=0.01)) == (
        "Speculation pays: 67% of the drafts were accepted, 3.00 tokens a step; drafting 3 takes 10.0 ms, checking "
        "them 12.0 ms, and a step without drafts 10.0 ms: 1.36 times the speed"
    )


def test_it_does_not_pay_and_what_to_change() -> None:
    said = str(measured(3, 1, drafting=0.024, checking=0.012, plain=0.01))
    assert said.startswith("Speculation does not pay: 33% of the drafts were accepted, 2.00 tokens a step")
    assert said.endswith(
        "0.56 times the speed. Try other --speculate-tokens or --speculate-bits, or serve without --speculate-bits"
    )


def test_a_step_in_which_the_machine_stood_still_counts_as_one() -> None:
    payoff = Payoff(2, wanted=5)
    for seconds in (0.01, 9.0, 0.01, 0.01, 0.01):
        payoff.add(1, 2, drafting=seconds, checking=0.01, plain=0.01)
    assert payoff.gain == pytest.approx(1.5)
