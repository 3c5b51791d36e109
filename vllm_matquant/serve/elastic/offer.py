"""What a server offers: the slices that are resident, and those of them that clients may ask for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_matquant.checkpoint.errors import ConfigError
from vllm_matquant.checkpoint.slice import Slice
from vllm_matquant.checkpoint.spec import WIDTHS
from vllm_matquant.serve.elastic.policy import Choice, LoadPolicy

# A compiled graph is given the handles of so many slices, however many there are, so that it serves every offer.
MAX_SLICES = 32
_RANGE = re.compile(r"(\d)\.\.(\d)")
_EXPECTED = f'widths from {WIDTHS[0]} to {WIDTHS[-1]} and names of recipes, such as "2..8" or "2,4,my-recipe"'


class OfferError(ValueError):
    """A width or recipe is no slice that is offered, or not one to whoever asks."""


def parse_choices(value: Any) -> tuple[Choice, ...]:
    """The widths and recipes of a list, each once, in its order.

    Args:
        value: a list of widths and names, or a text such as "2..8", "2,4,8" or "8,my-recipe".

    Raises:
        ValueError: it is none of these; the message says what was found and what was expected.
    """
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)) or not items:
        raise ValueError(f"found {value!r}, expected {_EXPECTED}")
    choices: list[Choice] = []
    for item in items:
        text = item.strip() if isinstance(item, str) else item
        span = _RANGE.fullmatch(text) if isinstance(text, str) else None
        if span:
            widths = range(int(span[1]), int(span[2]) + 1)
            choices += widths if widths else [0]
        else:
            choices.append(int(text) if isinstance(text, str) and text.isdecimal() else text)
    for choice in choices:
        if not (isinstance(choice, str) and choice) and (type(choice) is not int or choice not in WIDTHS):
            raise ValueError(f"found {value!r}, expected {_EXPECTED}")
    return tuple(dict.fromkeys(choices))


def choice_of(of: Slice) -> Choice:
    """What users call a slice."""
    return of.name if of.width is None else of.width


@dataclass(frozen=True)
class Offer:
    """The slices of an elastic server.

    Attributes:
        slices: what is resident, the one with the most bits first. A slice's place is its *slot*.
        for_clients: names of those that a request may ask for.
        refusal: why requests cannot have slices of their own, None if they can.
        policy: when the active slice follows the load, None for never.
    """

    slices: tuple[Slice, ...]
    for_clients: tuple[str, ...]
    refusal: str | None = None
    policy: LoadPolicy | None = None

    def slot(self, name: str) -> int:
        """The slot of the slice with this name.

        Raises:
            OfferError: there is none.
        """
        for slot, each in enumerate(self.slices):
            if each.name == name:
                return slot
        raise OfferError(f"found {name!r}, expected {self._listed(self.slices)}")

    def find(self, choice: Any) -> Slice:
        """The slice that a choice means: a width, as a number or a text, or the name of a recipe.

        Raises:
            OfferError: it is not offered; the message says what is.
        """
        return self._find(choice, self.slices)

    def find_for_client(self, choice: Any) -> Slice:
        """The slice that a request asks for.

        Raises:
            OfferError: it is not offered to clients, or no request can have one of its own.
        """
        if self.refusal is not None:
            raise OfferError(f"found {choice!r}, but all requests are computed at the server's width: {self.refusal}")
        return self._find(choice, [each for each in self.slices if each.name in self.for_clients])

    def _find(self, choice: Any, among: Sequence[Slice]) -> Slice:
        for each in among:
            if isinstance(choice, str):
                if choice in (each.name, str(each.width)):
                    return each
            elif isinstance(choice, (int, float)) and not isinstance(choice, bool) and choice == each.width:
                return each
        raise OfferError(f"found {choice!r}, expected {self._listed(among)}")

    @staticmethod
    def _listed(slices: Iterable[Slice]) -> str:
        names = [repr(choice_of(each)) for each in slices]
        return f"one of {', '.join(names)}" if names else "none: this server lets no client choose"


def ladder_of(policy: LoadPolicy, offer: Offer) -> list[Slice]:
    """The offered slices that a policy chooses among, the one with the most bits first.

    Raises:
        OfferError: its floor or ceiling is not offered.
        ConfigError: no two slices lie between them.
    """
    most = offer.slices[0] if policy.ceiling is None else offer.find(policy.ceiling)
    least = offer.slices[-1] if policy.floor is None else offer.find(policy.floor)
    steps = [each for each in offer.slices if least.average_bits <= each.average_bits <= most.average_bits]
    if len(steps) < 2:
        found = f"from {least.name} to {most.name}"
        raise ConfigError(
            "additional_config", "matquant.elastic_policy", found, "a floor with fewer bits than a ceiling"
        )
    return steps


def described(of: Slice) -> Mapping[str, Any]:
    """What the control endpoint says of a slice."""
    return {**of.label, "name": of.name, "average_bits": of.average_bits, "bytes": of.resident_bytes, "kl": of.kl}
