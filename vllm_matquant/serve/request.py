"""What a user asks a server for: the plugin's settings, and the slices that they mean in a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_matquant.checkpoint.errors import ConfigError
from vllm_matquant.checkpoint.quantization_config import is_width_list
from vllm_matquant.checkpoint.reader import Checkpoint
from vllm_matquant.checkpoint.sizes import parse_bytes
from vllm_matquant.checkpoint.slice import Slice
from vllm_matquant.checkpoint.spec import QUANT_METHOD, WIDTHS
from vllm_matquant.serve.elastic.offer import MAX_SLICES, Offer, ladder_of, parse_choices
from vllm_matquant.serve.elastic.policy import Choice, LoadPolicy, read_policy
from vllm_matquant.serve.served import Served
from vllm_matquant.serve.speculation.settings import DRAFT_CHOICE, MOST_TOKENS, parse_draft

SETTINGS_KEY = QUANT_METHOD  # of the plugin's own part in vLLM's additional_config
CHOICES = ("bits", "memory", "recipe")  # settings that choose what is active: one of them at most
SPECULATION = ("speculate_bits", "speculate_tokens")
SETTINGS = (*CHOICES, "resident", "elastic", "client_bits", "elastic_policy", *SPECULATION, "activation_bits")
ACTIVATION_BITS = (8, 16)
_RANGE = f"an integer from {WIDTHS[0]} to {WIDTHS[-1]}, or a number such as 2.5 as the budget of an average"


@dataclass(frozen=True)
class Request:
    """What the settings ask for, checked as far as that goes without the checkpoint.

    Attributes:
        bits: a width.
        budget: the most that the average width may be.
        memory: the most bytes that all weights may take.
        recipe: a recipe's file, or the width of every layer.
        resident: widths to keep in memory too, so that the server can switch to them.
        activation_bits: bits to which kernels round activations.
        elastic: widths and names of recipes that the server offers, each to be active at some time.
        client_bits: those of them that a request may ask for, by default all.
        policy: when the active slice follows the load, None for never.
        draft: a width, the name of a recipe, or the budget of an average: what drafts are made with, None for none.
    """

    bits: int | None = None
    budget: float | None = None
    memory: int | None = None
    recipe: Path | Mapping[str, int] | None = None
    resident: tuple[int, ...] = ()
    activation_bits: int | None = None
    elastic: tuple[Choice, ...] = ()
    client_bits: tuple[Choice, ...] | None = None
    policy: LoadPolicy | None = None
    draft: Choice | float | None = None

    def served(self, checkpoint: Checkpoint, report: Callable[[str], object], *, partial: bool = False) -> Served:
        """The slices of a checkpoint that are meant; without a choice the active one is the widest that it can serve.

        Args:
            checkpoint: whose files need not be checked yet.
            report: called with a line that says what was chosen, where the request left a choice.
            partial: the checkpoint is a download whose files are still to come.

        Raises:
            CheckpointError: the widths are not offered, or no recipe is within the budget.
        """
        if isinstance(self.recipe, Mapping):
            active = checkpoint.slice(widths=self.recipe)
        elif self.recipe is not None:
            active = checkpoint.slice(self.recipe)
        elif self.budget is not None or self.memory is not None:
            active = checkpoint.slice(budget=self.budget, memory=self.memory, partial=partial)
        elif self.bits is None and self.elastic:
            active = max(map(checkpoint.slice, self.elastic), key=lambda each: each.average_bits)
        elif self.bits is None and partial:
            active = checkpoint.slice(checkpoint.format.widths[-1])
        else:
            active = checkpoint.slice(self.bits)
        if self.bits is None:
            chosen = f"the widest of {list(checkpoint.format.widths)} that {checkpoint.folder} holds"
            told = self.recipe is not None or self.budget is not None or self.memory is not None
            if told or self.elastic:
                report(f"Serving {active}")
            else:
                report(f"No --bits given: serving at {active.width} bits, {chosen}")
        if self.elastic:
            return self._elastic(checkpoint, active)
        if self.draft is not None:
            draft = self._draft_of(checkpoint, active, self.draft, partial)
            return Served(active, (active, draft), self.activation_bits, draft=draft)
        others = [each for each in map(checkpoint.slice, self.resident) if each != active]
        return Served(active, (active, *others), self.activation_bits)

    def _elastic(self, checkpoint: Checkpoint, active: Slice) -> Served:
        """A server whose active slice can change among those that it offers; the active one is offered too."""
        _check_nested(checkpoint, "elastic", list(self.elastic))
        limits = [] if self.policy is None else [self.policy.floor, self.policy.ceiling]
        limits = [limit for limit in limits if limit is not None]
        choices = dict.fromkeys([*self.elastic, *self.resident, *(self.client_bits or ()), *limits])
        named = {each.name: each for each in [active, *map(checkpoint.slice, choices)]}
        slices = tuple(sorted(named.values(), key=lambda each: (-each.average_bits, each.name)))
        if len(slices) > MAX_SLICES:
            raise ConfigError(
                "additional_config", f"{SETTINGS_KEY}.elastic", f"{len(slices)} slices", f"at most {MAX_SLICES}"
            )
        clients = slices if self.client_bits is None else [checkpoint.slice(each) for each in self.client_bits]
        offer = Offer(slices, tuple(each.name for each in clients), policy=self.policy)
        if self.policy is not None:
            ladder_of(self.policy, offer)
        return Served(active, slices, self.activation_bits, offer)

    @staticmethod
    def _draft_of(checkpoint: Checkpoint, active: Slice, which: Choice | float, partial: bool) -> Slice:
        """The slice that drafts for the active one: it lies inside it, so that it has no planes of its own."""
        _check_nested(checkpoint, "speculate_bits", which)
        budget = which if isinstance(which, float) else None
        draft = checkpoint.slice(which if budget is None else None, budget=budget, partial=partial)
        wider = [layer for layer, width in draft.widths.items() if width > active.widths[layer]]
        if wider or dict(draft.widths) == dict(active.widths):
            where = f", which has {draft.widths[wider[0]]} bits at {wider[0]}" if wider else ""
            raise ConfigError(
                "additional_config",
                f"{SETTINGS_KEY}.speculate_bits",
                f"{draft.name}{where}",
                f"a slice that is narrower than {active.name}, which is served, and nowhere wider",
            )
        return draft


def _check_nested(checkpoint: Checkpoint, setting: str, value: object) -> None:
    """Refuse to hold several slices of a checkpoint whose slices do not lie inside each other."""
    if checkpoint.format.slicing != "truncate":
        raise ConfigError(
            "additional_config",
            f"{SETTINGS_KEY}.{setting}",
            f"{value} of a checkpoint with rounded slices, none of which lies inside another",
            "a checkpoint quantized with a method whose slices are truncated, or --bits alone",
        )


def read_request(additional_config: Any) -> Request:
    """The plugin's settings, ``additional_config["matquant"]``.

    ``bits`` is a width (an integer) or a budget (a number with a fraction, 3.0 too), ``memory`` a size such as "90MiB"
    or a number of bytes, ``recipe`` a file or an object {layer: width}, ``resident`` a list of widths,
    ``activation_bits`` 8 or 16, ``elastic`` and ``client_bits`` lists of widths and names of recipes, or texts such as
    "2..8", ``speculate_bits`` a width, a budget or the name of a recipe, ``speculate_tokens`` a number.

    Raises:
        ConfigError: the settings are not an object, hold an unknown key or a wrong value, or choose widths twice.
    """
    settings = additional_config.get(SETTINGS_KEY, {}) if isinstance(additional_config, Mapping) else {}
    if not isinstance(settings, Mapping):
        raise ConfigError("additional_config", SETTINGS_KEY, repr(settings), 'an object such as {"bits": 4}')
    unknown = sorted(set(settings) - set(SETTINGS))
    if unknown:
        raise ConfigError("additional_config", SETTINGS_KEY, f"unknown keys {unknown}", f"keys of {list(SETTINGS)}")
    given = [name for name in CHOICES if settings.get(name) is not None]
    if len(given) > 1:
        raise ConfigError("additional_config", SETTINGS_KEY, " and ".join(given), "one of them")

    def fail(name: str, expected: str) -> ConfigError:
        return ConfigError("additional_config", f"{SETTINGS_KEY}.{name}", repr(settings[name]), expected)

    bits, memory, recipe = (settings.get(name) for name in CHOICES)
    if bits is not None and not (
        (type(bits) is int and bits in WIDTHS) or (type(bits) is float and WIDTHS[0] <= bits <= WIDTHS[-1])
    ):
        raise fail("bits", _RANGE)
    resident = settings.get("resident") or ()
    if resident and not is_width_list(resident):
        raise fail("resident", f"ascending distinct widths from {WIDTHS[0]} to {WIDTHS[-1]}")
    activation_bits = settings.get("activation_bits")
    if activation_bits is not None and (type(activation_bits) is not int or activation_bits not in ACTIVATION_BITS):
        raise fail("activation_bits", f"one of {list(ACTIVATION_BITS)}")
    elastic = _read_choices("elastic", settings, fail)
    client_bits = _read_choices("client_bits", settings, fail)
    policy = _read_policy(settings, fail)
    for name in ("client_bits", "elastic_policy"):
        if settings.get(name) is not None and not elastic:
            raise fail(name, "elastic too, which says what a server offers")
    draft = _read_draft(settings, fail)
    width = bits if type(bits) is int else None
    return Request(
        width,
        bits if width is None else None,
        _read_memory(memory, fail),
        _read_recipe(recipe, fail),
        tuple(resident),
        activation_bits,
        elastic or (),
        client_bits,
        policy,
        draft,
    )


def _read_policy(settings: Mapping[str, Any], fail: Callable[[str, str], ConfigError]) -> LoadPolicy | None:
    value = settings.get("elastic_policy")
    try:
        return None if value is None else read_policy(value)
    except ValueError as error:
        raise fail("elastic_policy", f"sound settings ({error})") from error


def _read_choices(
    name: str, settings: Mapping[str, Any], fail: Callable[[str, str], ConfigError]
) -> tuple[Choice, ...] | None:
    value = settings.get(name)
    if value is None or (name == "client_bits" and value == []):
        return None if value is None else ()
    try:
        return parse_choices(value)
    except ValueError as error:
        raise fail(name, str(error).partition("expected ")[2]) from error


def _read_draft(settings: Mapping[str, Any], fail: Callable[[str, str], ConfigError]) -> Choice | float | None:
    draft, tokens = (settings.get(name) for name in SPECULATION)
    if tokens is not None and (type(tokens) is not int or not 1 <= tokens <= MOST_TOKENS):
        raise fail("speculate_tokens", f"an integer from 1 to {MOST_TOKENS}")
    if draft is None:
        if tokens is not None:
            raise fail("speculate_tokens", "speculate_bits too, which says what drafts are made with")
        return None
    for name in ("elastic", "resident"):
        if settings.get(name):
            raise fail("speculate_bits", f"none with {name}: a server drafts for one slice, which stays")
    if isinstance(draft, str):
        try:
            return parse_draft(draft)
        except ValueError as error:
            raise fail("speculate_bits", str(error).partition("expected ")[2]) from error
    if type(draft) not in (int, float) or not WIDTHS[0] <= draft <= WIDTHS[-1]:
        raise fail("speculate_bits", DRAFT_CHOICE)
    return draft


def _read_memory(memory: Any, fail: Callable[[str, str], ConfigError]) -> int | None:
    if isinstance(memory, str):
        try:
            memory = parse_bytes(memory)
        except ValueError as error:
            raise fail("memory", str(error).partition("expected ")[2]) from error
    if memory is not None and (type(memory) is not int or memory <= 0):
        raise fail("memory", 'a size such as "90MiB", or a number of bytes')
    return memory


def _read_recipe(recipe: Any, fail: Callable[[str, str], ConfigError]) -> Path | Mapping[str, int] | None:
    if recipe is None:
        return None
    if isinstance(recipe, (str, Path)):
        return Path(recipe)
    if not isinstance(recipe, Mapping):
        raise fail("recipe", "a file, or an object with a width for each layer")
    wrong = {layer: width for layer, width in recipe.items() if type(width) is not int or width not in WIDTHS}
    if wrong:
        raise ConfigError("additional_config", f"{SETTINGS_KEY}.recipe", wrong, f"widths of {list(WIDTHS)}")
    return recipe


def without_settings(additional_config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of ``additional_config`` without the plugin's settings.

    vLLM's compile cache is keyed by ``additional_config``, and no compiled graph depends on what is served.
    """
    return {name: value for name, value in additional_config.items() if name != SETTINGS_KEY}


def given_settings(additional_config: Any, names: Sequence[str] = SETTINGS) -> dict[str, Any]:
    """Those of the plugin's settings that are given, of a well-formed ``additional_config``."""
    settings = additional_config.get(SETTINGS_KEY, {}) if isinstance(additional_config, Mapping) else {}
    return {name: settings[name] for name in names if settings.get(name) is not None}


def resident_files(served: Sequence[Slice]) -> list[str]:
    """Names of the files that these slices read, each once."""
    return list(dict.fromkeys(file for each in served for file in each.files))
