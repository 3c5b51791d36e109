"""The job that says on paper what a width that follows the load saves."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

from vllm_matquant.checkpoint.files import publish_json
from vllm_matquant.checkpoint.spec import WIDTHS
from vllm_matquant.jobs.arguments import output_file, positive
from vllm_matquant.jobs.job import Job, Say, argument, running, silent
from vllm_matquant.jobs.plot import read_rows
from vllm_matquant.jobs.table import figures, headings
from vllm_matquant.serve.elastic.fleet import Day, Level, need_of
from vllm_matquant.serve.elastic.policy import read_policy
from vllm_matquant.serve.elastic.simulator import Machine

COLUMNS = ("replicas", "replica_hours", "average_bits")
Rows = list[dict[str, Any]]


def number(text: str) -> float:
    """A positive number."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a positive number")
    return value


def not_negative(text: str) -> float:
    """Zero or a positive number."""
    return 0.0 if text in ("0", "0.0") else number(text)


def step_times(text: str) -> dict[int, float]:
    """Parse ``8=30,4=18.5``: a positive number for each of some widths."""
    times: dict[int, float] = {}
    for part in text.split(","):
        width, _, time = part.partition("=")
        if not width.isdigit() or int(width) not in WIDTHS:
            raise argparse.ArgumentTypeError(f"found {part!r}, expected WIDTH=MILLISECONDS such as 8=30,4=18.5")
        times[int(width)] = number(time)
    return times


def show_step_times(times: Mapping[int, float]) -> str:
    """The text that :func:`step_times` parses."""
    return ",".join(f"{width}={time}" for width, time in times.items())


def policy(text: str) -> str:
    """What ``--elastic-policy`` of ``vllm serve`` takes, without its floor and ceiling."""
    try:
        read = read_policy(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if read.floor is not None or read.ceiling is not None:
        expected = "none: the widths are those whose step times are given"
        raise argparse.ArgumentTypeError(f"found a floor or a ceiling, expected {expected}")
    return text


@dataclass(frozen=True)
class Simulate(Job[Rows]):
    """How many replicas a day's load needs at the widest width, at the narrowest, and at one that follows the load.

    A simulation: it knows of a model only how long its steps take. Gives a row for each of the three: replicas that are
    enough all day, hours of replicas where as many run as each hour needs, average bits of the tokens served.
    """

    epilog = "Requests come in bursts, with prompts of 16 to 256 tokens and answers of 16 to 128."

    _: KW_ONLY
    step_ms: Mapping[int, float] | None = field(
        default=None,
        metadata=argument(
            "milliseconds of a step with one request at each width, such as 8=30,4=18,2=11",
            parse=step_times,
            show=show_step_times,
            metavar="LIST",
        ),
    )
    bench: Path | str | None = field(
        default=None,
        metadata=argument(
            "or rows of 'matquant bench serve' with batch 1, which tell them", parse=Path, metavar="JSON"
        ),
    )
    token_ms: float = field(
        default=0.0,
        metadata=argument(
            "milliseconds more for each further token in a step; default %(default)s", parse=not_negative
        ),
    )
    batch: int = field(
        default=8, metadata=argument("requests that a replica serves at a time; default %(default)s", parse=positive)
    )
    peak: float = field(
        default=4.0, metadata=argument("requests a second at the busiest hour; default %(default)s", parse=number)
    )
    night: float = field(
        default=0.5, metadata=argument("requests a second at the quietest hour; default %(default)s", parse=number)
    )
    first: float = field(
        default=2.0, metadata=argument("seconds to a first token that are promised; default %(default)s", parse=number)
    )
    between: float = field(
        default=0.1, metadata=argument("seconds between tokens that are promised; default %(default)s", parse=number)
    )
    late: float = field(
        default=0.01, metadata=argument("share of requests that may be later; default %(default)s", parse=number)
    )
    elastic_policy: str = field(
        default="load", metadata=argument("as that of vllm serve; default %(default)s", parse=policy, metavar="POLICY")
    )
    seed: int = field(default=0, metadata=argument("of the requests; default %(default)s", parse=int))
    json: Path | str | None = field(
        default=None, metadata=argument("write the rows there (JSON)", parse=output_file, metavar="OUT")
    )

    def run(self, say: Say = silent) -> Rows:
        times = self._times()
        widths = sorted(times, reverse=True)
        day, level = Day(self.peak, self.night, seed=self.seed), Level(self.first, self.between, self.late)
        ways = [
            (f"{widths[0]} bits", widths[:1], None),
            (f"{widths[-1]} bits", widths[-1:], None),
            ("follows the load", widths, read_policy(self.elastic_policy)),
        ]
        say(headings(COLUMNS))
        rows: Rows = []
        for name, ladder, followed in ways:
            machine = Machine([times[width] / 1e3 for width in ladder], self.token_ms / 1e3, places=self.batch)
            need = need_of(day, level, machine, ladder, followed)
            row = {"replicas": need.most, "replica_hours": need.hours, "average_bits": need.average_bits}
            rows.append({"serving": name, "replicas_by_hour": list(need.replicas)} | row)
            say(f"{figures(row, COLUMNS)}  {name}")
        if self.json:
            publish_json(Path(self.json), rows)
        return rows

    def _times(self) -> dict[int, float]:
        """Milliseconds of a step, by the width."""
        if (self.step_ms is None) == (self.bench is None):
            raise ValueError(f"found --step-ms {self.step_ms} and --bench {self.bench}, expected one of them")
        times = dict(self.step_ms or {})
        if self.bench is not None:
            found = [
                row
                for row in read_rows(Path(self.bench))
                if row.get("bits") in WIDTHS and "recipe" not in row and row.get("batch") == 1
            ]
            times = {row["bits"]: 1e3 / row["decode_tokens_per_s"] for row in found if row.get("decode_tokens_per_s")}
        if len(times) < 2:
            where = "--step-ms" if self.bench is None else f"{self.bench}, decode_tokens_per_s with batch 1"
            raise ValueError(f"{where}: found times of the widths {sorted(times)}, expected two widths at least")
        return times


simulate = running(Simulate)
