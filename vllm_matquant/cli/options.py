"""From the fields of a job to the options of its command."""

from __future__ import annotations

import argparse
import inspect
from dataclasses import Field
from typing import Any

from vllm_matquant.jobs.job import Argument, Job, PlannedJob, arguments_of, is_required


def add_options(parser: argparse.ArgumentParser, job: type[Job[Any]]) -> None:
    """Let a parser take the options of a job: what it parses has the job's class as ``job`` and the values by name."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = inspect.getdoc(job), job.epilog
    groups: dict[str, Any] = {}
    for field, its in arguments_of(job):
        if its.group and its.group not in groups:
            groups[its.group] = parser.add_argument_group(its.group)
        _add(groups[its.group] if its.group else parser, field, its)
    if issubclass(job, PlannedJob):
        parser.add_argument(
            "--dry-run", action="store_true", help="check everything and say what it will take; write nothing"
        )
    parser.set_defaults(job=job)


def _add(parser: Any, field: Field[Any], its: Argument) -> None:
    option = "--" + field.name.replace("_", "-")
    if isinstance(field.default, bool):
        parser.add_argument(option, action="store_true", help=its.help)
        return
    how: dict[str, Any] = {"type": its.parse, "help": its.help, "metavar": its.metavar, "choices": its.choices}
    if its.positional:
        parser.add_argument(field.name, **how)
    elif is_required(field):
        parser.add_argument(option, required=True, **how)
    elif its.repeated:
        parser.add_argument(option, action="append", default=[], **how)
    else:
        parser.add_argument(option, default=field.default, **how)
