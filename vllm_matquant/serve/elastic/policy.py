"""When to read fewer bits, and when more again: a policy looks at the load and says which step of a ladder to take.

A policy is data and its decisions are a function of what it is given, so that a server and a simulator
(``simulator.py``) run the same one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

Choice = int | str
"""A width, or the name of a recipe."""


@dataclass(frozen=True)
class Load:
    """What a server measured since the last look.

    Attributes:
        now: seconds, of any clock that does not go back.
        waiting: requests that wait for a place in the batch.
        kv_usage: share of the KV cache that is in use, 0 to 1.
        tpot: mean seconds from one token of a request to its next, None if none came.
    """

    now: float
    waiting: int = 0
    kv_usage: float = 0.0
    tpot: float | None = None


@dataclass(frozen=True)
class State:
    """Where a policy stands.

    Attributes:
        step: of the ladder, 0 for the most bits.
        since: when this step was taken.
        calm_since: since when the load has been low, None while it is not.
        reason: what the last step was taken for: a measure's name or "calm".
    """

    step: int
    since: float
    calm_since: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class LoadPolicy:
    """Fewer bits while a measure is at its threshold or above, more again when all have been well below for a while.

    Attributes:
        floor: the fewest bits to go down to, or a recipe; by default the least that is offered.
        ceiling: the most bits to go up to, or a recipe; by default the most that is offered.
        waiting: requests that wait.
        kv_usage: share of the KV cache in use.
        tpot: seconds from one token of a request to its next; 0 looks at none.
        dwell: seconds that every step lasts at least.
        calm: seconds that all measures must have been low before a step up.
        relief: what counts as low, relative to the threshold.
    """

    floor: Choice | None = None
    ceiling: Choice | None = None
    waiting: int = 4
    kv_usage: float = 0.9
    tpot: float = 0.0
    dwell: float = 2.0
    calm: float = 10.0
    relief: float = 0.5

    def __post_init__(self) -> None:
        limits = {"waiting": 1, "kv_usage": 0.01, "tpot": 0, "dwell": 0, "calm": 0, "relief": 0}
        for name, least in limits.items():
            most = 1.0 if name in ("kv_usage", "relief") else float("inf")
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
                expected = f"a number from {least}" + (f" to {most:g}" if most == 1.0 else "")
                raise ValueError(f"{name}: found {value!r}, expected {expected}")

    def next(self, state: State, load: Load, steps: int) -> State:
        """Where the policy stands after a look at the load: a step further at most.

        Args:
            state: where it stands.
            load: what was measured since the last look.
            steps: of the ladder.
        """
        pressures = self._pressures(load)
        calm = all(pressure <= self.relief for pressure in pressures.values())
        calm_since = None if not calm else load.now if state.calm_since is None else state.calm_since
        state = replace(state, calm_since=calm_since)
        if load.now - state.since < self.dwell:
            return state
        most = max(pressures, key=lambda name: pressures[name])
        if pressures[most] >= 1 and state.step < steps - 1:
            return State(state.step + 1, load.now, calm_since, most)
        if calm_since is not None and load.now - calm_since >= self.calm and state.step > 0:
            return State(state.step - 1, load.now, load.now, "calm")
        return state

    def _pressures(self, load: Load) -> dict[str, float]:
        """Each measure, relative to its threshold."""
        pressures = {"waiting": load.waiting / self.waiting, "kv_usage": load.kv_usage / self.kv_usage}
        if self.tpot and load.tpot is not None:
            pressures["tpot"] = load.tpot / self.tpot
        return pressures


def read_policy(value: Any) -> LoadPolicy:
    """The policy of a setting.

    Args:
        value: "load", with settings "load,floor=3,waiting=8"; or an object of the settings.

    Raises:
        ValueError: a setting is unknown or wrong.
    """
    if isinstance(value, str):
        name, *pairs = [part.strip() for part in value.split(",")]
        if name != "load" or not all("=" in pair for pair in pairs):
            raise ValueError(f'found {value!r}, expected "load", with settings such as "load,floor=3,waiting=8"')
        value = {key.strip(): _number(text.strip()) for key, _, text in (pair.partition("=") for pair in pairs)}
    names = [field.name for field in fields(LoadPolicy)]
    if not isinstance(value, Mapping) or not set(value) <= set(names):
        raise ValueError(f"found {value!r}, expected settings of {', '.join(names)}")
    return LoadPolicy(**value)


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
