"""The method of embeddings and output heads: the weight of a linear layer, whose rows can also be looked up."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch.nn import Module
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from vllm_matquant.checkpoint.errors import ConfigError
from vllm_matquant.serve.elastic.rows import RowSlots
from vllm_matquant.serve.linear import HANDLE, MatquantLinearMethod

TOKENS = "token_slots"  # of the buffer with the slice of each token, beside that of an output head's rows


class MatquantEmbeddingMethod(MatquantLinearMethod):
    """Loads, packs and applies one embedding or output head; the rows that vLLM pads its part with are zero."""

    def embedding(self, layer: VocabParallelEmbedding, input_: torch.Tensor) -> torch.Tensor:
        """The rows ``input_`` (int64 [...], counted on this rank): [..., hidden size] of the layer's dtype."""
        handle, columns = getattr(layer, HANDLE), self.stored.cut.in_features
        if self.rows is None:
            return self.kernel.embedding(input_, handle, columns, layer.params_dtype)
        return self.kernel.embedding_by_row(input_, handle, getattr(layer, TOKENS), columns, layer.params_dtype)

    def process_weights_after_loading(self, layer: Module) -> None:
        super().process_weights_after_loading(layer)
        assert isinstance(layer, VocabParallelEmbedding)
        if self.rows is not None:
            layer.register_buffer(TOKENS, self.rows.tokens, persistent=False)

    @staticmethod
    def slots_of(rows: RowSlots) -> torch.Tensor:
        """The slots of the rows of an output head: an embedding is multiplied as nothing else."""
        return rows.heads

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
