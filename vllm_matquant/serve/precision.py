"""The widths that a model runs at, and how they are asked for.

A model runs at one width, but for layers that have widths of their own, or by a recipe, which gives each layer its
width. Everything downstream asks for the precision of one layer, with a width for each of its output partitions (q, k
and v of a fused layer), and takes the widths of different layers or partitions as they come.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_matquant.checkpoint.errors import ConfigError
from vllm_matquant.checkpoint.reader import Checkpoint, open_checkpoint
from vllm_matquant.checkpoint.sizes import parse_bytes
from vllm_matquant.checkpoint.slice import Slice
from vllm_matquant.checkpoint.spec import QUANT_METHOD, WIDTHS, Format, served_width

SETTINGS_KEY = QUANT_METHOD  # of the plugin's own part in vLLM's additional_config
CHOICES = ("bits", "memory", "recipe")  # settings that choose widths: one of them at most
SETTINGS = (*CHOICES, "activation_bits")
ACTIVATION_BITS = (8, 16)
_RANGE = f"an integer from {WIDTHS[0]} to {WIDTHS[-1]}, or a number such as 2.5 as the budget of an average"


@dataclass(frozen=True)
class LayerPrecision:
    """The widths of one linear layer.

    Attributes:
        active_widths: the width that each output partition is computed at.
    """

    active_widths: tuple[int, ...]

    @property
    def resident_width(self) -> int:
        """Bits of each code that are kept in memory."""
        return max(self.active_widths)

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Widths whose decoders are kept in memory, ascending."""
        return tuple(sorted(set(self.active_widths)))

    def segments(self) -> Iterator[tuple[range, LayerPrecision]]:
        """The longest runs of output partitions with the same width, each with its precision.

        A segment keeps its own planes and decoders in memory, so that a part of a fused layer pays for its own bits.
        """
        start = 0
        for _, run in itertools.groupby(self.active_widths):
            widths = tuple(run)
            yield range(start, start + len(widths)), LayerPrecision(widths)
            start += len(widths)


@dataclass(frozen=True)
class Precision:
    """The widths of a model.

    Attributes:
        bits: the width of every layer that has no widths of its own.
        activation_bits: bits to which kernels round activations, None for the default of each width, see
            :func:`vllm_matquant.kernels.ops.linear`.
        recipe: the width of every layer by its name in the checkpoint; takes the place of ``bits``.
    """

    bits: int
    activation_bits: int | None = None
    recipe: Mapping[str, int] | None = field(default=None, hash=False)

    def slice_of(self, checkpoint: Checkpoint) -> Slice:
        """What to ask of the checkpoint."""
        return checkpoint.slice(self.bits) if self.recipe is None else checkpoint.slice(widths=self.recipe)

    def of_layer(self, parts: Sequence[str], widths: Sequence[Sequence[int]]) -> LayerPrecision:
        """The widths of a layer whose output partitions are the layers ``parts``, which have ``widths``, ascending."""
        if self.recipe is None:
            return LayerPrecision(tuple(served_width(offered, self.bits) for offered in widths))
        # A head that is tied to the embedding has no codes of its own, and no width: vLLM makes it, then drops it.
        return LayerPrecision(tuple(self.recipe.get(part, self.bits) for part in parts))


@dataclass(frozen=True)
class Request:
    """What the settings ask for, checked as far as that goes without the checkpoint.

    Attributes:
        bits: a width.
        budget: the most that the average width may be.
        memory: the most bytes that all weights may take.
        recipe: a recipe's file, or the width of every layer.
        activation_bits: see :class:`Precision`.
    """

    bits: int | None = None
    budget: float | None = None
    memory: int | None = None
    recipe: Path | Mapping[str, int] | None = None
    activation_bits: int | None = None

    @property
    def needs_recipes(self) -> bool:
        """Whether the checkpoint's files must be there to tell the widths."""
        return self.budget is not None or self.memory is not None or isinstance(self.recipe, Path)


def read_request(additional_config: Any) -> Request:
    """The plugin's settings, ``additional_config["matquant"]``.

    ``bits`` is a width (an integer) or a budget (a number with a fraction, 3.0 too), ``memory`` a size such as "90MiB"
    or a number of bytes, ``recipe`` a file or an object {layer: width}, ``activation_bits`` 8 or 16.

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
    if isinstance(memory, str):
        try:
            memory = parse_bytes(memory)
        except ValueError as error:
            raise fail("memory", str(error).partition("expected ")[2]) from error
    if memory is not None and (type(memory) is not int or memory <= 0):
        raise fail("memory", 'a size such as "90MiB", or a number of bytes')
    if isinstance(recipe, (str, Path)):
        recipe = Path(recipe)
    elif isinstance(recipe, Mapping):
        wrong = {layer: width for layer, width in recipe.items() if type(width) is not int or width not in WIDTHS}
        if wrong:
            raise ConfigError("additional_config", f"{SETTINGS_KEY}.recipe", wrong, f"widths of {list(WIDTHS)}")
    elif recipe is not None:
        raise fail("recipe", "a file, or an object with a width for each layer")
    activation_bits = settings.get("activation_bits")
    if activation_bits is not None and (type(activation_bits) is not int or activation_bits not in ACTIVATION_BITS):
        raise fail("activation_bits", f"one of {list(ACTIVATION_BITS)}")
    width = bits if type(bits) is int else None
    return Request(width, bits if width is None else None, memory, recipe, activation_bits)


def with_precision(additional_config: Mapping[str, Any], precision: Precision) -> dict[str, Any]:
    """A copy of ``additional_config`` whose settings ask for just these widths.

    A recipe's widths stand there themselves, not the name of a file: every process of the engine gets them, and
    vLLM's compile cache tells them apart.
    """
    settings = {name: value for name, value in additional_config.get(SETTINGS_KEY, {}).items() if name not in CHOICES}
    if precision.recipe is None:
        chosen: dict[str, Any] = {"bits": precision.bits}
    else:
        chosen = {"recipe": dict(precision.recipe)}
    return {**additional_config, SETTINGS_KEY: settings | chosen}


def resolve(
    request: Request,
    checkpoint_format: Format,
    folder: Path | None,
    report: Callable[[str], object] = lambda text: None,
    *,
    partial: bool = False,
) -> Precision:
    """The widths that a request asks for, checked against the checkpoint; without a request, the widest that it serves.

    Args:
        request: what is asked for.
        checkpoint_format: what the checkpoint's config.json declares.
        folder: the checkpoint, validated whole at these widths; None if it is not yet downloaded.
        report: called with what was chosen, where the request left a choice.
        partial: the folder is a download of which only the narrowest width has come: the rest is checked when it has.

    Raises:
        CheckpointError: the widths are not offered, no recipe is within the budget, files of it are not in the folder,
            or the files are not sound.
    """
    if folder is None:
        if request.needs_recipes:
            raise ValueError("a budget or a recipe's file needs the checkpoint's folder")
        if isinstance(request.recipe, Mapping):
            return _by_recipe(request.recipe, request.activation_bits)
        bits = request.bits or checkpoint_format.max_width
        checkpoint_format.check_width(bits, "quantization_config")
        return Precision(bits, request.activation_bits)
    checkpoint = open_checkpoint(folder, check_files=False)
    if request.needs_recipes or request.recipe is not None:
        if isinstance(request.recipe, Mapping):
            served = checkpoint.slice(widths=request.recipe)
        elif request.recipe is not None:
            served = checkpoint.slice(request.recipe)
        else:
            served = checkpoint.slice(budget=request.budget, memory=request.memory, partial=partial)
        report(f"Serving {served}")
        if not partial:
            checkpoint.check(served)
        return _by_recipe(served.widths, request.activation_bits)
    served = checkpoint.slice(request.bits)
    checkpoint.check(served)
    if request.bits is None:
        offered = f"the widest of {list(checkpoint_format.widths)} that {folder} holds"
        report(f"No --bits given: serving at {served.width} bits, {offered}")
    return Precision(served.widest if served.width is None else served.width, request.activation_bits)


def _by_recipe(widths: Mapping[str, int], activation_bits: int | None) -> Precision:
    """A recipe's precision; its widest width stands for the model's."""
    return Precision(max(widths.values(), default=WIDTHS[-1]), activation_bits, dict(widths))
