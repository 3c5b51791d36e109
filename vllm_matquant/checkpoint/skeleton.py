"""What a config.json implies: the model's parameters and linear layers, without a byte of weights."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vllm_matquant.checkpoint.errors import ConfigError
from vllm_matquant.checkpoint.experts import gate_layers, joined_experts
from vllm_matquant.checkpoint.language_model import (
    StoredNames,
    build_model,
    has_language_model,
    is_multimodal,
    take_language_model,
)
from vllm_matquant.checkpoint.names import CONFIG_FILE
from vllm_matquant.checkpoint.spec import Format


@dataclass(frozen=True)
class Skeleton:
    """Names and shapes of a language model, and of what else its files hold.

    Attributes:
        class_name: of transformers' model.
        parameters: shape of every parameter and persistent buffer, as named in a checkpoint.
        tied: the parameters that share the memory of an earlier one, which it names: a checkpoint may leave them out.
        linears: (out_features, in_features) of every ``torch.nn.Linear`` but the routers of experts and the gates of
            shared ones, in the model's order; each matrix of an expert is one.
        embeddings: (tokens, hidden size) of the input embedding, by its name.
        prefix: what the names of the parameters below the head begin with, such as "model."; files of such a model
            that were saved without a head lack it.
        head: full name of the layer that gives the logits, None if the model has none.
        joined_experts: the first parameter that holds experts which are no linear layers, None if there is none.
        tower: shape of every parameter and persistent buffer of what makes embeddings of pictures, as named by
            transformers. A checkpoint has the names of the source's files for them, see :meth:`stored_names`.
        renamed: of a model that has a tower, which tensor of the files each parameter is.
    """

    class_name: str
    parameters: dict[str, tuple[int, ...]]
    tied: dict[str, str]
    linears: dict[str, tuple[int, int]]
    embeddings: dict[str, tuple[int, int]]
    prefix: str = ""
    head: str | None = None
    joined_experts: str | None = None
    tower: dict[str, tuple[int, ...]] = field(default_factory=dict)
    renamed: StoredNames | None = None

    def stored_names(self, stored: Collection[str]) -> dict[str, str]:
        """The name in some files of each parameter that they hold, those of the tower too.

        Args:
            stored: the names of all tensors in the files.
        """
        if self.renamed is not None:
            return self.renamed(stored)
        # transformers' rule too: names without the prefix count where none has it.
        lacking = "" if any(name.startswith(self.prefix) for name in stored) else self.prefix
        return {name: own for name in self.parameters if (own := name.removeprefix(lacking)) in stored}

    def quantized_layers(self, format: Format, where: Path | str = CONFIG_FILE) -> dict[str, tuple[int, int]]:
        """Shape of every layer that a checkpoint of this format has codes of, in the model's order.

        These are the embeddings that the format names and the linear layers but for the ignored. A layer that is tied
        to another one has no codes of its own.

        Args:
            format: the checkpoint's format.
            where: the file to name in an error.

        Raises:
            ConfigError: an embedding is not the model's, or the format says different things of tied layers.
        """
        field = "quantization_config.quantized_embeddings"
        unknown = sorted(set(format.quantized_embeddings) - self.embeddings.keys())
        if unknown:
            raise ConfigError(where, field, unknown, f"no names but {list(self.embeddings)}")
        layers = {name: shape for name, shape in self.embeddings.items() if name in format.quantized_embeddings}
        layers |= {name: shape for name, shape in self.linears.items() if name not in format.ignored_layers}
        for pair in self.tied.items():
            tied, first = (parameter.removesuffix(".weight") for parameter in pair)
            if (tied in layers) != (first in layers):
                one, other = (tied, first) if tied in layers else (first, tied)
                found = f"{one} quantized and {other}, which shares its weight, not"
                raise ConfigError(where, f"{field} and ignored_layers", found, "both quantized or neither")
            layers.pop(tied, None)
        return layers


def build_skeleton(config: dict[str, Any], where: Path | str = CONFIG_FILE) -> Skeleton:
    """Build the model that a config.json describes on the meta device, from transformers' own classes alone.

    Code that comes with a checkpoint ("auto_map") is never run.

    Args:
        config: the content of config.json; its ``quantization_config`` is left aside.
        where: the file to name in an error.

    Raises:
        ConfigError: transformers knows no causal language model of this type, or refuses the configuration.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ConfigError(where, "model_type", model_type, "the name of an architecture that transformers knows")
    try:
        with torch.device("meta"):
            whole = build_model(config)
        embedding, head = whole.get_input_embeddings(), whole.get_output_embeddings()
        apart = has_language_model(whole)
    # Each architecture validates its fields in its own way, so there is no narrower class to catch.
    except Exception as cause:
        reason = str(cause).split("\n")[0][:200]
        raise ConfigError(
            where,
            "architecture",
            f"model_type {model_type!r}, of which transformers builds no causal language model ({reason})",
            "an architecture and values that transformers knows (code inside a checkpoint is never run)",
        ) from cause

    if not apart:
        raise ConfigError(
            where,
            "model_type",
            f"{model_type!r}, whose language model is no part of its own beside a vision tower",
            "a model whose language model is one, as those of LLaVA, Gemma 3 and Qwen3-VL are",
        )
    class_name, shapes = type(whole).__name__, _shapes(whole)
    renamed = StoredNames(whole) if is_multimodal(whole) else None
    with torch.device("meta"):
        model = take_language_model(whole)
    first: dict[int, str] = {}
    names = {
        name: first.setdefault(id(parameter), name)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    gates, parameters = gate_layers(model), _shapes(model)
    return Skeleton(
        class_name=class_name,
        parameters=parameters,
        tied={name: earlier for name, earlier in names.items() if earlier != name},
        linears={
            name: (module.out_features, module.in_features)
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and name not in gates
        },
        embeddings={
            name: (module.num_embeddings, module.embedding_dim)
            for name, module in model.named_modules()
            if module is embedding and isinstance(module, torch.nn.Embedding)
        },
        prefix=f"{model.base_model_prefix}.",
        head=next((name for name, module in model.named_modules() if module is head), None),
        joined_experts=joined_experts(model),
        tower={name: shape for name, shape in shapes.items() if name not in parameters} if renamed else {},
        renamed=renamed,
    )


def _shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
