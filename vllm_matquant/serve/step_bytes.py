"""Bytes of weights that a decoding step reads."""

from __future__ import annotations

from torch.nn import Module
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, ReplicatedLinear
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from vllm_matquant.serve.linear import MatquantLinearMethod, resident_bytes


def step_bytes(model: Module) -> int:
    """Bytes of weights that this rank reads for a token: those of linear layers and of the output head, and of experts
    the share that a token is routed to. Of an embedding that is no head a step reads a row or a few. For a server of
    one slice (usable with ``LLM.apply_model``)."""
    head = getattr(model, "lm_head", None)
    return sum(
        _weight_bytes(module)
        for module in model.modules()
        if isinstance(module, (LinearBase, RoutedExperts))
        or (isinstance(module, VocabParallelEmbedding) and module is head)
    )


def _weight_bytes(layer: Module) -> int:
    method = layer.quant_method
    if isinstance(method, MatquantLinearMethod):
        return method.resident_bytes()
    # Not those of a tensor: vLLM packs the weight in a form of its own, and may leave an empty one.
    if isinstance(layer, VocabParallelEmbedding):
        return layer.num_embeddings_per_partition * layer.embedding_dim * layer.params_dtype.itemsize
    if isinstance(layer, RoutedExperts):
        weights = 3 * layer.hidden_size * layer.intermediate_size_per_partition * layer.local_num_experts
        whole = resident_bytes(layer) or weights * layer.params_dtype.itemsize
        return whole * layer.top_k // layer.global_num_experts
    assert isinstance(layer, LinearBase)
    rows, columns = (
        (layer.output_size, layer.input_size)
        if isinstance(layer, ReplicatedLinear)
        else (layer.output_size_per_partition, layer.input_size_per_partition)
    )
    return rows * columns * layer.params_dtype.itemsize
