"""Random models that every test of a whole model starts from."""

from __future__ import annotations

from typing import TypeVar

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

M = TypeVar("M", bound=torch.nn.Module)


def randomized(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """A causal language model in float32 whose every parameter, biases and norms too, is random."""
    return randomize(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval(), seed)


def randomize(model: M, seed: int) -> M:
    """Give every parameter of a model, biases and norms too, random values."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.1 * noise if "norm" in name else 0.1 * noise
    return model
