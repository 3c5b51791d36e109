"""The fields of another tool's ``quantization_config``, read strictly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_matquant.checkpoint.errors import ConfigError
from vllm_matquant.checkpoint.spec import WIDTHS


@dataclass(frozen=True)
class Fields:
    """Some fields.

    Attributes:
        content: by their names.
        where: the file that holds them.
        subject: what they belong to in it.
    """

    content: Mapping[str, Any]
    where: Path
    subject: str = "quantization_config"

    def get(self, *names: str, default: Any = None) -> Any:
        """The first of these fields that is there and not null."""
        return next((self.content[name] for name in names if self.content.get(name) is not None), default)

    def fail(self, name: str, expected: object, hint: str = "") -> ConfigError:
        """The error of a field that is not what was expected."""
        found = repr(self.content[name]) if name in self.content else "nothing"
        return ConfigError(self.where, f"{self.subject}.{name}", found, expected, hint)

    def one_of(self, names: Sequence[str], known: Sequence[Any], default: Any) -> Any:
        """The first of some fields that is there, which must have one of the known values.

        Raises:
            ConfigError: it has another one.
        """
        name = next((name for name in names if self.content.get(name) is not None), names[0])
        value = self.get(name, default=default)
        if value not in known or isinstance(value, bool) != isinstance(known[0], bool):
            raise self.fail(name, f"one of {list(known)}")
        return value

    def refuse(self, *names: str) -> None:
        """Refuse fields that change what the weights mean, or what else is quantized, where they say anything.

        Raises:
            ConfigError: one does.
        """
        for name in names:
            if self.content.get(name):
                raise self.fail(name, "nothing: an import would lose it")

    def bits(self, *names: str, known: Sequence[int] = WIDTHS) -> int:
        """Bits of a code, in the first of some fields that is there.

        Raises:
            ConfigError: they are none, or not those of a width.
        """
        name = next((name for name in names if self.content.get(name) is not None), names[0])
        value = self.content.get(name)
        if type(value) is not int or value not in known:
            raise self.fail(name, f"one of {list(known)}")
        return value

    def group_size(self, *names: str) -> int:
        """Columns of a group, 0 for a whole row, which the tools write as -1.

        Raises:
            ConfigError: it is no such number.
        """
        name = next((name for name in names if self.content.get(name) is not None), names[0])
        value = self.content.get(name)
        if type(value) is not int or not (value == -1 or value > 0):
            raise self.fail(name, "a number of columns, or -1 for whole rows")
        return max(value, 0)

    def part(self, name: str, content: Any) -> Fields:
        """The fields of an object among these.

        Raises:
            ConfigError: it is no object.
        """
        subject = f"{self.subject}.{name}"
        if not isinstance(content, dict):
            raise ConfigError(self.where, subject, repr(content), "an object")
        return Fields(content, self.where, subject)
