"""The model that is trained, against transformers' with the weights of a slice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from tests.quantize.tiny_sources import ARCHITECTURES, VOCABULARY, write_source
from tests.train.conftest import make_parent
from vllm_matquant.checkpoint.reader import open_checkpoint
from vllm_matquant.quantize.terms import SOURCE, parse_terms
from vllm_matquant.train.model import NestedModel, load_model
from vllm_matquant.train.objective import add_gradients

TOKENS = torch.randint(VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))


def opened(source: Path, parent: Path, trained: tuple[int, ...] = (2, 4, 8), **options: Any) -> NestedModel:
    return load_model(source, open_checkpoint(parent), trained, (2, 3, 4, 8), torch.float32, **options)


@torch.no_grad()
def assert_slices(model: NestedModel, source: Path, parent: Path) -> None:
    """At every width the logits are those of the source with the slice's weights."""
    plain, checkpoint = (
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval(),
        open_checkpoint(parent),
    )
    torch.testing.assert_close(model.logits(TOKENS, SOURCE), plain(TOKENS).logits)
    for width in checkpoint.format.widths:
        weights = {f"{layer}.weight": weight for layer, weight in checkpoint.weights(checkpoint.slice(width))}
        expected = functional_call(plain, weights, (TOKENS,)).logits
        torch.testing.assert_close(model.logits(TOKENS, width), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_architecture_at_every_width(model_type: str, tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", model_type)
    parent = make_parent(source, tmp_path / "parent", "--bits", "2,4,8", "--group-size", "32")
    model = load_model(source, open_checkpoint(parent), (2,), (2, 4, 8), torch.float32)
    assert_slices(model, source, parent)
    add_gradients(model, parse_terms("2"), (1,), TOKENS)
    assert all(parameter.grad.abs().max() > 0 for _, parameter in model.parameters())


@pytest.mark.parametrize("model_type", ["llama", "gemma"])  # the latter multiplies what its embedding gives
@pytest.mark.parametrize("tied", [False, True])
def test_quantized_embeddings_are_the_slices_own_and_stay(model_type: str, tied: bool, tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", model_type, tie_word_embeddings=tied)
    parent = make_parent(source, tmp_path / "parent", "--bits", "2,3,4,8", "--quantize-embeddings")
    model = opened(source, parent)
    assert_slices(model, source, parent)
    trained = {name.partition(".shift")[0] for name, _ in model.parameters() if name.endswith(".shift")}
    assert set(model.layers) - trained == {"model.embed_tokens"} | (set() if tied else {"lm_head"})


def test_layers_of_other_widths_and_group_sizes(source: Path, tmp_path: Path) -> None:
    rules = ("--bits-for", "down_proj=4", "--bits-for", "o_proj=8", "--group-size-for", "v_proj=channel")
    rules += ("--group-size-for", "[qk]_proj=channel", "--ignore", "up_proj|gate_proj")
    parent = make_parent(source, tmp_path, "--bits", "2,3,4,8", *rules)
    model = opened(source, parent, (2, 8))
    assert_slices(model, source, parent)
    names = {name.removeprefix("model.layers.0.") for name, _ in model.parameters() if ".0." in name}
    assert {"mlp.down_proj.changes.4", "self_attn.o_proj.changes.8", "self_attn.v_proj.changes.2"} <= names
    assert not {"mlp.up_proj.shift", "mlp.down_proj.changes.8", "self_attn.o_proj.changes.2"} & names
    assert model.layers["model.layers.0.self_attn.v_proj"].changes["2"].shape == (32, 1, 2)


def test_nothing_else_is_trained(source: Path, parent: Path) -> None:
    model = opened(source, parent, (2,))
    add_gradients(model, parse_terms("2"), (1,), TOKENS)
    wanted = {name for name, _ in model.parameters()}
    assert all(name.endswith((".shift", ".changes.2")) for name in wanted)
    assert len(wanted) == 2 * len(model.layers)
    assert sum(parameter.requires_grad for parameter in model.model.parameters()) == len(wanted)
    assert model.weights == sum(rows * columns for rows, columns in open_checkpoint(parent).layers.values())


def test_derivatives_are_those_of_the_model(source: Path, parent: Path) -> None:
    """Of a whole model, by torch's own functions of the decoded weights."""
    model, checkpoint = opened(source, parent, (2,)), open_checkpoint(parent)
    terms = parse_terms("2")
    [found] = add_gradients(model, terms, (1,), TOKENS).values()
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = plain(TOKENS).logits[:, :-1].log_softmax(-1)
    weights = {f"{layer}.weight": weight.requires_grad_() for layer, weight in checkpoint.weights(checkpoint.slice(2))}
    logs = functional_call(plain, weights, (TOKENS,)).logits[:, :-1].log_softmax(-1)
    loss = (wanted.exp() * (wanted - logs)).sum(-1).mean()
    torch.testing.assert_close(found, loss, rtol=1e-3, atol=1e-6)
    for layer, gradient in zip(model.layers, torch.autograd.grad(loss, list(weights.values())), strict=True):
        scale = checkpoint.decoder(layer, 2).affine.scale.repeat_interleave(32, 1)
        expected = gradient * scale / 64
        assert float(expected.abs().max()) > 0
        torch.testing.assert_close(
            model.layers[layer].shift.grad, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())
        )


def test_blocks_that_run_once_more_give_the_same_derivatives(source: Path, parent: Path) -> None:
    kept, again = opened(source, parent), opened(source, parent)
    again.keep_no_activations()
    terms, runs = parse_terms("8,4,2,8->2"), []
    block = again.model.model.layers[0].mlp
    block.register_forward_pre_hook(lambda *_: runs.append(again._switch.width))
    for model in (kept, again):
        add_gradients(model, terms, (1, 1, 1, 1), TOKENS)
    assert runs == [SOURCE, 8, 8, 4, 4, 2, 2]
    for (name, one), (_, other) in zip(kept.parameters(), again.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name
    assert not any(module.training for module in again.model.model.layers[0].children())
