"""Embeddings and output heads as vLLM's own layers: whole, padded, and cut among ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from tests.checkpoint.samples import decoder_bytes, decoder_names
from tests.serve.tiny_models import EMBEDDINGS, quantize, served_at
from vllm_matquant.checkpoint.decoder import AFFINE_INT8, CODEBOOK, KINDS, DecoderKind
from vllm_matquant.checkpoint.errors import ConfigError, MissingTensorError
from vllm_matquant.checkpoint.names import plane_name
from vllm_matquant.checkpoint.packing import pack_codes, slice_codes
from vllm_matquant.checkpoint.spec import Format
from vllm_matquant.serve.config import MatquantConfig
from vllm_matquant.serve.embedding import check_embeddings
from vllm_matquant.serve.linear import predicted_bytes, resident_bytes

COLUMNS = 96
EVERY_KIND = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
# Tokens and ranks; vLLM pads the tokens to a multiple of 64, and the last of four ranks has padding only.
CUTS = [(128, 1), (100, 1), (100, 2), (40, 4)]


class Source:
    """A random embedding: its tensors on disk, and its weights at each width."""

    def __init__(self, tokens: int, checkpoint_format: Format, seed: int = 0) -> None:
        weight = torch.randn(tokens, COLUMNS, generator=torch.Generator().manual_seed(seed))
        group_size = checkpoint_format.group_size_of(COLUMNS, "embedding")
        self.format, self.tokens = checkpoint_format, tokens
        self.codes, self.decoders = quantize(weight, group_size, checkpoint_format)

    def weight(self, width: int) -> torch.Tensor:
        return self.decoders[width].decode(slice_codes(self.codes, 8, width, self.format.slicing))

    def new_layer(
        self, width: int, *, rank: int = 0, ranks: int = 1, head: bool = False, dtype: torch.dtype = torch.float32
    ) -> torch.nn.Module:
        """The layer of one rank, before its weights are loaded."""
        config = MatquantConfig(self.format)
        config.served = served_at(width)
        with set_current_vllm_config(VllmConfig()):
            if head:
                return ParallelLMHead(self.tokens, COLUMNS, params_dtype=dtype, quant_config=config, prefix="lm_head")
            group: Any = SimpleNamespace(rank_in_group=rank, world_size=ranks, all_reduce=lambda partial: partial)
            return VocabParallelEmbedding(
                self.tokens,
                COLUMNS,
                dtype,
                quant_config=config,
                prefix="model.embed_tokens",
                parallel_group=group,
            )

    def load(self, layer: torch.nn.Module, without: str = "") -> torch.nn.Module:
        base, planes = pack_codes(self.codes)
        tensors = {"weight_base": base} | {plane_name(3 + index): plane for index, plane in enumerate(planes)}
        for decoder in self.decoders.values():
            tensors |= {name.removeprefix("."): tensor for name, tensor in decoder.named("").items()}
        for name, param in list(layer.named_parameters()):
            if name != without:
                param.weight_loader(param, tensors[name])
        layer.quant_method.process_weights_after_loading(layer)
        return layer


@pytest.fixture(autouse=True)
def _single_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (
        "vllm.model_executor.parameter",
        "vllm.model_executor.layers.vocab_parallel_embedding",
        "vllm_matquant.serve.linear",
    ):
        monkeypatch.setattr(f"{module}.get_tensor_model_parallel_rank", lambda: 0)
        monkeypatch.setattr(f"{module}.get_tensor_model_parallel_world_size", lambda: 1)


@pytest.mark.parametrize(
    ("kind", "slicing"),
    [(AFFINE_INT8, "truncate"), (AFFINE_INT8, "round"), (CODEBOOK, "truncate")],
    ids=lambda value: getattr(value, "name", value),
)
@pytest.mark.parametrize("width", range(2, 9))
def test_lookup_and_logits_at_every_width(width: int, slicing: Any, kind: DecoderKind) -> None:
    source = Source(100, Format(slicing=slicing, decoder_kind=kind, **EMBEDDINGS), seed=width)
    ids, x = torch.tensor([[0, 99], [16, 15]]), torch.randn(3, COLUMNS)
    embedding, head = (source.load(source.new_layer(width, head=head)) for head in (False, True))
    torch.testing.assert_close(embedding(ids), source.weight(width)[ids])
    for layer in (embedding, head):
        logits = layer.quant_method.apply(layer, x)
        assert logits.shape == (3, 128)
        torch.testing.assert_close(logits[:, :100], x @ source.weight(width).T, rtol=1e-4, atol=1e-4)
        assert not logits[:, 100:].any()


@pytest.mark.parametrize(("tokens", "ranks"), CUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@EVERY_KIND
def test_ranks_make_the_whole_together(tokens: int, ranks: int, dtype: torch.dtype, kind: DecoderKind) -> None:
    source = Source(tokens, Format(group_size=32, decoder_kind=kind, **EMBEDDINGS))
    layers = [source.load(source.new_layer(3, rank=rank, ranks=ranks, dtype=dtype)) for rank in range(ranks)]
    ids, x = torch.arange(tokens), torch.randn(2, COLUMNS)
    looked_up = torch.stack([layer(ids) for layer in layers]).sum(0)
    assert looked_up.dtype == dtype
    assert torch.equal(looked_up, source.weight(3).to(dtype))
    logits = torch.cat([layer.quant_method.apply(layer, x) for layer in layers], dim=1)[:, :tokens]
    torch.testing.assert_close(logits, x @ source.weight(3).T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("tokens", "ranks"), CUTS)
@pytest.mark.parametrize("width", [2, 5, 8])
@EVERY_KIND
def test_resident_bytes_are_those_of_the_padded_tokens(width: int, tokens: int, ranks: int, kind: DecoderKind) -> None:
    source = Source(tokens, Format(group_size=32, decoder_kind=kind, **EMBEDDINGS))
    layer = source.load(source.new_layer(width, ranks=ranks))
    rows = -(-tokens // 64) * 64 // ranks
    by_hand = rows * 96 * width // 8 + decoder_bytes(kind.form(width), rows, 3)
    assert resident_bytes(layer) == predicted_bytes(layer) == by_hand
    assert not list(layer.named_parameters())


def test_a_tied_head_is_the_embedding_itself() -> None:
    source = Source(100, Format(**EMBEDDINGS))
    model = torch.nn.Module()
    model.embed_tokens = source.new_layer(4)
    model.lm_head = source.new_layer(4, head=True).tie_weights(model.embed_tokens)
    source.load(model.embed_tokens)
    assert model.lm_head is model.embed_tokens
    assert resident_bytes(model) == resident_bytes(model.embed_tokens)


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for kind in KINDS.values()
        for name in ("weight_base", "weight_plane3", *sorted(decoder_names(kind, 3)))
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_tensor_that_did_not_come_is_named(name: str, head: bool, kind: DecoderKind) -> None:
    source = Source(100, Format(decoder_kind=kind, **EMBEDDINGS))
    with pytest.raises(MissingTensorError, match=f"{'lm_head' if head else 'model.embed_tokens'}: {name}: found"):
        source.load(source.new_layer(3, head=head), without=name)


def test_models_that_keep_a_quantized_embedding_unquantized_are_refused() -> None:
    source = Source(100, Format(**EMBEDDINGS))
    model = torch.nn.Module()
    model.quantized = source.new_layer(4)
    model.unquantized = VocabParallelEmbedding(100, COLUMNS)
    check_embeddings(model, {"quantized"})
    with pytest.raises(ConfigError, match="unquantized: quantized embedding: found vLLM's Module"):
        check_embeddings(model, {"quantized", "unquantized"})
