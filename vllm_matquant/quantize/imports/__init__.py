"""Checkpoints that another tool has quantized, as parents of nested ones.

Each format has a module of its own (:mod:`~vllm_matquant.quantize.imports.gptq` and its neighbours), which says what
the stored tensors of a layer mean; :mod:`~vllm_matquant.quantize.imports.formats` tells the formats apart.
"""
