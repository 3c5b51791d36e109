"""Checkpoints in transformers: importing this lets ``from_pretrained`` load one, at a width, for the kernels.

transformers has no entry points for quantization methods: whoever loads a checkpoint imports this first.
"""

from vllm_matquant.transformers.quantizer import MatquantConfig, MatquantQuantizer

__all__ = ["MatquantConfig", "MatquantQuantizer"]
