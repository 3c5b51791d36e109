"""An elastic server under clients that ask, switch, flood, leave, and one whose process is killed."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.quantize.tiny_sources import write_tokenizer
from tests.serve.elastic.servers import KEY, WIDTH, Server, serving
from tests.serve.tiny_models import EMBEDDINGS, write_checkpoint
from vllm_matquant.checkpoint.spec import Format
from vllm_matquant.jobs.control import control

pytestmark = pytest.mark.slow

WIDTHS = (8, 4, 3, 2)
PROMPTS = [[3 + index, 14, 15, 92, 65 - index, 7 * index] for index in range(8)]
MANY = 100
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("server")
    write_checkpoint(root / "tiny", "llama", Format(group_size=32, **EMBEDDINGS), 5, tie_word_embeddings=True)
    write_tokenizer(root / "tiny")
    return root


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    options = ["--bits", "8", "--elastic", "8,2..4", "--client-bits", "8,4,3", "--enforce-eager", "--dtype", "float32"]
    with serving(folder / "tiny", folder, *options) as running:
        yield running


@pytest.fixture(scope="module")
def expected(server: Server) -> dict[int, list[list[float]]]:
    """What each width answers to each prompt, with nothing else going on."""
    answers = {}
    for width in WIDTHS:
        assert server.switch(bits=width)[0] == 200
        answers[width] = [server.complete(prompt) for prompt in PROMPTS]
    server.switch(bits=8)
    return answers


def same(found: Any, wanted: list[float]) -> bool:
    return isinstance(found, list) and all(abs(a - b) < TOLERANCE for a, b in zip(found, wanted, strict=True))


def test_widths_differ(expected: dict[int, list[list[float]]]) -> None:
    for width in WIDTHS:
        for other in WIDTHS:
            assert same(expected[width][0], expected[other][0]) == (width == other)


def test_the_endpoint_asks_for_the_key(server: Server) -> None:
    for key in (None, "another"):
        assert server.ask(WIDTH, key=key)[0] == 401
        assert server.ask(WIDTH, {"bits": 4}, key=key)[0] == 401
    assert server.ask(WIDTH)[1]["active"]["bits"] == 8


def test_the_command(server: Server) -> None:
    answer = control(server.url, bits=4, api_key=KEY)
    assert (answer["before"]["bits"], answer["active"]["bits"]) == (8, 4)
    assert control(server.url + "/v1", api_key=KEY)["active"]["bits"] == 4
    assert control(server.url, bits=8, drain=True, api_key=KEY)["active"]["bits"] == 8
    for wrong, message in (({"bits": 5}, "400: bits: found 5"), ({"api_key": "another"}, "401: Unauthorized")):
        with pytest.raises(ValueError, match=message):
            control(server.url, **{"api_key": KEY} | wrong)


def test_a_request_has_the_width_that_it_asks_for(server: Server, expected: dict[int, list[list[float]]]) -> None:
    with ThreadPoolExecutor(8) as clients:
        asked = [(8, 4, 3, None)[index % 4] for index in range(8)]
        found = list(clients.map(lambda index: server.complete(PROMPTS[index], asked[index]), range(8)))
    for index, bits in enumerate(asked):
        assert same(found[index], expected[bits or 8][index]), (index, bits)


@pytest.mark.parametrize("bits", [2, 5, "four", 9])
def test_what_a_request_cannot_have_is_a_400_that_says_what_it_can(server: Server, bits: Any) -> None:
    status, answer = server.complete(PROMPTS[0], bits)
    assert status == 400
    assert "expected one of 8, 4, 3" in answer


def test_a_width_that_is_not_offered(server: Server) -> None:
    for body in ({"bits": 5}, {"recipe": "other"}, {}):
        status, answer = server.ask(WIDTH, body)
        assert status == 400
        assert "expected" in answer
    assert server.ask(WIDTH)[1]["processes"] == ["uniform-8"]


def under_load(server: Server, expected: dict[int, list[list[float]]], work: Any) -> int:
    """Do ``work`` while 8 clients ask, every second one for a width; returns how many answers they got, all right."""
    stop, wrong, count = threading.Event(), [], [0] * 8

    def client(index: int) -> None:
        while not stop.is_set():
            bits = (None, 3, None, 4)[(index + count[index]) % 4]
            answer = server.complete(PROMPTS[index], bits)
            allowed = WIDTHS if bits is None else (bits,)
            if not any(same(answer, expected[width][index]) for width in allowed):
                wrong.append((index, bits, answer))
            count[index] += 1

    threads = [threading.Thread(target=client, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    try:
        work()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    return sum(count)


def test_many_switches_under_load(server: Server, expected: dict[int, list[list[float]]]) -> None:
    def switch(times: int) -> None:
        for index in range(times):
            status, answer = server.switch(bits=WIDTHS[index % 4], drain=index % 10 == 9)
            assert status == 200, answer
            time.sleep(0.02)

    under_load(server, expected, lambda: switch(40))  # what allocators and caches keep has come by then
    before = server.resident_bytes()
    assert under_load(server, expected, lambda: switch(MANY)) > 8
    assert server.resident_bytes() <= before * 1.01


def test_many_switches_at_a_time(server: Server, expected: dict[int, list[list[float]]]) -> None:
    def all_at_once() -> None:
        with ThreadPoolExecutor(MANY) as operators:
            answers = list(operators.map(lambda index: server.switch(bits=WIDTHS[index % 4]), range(MANY)))
        assert {status for status, _ in answers} == {200}

    under_load(server, expected, all_at_once)
    state = server.ask(WIDTH)[1]
    assert state["processes"] == [state["active"]["name"]]


def test_a_client_that_floods_the_endpoint(server: Server, expected: dict[int, list[list[float]]]) -> None:
    def flood() -> None:
        bodies = [{"bits": 4}, {"bits": 9}, "x" * 100_000, {"bits": 2}]
        with ThreadPoolExecutor(50) as clients:
            answers = list(clients.map(lambda index: server.ask(WIDTH, bodies[index % 4])[0], range(400)))
        assert set(answers) <= {200, 400, 429}

    under_load(server, expected, flood)
    assert server.switch(bits=8)[0] == 200


def test_a_request_that_is_cancelled_in_a_switch(server: Server, expected: dict[int, list[list[float]]]) -> None:
    body = json.dumps({"model": "tiny", "prompt": PROMPTS[0], "max_tokens": 110, "ignore_eos": True, "stream": True})
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        lines = ["POST /v1/completions HTTP/1.1", "Host: x", f"Authorization: Bearer {KEY}",
                 "Content-Type: application/json", f"Content-Length: {len(body)}", "", body]  # fmt: skip
        client.sendall("\r\n".join(lines).encode())
        assert client.recv(1000).startswith(b"HTTP/1.1 200")
        with ThreadPoolExecutor(1) as operator:
            switched = operator.submit(server.switch, bits=4, drain=True)
            time.sleep(0.02)
            client.close()
            assert switched.result()[0] == 200
    assert same(server.complete(PROMPTS[1]), expected[4][1])
    assert server.switch(bits=8)[0] == 200


def test_metrics(server: Server, expected: dict[int, list[list[float]]]) -> None:
    server.switch(bits=4)
    server.complete(PROMPTS[0], 3)
    time.sleep(3)
    text = server.ask("/metrics")[1]
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("matquant"))
    assert float(lines["matquant_active_bits"]) == 4
    assert float(lines['matquant_active{slice="uniform-4"}']) == 1
    tokens = server.ask(WIDTH)[1]["tokens"]
    for name, count in tokens.items():
        assert float(lines[f'matquant_tokens_total{{slice="{name}"}}']) == count > 0
    assert float(lines["matquant_switch_seconds_count"]) >= 4
    assert float(lines['matquant_resident_bytes{process="0"}']) > 0
    server.switch(bits=8)


def test_a_process_that_is_killed_in_a_switch(folder: Path) -> None:
    """The server ends; it does not go on with half of its processes switched, and whoever asked gets an answer."""
    options = ["--elastic", "2,8", "--enforce-eager", "--dtype", "float32", "--tensor-parallel-size", "2",
               "--distributed-executor-backend", "mp"]  # fmt: skip
    with serving(folder / "tiny", folder, *options) as running:
        assert running.switch(bits=2)[1]["active"]["bits"] == 2
        assert running.ask(WIDTH)[1]["processes"] == ["uniform-2", "uniform-2"]
        ranks = sorted(pid for pid, name in running.processes().items() if "VLLM::Worker" in name)
        assert len(ranks) == 2, running.processes()
        os.kill(ranks[1], signal.SIGSTOP)  # so that the switch is under way when it dies
        with ThreadPoolExecutor(1) as operator:
            asked = operator.submit(running.ask, WIDTH, {"bits": 8})
            time.sleep(1)
            os.kill(ranks[1], signal.SIGKILL)
            status, _ = asked.result(timeout=90)
        assert status in (0, 500, 503)
        running.process.wait(90)
        assert running.switch(bits=2)[0] == 0


def test_a_server_that_follows_its_load(folder: Path) -> None:
    options = ["--elastic", "2,8", "--enforce-eager", "--dtype", "float32",
               "--elastic-policy", "load,waiting=2,dwell=0.5,calm=1"]  # fmt: skip
    with serving(folder / "tiny", folder, *options) as running:
        with ThreadPoolExecutor(40) as clients:
            list(clients.map(lambda index: running.complete(PROMPTS[index % 8], tokens=100), range(120)))
        deadline = time.monotonic() + 30
        while running.ask(WIDTH)[1]["active"]["bits"] != 8 and time.monotonic() < deadline:
            time.sleep(0.2)
        state = running.ask(WIDTH)[1]
        assert state["active"]["bits"] == 8
        assert state["tokens"]["uniform-2"] > 0
        text = running.ask("/metrics")[1]
        # Once on a quiet machine; on a busy one the clients may pause, and the load come again.
        assert re.search(r'matquant_policy_decisions_total\{reason="waiting"\} [1-9]', text)
        assert 'matquant_policy_decisions_total{reason="calm"}' in text
        assert "Following the load (waiting): uniform-2" in running.log.read_text()


def test_pooling_requests_are_all_computed_at_the_servers_width(folder: Path) -> None:
    untied = folder / "untied"
    ignored = {**EMBEDDINGS, "ignored_layers": ("lm_head",), "quantized_embeddings": ()}
    write_checkpoint(untied, "llama", Format(group_size=32, **ignored), 5)
    write_tokenizer(untied)
    options = ["--elastic", "2,8", "--enforce-eager", "--dtype", "float32", "--runner", "pooling"]
    with serving(untied, folder, *options) as running:

        def embed(**others: Any) -> Any:
            status, answer = running.ask("/v1/embeddings", {"model": "tiny", "input": PROMPTS[0], **others})
            assert status == 200, answer
            return answer["data"][0]["embedding"]

        eight = embed()
        assert running.switch(bits=2)[0] == 200
        two = embed()
        assert max(abs(a - b) for a, b in zip(eight, two, strict=True)) > 1e-3
        assert running.switch(bits=8)[0] == 200
        assert embed() == eight
        assert running.ask(WIDTH)[1]["refusal"] is not None
