"""How many replicas a day's load needs: at one width all day, or at one that follows the load.

On paper: :mod:`vllm_matquant.serve.elastic.simulator` serves each hour's requests, divided evenly among the replicas.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_matquant.serve.elastic.policy import LoadPolicy
from vllm_matquant.serve.elastic.simulator import Arrival, Machine, Outcome, bursts, simulate

HOURS = 24
PEAK_HOUR = 15  # o'clock
SWING = 0.5  # requests come so much more, and less, often than on average while a burst lasts, and after it


@dataclass(frozen=True)
class Day:
    """A day's load, a wave from the night's to the afternoon's.

    Attributes:
        peak: requests a second at the busiest hour.
        night: requests a second at the quietest.
        sample: seconds of each hour that are simulated.
        seed: of the requests' times and lengths.
    """

    peak: float
    night: float
    sample: float = 120.0
    seed: int = 0

    def rate(self, hour: int) -> float:
        """Requests a second in an hour of the day, 0 to 23."""
        wave = (1 + math.cos(2 * math.pi * (hour - PEAK_HOUR) / HOURS)) / 2
        return self.night + (self.peak - self.night) * wave

    def arrivals(self, hour: int, replicas: int) -> list[Arrival]:
        """The requests of one of so many replicas in the sample of an hour."""
        rate = self.rate(hour) / replicas
        return bursts(self.seed + hour, self.sample, (1 - SWING) * rate, (1 + SWING) * rate)


@dataclass(frozen=True)
class Level:
    """What users are promised.

    Attributes:
        first: seconds to a request's first token.
        between: mean seconds between its tokens.
        late: share of requests that may be later than that.
    """

    first: float
    between: float
    late: float = 0.01


@dataclass(frozen=True)
class Need:
    """What a way of serving needs.

    Attributes:
        replicas: for each hour, as few as keep the promise.
        average_bits: of the tokens that these generate in a day.
    """

    replicas: tuple[int, ...]
    average_bits: float

    @property
    def most(self) -> int:
        """Replicas that are enough all day."""
        return max(self.replicas)

    @property
    def hours(self) -> int:
        """Hours of replicas a day, where as many run as each hour needs."""
        return sum(self.replicas)


def need_of(
    day: Day, level: Level, machine: Machine, bits: Sequence[float], policy: LoadPolicy | None, most: int = 64
) -> Need:
    """The replicas that serve a day as promised.

    Args:
        day: the load.
        level: the promise.
        machine: a replica, with a time for each step of the ladder.
        bits: of each step of the ladder.
        policy: that replicas follow; None stays at the ladder's first step.
        most: replicas to try.

    Raises:
        ValueError: not even the most keep the promise.
    """
    replicas: list[int] = []
    tokens = weighted = 0.0
    for hour in range(HOURS):
        count, outcome = _fewest(day, hour, level, machine, policy, most)
        replicas.append(count)
        generated = [count * each for each in outcome.tokens]
        tokens += sum(generated)
        weighted += sum(each * width for each, width in zip(generated, bits, strict=True))
    return Need(tuple(replicas), weighted / max(1.0, tokens))


def _fewest(
    day: Day, hour: int, level: Level, machine: Machine, policy: LoadPolicy | None, most: int
) -> tuple[int, Outcome]:
    for count in range(1, most + 1):
        outcome = simulate(day.arrivals(hour, count), machine, policy)
        if outcome.late(level.first, level.between) <= level.late:
            return count, outcome
    raise ValueError(
        f"{day.rate(hour):.3g} requests a second: found {most} replicas too few to answer within {level.first} s and "
        f"{level.between} s a token, expected a promise that an empty server keeps"
    )
