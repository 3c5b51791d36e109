from __future__ import annotations

import pytest

from vllm_matquant.serve.elastic.fleet import HOURS, PEAK_HOUR, Day, Level, need_of
from vllm_matquant.serve.elastic.policy import LoadPolicy
from vllm_matquant.serve.elastic.simulator import Machine

DAY = Day(peak=2.0, night=0.5, sample=60.0)
LEVEL = Level(first=2.0, between=0.1, late=0.02)


def test_a_day_is_a_wave() -> None:
    rates = [DAY.rate(hour) for hour in range(HOURS)]
    assert rates.index(max(rates)) == PEAK_HOUR
    assert max(rates) == pytest.approx(DAY.peak)
    assert min(rates) == pytest.approx(DAY.night)
    assert sum(rates) / HOURS == pytest.approx((DAY.peak + DAY.night) / 2)


def test_replicas_share_an_hours_requests() -> None:
    day = Day(peak=8.0, night=1.0, sample=400.0)
    alone, shared = (len(day.arrivals(PEAK_HOUR, replicas)) for replicas in (1, 4))
    assert alone / 400.0 == pytest.approx(8.0, rel=0.1)
    assert shared == pytest.approx(alone / 4, rel=0.2)


def test_one_width_has_its_bits_and_as_few_replicas_as_keep_the_promise() -> None:
    machine = Machine([0.03], 0.001)
    need = need_of(DAY, LEVEL, machine, [8], None)
    assert need.average_bits == 8
    assert len(need.replicas) == HOURS
    assert need.most == need.replicas[PEAK_HOUR]
    assert need_of(DAY, LEVEL, Machine([0.015], 0.0005), [4], None).hours <= need.hours
    assert need_of(DAY, Level(20.0, 1.0, 0.02), machine, [8], None).hours <= need.hours


def test_a_policy_needs_no_more_than_its_widest_step() -> None:
    machine = Machine([0.03, 0.015], 0.0005)
    followed = need_of(DAY, LEVEL, machine, [8, 4], LoadPolicy(waiting=2, dwell=1.0))
    assert followed.hours <= need_of(DAY, LEVEL, Machine([0.03], 0.0005), [8], None).hours
    assert 4 <= followed.average_bits <= 8


def test_a_promise_that_no_number_of_replicas_keeps() -> None:
    with pytest.raises(ValueError, match=r"found 3 replicas too few to answer within 2.0 s and 0.01 s a token"):
        need_of(DAY, Level(2.0, 0.01), Machine([0.03], 0.0), [8], None, most=3)
