"""The control endpoint of a server: ``/v1/matquant/width``, below ``/v1`` so that ``--api-key`` guards it."""

from __future__ import annotations

import asyncio
import functools
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from vllm_matquant.checkpoint.slice import Slice
from vllm_matquant.checkpoint.spec import QUANT_METHOD
from vllm_matquant.serve.elastic.follow import make_follower
from vllm_matquant.serve.elastic.metrics import ElasticMetrics
from vllm_matquant.serve.elastic.offer import OfferError, described
from vllm_matquant.serve.elastic.requests import Front
from vllm_matquant.serve.elastic.switch import Switcher, SwitchError

PATH = "/v1/matquant/width"
MEASURE_SECONDS = 2.0  # between two questions to the engine's processes
MOST_WAITING = 128  # switches that may wait for their turn
_STATE = "matquant_switcher"
_KEYS = {"bits", "recipe", "drain"}


class Control:
    """A plugin of vLLM's HTTP server (``vllm.plugins.endpoint_plugins.interface.EndpointPlugin``)."""

    name = "matquant"
    required_tasks = None

    def __init__(self) -> None:
        self._waiting = 0
        self._asking: asyncio.Future[dict[str, Any]] | None = None

    def attach_router(self, app: FastAPI) -> None:
        self._app = app  # what it serves is not known yet

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        quant_config = None if engine_client is None else engine_client.vllm_config.quant_config
        if quant_config is None or quant_config.get_name() != QUANT_METHOD:
            return
        setattr(state, _STATE, None if quant_config.front is None else self._start(engine_client, quant_config.front))
        self._app.add_api_route(PATH, self.get, methods=["GET"])
        self._app.add_api_route(PATH, self.post, methods=["POST"])

    def _start(self, engine: Any, front: Front) -> Switcher:
        """Begin to measure an elastic server and, with a policy, to follow its load."""
        switcher = Switcher(engine, front)
        self._metrics = ElasticMetrics(front.offer, front.active)
        switcher.listeners.append(self._metrics.switched)
        self._tasks = [asyncio.create_task(self._measure(switcher))]
        if front.offer.policy is not None:
            self._tasks.append(asyncio.create_task(make_follower(switcher, front.offer.policy, self._metrics).run()))
        return switcher

    async def _measure(self, switcher: Switcher) -> None:
        while True:
            self._metrics.update(await switcher.state())
            await asyncio.sleep(MEASURE_SECONDS)

    async def get(self, raw_request: Request) -> JSONResponse:
        """What is offered and active, and how many tokens were computed with each slice."""
        switcher = _switcher(raw_request)
        if switcher is None:
            return _not_elastic()
        if self._asking is None or self._asking.done():
            self._asking = asyncio.ensure_future(state_of(switcher))
        # Whoever asks meanwhile is told the same: a flood of questions is one to the engine's processes.
        return JSONResponse(await asyncio.shield(self._asking))

    async def post(self, raw_request: Request) -> JSONResponse:
        """Switch: ``{"bits": 4}`` or ``{"recipe": NAME}``, with ``"drain": true`` to wait for running requests."""
        switcher = _switcher(raw_request)
        if switcher is None:
            return _not_elastic()
        try:
            wanted, drain = _read(await raw_request.json(), switcher)
        except ValueError as error:  # JSON's among them
            return _error(400, str(error))
        if self._waiting >= MOST_WAITING:
            return _error(429, f"found {self._waiting} switches that wait, expected fewer: try again later")
        self._waiting += 1
        try:
            switched = await switcher.switch(wanted, drain)
        except SwitchError as error:
            return _error(500, str(error))
        finally:
            self._waiting -= 1
        return JSONResponse(
            {
                "before": described(switched.before),
                "active": described(switched.active),
                "seconds": switched.seconds,
                "drain_seconds": switched.drain_seconds,
            }
        )


def with_control(load_endpoint_plugins: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's ``load_endpoint_plugins``, and this one.

    As an entry point it would be loaded only where ``VLLM_PLUGINS`` names it, and every other server would warn of it.
    """

    @functools.wraps(load_endpoint_plugins)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return [*load_endpoint_plugins(*args, **kwargs), Control()]

    return wrapper


async def state_of(switcher: Switcher) -> dict[str, Any]:
    """What the endpoint tells of an elastic server."""
    front, states = switcher.front, await switcher.state()
    return {
        "active": described(front.active),
        "offered": [described(each) for each in front.offer.slices],
        "for_requests": list(front.offer.for_clients) if front.offer.refusal is None else [],
        "refusal": front.offer.refusal,
        "tokens": states[0]["tokens"],
        "resident_bytes": [each["bytes"] for each in states],
        "processes": [each["active"] for each in states],
    }


def _switcher(raw_request: Request) -> Switcher | None:
    switcher: Switcher | None = getattr(raw_request.app.state, _STATE, None)
    return switcher


def _read(body: Any, switcher: Switcher) -> tuple[Slice, bool]:
    if not isinstance(body, dict) or not set(body) <= _KEYS or ("bits" in body) == ("recipe" in body):
        raise OfferError(f'found {body!r}, expected an object such as {{"bits": 4}} or {{"recipe": NAME}}')
    drain = body.get("drain", False)
    if not isinstance(drain, bool):
        raise OfferError(f"drain: found {drain!r}, expected true or false")
    [name] = set(body) - {"drain"}
    try:
        return switcher.front.offer.find(body[name]), drain
    except OfferError as error:
        raise OfferError(f"{name}: {error}") from error


def _not_elastic() -> JSONResponse:
    return _error(404, "this server has one width; vllm serve DIR --elastic 2..8 offers several")


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "code": status}}, status_code=status)
