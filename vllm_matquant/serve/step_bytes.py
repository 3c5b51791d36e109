"""Bytes of weights that a decoding step reads."""

from __future__ import annotations

from torch.nn import Module
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from vllm_matquant.serve.linear import MatquantLinearMethod


def step_bytes(model: Module) -> int:
    """Bytes of weights that this rank reads for a token: those of linear layers and of the output head. Of an embedding
    that is no head a step reads a row or a few. For a server of one slice (usable with ``LLM.apply_model``)."""
    head = getattr(model, "lm_head", None)
    return sum(
        _weight_bytes(module)
        for module in model.modules()
        if isinstance(module, LinearBase) or (isinstance(module, VocabParallelEmbedding) and module is head)
    )


def _weight_bytes(layer: Module) -> int:
    method = layer.quant_method
    if isinstance(method, MatquantLinearMethod):
        return method.resident_bytes()
    # Not those of a tensor: vLLM packs the weight in a form of its own, and may leave an empty one.
    if isinstance(layer, VocabParallelEmbedding):
        return layer.num_embeddings_per_partition * layer.embedding_dim * layer.params_dtype.itemsize
    assert isinstance(layer, LinearBase)
    return layer.output_size_per_partition * layer.input_size_per_partition * layer.params_dtype.itemsize
