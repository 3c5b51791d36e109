"""The names and shapes that a config.json implies are those of the real model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from vllm_matquant.checkpoint.errors import ConfigError
from vllm_matquant.checkpoint.skeleton import build_skeleton

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
    assert skeleton.tied == ({"lm_head.weight"} if tied else set())
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert list(skeleton.linears) == linears
    assert len(linears) == 2 * 7 + 1
    assert skeleton.linears["model.layers.0.mlp.down_proj"] == (32, 48)
    assert skeleton.quantized_layers(["lm_head"]).keys() == set(linears) - {"lm_head"}


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
