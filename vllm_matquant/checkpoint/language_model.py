"""The language model of a checkpoint: the whole of most models, one part of those that are given pictures too.

A multimodal model of transformers is a trunk beside what makes embeddings of pictures (vision tower and projector),
and an output head. That part is taken out: what is left is a causal language model, called with tokens, whose
parameters keep the names that they have in the whole.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as _MULTIMODAL

from vllm_matquant.checkpoint.experts import separate_experts
from vllm_matquant.checkpoint.files import read_json
from vllm_matquant.checkpoint.model_config import build_config
from vllm_matquant.checkpoint.names import CONFIG_FILE


def build_language_model(content: Mapping[str, Any], **options: Any) -> PreTrainedModel:
    """The language model of a config.json, with random weights and a linear layer for each matrix of an expert.

    Args:
        content: of config.json; its ``quantization_config`` is left aside.
        options: of transformers' ``from_config``, such as ``dtype``.

    Raises:
        Exception: transformers refuses the configuration, each architecture in its own way.
    """
    return take_language_model(build_model(content, **options))


def load_language_model(
    folder: Path, content: Mapping[str, Any] | None = None, *, dtype: torch.dtype
) -> PreTrainedModel:
    """The language model in a folder of transformers, otherwise as :func:`build_language_model`.

    Args:
        folder: with weights and config.json.
        content: of another config.json to take.
        dtype: of its parameters.
    """
    given = {} if content is None else {"config": build_config(content)}
    content = read_json(folder / CONFIG_FILE, any_float=True) if content is None else content
    made_by = _auto_class(content.get("model_type"))
    return take_language_model(made_by.from_pretrained(folder, dtype=dtype, trust_remote_code=False, **given))


def build_model(content: Mapping[str, Any], **options: Any) -> PreTrainedModel:
    """transformers' whole model of a config.json, see :func:`build_language_model`."""
    config = build_config(content)
    model: PreTrainedModel = _auto_class(config.model_type).from_config(config, **options)
    return model


def take_language_model(model: PreTrainedModel) -> PreTrainedModel:
    """Take what is given pictures out of a model of transformers, and its experts apart; it is changed.

    Args:
        model: one with a language model of its own, see :func:`has_language_model`.
    """
    if is_multimodal(model):
        base, trunk = model.base_model, model.get_decoder()
        for parts in (base._modules, base._parameters, base._buffers):
            for name in [name for name, part in parts.items() if part is not trunk]:
                delattr(base, name)
    return separate_experts(model)


def is_multimodal(model: PreTrainedModel) -> bool:
    """Whether a model of transformers is one that is given pictures too: its trunk is a part of such a one's."""
    return model.config.model_type in _MULTIMODAL and model.get_decoder() is not model.base_model


def has_language_model(model: PreTrainedModel) -> bool:
    """Whether the language model is all of a model of transformers, or a part of its own with a head beside."""
    if not is_multimodal(model):
        return True
    base, head = model.base_model, model.get_output_embeddings()
    return {*model.children()} == {base, head} and model.get_decoder() in [*base.children()]


class StoredNames:
    """What the tensors in files are called in transformers' model: it renames those of multimodal models.

    Attributes:
        joins: whether it also makes some parameters of several tensors, or of other values.

    Args:
        model: transformers' whole model; it may be changed later.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        transforms = get_model_conversion_mapping(model, add_legacy=False)
        self._renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        self.joins = len(self._renamings) < len(transforms)
        self._prefix = model.base_model_prefix
        self._known = dict.fromkeys(model.state_dict(), True)

    def __call__(self, stored: Collection[str]) -> dict[str, str]:
        """The name in the files of each parameter that they hold.

        Args:
            stored: the names in the files.
        """
        found = {}
        for name in sorted(stored):
            renamed, _ = rename_source_key(name, self._renamings, [], self._prefix, self._known)
            if renamed in self._known:
                found[renamed] = name
        return found


def _auto_class(model_type: object) -> Any:
    """transformers' class that makes models of a type."""
    return AutoModelForImageTextToText if model_type in _MULTIMODAL else AutoModelForCausalLM
