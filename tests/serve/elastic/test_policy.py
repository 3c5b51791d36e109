"""Policies by themselves, and in a simulated server that the real one's code drives."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.serve.elastic.slices import EIGHT, FOUR, RECIPE, TWO, a_front
from vllm_matquant.serve.elastic.follow import Follower, LoadMeter
from vllm_matquant.serve.elastic.policy import Load, LoadPolicy, State, read_policy
from vllm_matquant.serve.elastic.simulator import Machine, bursts, simulate

STEPS = 4
POLICY = LoadPolicy(waiting=4, kv_usage=0.9, tpot=0.1, dwell=2.0, calm=10.0)


def run(policy: LoadPolicy, loads: list[Load], step: int = 0) -> list[int]:
    """The step of the ladder after each look."""
    state, steps = State(step, 0.0), []
    for load in loads:
        state = policy.next(state, load, STEPS)
        steps.append(state.step)
    return steps


@pytest.mark.parametrize(("measure", "low", "high"), [("waiting", 3, 4), ("kv_usage", 0.89, 0.9), ("tpot", 0.099, 0.1)])
def test_each_measure_at_its_threshold_asks_for_fewer_bits(measure: str, low: Any, high: Any) -> None:
    assert run(POLICY, [Load(5.0, **{measure: low})]) == [0]
    state = POLICY.next(State(0, 0.0), Load(5.0, **{measure: high}), STEPS)
    assert (state.step, state.since, state.reason) == (1, 5.0, measure)


def test_every_step_lasts() -> None:
    busy = [Load(now / 2, waiting=9) for count, now in enumerate(range(4, 24))]
    assert run(POLICY, busy) == [1] * 4 + [2] * 4 + [3] * 12


def test_up_again_after_a_calm_time_only() -> None:
    calm = [Load(float(now)) for now in range(3, 30)]
    assert run(POLICY, calm, step=2) == [2] * 10 + [1] * 10 + [0] * 7
    between = [Load(float(now), waiting=3) for now in range(3, 60)]  # below the threshold, but not well below
    assert run(POLICY, between, step=2) == [2] * 57
    broken = [Load(float(now), waiting=3 if now % 9 == 0 else 0) for now in range(3, 60)]
    assert run(POLICY, broken, step=2) == [2] * 57


def test_no_further_than_the_ladder() -> None:
    assert run(POLICY, [Load(9.0 * now, waiting=9) for now in range(1, 9)], step=3) == [3] * 8
    assert run(POLICY, [Load(20.0 * now) for now in range(1, 9)]) == [0] * 8


def test_a_load_that_swings_does_not_make_the_width_swing() -> None:
    swinging = [Load(now / 4, waiting=8 * (now % 8 < 4)) for now in range(400)]
    steps = run(POLICY, swinging)
    assert steps == sorted(steps)


def test_settings() -> None:
    assert read_policy("load") == LoadPolicy()
    read = LoadPolicy(floor=3, ceiling="my-recipe", waiting=8, tpot=0.05)
    assert read_policy("load, floor=3, ceiling=my-recipe,waiting=8,tpot=0.05") == read
    assert read_policy({"floor": 3, "ceiling": "my-recipe", "waiting": 8, "tpot": 0.05}) == read


WRONG_TEXTS = "|other|load,floor|load,sped=1|load,waiting=0|load,kv_usage=1.5|load,dwell=-1|load,calm=x|load,tpot=nan"


@pytest.mark.parametrize(
    "value", [*WRONG_TEXTS.split("|"), {"waiting": True}, {"waiting": None}, {"other": 1}, 4, None, ["load"]]
)
def test_wrong_settings(value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=r"found .*, expected"):
        read_policy(value)


class Switcher:
    def __init__(self) -> None:
        self.front = a_front()

    async def switch(self, wanted: Any) -> None:
        self.front.active = wanted


def follower(switcher: Switcher) -> tuple[Follower, list[str]]:
    reasons: list[str] = []
    metrics: Any = type("Metrics", (), {"decided": staticmethod(reasons.append)})
    return Follower(POLICY, [EIGHT, FOUR, RECIPE, TWO], switcher, LoadMeter(), metrics), reasons  # type: ignore[arg-type]


def test_a_server_follows_as_the_policy_says() -> None:
    switcher = Switcher()
    follow, reasons = follower(switcher)

    async def looks() -> list[Any]:
        active = []
        for now in range(0, 8):
            await follow.look(Load(float(now), waiting=5))
            active.append(switcher.front.active)
        return active

    assert asyncio.run(looks()) == [EIGHT, EIGHT, FOUR, FOUR, RECIPE, RECIPE, TWO, TWO]
    assert reasons == ["waiting"] * 3


def test_a_server_goes_on_from_what_somebody_else_has_switched_to() -> None:
    switcher = Switcher()
    follow, _ = follower(switcher)

    async def looks() -> None:
        await follow.look(Load(0.0))
        switcher.front.active = RECIPE
        await follow.look(Load(1.0, waiting=9))  # just switched: it lasts
        assert switcher.front.active == RECIPE
        await follow.look(Load(3.0, waiting=9))
        assert switcher.front.active == TWO

    asyncio.run(looks())


def test_the_meter_takes_down_what_vllm_tells() -> None:
    from vllm.v1.metrics.stats import IterationStats, SchedulerStats

    meter, iteration = LoadMeter(), IterationStats()
    iteration.inter_token_latencies_iter = [0.25, 0.75]
    meter.record(SchedulerStats(num_waiting_reqs=3, num_skipped_waiting_reqs=2, kv_cache_usage=0.5), iteration)
    load = meter.take()
    assert (load.waiting, load.kv_usage, load.tpot) == (5, 0.5, 0.5)
    load = meter.take()
    assert (load.waiting, load.kv_usage, load.tpot) == (5, 0.5, None)


MACHINE = Machine(step_seconds=(0.08, 0.05, 0.04, 0.03), token_seconds=0.0005)


@pytest.mark.parametrize("seed", range(5))
def test_in_bursts_a_policy_serves_sooner_than_the_most_bits_and_wider_than_the_fewest(seed: int) -> None:
    arrivals = bursts(seed, 120.0, calm_rate=0.3, burst_rate=2.5)
    wide, narrow = (simulate(arrivals, MACHINE, None, step) for step in (0, STEPS - 1))
    followed = simulate(arrivals, MACHINE, LoadPolicy(waiting=2, dwell=1.0, calm=4.0))
    levels = {"first": 10 * MACHINE.step_seconds[0], "between": 2 * MACHINE.step_seconds[0]}
    assert narrow.late(**levels) <= followed.late(**levels) < wide.late(**levels)
    assert followed.tokens[0] > 0
    assert sum(followed.tokens) == sum(wide.tokens) == sum(each.tokens for each in arrivals)
    assert 0 < followed.switches < 60
    assert len(followed.first) == len(followed.between) == len(arrivals)


def test_an_empty_server_stays_at_the_most_bits() -> None:
    arrivals = bursts(0, 120.0, calm_rate=0.1, burst_rate=0.1)
    outcome = simulate(arrivals, MACHINE, LoadPolicy())
    assert outcome.switches == 0
    assert outcome.tokens[1:] == [0, 0, 0]
    assert simulate(arrivals, MACHINE, LoadPolicy()) == outcome
