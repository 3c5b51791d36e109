"""Tiny models of every architecture that transformers knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from tests.quantize.tiny_sources import VOCABULARY
from tests.random_models import randomize

TOKENS = torch.randint(VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(0))
TINY = {
    **dict.fromkeys(["hidden_size", "d_model", "n_embd"], 32),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "d_ff", "moe_intermediate_size"], 64),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "num_layers"], 4),
    **dict.fromkeys(["num_attention_heads", "n_head", "num_heads"], 4),
    **dict.fromkeys(["decoder_layers", "encoder_layers", "num_decoder_layers", "num_encoder_layers"], 2),
    **dict.fromkeys(["decoder_ffn_dim", "encoder_ffn_dim"], 64),
    **dict.fromkeys(["decoder_attention_heads", "encoder_attention_heads"], 4),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "num_experts_per_token", "moe_topk"], 2),
    **dict.fromkeys(["n_group", "topk_group"], 1),
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank"], 16),
    **dict.fromkeys(["qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"], 8),
    **{"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4, "max_position_embeddings": 64},
    **{"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2},
}
# What some architectures call otherwise, or cannot have; None leaves a field to its default.
_LATENT = (
    "axk1",
    "axk2",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "longcat_flash",
)
_OWN: dict[str, dict[str, Any]] = {
    **{name: {"num_key_value_heads": 4, "head_dim": None} for name in (*_LATENT, "youtu")},
    "xlstm": {"v_head_dim": None},
    "lfm2_moe": {"layer_types": ["full_attention"] * 4, "num_dense_layers": 1},
    "codegen": {"rotary_dim": 8},
    "falcon": {"head_dim": None},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        **{"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 0},
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCABULARY},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 8},
    "minicpm3": {"num_key_value_heads": 4},
}
_MOST_WEIGHTS = 100_000_000
MULTIMODAL = frozenset(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
# What takes pictures or sound in has other sizes than the language model, and gives it what is as wide as its states.
_TOWER = TINY | {**dict.fromkeys(["num_hidden_layers", "num_layers", "depth"], 2), "num_heads": 4}
_TOWER |= dict.fromkeys(["embed_dim", "out_hidden_size"], TINY["hidden_size"])
# Positions in pictures: sections of half a head's size, where the default is of larger heads.
_SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}}
_SECTIONED = ("glm46v", "glm4v", "glm_ocr", "glmga", "paddleocr_vl", "qwen2_5_vl", "qwen2_vl")
_LANGUAGE_MODELS = ("text_config", "language_config", "llm_config")


def tiny_model(model_type: str) -> PreTrainedModel:
    """A random model of an architecture; skips the test where none can be built, or none that is small."""
    multimodal = model_type in MULTIMODAL
    of = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
    try:
        fields = TINY | _OWN.get(model_type, {})
        if multimodal:
            fields = _shrunk(AutoConfig.for_model(model_type).to_dict()) | {"model_type": None}
        if model_type in _SECTIONED:
            fields["text_config"] |= _SECTIONS
        config = AutoConfig.for_model(
            model_type, **{name: value for name, value in fields.items() if value is not None}
        )
        with torch.device("meta"):
            weights = sum(each.numel() for each in of.from_config(config).parameters())
        if weights > _MOST_WEIGHTS:
            pytest.skip(f"{model_type}: {weights} weights")
        model = randomize(of.from_config(config, dtype=torch.float32).eval(), 0)
        model(input_ids=TOKENS, use_cache=False)
    except Exception as cause:  # each architecture has its own
        pytest.skip(f"{model_type}: {str(cause).splitlines()[:1]}")
    return model


def _shrunk(fields: dict[str, Any], tiny: dict[str, Any] = TINY) -> dict[str, Any]:
    """The fields of a multimodal model's configuration, with those of its parts as small as ``tiny`` says."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, dict) and name.endswith("_config"):
            found[name] = _shrunk(value, TINY if name in _LANGUAGE_MODELS else _TOWER)
        elif name != "layer_types":
            found[name] = tiny[name] if value is not None and name in tiny else value
    return found


def write_tiny(folder: Path, model_type: str, of: type = AutoModelForCausalLM, **fields: object) -> Path:
    """Save a tiny model of an architecture, of transformers' class for some task."""
    config = AutoConfig.for_model(model_type, **(TINY | fields))
    of.from_config(config).save_pretrained(folder)
    return folder
