"""The command that switches a server, where there is none that understands it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from vllm_matquant.cli import main
from vllm_matquant.jobs.control import Control, control

SEEN: list[tuple[str, str, Any, str | None]] = []


class Handler(BaseHTTPRequestHandler):
    """Answers with what it is asked for: 500 with no JSON where the width is 7."""

    def do_GET(self) -> None:
        self.answer(None)

    def do_POST(self) -> None:
        self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def answer(self, body: Any) -> None:
        SEEN.append((self.command, self.path, body, self.headers["Authorization"]))
        broken = body is not None and body.get("bits") == 7
        self.send_response(500 if broken else 200)
        self.end_headers()
        self.wfile.write(b"broken" if broken else json.dumps({"asked": body}).encode())

    def log_message(self, *args: Any) -> None: ...


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    SEEN.clear()
    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_what_is_sent(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert control(url) == {"asked": None}
    control(f"{url}/v1/", bits=4)
    monkeypatch.setenv("VLLM_API_KEY", "from-environment")
    control(url, recipe="mine", drain=True)
    control(url, bits="2", api_key="given")
    path = "/v1/matquant/width"
    assert [
        ("GET", path, None, None),
        ("POST", path, {"bits": 4, "drain": False}, None),
        ("POST", path, {"recipe": "mine", "drain": True}, "Bearer from-environment"),
        ("POST", path, {"bits": 2, "drain": False}, "Bearer given"),
    ] == SEEN


def test_the_command_prints_the_answer(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["control", url, "--bits", "4"]) == 0
    assert json.loads(capsys.readouterr().out) == {"asked": {"bits": 4, "drain": False}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 4, "recipe": "mine"}, "found --bits 4 and --recipe mine, expected one of them"),
        ({"drain": True}, "found --drain, expected --bits or --recipe with it"),
        ({"bits": 7}, "500: broken"),
    ],
)
def test_what_is_wrong_is_said(url: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        control(url, **options)


def test_no_server() -> None:
    with pytest.raises(ValueError, match="expected a server that listens there"):
        control("http://127.0.0.1:9", timeout=5)
    with pytest.raises(ValueError, match="expected one such as http://localhost:8000"):
        control("localhost:8000")


@pytest.mark.parametrize("wrong", [{"bits": 9}, {"timeout": 0}])
def test_values_that_no_option_has(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Control("http://localhost", **wrong)
