"""The method of embeddings and output heads: the weight of a linear layer, whose rows can also be looked up."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch.nn import Module
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from vllm_matquant.checkpoint.errors import ConfigError
from vllm_matquant.serve.linear import HANDLE, MatquantLinearMethod


class MatquantEmbeddingMethod(MatquantLinearMethod):
    """Loads, packs and applies one embedding or output head; the rows that vLLM pads its part with are zero."""

    def embedding(self, layer: VocabParallelEmbedding, input_: torch.Tensor) -> torch.Tensor:
        """The rows ``input_`` (int64 [...], counted on this rank): [..., hidden size] of the layer's dtype."""
        return self.kernel.embedding(input_, getattr(layer, HANDLE), self.stored.cut.in_features, layer.params_dtype)

    def tie_weights(self, layer: Module, embed_tokens: VocabParallelEmbedding) -> VocabParallelEmbedding:
        """What takes the place of the output head ``layer``: the embedding itself, whose planes are resident once."""
        return embed_tokens


def check_embeddings(model: Module, quantized: Collection[str]) -> None:
    """Refuse a model of which vLLM does not let this plugin serve a quantized embedding: some classes do not ask.

    Args:
        model: vLLM's model, before its weights are loaded.
        quantized: names of the checkpoint's quantized layers.

    Raises:
        ConfigError: an embedding or output head of these expects a weight that is not quantized.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, VocabParallelEmbedding) or name not in quantized:
            continue
        if not isinstance(layer.quant_method, MatquantEmbeddingMethod):
            raise ConfigError(
                name,
                "quantized embedding",
                f"vLLM's {type(model).__name__}, which keeps it unquantized",
                "a model class that hands its quantization config to the layer",
                "Quantize the model without its embeddings.",
            )
