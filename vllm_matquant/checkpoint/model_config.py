"""transformers' configuration of a model, from the content of its config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

_TAG = "__float__"  # of an object that transformers writes for a number that JSON does not know
_NUMBERS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def build_config(content: Mapping[str, Any]) -> PreTrainedConfig:
    """transformers' configuration; code that comes with a checkpoint ("auto_map") is never run.

    Args:
        content: of config.json; its ``quantization_config`` is left aside.

    Raises:
        Exception: transformers refuses it, each architecture in its own way.
    """
    fields = {name: value for name, value in content.items() if name not in ("model_type", "quantization_config")}
    return AutoConfig.for_model(content["model_type"], **_untagged(fields))


def tag_floats(content: Any) -> Any:
    """JSON's values with an object in the place of every float that JSON does not know, as transformers writes them."""
    if isinstance(content, dict):
        return {name: tag_floats(value) for name, value in content.items()}
    if isinstance(content, list):
        return [tag_floats(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return {_TAG: next(name for name, number in _NUMBERS.items() if repr(number) == repr(content))}
    return content


def _untagged(content: Any) -> Any:
    if isinstance(content, dict):
        if set(content) == {_TAG} and content[_TAG] in _NUMBERS:
            return _NUMBERS[content[_TAG]]
        return {name: _untagged(value) for name, value in content.items()}
    return [_untagged(value) for value in content] if isinstance(content, list) else content
