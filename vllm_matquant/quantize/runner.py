"""Runs a model of transformers with the weights of no more than one transformer block in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from torch.func import functional_call
from transformers import PreTrainedModel

from vllm_matquant.checkpoint.language_model import build_language_model
from vllm_matquant.checkpoint.names import CONFIG_FILE
from vllm_matquant.checkpoint.skeleton import Skeleton
from vllm_matquant.quantize.trial import record_arguments, try_blocks

Rows = Callable[[torch.Tensor], torch.Tensor]
"""Gives the rows of an embedding, float32 [n, columns], for tokens, int64 [n]."""


class Head(Protocol):
    """What the model does after its last block."""

    def __call__(self, hidden: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        """The logits, float32 [sequences, length, vocabulary].

        Args:
            hidden: the last block's outputs, float32 [sequences, length, hidden_size].
            weight: what to use in the place of the output head's own, float32 [vocabulary, hidden_size].
        """


class TransformersRunner:
    """A causal language model of transformers, run part by part.

    Parameters are on the meta device until a part is asked for; code that comes with a checkpoint is never run.

    Args:
        config: the content of config.json.
        skeleton: the model's parameters.
        read: gives a parameter by its name, as it is stored; a tied one by the name that it is tied to.
        where: config.json, to name in an error.

    Attributes:
        block_names: full name of each transformer block, such as "model.layers.3", in order.
        output_head: full name of the layer that gives the logits, None if the model has none that is linear.

    Raises:
        ConfigError: the model's blocks cannot be run one after the other, see :mod:`vllm_matquant.quantize.trial`.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        skeleton: Skeleton,
        read: Callable[[str], torch.Tensor],
        where: Path | str = CONFIG_FILE,
    ) -> None:
        self._skeleton, self._read = skeleton, read
        self._model = _empty_model(config)
        self._returns_tuples = try_blocks(self._model, where)
        self._trunk = self._model.get_decoder()  # all but the output head, as transformers calls it
        names = {module: name for name, module in self._model.named_modules()}
        self._prefix = f"{names[self._trunk]}."
        self.block_names = [f"{self._prefix}layers.{index}" for index in range(len(self._trunk.layers))]
        head = names.get(self._model.get_output_embeddings())
        self.output_head = head if head in skeleton.linears else None

    @property
    def hidden_size(self) -> int:
        """Values in a token's hidden state."""
        return self._trunk.config.hidden_size

    def load_block(self, index: int) -> torch.nn.Module:
        """Transformer block ``index`` with its weights in float32."""
        block = copy.deepcopy(self.empty_block(index))
        block.load_state_dict(self.block_parameters(index), assign=True)
        return block.eval()

    def empty_block(self, index: int) -> torch.nn.Module:
        """Transformer block ``index`` with parameters on the meta device, to be called with others; not to be changed.

        See :func:`call_block`.
        """
        return self._trunk.layers[index]

    def block_parameters(self, index: int, without: Container[str] = ()) -> dict[str, torch.Tensor]:
        """Parameters of transformer block ``index`` in float32, by their names within it.

        Args:
            without: full names of layers whose weights are left out and not read.
        """
        prefix = f"{self.block_names[index]}."
        names = [name for name in self.empty_block(index).state_dict() if not _is_weight_of(prefix + name, without)]
        return {name: self._read(prefix + name).float() for name in names}

    def embed(self, tokens: torch.Tensor, hidden: torch.Tensor, embedding: Rows | None = None) -> list[dict[str, Any]]:
        """What the first transformer block is given.

        Args:
            tokens: int64 [sequences, length].
            hidden: float32 [sequences, length, hidden_size], to be filled.
            embedding: gives what shall stand in the place of the input embedding's own rows.

        Returns:
            For each block the keyword arguments that the model calls it with (attention mask, position embeddings),
            made for one sequence: they broadcast.
        """
        trunk = self._load_trunk(tokens.unique(), embedding)
        calls = record_arguments(trunk.layers, lambda _, given: self._returned(given))
        with torch.no_grad():
            for sequence, filled in zip(tokens, hidden, strict=True):
                calls.clear()
                trunk(input_ids=sequence[None], use_cache=False)
                filled.copy_(calls[0][1][0])
        return [arguments for _, _, arguments in calls]

    def load_final(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """What the model does between its last block and its output head, with weights in float32.

        Returns:
            A function from the last block's outputs, float32 [sequences, length, hidden_size], to the head's inputs,
            float32 [sequences, length, in_features]; where a model scales these, without the constant factor.
        """
        model, last = self._load_last(lambda name: name.startswith(self._prefix))
        trunk = model.get_decoder()

        def final(hidden: torch.Tensor) -> torch.Tensor:
            last.forward = lambda *_, **__: self._returned(hidden)
            return trunk(inputs_embeds=hidden, use_cache=False).last_hidden_state

        return final

    def load_head(self, device: str = "cpu") -> Head:
        """What the model does after its last block, with weights in float32 on ``device``."""
        model, last = self._load_last(lambda name: True, device)

        def head(hidden: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
            last.forward = lambda *_, **__: self._returned(hidden)
            replacing = {} if weight is None else {f"{self.output_head}.weight": weight}
            asked = {"inputs_embeds": hidden, "use_cache": False}
            return functional_call(model, replacing, kwargs=asked).logits

        return head

    def _returned(self, hidden: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor]:
        """A hidden state in the form in which a block returns it."""
        return (hidden,) if self._returns_tuples else hidden

    def _load_last(self, wanted: Callable[[str], bool], device: str = "cpu") -> tuple[PreTrainedModel, torch.nn.Module]:
        """The model with its last block alone, and that block, which has no weights.

        Args:
            wanted: which of the other parameters to load in float32, by their names.
            device: to load them on.
        """
        model = copy.deepcopy(self._model)
        trunk = model.get_decoder()
        last, trunk.layers = trunk.layers[-1], torch.nn.ModuleList()
        # The embedding is not asked, for its outputs are given.
        asked = [name for name in model.state_dict() if name.removesuffix(".weight") not in self._skeleton.embeddings]
        state = {name: self._read(name).to(device).float() for name in asked if wanted(name)}
        model.load_state_dict(state, strict=False, assign=True)
        trunk.layers = torch.nn.ModuleList([last])
        return model.eval(), last

    def _load_trunk(self, tokens: torch.Tensor, embedding: Rows | None) -> PreTrainedModel:
        """The trunk with the parameters of its blocks on the meta device, all others in float32.

        Args:
            tokens: int64 [n], whose rows to load of the input embedding.
            embedding: gives other rows than the source's, see :meth:`embed`.
        """

        def load(name: str) -> torch.Tensor:
            stored = self._read(self._prefix + name)
            if (self._prefix + name).removesuffix(".weight") not in self._skeleton.embeddings:
                return stored.float()
            # Rows that are never touched take no memory: a vocabulary can be larger than many blocks.
            table = torch.empty(stored.shape)
            table[tokens] = embedding(tokens) if embedding else stored[tokens].float()
            return table

        trunk = copy.deepcopy(self._trunk)
        blocks, trunk.layers = trunk.layers, torch.nn.ModuleList()
        trunk.load_state_dict({name: load(name) for name in trunk.state_dict()}, assign=True)
        trunk.layers = blocks
        return trunk


def _empty_model(config: Mapping[str, Any]) -> PreTrainedModel:
    # Parameters stay on the meta device; buffers, such as rotary frequencies, are no part of a checkpoint.
    with init_empty_weights(include_buffers=False):
        return build_language_model(config, dtype=torch.float32).eval()


def _is_weight_of(parameter: str, layers: Container[str]) -> bool:
    return parameter.endswith(".weight") and parameter.removesuffix(".weight") in layers


def run_block(
    block: torch.nn.Module,
    inputs: torch.Tensor,
    outputs: torch.Tensor,
    arguments: dict[str, Any],
    batch_tokens: int,
    replacing: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Run ``block`` batch by batch.

    Args:
        block: a transformer block.
        inputs: float32 [sequences, length, hidden_size].
        outputs: of the same shape, to be filled; may be ``inputs`` itself.
        arguments: what the model calls the block with besides.
        batch_tokens: tokens to run at a time.
        replacing: tensors to use in the place of the block's own, by name.
    """
    sequences = max(1, batch_tokens // inputs.shape[1])
    for batch, filled in zip(inputs.split(sequences), outputs.split(sequences), strict=True):
        filled.copy_(call_block(block, batch, arguments, replacing))


def call_block(
    block: torch.nn.Module,
    hidden: torch.Tensor,
    arguments: dict[str, Any],
    replacing: Mapping[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """The hidden states that ``block`` makes of ``hidden``: all that some architectures return, the first for others.

    Args:
        block: a transformer block.
        hidden: float32 [sequences, length, hidden_size].
        arguments: what the model calls the block with besides.
        replacing: tensors to use in the place of the block's own, by name.
    """
    output = functional_call(block, dict(replacing or {}), (hidden,), arguments)
    return output[0] if isinstance(output, tuple) else output
