"""The control endpoint, over an engine that is not there."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import REGISTRY, CollectorRegistry

from tests.serve.elastic.slices import EIGHT, FOUR, TWO, a_front
from vllm_matquant.serve.elastic import api
from vllm_matquant.serve.elastic.api import PATH, Control
from vllm_matquant.serve.elastic.metrics import ElasticMetrics
from vllm_matquant.serve.elastic.switch import Switched


class Engine:
    def __init__(self, front: Any, error: str | None = None) -> None:
        self.vllm_config = SimpleNamespace(quant_config=SimpleNamespace(front=front, get_name=lambda: "matquant"))
        self.logger_manager = None
        self.active, self.error = "uniform-8", error

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[dict[str, Any]]:
        if method == "matquant_state":
            tokens = {"uniform-8": 5, "uniform-4": 2, "my-recipe": 0, "uniform-2": 0}
            return [{"active": self.active, "bytes": 8000, "tokens": tokens}]
        if self.error is not None and args[0] != "uniform-8":
            return [{"error": self.error}]
        self.active = args[0]
        return [{}]


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> CollectorRegistry:
    own = CollectorRegistry()
    monkeypatch.setattr(api, "ElasticMetrics", lambda offer, active: ElasticMetrics(offer, active, own))
    return own


def client_of(engine: Any) -> TestClient:
    app, control = FastAPI(), Control()
    control.attach_router(app)

    async def start() -> None:
        await control.init_state(engine, app.state, SimpleNamespace())  # type: ignore[arg-type]

    app.router.on_startup.append(start)
    return TestClient(app)


def test_what_is_offered_and_active() -> None:
    with client_of(Engine(a_front())) as client:
        state = client.get(PATH).json()
    assert state["active"] == {"bits": 8, "name": "uniform-8", "average_bits": 8.0, "bytes": 8000, "kl": None}
    assert [each["name"] for each in state["offered"]] == ["uniform-8", "uniform-4", "my-recipe", "uniform-2"]
    assert state["offered"][2] == {"bits": 3.4, "recipe": "my-recipe", "name": "my-recipe", "average_bits": 3.4,
                                   "bytes": 3400, "kl": 0.5}  # fmt: skip
    assert state["for_requests"] == ["uniform-8", "uniform-4", "my-recipe"]
    assert state["tokens"]["uniform-4"] == 2
    assert (state["resident_bytes"], state["processes"], state["refusal"]) == ([8000], ["uniform-8"], None)


def test_switches() -> None:
    engine = Engine(a_front())
    with client_of(engine) as client:
        answer = client.post(PATH, json={"bits": 4})
        assert answer.status_code == 200
        assert (answer.json()["before"]["bits"], answer.json()["active"]["bits"]) == (8, 4)
        assert answer.json()["seconds"] >= answer.json()["drain_seconds"] == 0
        assert client.post(PATH, json={"recipe": "my-recipe"}).json()["active"]["name"] == "my-recipe"
        assert client.get(PATH).json()["active"]["name"] == engine.active == "my-recipe"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"bits": 3}, "bits: found 3, expected one of 8, 4, 'my-recipe', 2"),
        ({"bits": "four"}, "found 'four'"),
        ({"bits": None}, "found None"),
        ({"recipe": "other"}, "recipe: found 'other'"),
        ({}, "expected an object such as"),
        ([], "expected an object such as"),
        ("4", "expected an object such as"),
        ({"bits": 4, "recipe": "my-recipe"}, "expected an object such as"),
        ({"bits": 4, "other": 1}, "expected an object such as"),
        ({"bits": 4, "drain": "yes"}, "drain: found 'yes', expected true or false"),
    ],
)
def test_what_cannot_be_switched_to(body: Any, message: str) -> None:
    engine = Engine(a_front())
    with client_of(engine) as client:
        answer = client.post(PATH, json=body)
        assert answer.status_code == 400
        assert message in answer.json()["error"]["message"]
        assert client.post(PATH, content=b"{").status_code == 400
        assert client.post(PATH, content=b"\xff").status_code == 400
    assert engine.active == "uniform-8"


def test_a_switch_that_fails_says_so() -> None:
    with client_of(Engine(a_front(), error="RuntimeError: broken")) as client:
        answer = client.post(PATH, json={"bits": 4})
        assert answer.status_code == 500
        assert "process 0: RuntimeError: broken; all are back at uniform-8" in answer.json()["error"]["message"]
        assert client.get(PATH).json()["active"]["bits"] == 8


def test_a_flood_is_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "MOST_WAITING", 2)
    engine = Engine(a_front())
    control, app = Control(), FastAPI()
    control.attach_router(app)

    async def flood() -> list[int]:
        await control.init_state(engine, app.state, SimpleNamespace())  # type: ignore[arg-type]
        gate = asyncio.Event()

        async def slow(method: str, args: tuple[Any, ...] = ()) -> list[dict[str, Any]]:
            await gate.wait()
            return [{}]

        monkeypatch.setattr(engine, "collective_rpc", slow)

        async def ask(bits: int) -> int:
            async def body() -> Any:
                return {"bits": bits}

            return (await control.post(SimpleNamespace(app=app, json=body))).status_code  # type: ignore[arg-type]

        asked = [asyncio.create_task(ask(4)) for _ in range(5)]
        await asyncio.sleep(0.01)
        gate.set()
        return await asyncio.gather(*asked)

    assert sorted(asyncio.run(flood())) == [200, 200, 429, 429, 429]


def test_a_flood_of_questions_is_one_to_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, asked = Engine(a_front()), []
    control, app = Control(), FastAPI()
    control.attach_router(app)

    async def flood() -> list[Any]:
        await control.init_state(engine, app.state, SimpleNamespace())  # type: ignore[arg-type]
        await asyncio.sleep(0.01)  # the first measurement for the metrics
        answer = engine.collective_rpc

        async def counted(method: str, args: tuple[Any, ...] = ()) -> list[dict[str, Any]]:
            asked.append(method)
            await asyncio.sleep(0.01)
            return await answer(method, args)

        monkeypatch.setattr(engine, "collective_rpc", counted)
        request: Any = SimpleNamespace(app=app)
        return await asyncio.gather(*(control.get(request) for _ in range(50)))

    assert {each.status_code for each in asyncio.run(flood())} == {200}
    assert asked == ["matquant_state"]


def test_a_server_with_one_width_says_how_to_have_several() -> None:
    with client_of(Engine(None)) as client:
        for answer in (client.get(PATH), client.post(PATH, json={"bits": 4})):
            assert answer.status_code == 404
            assert "--elastic 2..8" in answer.json()["error"]["message"]


def test_other_servers_have_no_such_endpoint() -> None:
    other = SimpleNamespace(vllm_config=SimpleNamespace(quant_config=None))
    for engine in (None, other):
        with client_of(engine) as client:
            assert client.get(PATH).json() == {"detail": "Not Found"}


def test_metrics(registry: CollectorRegistry) -> None:
    metrics = ElasticMetrics(a_front().offer, EIGHT, registry)
    value = registry.get_sample_value
    assert value("matquant_active_bits") == 8
    metrics.update([{"active": "", "bytes": 70, "tokens": {"uniform-8": 5, "uniform-4": 2}}, {"bytes": 60}])
    metrics.update([{"active": "", "bytes": 70, "tokens": {"uniform-8": 9, "uniform-4": 2}}, {"bytes": 60}])
    assert value("matquant_tokens_total", {"slice": "uniform-8"}) == 9
    assert value("matquant_tokens_total", {"slice": "uniform-4"}) == 2
    assert value("matquant_tokens_total", {"slice": "uniform-2"}) == 0
    assert value("matquant_resident_bytes", {"process": "1"}) == 60
    metrics.switched(Switched(EIGHT, EIGHT, 0.0, 0.0))
    metrics.switched(Switched(EIGHT, FOUR, 0.002, 0.0))
    metrics.switched(Switched(FOUR, TWO, 0.02, 3.0))
    metrics.decided("waiting")
    assert value("matquant_active_bits") == 2
    assert value("matquant_active", {"slice": "uniform-2"}) == 1
    assert value("matquant_active", {"slice": "uniform-8"}) == 0
    assert value("matquant_switches_total", {"to": "uniform-4"}) == 1
    assert value("matquant_switch_seconds_count") == 2
    assert value("matquant_drain_seconds_sum") == 3.0
    assert value("matquant_policy_decisions_total", {"reason": "waiting"}) == 1
    assert REGISTRY.get_sample_value("matquant_active_bits") is None
