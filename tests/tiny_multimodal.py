"""Tiny random models that are given pictures too, as they lie on a hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel, PreTrainedTokenizerFast
from transformers.core_model_loading import revert_weight_conversion

from tests.quantize.tiny_sources import VOCABULARY, byte_tokenizer
from tests.random_models import randomize

IMAGE, BEGIN, END, VIDEO = range(VOCABULARY, VOCABULARY + 4)  # tokens that stand for pictures
SPECIAL = ("<image>", "<begin>", "<end>", "<video>")
_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY + 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2},
}
_TOWER: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
_QWEN_TOWER: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "depth": 2, "num_heads": 2}
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]}
_QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": BEGIN,
    "vision_end_token_id": END,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llava": {
        "text_config": {"model_type": "llama", **_TEXT},
        "vision_config": {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14, **_TOWER},
        "image_token_index": IMAGE,
        "image_seq_length": 4,
    },
    "gemma3": {
        "text_config": {
            **{"model_type": "gemma3_text", **_TEXT, "tie_word_embeddings": True, "query_pre_attn_scalar": 32},
            **{"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        },
        "vision_config": {"model_type": "siglip_vision_model", "image_size": 56, "patch_size": 14, **_TOWER},
        "mm_tokens_per_image": 4,
        **{"image_token_index": IMAGE, "boi_token_index": BEGIN, "eoi_token_index": END},
    },
    "qwen2_5_vl": {
        "text_config": {
            **{**_TEXT, "rope_parameters": _ROPE},
            **{"head_dim": None, "num_attention_heads": 2, "num_key_value_heads": 1},
        },
        "vision_config": {
            **{**_QWEN_TOWER, "out_hidden_size": 64, "patch_size": 14},
            **{"fullatt_block_indexes": [1], "window_size": 56},
        },
        "tie_word_embeddings": False,
        **_QWEN_TOKENS,
    },
    "qwen3_vl": {
        "text_config": {**_TEXT, "rope_parameters": {**_ROPE, "mrope_interleaved": True}},
        "vision_config": {
            **{**_QWEN_TOWER, "out_hidden_size": 64, "patch_size": 16},
            **{"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        },
        "tie_word_embeddings": False,
        **_QWEN_TOKENS,
    },
}


_MEANS = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
_QWEN_PICTURES = {"merge_size": 2, "size": {"longest_edge": 16384, "shortest_edge": 3136}, "temporal_patch_size": 2}
_VIDEO = {"merge_size": 2, "size": {"longest_edge": 602112, "shortest_edge": 100352}, "temporal_patch_size": 2}
# What transformers makes of a picture, as it writes it: it can write none of these where it has no torchvision.
PROCESSORS: dict[str, dict[str, Any]] = {
    "llava": {
        "processor_class": "LlavaProcessor",
        "image_processor": {
            **{"image_processor_type": "CLIPImageProcessor", **_MEANS, "size": {"shortest_edge": 28}},
            "crop_size": {"height": 28, "width": 28},
        },
        **{"patch_size": 14, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"},
    },
    "gemma3": {
        "processor_class": "Gemma3Processor",
        "image_processor": {
            **{"image_processor_type": "Gemma3ImageProcessor", **_MEANS, "size": {"height": 56, "width": 56}},
        },
        "image_seq_length": 4,
    },
    "qwen2_5_vl": {
        "processor_class": "Qwen2_5_VLProcessor",
        "image_processor": {
            **{"image_processor_type": "Qwen2VLImageProcessor", **_MEANS, **_QWEN_PICTURES, "patch_size": 14},
        },
        "video_processor": {"video_processor_type": "Qwen2VLVideoProcessor", **_VIDEO, "patch_size": 14},
    },
    "qwen3_vl": {
        "processor_class": "Qwen3VLProcessor",
        "image_processor": {
            **{"image_processor_type": "Qwen2VLImageProcessor", **_MEANS, **_QWEN_PICTURES, "patch_size": 16},
        },
        "video_processor": {"video_processor_type": "Qwen3VLVideoProcessor", **_VIDEO, "patch_size": 16},
    },
}
# Of pictures that these processors do not resize: height and width.
PICTURES = {"llava": (28, 28), "gemma3": (56, 56), "qwen2_5_vl": (56, 84), "qwen3_vl": (64, 96)}


def random_model(model_type: str, seed: int = 0) -> PreTrainedModel:
    """transformers' model of an architecture, tower and projector too, whose every parameter is random."""
    config = AutoConfig.for_model(model_type, **CONFIGS[model_type])
    return randomize(AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval(), seed)


def stored(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The tensors of a model by the names that they have in the files of its kind on a hub."""
    tied = {"language_model.lm_head.weight", "lm_head.weight"} if model.config.tie_word_embeddings else set()
    tensors = revert_weight_conversion(model, model.state_dict())
    return {
        # What transformers does not write of a model that it has not loaded.
        name.replace("vision_tower.", "vision_tower.vision_model."): tensor.contiguous()
        for name, tensor in tensors.items()
        if name not in tied
    }


def write_multimodal(folder: Path, model_type: str, seed: int = 0) -> Path:
    """Save a random model, its tokenizer and its processor of pictures."""
    model = random_model(model_type, seed)
    folder.mkdir()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    save_file(stored(model), folder / "model.safetensors", {"format": "pt"})
    (folder / "processor_config.json").write_text(json.dumps(PROCESSORS[model_type]))
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Save a tokenizer with tokens for pictures."""
    backend = byte_tokenizer().backend_tokenizer
    backend.add_tokens(["\n" * count for count in range(1, 5)])  # which vLLM looks for in Gemma's
    backend.add_tokens([f"<extra{number}>" for number in range(backend.get_vocab_size(), VOCABULARY)])
    names = ("image_token", "boi_token", "eoi_token", "video_token")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
        extra_special_tokens=dict(zip(names, SPECIAL, strict=True)),
    )
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL)) == [IMAGE, BEGIN, END, VIDEO]
    tokenizer.save_pretrained(folder)
