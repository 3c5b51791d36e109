"""The quantization methods by name, and their settings from text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

from vllm_matquant.quantize.baselines import GPTQ, MatGPTQ, RoundToNearest
from vllm_matquant.quantize.device import check_device
from vllm_matquant.quantize.gptvq import GPTVQ
from vllm_matquant.quantize.method import Method
from vllm_matquant.quantize.nested import Nested
from vllm_matquant.quantize.nested_tuned import NestedTuned
from vllm_matquant.quantize.nested_vq import NestedVQ
from vllm_matquant.quantize.omni import MatQuantOmni, MatQuantOmniExtra, OmniQuant

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Nested,
        NestedTuned,
        NestedVQ,
        MatQuantOmni,
        MatQuantOmniExtra,
        OmniQuant,
        MatGPTQ,
        GPTQ,
        GPTVQ,
        RoundToNearest,
    )
}


_SWITCH = {"true": True, "1": True, "false": False, "0": False}


def settings_of(method: Any) -> Iterator[tuple[str, int | float | str]]:
    """The settings of a method and their values; those of a part of it by dotted names, such as "tuning.iterations"."""
    for field in fields(method):
        value = getattr(method, field.name)
        if is_dataclass(value):
            yield from ((f"{field.name}.{name}", inner) for name, inner in settings_of(value))
        elif field.name != "widths":
            yield field.name, value


def with_settings(method: Method, settings: Sequence[str]) -> Method:
    """The method with other settings.

    Args:
        settings: each "NAME=VALUE"; a value is read as what the setting is now: true or false, a whole number, a
            number or a text.

    Raises:
        ValueError: there is no such setting, or the value is none for it.
    """
    known, changes = dict(settings_of(method)), {}
    for setting in settings:
        name, _, text = setting.partition("=")
        if name not in known:
            raise ValueError(f"setting: found {setting!r}, expected NAME=VALUE with one of {', '.join(known)}")
        kind = type(known[name])
        try:
            changes[name] = _SWITCH[text.lower()] if kind is bool else kind(text)
        except (KeyError, ValueError) as cause:
            expected = "true or false" if kind is bool else f"one such as {known[name]}"
            raise ValueError(f"setting {name}: found {text!r}, expected {expected}") from cause
    return _replaced(method, changes)


def check_devices(method: Method) -> None:
    """Check that the devices which a method's settings name are there.

    Raises:
        ValueError: one is not.
    """
    for name, value in settings_of(method):
        if name.rpartition(".")[2] == "device":
            check_device(f"setting {name}", str(value))


def _replaced(part: Any, changes: Mapping[str, int | float | str]) -> Any:
    """With other values, all at once: what one may be can depend on another."""
    own: dict[str, Any] = {}
    inner: dict[str, dict[str, int | float | str]] = {}
    for name, value in changes.items():
        first, _, rest = name.partition(".")
        if rest:
            inner.setdefault(first, {})[rest] = value
        else:
            own[first] = value
    parts = {name: _replaced(getattr(part, name), within) for name, within in inner.items()}
    return replace(part, **own, **parts)
