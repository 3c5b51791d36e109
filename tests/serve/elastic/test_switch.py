"""Switches of an engine whose processes fail, or of one that is busy."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from tests.serve.elastic.slices import EIGHT, FOUR, TWO, a_front
from vllm_matquant.serve.elastic.offer import OfferError
from vllm_matquant.serve.elastic.switch import Switched, Switcher, SwitchError, switch


class Engine:
    """Two processes, one of which may fail at a slice, and requests that take their time."""

    def __init__(self, fails_at: tuple[str, ...] = (), busy: float = 0.0) -> None:
        self.fails_at, self.busy = fails_at, busy
        self.processes = ["uniform-8", "uniform-8"]
        self.calls: list[str] = []
        self.engine_core = self

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[dict[str, Any]]:
        self.calls.append(" ".join([method, *args]))
        await asyncio.sleep(0.01)
        return self.answer(*args)

    def answer(self, name: str) -> list[dict[str, Any]]:
        self.processes[0] = name
        if name in self.fails_at:
            return [{}, {"error": "RuntimeError: broken"}]
        self.processes[1] = name
        return [{}, {}]

    async def pause_scheduler_async(self, mode: str, clear_cache: bool) -> None:
        assert (mode, clear_cache) == ("wait", False)
        self.calls.append("pause")
        await asyncio.sleep(self.busy)

    async def resume_generation(self) -> None:
        self.calls.append("resume")

    async def reset_prefix_cache(self) -> bool:
        self.calls.append("reset")
        return True


def test_running_requests_are_not_waited_for() -> None:
    engine = Engine()
    switcher = Switcher(engine, a_front())
    seen: list[Switched] = []
    switcher.listeners.append(seen.append)
    switched = asyncio.run(switcher.switch(FOUR))
    assert (switched.before, switched.active, switched.drain_seconds) == (EIGHT, FOUR, 0.0)
    assert switched.seconds > 0
    assert seen == [switched]
    assert engine.calls == ["matquant_switch uniform-4"]
    assert switcher.front.active == FOUR


def test_draining() -> None:
    engine = Engine(busy=0.2)
    switched = asyncio.run(Switcher(engine, a_front()).switch(FOUR, drain=True))
    assert engine.calls == ["pause", "matquant_switch uniform-4", "resume"]
    assert switched.drain_seconds >= 0.2 > switched.seconds


def test_where_requests_have_no_width_of_their_own_all_end_first_and_nothing_cached_stays() -> None:
    engine = Engine()
    asyncio.run(Switcher(engine, a_front(refusal="a reason")).switch(FOUR))
    assert engine.calls == ["pause", "matquant_switch uniform-4", "reset", "resume"]


@pytest.mark.parametrize("drain", [False, True])
def test_half_a_switch_is_undone(drain: bool) -> None:
    engine = Engine(fails_at=("uniform-4",))
    switcher = Switcher(engine, a_front())
    with pytest.raises(SwitchError, match="uniform-4: process 1: RuntimeError: broken; all are back at uniform-8"):
        asyncio.run(switcher.switch(FOUR, drain))
    assert engine.processes == ["uniform-8", "uniform-8"]
    assert switcher.front.active == EIGHT
    assert (engine.calls[-1] == "resume") == drain
    asyncio.run(Switcher(engine, switcher.front).switch(TWO))
    assert engine.processes == ["uniform-2", "uniform-2"]


def test_what_cannot_be_undone_is_said() -> None:
    switcher = Switcher(Engine(fails_at=("uniform-4", "uniform-8")), a_front())
    with pytest.raises(SwitchError, match="and could not be undone: process 1: RuntimeError: broken"):
        asyncio.run(switcher.switch(FOUR))


def test_an_engine_that_dies_keeps_what_was_active() -> None:
    class Dying(Engine):
        async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[dict[str, Any]]:
            raise ConnectionError("dead")

    switcher = Switcher(Dying(), a_front())
    with pytest.raises(ConnectionError):
        asyncio.run(switcher.switch(FOUR))
    assert switcher.front.active == EIGHT


def test_many_at_a_time_take_their_turns() -> None:
    engine = Engine()
    switcher = Switcher(engine, a_front())
    order: list[Switched] = []
    switcher.listeners.append(order.append)

    async def all_at_once() -> None:
        wanted = [(FOUR, TWO, EIGHT)[index % 3] for index in range(100)]
        await asyncio.gather(*(switcher.switch(each, drain=index % 7 == 0) for index, each in enumerate(wanted)))

    asyncio.run(all_at_once())
    assert engine.processes == [switcher.front.active.name] * 2
    assert [each.before for each in order] == [EIGHT, *(each.active for each in order[:-1])]


def test_a_switch_goes_on_when_whoever_asked_is_gone() -> None:
    engine = Engine(busy=0.1)
    switcher = Switcher(engine, a_front())

    async def leave() -> None:
        asked = asyncio.create_task(switcher.switch(FOUR, drain=True))
        await asyncio.sleep(0.02)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        await switcher.switch(TWO)  # its turn comes after all of the first one

    asyncio.run(leave())
    assert engine.calls == ["pause", "matquant_switch uniform-4", "resume", "matquant_switch uniform-2"]


def an_llm(engine: Engine, unfinished: bool = False, front: Any = None) -> Any:
    return SimpleNamespace(
        llm_engine=SimpleNamespace(
            vllm_config=SimpleNamespace(quant_config=SimpleNamespace(front=front or a_front())),
            has_unfinished_requests=lambda: unfinished,
        ),
        collective_rpc=lambda method, args: engine.answer(*args),
        reset_prefix_cache=lambda: True,
    )


def test_an_llm() -> None:
    engine = Engine()
    llm = an_llm(engine)
    assert switch(llm, bits=4) == FOUR
    assert switch(llm, recipe="my-recipe").name == "my-recipe"
    assert engine.processes == ["my-recipe", "my-recipe"]
    with pytest.raises(OfferError, match="found 3"):
        switch(llm, bits=3)
    for wrong in ({}, {"bits": 4, "recipe": "my-recipe"}):
        with pytest.raises(OfferError, match="expected one of them"):
            switch(llm, **wrong)
    with pytest.raises(OfferError, match="requests that are running"):
        switch(an_llm(engine, unfinished=True), bits=4)
    plain = an_llm(engine)
    plain.llm_engine.vllm_config.quant_config.front = None
    with pytest.raises(OfferError, match="an engine with one width"):
        switch(plain, bits=4)


def test_an_llm_whose_process_fails_is_as_before() -> None:
    engine = Engine(fails_at=("uniform-4",))
    llm = an_llm(engine)
    with pytest.raises(SwitchError, match="all are back at uniform-8"):
        switch(llm, bits=4)
    assert engine.processes == ["uniform-8", "uniform-8"]
    assert llm.llm_engine.vllm_config.quant_config.front.active == EIGHT
