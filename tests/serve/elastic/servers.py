"""``vllm serve`` as a process of its own, on the loopback address, and its clients."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

KEY = "a-key"
WIDTH = "/v1/matquant/width"
START_SECONDS = 240


@dataclass
class Server:
    """A server that runs.

    Attributes:
        process: of the server, the first of its session.
        port: on the loopback address.
        log: file with its output.
    """

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, path: str, body: Any = None, key: str | None = KEY, timeout: float = 120.0) -> tuple[int, Any]:
        """Status and content of an answer; 0 and the error where there is none."""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        data = None if body is None else json.dumps(body).encode()
        try:
            with urlopen(Request(self.url + path, data, headers), timeout=timeout) as response:
                content = response.read()
                return response.status, json.loads(content) if content[:1] in (b"{", b"[") else content.decode()
        except HTTPError as error:
            return error.code, error.read().decode(errors="replace")
        except (OSError, HTTPException) as error:
            return 0, repr(error)

    def switch(self, **body: Any) -> tuple[int, Any]:
        return self.ask(WIDTH, body)

    def complete(self, prompt: list[int], bits: Any = None, tokens: int = 8, timeout: float = 120.0) -> Any:
        """Log-probabilities of the tokens that follow, the most probable ones; the error where it is refused."""
        body = {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "logprobs": 0}
        body |= {"ignore_eos": True} | ({} if bits is None else {"vllm_xargs": {"matquant_bits": bits}})
        status, answer = self.ask("/v1/completions", body, timeout=timeout)
        return answer["choices"][0]["logprobs"]["token_logprobs"] if status == 200 else (status, answer)

    def processes(self) -> dict[int, str]:
        """The server's processes that run, with their names."""
        found = {}
        for folder in Path("/proc").iterdir():
            try:
                if folder.name.isdigit() and os.getsid(int(folder.name)) == self.process.pid:
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except (OSError, ProcessLookupError):
                continue
        return found

    def resident_bytes(self) -> int:
        """Memory of all processes, shared memory left aside."""
        total = 0
        for pid in self.processes():
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith("RssAnon"):
                    total += int(line.split()[1]) * 1024
        return total


@contextmanager
def serving(model: Path, folder: Path, *options: str) -> Iterator[Server]:
    """A server of a model; it is ended, with all of its processes, at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--host", "127.0.0.1",
               "--port", str(port), "--api-key", KEY, "--served-model-name", "tiny", "--max-model-len", "128",
               "--max-num-seqs", "8", *options]  # fmt: skip
    log = folder / f"server-{port}.log"
    with log.open("wb") as output:
        environment = os.environ | {"VLLM_CACHE_ROOT": str(folder / "cache"), "VLLM_LOGGING_LEVEL": "INFO"}
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    server = Server(process, port, log)
    try:
        deadline = time.monotonic() + START_SECONDS
        while server.ask("/health", timeout=5)[0] != 200:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{' '.join(command)}: no server\n{log.read_text()[-4000:]}")
            time.sleep(0.3)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
        for pid in server.processes():
            os.kill(pid, signal.SIGKILL)
