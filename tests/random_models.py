"""Random models that every test of a whole model starts from."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel


def randomized(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """A causal language model in float32 whose every parameter, biases and norms too, is random."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.1 * noise if "norm" in name else 0.1 * noise
    return model
