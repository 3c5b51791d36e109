"""Tiny random source models with a tokenizer, as they lie on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast

from tests.random_models import randomized
from vllm_matquant.quantize.source import Source

ONE_WIDTH = ("gptq", "gptvq", "omniquant")  # methods that make no parent of several widths
VOCABULARY = 320
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
# Windows shorter than the sequences of the tests, so that blocks of both kinds are told apart.
_WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, **_WINDOW},
    "qwen3": {"tie_word_embeddings": True},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 16, **_WINDOW},
    "gemma3_text": {"query_pre_attn_scalar": 16, **_WINDOW},
}

_EXPERTS = {
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "n_shared_experts"], 2),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size"], 64),
}
# With latent keys and values, and a first block that is dense.
_LATENT = {
    **{"num_key_value_heads": 4, "head_dim": 8, "q_lora_rank": 16, "kv_lora_rank": 16, "first_k_dense_replace": 1},
    **{"n_group": 1, "topk_group": 1, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
}
MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": _EXPERTS,
    "qwen2_moe": _EXPERTS,
    "mixtral": _EXPERTS,
    "olmoe": _EXPERTS,
    "deepseek_v2": _EXPERTS | _LATENT,
    "deepseek_v3": _EXPERTS | _LATENT,
}


def random_model(model_type: str, seed: int = 0, **overrides: object) -> PreTrainedModel:
    """A causal language model in float32 whose every parameter, biases and norms too, is random."""
    config = AutoConfig.for_model(model_type, **(_SHAPE | (ARCHITECTURES | MIXTURES)[model_type] | overrides))
    return randomized(config, seed)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of bytes and a few pairs of them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>", "<pad>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and the other cat thought that it had"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def write_tokenizer(folder: Path, template: str | None = None) -> None:
    """Save the tokenizer.

    Args:
        template: what it makes of a text, such as ``<s> $A`` to begin texts with ``<s>``; by default it adds nothing.
    """
    tokenizer = byte_tokenizer()
    if template:
        special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>", "<pad>")]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[each for each in special if each[0] in template.split()]
        )
    tokenizer.save_pretrained(folder)


def write_source(
    folder: Path, model_type: str = "llama", seed: int = 0, shard_size: str = "1GB", **overrides: object
) -> Path:
    """Save a random model and its tokenizer."""
    random_model(model_type, seed, **overrides).save_pretrained(folder, max_shard_size=shard_size)
    byte_tokenizer().save_pretrained(folder)
    return folder


def block_layers(source: Source) -> list[str]:
    """Full names of the linear layers inside of transformer blocks, in the model's order."""
    return [name for name, matrix in source.matrices.items() if matrix.block is not None]
