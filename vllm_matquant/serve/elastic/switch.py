"""Switches the active slice of a running engine: in all of its processes, or in none."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vllm.logger import init_logger

from vllm_matquant.checkpoint.slice import Slice
from vllm_matquant.serve.elastic.offer import OfferError
from vllm_matquant.serve.elastic.requests import Front

logger = init_logger(f"vllm.{__name__}")


class SwitchError(RuntimeError):
    """A process of the engine did not switch; the message says whether all are back at what was active before."""


@dataclass(frozen=True)
class Switched:
    """What a switch did.

    Attributes:
        before: what was active.
        active: what is active now.
        seconds: how long it took, waiting for requests left aside.
        drain_seconds: how long requests were waited for.
    """

    before: Slice
    active: Slice
    seconds: float
    drain_seconds: float


@dataclass
class Switcher:
    """Switches the engine behind a server; switches that come at a time take their turns.

    Attributes:
        engine: vLLM's ``AsyncLLM``.
        front: what the server knows of its slices.
        listeners: called with each switch that was made.
    """

    engine: Any
    front: Front
    listeners: list[Callable[[Switched], None]] = field(default_factory=list)
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)
    _tasks: set[asyncio.Task[Switched]] = field(default_factory=set, init=False)  # those that run or wait

    async def switch(self, wanted: Slice, drain: bool = False) -> Switched:
        """Make a slice the active one.

        Where requests have slices of their own, those that are running keep theirs; new ones get ``wanted``. Where they
        have none, all that are running end first, for none may be computed with two, and what is cached of prompts is
        dropped.

        Args:
            wanted: one of those that are offered.
            drain: wait until all requests have ended that are running; those that come meanwhile wait.

        Raises:
            SwitchError: a process of the engine did not switch.
        """
        # To its end, also if whoever asked is gone meanwhile: half a switch must not stay.
        task = asyncio.ensure_future(self._in_turn(wanted, drain))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    async def _in_turn(self, wanted: Slice, drain: bool) -> Switched:
        async with self._turn:
            return await self._switch(wanted, drain)

    async def _switch(self, wanted: Slice, drain: bool) -> Switched:
        before, together = self.front.active, self.front.offer.refusal is not None
        start = time.perf_counter()
        if wanted == before:
            return Switched(before, before, 0.0, 0.0)
        drained = 0.0
        if not (drain or together):
            await self._tell(wanted, before)
        else:
            # Not pause_generation, whose requests that come meanwhile vLLM 0.33 rejects; here they wait.
            await self.engine.engine_core.pause_scheduler_async("wait", clear_cache=False)
            drained = time.perf_counter() - start
            try:
                await self._tell(wanted, before)
                if together:
                    await self.engine.reset_prefix_cache()
            finally:
                await self.engine.resume_generation()
        self.front.active = wanted
        seconds = time.perf_counter() - start - drained
        switched = Switched(before, wanted, seconds, drained)
        logger.info(
            "Switched from %s to %s in %.4f s, after %.3f s of waiting", before.name, wanted.name, seconds, drained
        )
        for listener in self.listeners:
            listener(switched)
        return switched

    async def _tell(self, wanted: Slice, before: Slice) -> None:
        errors = _errors(await self.engine.collective_rpc("matquant_switch", args=(wanted.name,)))
        if errors:
            undone = _errors(await self.engine.collective_rpc("matquant_switch", args=(before.name,)))
            raise _failure(wanted, before, errors, undone)

    async def state(self) -> list[dict[str, Any]]:
        """What each process of the engine computes with, see :meth:`ElasticWorker.matquant_state`."""
        states: list[dict[str, Any]] = await self.engine.collective_rpc("matquant_state")
        return states


def switch(llm: Any, bits: int | None = None, recipe: str | None = None) -> Slice:
    """Make another slice of an elastic ``vllm.LLM`` the active one; requests of earlier calls have ended.

    Args:
        llm: made with ``additional_config={"matquant": {"elastic": "2..8"}}``, or by :func:`vllm_matquant.serve`.
        bits: a width that it offers.
        recipe: or the name of a recipe that it offers.

    Returns:
        The slice that is active now.

    Raises:
        ValueError: it is not offered, or the engine has one width, or requests are running.
        SwitchError: a process of the engine did not switch.
    """
    engine = llm.llm_engine
    front: Front | None = getattr(engine.vllm_config.quant_config, "front", None)
    if front is None:
        raise OfferError('found an engine with one width, expected one with "elastic" among its settings')
    if (bits is None) == (recipe is None):
        raise OfferError(f"found bits {bits} and recipe {recipe!r}, expected one of them")
    if engine.has_unfinished_requests():
        raise OfferError("found requests that are running, expected none: step the engine until they have ended")
    wanted, before = front.offer.find(bits if recipe is None else recipe), front.active
    errors = _errors(llm.collective_rpc("matquant_switch", args=(wanted.name,)))
    if errors:
        raise _failure(wanted, before, errors, _errors(llm.collective_rpc("matquant_switch", args=(before.name,))))
    if front.offer.refusal is not None and not llm.reset_prefix_cache():
        logger.warning("What is cached of prompts was not dropped")
    front.active = wanted
    return wanted


def _errors(answers: list[dict[str, Any]]) -> list[str]:
    return [f"process {rank}: {answer['error']}" for rank, answer in enumerate(answers) if "error" in answer]


def _failure(wanted: Slice, before: Slice, errors: list[str], undone: list[str]) -> SwitchError:
    state = f"all are back at {before.name}" if not undone else f"and could not be undone: {'; '.join(undone)}"
    return SwitchError(f"{wanted.name}: {'; '.join(errors)}; {state}")
