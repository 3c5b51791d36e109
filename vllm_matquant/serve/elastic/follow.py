"""Lets the active slice of a server follow its load."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.logger import init_logger
from vllm.v1.metrics.loggers import StatLoggerBase

from vllm_matquant.checkpoint.errors import ConfigError
from vllm_matquant.checkpoint.slice import Slice
from vllm_matquant.serve.elastic.metrics import ElasticMetrics
from vllm_matquant.serve.elastic.offer import ladder_of
from vllm_matquant.serve.elastic.policy import Load, LoadPolicy, State
from vllm_matquant.serve.elastic.switch import Switcher, SwitchError

logger = init_logger(f"vllm.{__name__}")

INTERVAL = 0.25  # seconds between two looks at the load


class LoadMeter(StatLoggerBase):
    """Takes down what vLLM measures of each step, until it is asked for."""

    def __init__(self, vllm_config: Any = None, engine_index: int = 0) -> None:
        self._waiting, self._kv_usage = 0, 0.0
        self._latencies: list[float] = []

    def record(self, scheduler_stats: Any, iteration_stats: Any, *args: Any, **kwargs: Any) -> None:
        if scheduler_stats is not None:
            self._waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
            self._kv_usage = scheduler_stats.kv_cache_usage
        if iteration_stats is not None:
            self._latencies += iteration_stats.inter_token_latencies_iter

    def log_engine_initialized(self) -> None: ...

    def log(self) -> None: ...

    def record_sleep_state(self, *args: Any, **kwargs: Any) -> None: ...

    def take(self) -> Load:
        """The load since the last call."""
        latencies, self._latencies = self._latencies, []
        tpot = sum(latencies) / len(latencies) if latencies else None
        return Load(time.monotonic(), self._waiting, self._kv_usage, tpot)


@dataclass
class Follower:
    """Switches a server as its policy says.

    Attributes:
        policy: that decides.
        ladder: the slices that it chooses among, the one with the most bits first.
        switcher: of the server.
        meter: of its load.
        metrics: where decisions are counted.
    """

    policy: LoadPolicy
    ladder: Sequence[Slice]
    switcher: Switcher
    meter: LoadMeter
    metrics: ElasticMetrics
    _state: State | None = field(default=None, init=False)

    async def run(self) -> None:
        """Look at the load again and again."""
        while True:
            await asyncio.sleep(INTERVAL)
            try:
                await self.look(self.meter.take())
            except SwitchError as error:
                logger.error("The width did not follow the load: %s", error)

    async def look(self, load: Load) -> None:
        """Switch if the policy says so."""
        state = self._standing(load)
        after = self.policy.next(state, load, len(self.ladder))
        self._state = after
        if after.step == state.step:
            return
        wanted = self.ladder[after.step]
        logger.info("Following the load (%s): %s; %s", after.reason, wanted.name, load)
        self.metrics.decided(after.reason)
        await self.switcher.switch(wanted)

    def _standing(self, load: Load) -> State:
        """Where the policy stands: at what is active, be it that somebody else has switched."""
        active = self.switcher.front.active
        if self._state is not None and self.ladder[self._state.step] == active:
            return self._state
        bits = [abs(each.average_bits - active.average_bits) for each in self.ladder]
        return State(bits.index(min(bits)), load.now)


def make_follower(switcher: Switcher, policy: LoadPolicy, metrics: ElasticMetrics) -> Follower:
    """One that measures the load of the switcher's engine from now on.

    Raises:
        ConfigError: the engine measures nothing.
    """
    if switcher.engine.logger_manager is None:
        raise ConfigError("engine", "--disable-log-stats", True, "none with --elastic-policy, which needs the stats")
    meter = LoadMeter()
    switcher.engine.logger_manager.stat_loggers.append(meter)
    return Follower(policy, ladder_of(policy, switcher.front.offer), switcher, meter, metrics)
