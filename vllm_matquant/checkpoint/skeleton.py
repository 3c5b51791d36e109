"""What a config.json implies: the model's parameters and linear layers, without a byte of weights."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from vllm_matquant.checkpoint.errors import ConfigError
from vllm_matquant.checkpoint.spec import CONFIG_FILE


@dataclass(frozen=True)
class Skeleton:
    """Names and shapes of a model.

    Attributes:
        parameters: shape of every parameter and persistent buffer, as named in a checkpoint.
        tied: the parameters that share the memory of an earlier one, so that a checkpoint may leave them out.
        linears: (out_features, in_features) of every ``torch.nn.Linear``, in the model's order.
    """

    parameters: dict[str, tuple[int, ...]]
    tied: frozenset[str]
    linears: dict[str, tuple[int, int]]

    def quantized_layers(self, ignored: Collection[str]) -> dict[str, tuple[int, int]]:
        """The linear layers but for the ignored: what a checkpoint quantizes."""
        return {name: shape for name, shape in self.linears.items() if name not in ignored}


def build_skeleton(config: dict[str, Any], where: Path | str = CONFIG_FILE) -> Skeleton:
    """Build the model that a config.json describes on the meta device, from transformers' own classes alone.

    Code that comes with a checkpoint ("auto_map") is never run.

    Args:
        config: the content of config.json; its ``quantization_config`` is left aside.
        where: the file to name in an error.

    Raises:
        ConfigError: transformers knows no causal language model of this type, or refuses the configuration.
    """
    fields = {name: value for name, value in config.items() if name != "quantization_config"}
    model_type = fields.pop("model_type", None)
    if not isinstance(model_type, str):
        raise ConfigError(where, "model_type", model_type, "the name of an architecture that transformers knows")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields))
    # Each architecture validates its fields in its own way, so there is no narrower class to catch.
    except Exception as cause:
        reason = str(cause).split("\n")[0][:200]
        raise ConfigError(
            where,
            "architecture",
            f"model_type {model_type!r}, of which transformers builds no causal language model ({reason})",
            "an architecture and values that transformers knows (code inside a checkpoint is never run)",
        ) from cause

    first: dict[int, str] = {}
    names = model.named_parameters(remove_duplicate=False)
    tied = frozenset(name for name, parameter in names if first.setdefault(id(parameter), name) != name)
    return Skeleton(
        parameters={name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
        tied=tied,
        linears={
            name: (module.out_features, module.in_features)
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear)
        },
    )
