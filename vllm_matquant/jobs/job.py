"""What a job is: one thing that a user asks for, with its options as the fields of a dataclass.

The command line and the Python function of a job are both made from these fields, so that an option has one name, one
default, one check and one explanation wherever it is given.
"""

from __future__ import annotations

import argparse
import inspect
import re
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import PurePath
from typing import Any, ClassVar, Generic, ParamSpec, TypeVar

Say = Callable[[str], None]
"""What a line for a reader is given to."""

Result = TypeVar("Result", covariant=True)
_Options = ParamSpec("_Options")
_KEY = "argument"


def silent(line: str) -> None:
    """Say nothing."""


def show(value: Any) -> str:
    """A value as a command line has it: parts of a sequence are separated by commas."""
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


@dataclass(frozen=True)
class Argument:
    """How an option of a job is given on a command line.

    Attributes:
        help: one sentence; ``%(default)s`` stands for the default.
        parse: from the text of a command line to the value; raises argparse.ArgumentTypeError.
        show: from the value back to such a text.
        metavar: what stands for the value in the help.
        choices: the values allowed, where they are few.
        positional: whether it is told by its place, not by a name.
        repeated: whether it may be given several times; the value is the tuple of all.
        group: heading of the options that belong together.
        recorded: whether the command that a checkpoint was made by tells it.
        as_is: classes of values that Python code may give and no command line can: they are not parsed.
    """

    help: str
    parse: Callable[[str], Any] = str
    show: Callable[[Any], str] = show
    metavar: str | None = None
    choices: Sequence[Any] | None = None
    positional: bool = False
    repeated: bool = False
    group: str | None = None
    recorded: bool = True
    as_is: tuple[type, ...] = ()

    def normal(self, value: Any) -> Any:
        """The value as ``parse`` gives it, from any value that it could be written as.

        Raises:
            argparse.ArgumentTypeError: there is no such value.
        """
        if value is not None and self.repeated:
            return tuple(self.parse(self._text(each)) for each in self._several(value))
        if value is None or isinstance(value, (bool, *self.as_is)):
            return value
        value = self.parse(self._text(value))
        if self.choices is not None and value not in self.choices:
            raise argparse.ArgumentTypeError(f"found {value!r}, expected one of {', '.join(map(str, self.choices))}")
        return value

    def _text(self, value: Any) -> str:
        """The value as a command line has it.

        Raises:
            argparse.ArgumentTypeError: there is no such text.
        """
        try:
            return value if isinstance(value, str) else self.show(value)
        except (TypeError, LookupError) as error:  # no pair where a rule is one
            raise argparse.ArgumentTypeError(f"found {value!r}, expected {self.metavar or 'a text'}") from error

    def _several(self, value: Any) -> Iterable[Any]:
        """The values of an option that may be given several times: one text or path is one value, not its letters.

        Args:
            value: one, an iterable of them, or, of an option that is written NAME=VALUE, a mapping.

        Raises:
            argparse.ArgumentTypeError: it is none of these.
        """
        if isinstance(value, (str, PurePath)):
            return [value]
        form = self.metavar or "a text"
        rules = "=" in form
        if isinstance(value, Mapping) and rules:
            return [f"{name}={show(each)}" for name, each in value.items()]
        if isinstance(value, Mapping) or not isinstance(value, Iterable):
            expected = f"{form}, a list of such{' or a mapping' if rules else ''}"
            raise argparse.ArgumentTypeError(f"found {value!r}, expected {expected}")
        return value


def argument(help: str, **how: Any) -> dict[str, Argument]:
    """The metadata of a job's field, see :class:`Argument`."""
    return {_KEY: Argument(help, **how)}


class Job(ABC, Generic[Result]):
    """One thing that a user asks for; a subclass is a frozen dataclass whose fields have :func:`argument` as metadata.

    Every value may also be given as a command line would have it: "2,4" for (2, 4), a text for a path. An option that a
    command line may give several times takes a list, a single text, or, where it is written NAME=VALUE, a mapping.

    Attributes:
        epilog: what the command's help ends with.

    Raises:
        ValueError: an option's value is none for it.
    """

    epilog: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for field, its in arguments_of(type(self)):
            try:
                object.__setattr__(self, field.name, its.normal(getattr(self, field.name)))
            except argparse.ArgumentTypeError as error:
                raise ValueError(f"{field.name}: {error}") from error

    @abstractmethod
    def run(self, say: Say = silent) -> Result:
        """Do it; ``say`` is given each line that a reader at a terminal wants to see."""

    def exit_status(self, result: Any) -> int:
        """What the command ends with when :meth:`run` has returned ``result``."""
        return 0


class PlannedJob(Job[Result]):
    """A job that can be checked and foreseen: its command has the option ``--dry-run``."""

    @abstractmethod
    def plan(self) -> object:
        """Check all that can be checked before the work, and say what it will take; writes nothing.

        Returns:
            Something whose ``str`` tells it.
        """

    def check_plan(self, plan: Any) -> None:
        """Refuse what :meth:`run` would refuse for what its plan says, once a reader has seen the plan.

        Raises:
            ValueError: it cannot be carried out, as where the disk is too small.
        """


def arguments_of(job: type[Job[Any]]) -> Iterator[tuple[Field[Any], Argument]]:
    """The options of a job, in order."""
    return ((field, field.metadata[_KEY]) for field in fields(job) if _KEY in field.metadata)  # type: ignore[arg-type]


def is_required(field: Field[Any]) -> bool:
    """Whether an option must be given."""
    return field.default is MISSING and field.default_factory is MISSING


def command_of(name: str, job: Job[Any]) -> list[str]:
    """The command line that does what the job does: ``name`` and every option that is not the default."""
    command = ["matquant", *name.split()]
    for field, its in arguments_of(type(job)):
        value = getattr(job, field.name)
        if not its.recorded or (not is_required(field) and value == field.default):
            continue
        option = [] if its.positional else ["--" + field.name.replace("_", "-")]
        if isinstance(value, bool):
            command += option
        else:
            for each in value if its.repeated else [value]:
                command += [*option, its.show(each)]
    return command


def running(job: Callable[_Options, Job[Result]]) -> Callable[_Options, Result]:
    """The function that runs a job, silently, and returns what comes of it; its arguments are the job's options."""

    def run(*args: _Options.args, **kwargs: _Options.kwargs) -> Result:
        return job(*args, **kwargs).run()

    assert isinstance(job, type)
    run.__name__ = run.__qualname__ = re.sub(r"(?<!^)(?=[A-Z])", "_", job.__name__).lower()
    run.__module__ = job.__module__
    run.__signature__ = inspect.signature(job)  # type: ignore[attr-defined]
    lines = []
    for field, its in arguments_of(job):
        text = its.help.replace("%(default)s", show(field.default)).replace("%%", "%")
        lines.append(textwrap.fill(f"{field.name}: {text}", 110, initial_indent=" " * 4, subsequent_indent=" " * 8))
    run.__doc__ = f"{inspect.getdoc(job)}\n\nArgs:\n" + "\n".join(lines) + "\n"
    return run
