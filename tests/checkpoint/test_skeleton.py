"""The names and shapes that a config.json implies are those of the real model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from vllm_matquant.checkpoint.errors import ConfigError
from vllm_matquant.checkpoint.skeleton import build_skeleton
from vllm_matquant.checkpoint.spec import Format

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 40,
    "pad_token_id": 0,
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"])
def test_skeleton_is_the_model_without_weights(model_type: str, tied: bool) -> None:
    config = {"model_type": model_type, "tie_word_embeddings": tied, "quantization_config": {"any": 1}, **SIZES}
    skeleton = build_skeleton(config)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, tie_word_embeddings=tied, **SIZES))
    assert skeleton.parameters == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert skeleton.tied == ({"lm_head.weight": "model.embed_tokens.weight"} if tied else {})
    assert skeleton.embeddings == {"model.embed_tokens": (40, 32)}
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert list(skeleton.linears) == linears
    assert len(linears) == 2 * 7 + 1
    assert skeleton.linears["model.layers.0.mlp.down_proj"] == (32, 48)
    assert skeleton.quantized_layers(Format()).keys() == set(linears) - {"lm_head"}


def test_embeddings_are_quantized_where_the_format_says_so() -> None:
    embeddings = ("model.embed_tokens",)
    config = {"model_type": "llama", **SIZES}
    tied, untied = (build_skeleton(config | {"tie_word_embeddings": tied}) for tied in (True, False))
    blocks = tied.quantized_layers(Format()).keys()
    assert untied.quantized_layers(Format(ignored_layers=())).keys() == blocks | {"lm_head"}
    assert untied.quantized_layers(Format(quantized_embeddings=embeddings)).keys() == blocks | {*embeddings}
    both = Format(ignored_layers=(), quantized_embeddings=embeddings)
    assert list(untied.quantized_layers(both)) == [*embeddings, *blocks, "lm_head"]
    assert list(tied.quantized_layers(both)) == [*embeddings, *blocks]
    assert tied.quantized_layers(both)["model.embed_tokens"] == (40, 32)
    for contradiction in (Format(ignored_layers=()), Format(quantized_embeddings=embeddings)):
        with pytest.raises(ConfigError, match=r"^there: .*shares its weight, not, expected both quantized or neither"):
            tied.quantized_layers(contradiction, "there")
    with pytest.raises(ConfigError, match=r"found \['lm_head'\], expected no names but \['model.embed_tokens'\]"):
        untied.quantized_layers(Format(quantized_embeddings=("lm_head",)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "model_type: found None"),
        ({"model_type": 3}, "model_type: found 3"),
        ({"model_type": "nonesuch", "auto_map": {"AutoModelForCausalLM": "evil.Model"}}, "never run"),
        ({"model_type": "clip"}, "builds no causal language model"),
        ({"model_type": "llama", "hidden_size": "wide"}, "builds no causal language model"),
        ({"model_type": "llama", "hidden_size": 2**62}, "builds no causal language model"),
    ],
)
def test_no_skeleton(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^some file: .*{message}"):
        build_skeleton(config, "some file")


def test_code_beside_a_known_architecture_is_ignored() -> None:
    config = {"model_type": "llama", "auto_map": {"AutoModelForCausalLM": "evil.Model"}, **SIZES}
    assert build_skeleton(config).linears.keys() >= {"lm_head"}
