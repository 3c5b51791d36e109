"""The command ``matquant``: a sub-command for each job, with the job's options.

A job's module is imported only when its command is given, so that help is there at once. A new command is a line in
:data:`COMMANDS`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import vllm_matquant

if TYPE_CHECKING:
    from vllm_matquant.jobs.job import Job

_INTERRUPTED = 130  # the exit status of a program that Ctrl-C has ended


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        job: module and class of its job.
        help: what the list of commands says of it.
    """

    job: str
    help: str

    def load(self) -> type[Job[Any]]:
        module, _, name = self.job.partition(":")
        found: type[Job[Any]] = getattr(importlib.import_module(f"vllm_matquant.jobs.{module}"), name)
        return found


COMMANDS = {
    "quantize": Command("quantize:Quantize", "a Hugging Face model to a nested checkpoint of 2 to 8 bits"),
    "import": Command("import_model:ImportModel", "a checkpoint that another tool has quantized to a nested one"),
    "train": Command("train:Train", "train all widths of a nested checkpoint together (MatQuant)"),
    "search": Command("search:Search", "the best width for each layer within a budget"),
    "evaluate": Command("evaluate:Evaluate", "perplexity and KL divergence of widths and recipes"),
    "verify": Command("verify:Verify", "check a checkpoint's files, format and nesting"),
    "bench kernel": Command("bench:BenchKernel", "time of one linear layer at each width"),
    "bench experts": Command("bench:BenchExperts", "time of one mixture of experts at each width"),
    "bench serve": Command("bench:BenchServe", "tokens per second and memory of each width, served by vLLM"),
    "control": Command("control:Control", "switch a server to another width while it serves"),
    "simulate": Command(
        "simulate:Simulate", "replicas that a day's load needs, at one width and at one that follows it"
    ),
    "plot": Command("plot:Plot", "draw quality against bits per weight and speed"),
}
GROUPS = {
    "": "Quantize a model once, serve it at any width from 2 to 8 bits: `vllm serve DIR --bits 4`.",
    "bench": "measure the speed of kernels, and of a checkpoint that vLLM serves",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``matquant`` with these arguments, by default the process's own; returns the exit status."""
    return _run("", arguments, "matquant")


def tool(command: str) -> Callable[..., int]:
    """The function that runs one command, or one group of them, as a program of its own."""

    def main(arguments: Sequence[str] | None = None) -> int:
        return _run(command, arguments, None)

    return main


def build_parser(command: str, arguments: Sequence[str], program: str | None = None) -> argparse.ArgumentParser:
    """The parser of a command or of a group of them; the options are there of the one that ``arguments`` choose.

    Args:
        command: words such as "bench kernel"; empty for all commands.
        arguments: what will be parsed.
        program: what the parser calls itself, by default the name of the process's script.
    """
    parser = argparse.ArgumentParser(program, allow_abbrev=False)
    if not command:
        parser.add_argument("--version", action="version", version=f"%(prog)s {vllm_matquant.__version__}")
    _fill(parser, command.split(), list(arguments))
    return parser


def _fill(parser: argparse.ArgumentParser, words: list[str], arguments: list[str]) -> None:
    """Give the parser of the command ``words``, or of the commands that begin so, its arguments."""
    name = " ".join(words)
    if name in COMMANDS:
        from vllm_matquant.cli.options import add_options

        add_options(parser, COMMANDS[name].load())
        parser.set_defaults(parser=parser)
        return
    parser.description = parser.description or GROUPS[name]
    parser.set_defaults(parser=parser)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    below = [command.split() for command in COMMANDS if command.split()[: len(words)] == words]
    for part in dict.fromkeys(command[len(words)] for command in below):
        path = [*words, part]
        known = COMMANDS.get(" ".join(path))
        child = commands.add_parser(part, help=known.help if known else GROUPS[" ".join(path)], allow_abbrev=False)
        if arguments[:1] == [part]:
            _fill(child, path, arguments[1:])


def _run(command: str, arguments: Sequence[str] | None, program: str | None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    if [*command.split(), *words][:1] == ["bench"]:
        # To wake a thread takes as long as a small layer: spin as where nothing is set, and so in a server.
        os.environ.setdefault("GOMP_SPINCOUNT", "300000")
    from vllm_matquant.cli import threads  # noqa: F401 - before torch

    options = vars(build_parser(command, words, program).parse_args(words))
    parser: argparse.ArgumentParser = options.pop("parser")
    job_type: type[Job[Any]] = options.pop("job")
    dry_run = options.pop("dry_run", False)
    options.pop("command", None)  # the words before, that the parser of a group keeps
    from vllm_matquant.jobs.job import PlannedJob, silent
    from vllm_matquant.quantize.ranks import launched_rank

    if launched_rank():
        parser.prog += f" (rank {launched_rank()})"
    say = silent if launched_rank() else _print
    try:
        job = job_type(**options)
        if dry_run and isinstance(job, PlannedJob):
            plan = job.plan()
            say(str(plan))
            job.check_plan(plan)
            return 0
        return int(job.exit_status(job.run(say)))
    except (ValueError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt as stop:
        parser.exit(_INTERRUPTED, f"\n{parser.prog}: interrupted{f'; {stop}' if str(stop) else ''}\n")


def _print(line: str) -> None:
    """Print a line above the progress bars that are shown."""
    from tqdm import tqdm

    tqdm.write(line)
    sys.stdout.flush()
