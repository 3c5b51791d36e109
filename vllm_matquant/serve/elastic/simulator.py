"""A server's queue in numbers, to try policies on: requests arrive, wait, and are computed step by step in a batch.

It knows nothing of a model but how long a step takes at each width, which ``matquant bench serve`` measures. Its method
is that of NestedFP and MorphServe: bursts of requests drawn with a seed, service levels as multiples of what an empty
server needs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from vllm_matquant.serve.elastic.policy import Load, LoadPolicy, State


@dataclass
class Arrival:
    """A request.

    Attributes:
        at: seconds.
        prompt: tokens of it.
        tokens: to generate.
    """

    at: float
    prompt: int
    tokens: int


@dataclass(frozen=True)
class Machine:
    """How long steps take.

    Attributes:
        step_seconds: of one token for one request, at each step of the ladder.
        token_seconds: more for each further token in a step.
        places: requests in a batch.
        chunk: the most tokens of prompts in a step.
    """

    step_seconds: Sequence[float]
    token_seconds: float
    places: int = 8
    chunk: int = 512


@dataclass
class Outcome:
    """What became of the requests.

    Attributes:
        first: seconds to the first token of each request.
        between: mean seconds between two tokens of each request.
        tokens: generated at each step of the ladder.
        switches: how often the step changed.
        seconds: until the last request had ended.
    """

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    switches: int = 0
    seconds: float = 0.0

    def late(self, first: float, between: float) -> float:
        """The share of requests whose first token, or whose tokens, came later than these seconds."""
        late = [a > first or b > between for a, b in zip(self.first, self.between, strict=True)]
        return sum(late) / max(1, len(late))


@dataclass
class _Running:
    arrival: Arrival
    step: int  # of the ladder, which a request keeps
    left: int  # tokens of the prompt
    first_at: float = 0.0
    done: int = 0


def bursts(seed: int, seconds: float, calm_rate: float, burst_rate: float, period: float = 20.0) -> list[Arrival]:
    """Requests whose rate is higher in every second half of each period; lengths are drawn too."""
    random, arrivals, now = Random(seed), list[Arrival](), 0.0
    while True:
        rate = burst_rate if now % period >= period / 2 else calm_rate
        now += random.expovariate(rate)
        if now >= seconds:
            return arrivals
        arrivals.append(Arrival(now, random.randint(16, 256), random.randint(16, 128)))


def simulate(
    arrivals: Sequence[Arrival], machine: Machine, policy: LoadPolicy | None, step: int = 0, interval: float = 0.25
) -> Outcome:
    """Serve requests; requests that are running keep the step that they began with, as in a server.

    Args:
        arrivals: in order of time.
        machine: that serves them.
        policy: that is asked every ``interval`` seconds; None stays at ``step``.
        step: of the ladder, at first.
        interval: seconds.
    """
    outcome = Outcome(tokens=[0] * len(machine.step_seconds))
    coming, waiting, running = deque(arrivals), deque[Arrival](), list[_Running]()
    state, now, looked, latencies = State(step, 0.0), 0.0, 0.0, list[float]()
    while coming or waiting or running:
        if not waiting and not running:
            now = max(now, coming[0].at)
        while coming and coming[0].at <= now:
            waiting.append(coming.popleft())
        while waiting and len(running) < machine.places:
            arrival = waiting.popleft()
            running.append(_Running(arrival, state.step, arrival.prompt))
        if policy is not None and now - looked >= interval:
            tpot = sum(latencies) / len(latencies) if latencies else None
            after = policy.next(state, Load(now, len(waiting), 0.0, tpot), len(machine.step_seconds))
            outcome.switches += after.step != state.step
            state, looked, latencies = after, now, []
        seconds = _step(running, machine, now, outcome)
        now += seconds
        latencies += [seconds] * sum(each.done > 1 for each in running)
        running = [each for each in running if each.done < each.arrival.tokens]
    outcome.seconds = now
    return outcome


def _step(running: list[_Running], machine: Machine, now: float, outcome: Outcome) -> float:
    """Compute one step; its seconds."""
    room, tokens, advancing = machine.chunk, 0, []
    for each in running:
        part = min(each.left, room)
        tokens += part if each.left else 1
        room -= part
        each.left -= part
        if each.left == 0:
            advancing.append(each)
    # One pass over the planes serves all widths of the batch, so the widest of them says how long it takes.
    seconds = machine.step_seconds[min(each.step for each in running)] + machine.token_seconds * (tokens - 1)
    for each in advancing:
        each.done += 1
        outcome.tokens[each.step] += 1
        if each.done == 1:
            each.first_at = now + seconds
            outcome.first.append(each.first_at - each.arrival.at)
        if each.done == each.arrival.tokens:
            outcome.between.append((now + seconds - each.first_at) / max(1, each.done - 1))
    return seconds
