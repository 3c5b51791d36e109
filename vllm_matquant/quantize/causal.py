"""Whether a checkpoint is what can be quantized: a causal language model, with its own head and names."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from vllm_matquant.checkpoint.errors import CheckpointError, ConfigError, UnexpectedTensorError
from vllm_matquant.checkpoint.skeleton import Skeleton

# How the architectures of causal language models end, those of code inside a checkpoint too.
_CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_HEADS = frozenset({"score", "classifier", "qa_outputs", "v_head"})  # of other tasks, by their usual names
_EXPECTED = "a causal language model"


def check_task(config: Mapping[str, Any], where: Path) -> None:
    """Refuse a model of another task than predicting the next token, and one saved without a head.

    Args:
        config: the content of config.json.
        where: that file, to name in an error.

    Raises:
        ConfigError: ``architectures`` names such a model.
    """
    for name in config.get("architectures") or []:
        if not str(name).endswith(_CAUSAL):
            lacking = "was saved without its output head" if str(name).endswith("Model") else "has another head"
            raise ConfigError(
                where,
                "architectures",
                f"{name}, which {lacking}",
                f"{_EXPECTED}, such as one saved by AutoModelForCausalLM",
            )


def check_layers(config: Mapping[str, Any], skeleton: Skeleton, where: Path) -> None:
    """Refuse experts that are no linear layers, and a model that has none.

    Args:
        config, where: as of :func:`check_task`.
        skeleton: the model's parameters.

    Raises:
        ConfigError: it is one.
    """
    kind = repr(config.get("model_type"))
    if skeleton.joined_experts:
        raise ConfigError(
            where,
            "model_type",
            f"{kind}, a mixture of experts that are no gated linear layers without biases, or are joined in its files "
            f"({skeleton.joined_experts})",
            "a dense model, or experts whose matrices its files hold one by one, as those of Qwen3-MoE do",
        )
    if not any("." in name for name in skeleton.linears):
        raise ConfigError(
            where, "model_type", f"{kind}, whose blocks have no linear layers (torch.nn.Linear)", "one with some"
        )


def check_heads(names: Collection[str], skeleton: Skeleton, where: Path) -> None:
    """Refuse files with the head of another task.

    Args:
        names: of all tensors in the files.
        skeleton: the model's parameters.
        where: the folder, to name in an error.

    Raises:
        UnexpectedTensorError: there is a head that the causal language model lacks.
    """
    for name in sorted(set(names) - skeleton.parameters.keys()):
        if name.split(".")[0] in _HEADS:
            raise UnexpectedTensorError(where, name, "the head of another task", f"the tensors of {_EXPECTED}")


def explain_missing(
    config: Mapping[str, Any], skeleton: Skeleton, cause: CheckpointError, where: Path
) -> CheckpointError:
    """What to tell of a parameter that is in no file: transformers renames and joins tensors of some architectures.

    Args:
        config, skeleton, where: as of :func:`check_layers`.
        cause: the error that names the parameter.
    """
    kind = config.get("model_type")
    if skeleton.renamed is not None:
        changed = skeleton.renamed.joins  # what is renamed alone was found by its own name
    else:
        names = (skeleton.class_name, kind)  # transformers keeps some by class, some by type
        changed = any(get_checkpoint_conversion_mapping(name) for name in names)
    if not changed:
        return cause
    return ConfigError(
        where,
        "model_type",
        f"{kind!r}, of which transformers renames or joins tensors while it loads them ({cause.subject} is in no file)",
        "an architecture whose files hold the parameters by the names of transformers' model",
    )
