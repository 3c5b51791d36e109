"""The job that asks an elastic server what is active, or switches it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from vllm_matquant.checkpoint.spec import WIDTHS
from vllm_matquant.jobs.arguments import positive
from vllm_matquant.jobs.job import Job, Say, argument, running, silent

_PATH = "/v1/matquant/width"


@dataclass(frozen=True)
class Control(Job[dict[str, Any]]):
    """Switch a server to another width while it serves, or tell what it offers and what is active.

    Gives what the server answered.
    """

    epilog = "The server must have been started with --elastic, such as: vllm serve DIR --elastic 2..8"

    url: str = field(metadata=argument("of the server, such as http://localhost:8000", positional=True, metavar="URL"))
    bits: int | None = field(
        default=None, metadata=argument("width to switch to", parse=int, choices=WIDTHS, metavar="N")
    )
    recipe: str | None = field(
        default=None, metadata=argument("or recipe of the checkpoint, by its name", metavar="NAME")
    )
    drain: bool = field(
        default=False, metadata=argument("wait for requests that are running, and let new ones wait, before the switch")
    )
    api_key: str | None = field(
        default=None,
        metadata=argument("that the server asks for; by default the environment variable VLLM_API_KEY", metavar="KEY"),
    )
    timeout: int = field(
        default=600,
        metadata=argument("seconds to wait; default %(default)s", parse=positive, metavar="SECONDS"),
    )

    def run(self, say: Say = silent) -> dict[str, Any]:
        body: dict[str, Any] | None = None
        if self.bits is not None or self.recipe is not None:
            if self.bits is not None and self.recipe is not None:
                raise ValueError(f"found --bits {self.bits} and --recipe {self.recipe}, expected one of them")
            body = {"recipe": self.recipe} if self.bits is None else {"bits": self.bits}
            body["drain"] = self.drain
        elif self.drain:
            raise ValueError("found --drain, expected --bits or --recipe with it")
        answer = self._ask(body)
        say(json.dumps(answer, indent=2))
        return answer

    def _ask(self, body: dict[str, Any] | None) -> dict[str, Any]:
        key = self.api_key or os.environ.get("VLLM_API_KEY")
        url = self.url.removesuffix("/").removesuffix("/v1") + _PATH
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url: found {self.url!r}, expected one such as http://localhost:8000")
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        try:
            with urlopen(Request(url, data, headers), timeout=self.timeout) as response:
                answer: dict[str, Any] = json.load(response)
        except HTTPError as error:
            raise ValueError(f"{url}: {error.code}: {_message(error.read())}") from error
        except (URLError, TimeoutError) as error:
            raise ValueError(
                f"{url}: {getattr(error, 'reason', error)}; expected a server that listens there"
            ) from error
        return answer


def _message(body: bytes) -> str:
    """What a server says is wrong."""
    try:
        error = json.loads(body)["error"]
    except (ValueError, LookupError, TypeError):
        return body.decode(errors="replace")[:500]
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)


control = running(Control)
