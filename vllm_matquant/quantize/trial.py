"""A trial of a model's forward without its weights: whether its blocks can be run one after the other.

Blocks are run each over all windows of a text before the next one begins. That is right for a model which hands to a
block nothing but the hidden state that the block before has made, and what is the same for all texts, such as masks
and positions. Models whose blocks share keys and values, or are given more of each token than its hidden state, would
be quantized and measured on what they never see.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.func import functional_call
from transformers import PreTrainedModel

from vllm_matquant.checkpoint.errors import ConfigError

_LENGTH = 4  # tokens of a trial
_PLAIN = (bool, int, float, str, torch.dtype, type(None))


class _UnfitError(Exception):
    """Says what keeps the blocks of a model from being run one after the other."""


def try_blocks(model: PreTrainedModel, where: Path | str) -> bool:
    """Try whether the blocks of a model can be run one after the other, each over all windows of a text.

    Args:
        model: a causal language model with its parameters on the meta device; it is not changed.
        where: its config.json, to name in an error.

    Raises:
        ConfigError: they cannot, or transformers' code fails with these values.

    Returns:
        Whether a block gives its hidden state as the first of a tuple.
    """
    kind = getattr(model.config, "model_type", type(model).__name__)
    try:
        with torch.no_grad():
            return _try(model)
    except _UnfitError as cause:
        reason = str(cause)
    # Each architecture fails in its own way, so there is no narrower class to catch.
    except Exception as cause:
        told = (str(cause) or type(cause).__name__).split("\n")[0][:200]
        reason = f"for which transformers' own code fails with the values of this file ({told})"
    expected = (
        "an architecture whose blocks are given hidden states and what is the same for all texts, such as masks and "
        "positions: quantizing runs one block after the other, each over all windows"
    )
    raise ConfigError(where, "model_type", f"{kind!r}, {reason}", expected)


def record_arguments(
    blocks: torch.nn.ModuleList, give: Callable[[int, torch.Tensor], Any]
) -> list[tuple[int, torch.Tensor, dict[str, Any]]]:
    """Put something else in the place of blocks' forwards, which notes what they are called with.

    Args:
        blocks: of a copy of the model, whose forwards may be replaced.
        give: makes of a block's index and the hidden state that it is given what the block returns.

    Returns:
        A list that will hold for each call of a block its index, the hidden state, and the other arguments by name.
    """
    calls: list[tuple[int, torch.Tensor, dict[str, Any]]] = []

    def replace(index: int, block: torch.nn.Module) -> None:
        names = list(inspect.signature(block.forward).parameters)

        def forward(*positional: Any, **keywords: Any) -> Any:
            arguments = dict(zip(names, positional, strict=False)) | keywords
            hidden = arguments.pop(names[0])
            calls.append((index, hidden, arguments))
            return give(index, hidden)

        block.forward = forward

    for index, block in enumerate(blocks):
        replace(index, block)
    return calls


def _try(model: PreTrainedModel) -> bool:
    originals = getattr(model.get_decoder(), "layers", None)
    if not isinstance(originals, torch.nn.ModuleList) or not originals:
        raise _UnfitError("whose blocks are in no list named layers")
    trunk = copy.deepcopy(model.get_decoder())
    words = trunk.get_input_embeddings()
    if not isinstance(words, torch.nn.Embedding):
        raise _UnfitError("whose input embedding is no table")
    tokens = torch.arange(2 * _LENGTH).view(2, _LENGTH) % words.num_embeddings
    _fill(trunk, words, tokens)
    makes = [_make_of(block) for block in originals]
    forms: dict[object, bool] = {}  # whether a block of a make returns a tuple
    made: dict[int, torch.Tensor] = {}

    def give(index: int, hidden: torch.Tensor) -> Any:
        _, _, arguments = calls[-1]
        _check_kinds(arguments)
        make = makes[index]
        if make not in forms:
            forms[make] = _returns_tuple(originals[index], hidden, arguments)
        # For every text the same, so that what differs between texts does not come from here.
        made[index] = _waves(len(originals), *hidden.shape)[index]
        return (made[index],) if forms[make] else made[index]

    calls = record_arguments(trunk.layers, give)
    found, ends = [], []
    for sequence in tokens:
        calls.clear()
        ends.append(trunk(input_ids=sequence[None], use_cache=False).last_hidden_state)
        found.append(list(calls))
    for each in found:
        if [index for index, _, _ in each] != list(range(len(originals))):
            raise _UnfitError("whose blocks are not called once each, in their order")
        if not all(_same(hidden, made[index - 1]) for index, hidden, _ in each[1:]):
            raise _UnfitError("which changes hidden states between one block and the next")
    for (_, _, one), (_, _, other) in zip(*found, strict=True):
        different = [name for name in one if not _same(one[name], other.get(name))]
        if different:
            raise _UnfitError(f"whose blocks are given {' and '.join(different)} of each text beside hidden states")
    # What comes after the last block is later run without those before it.
    ends.append(trunk(inputs_embeds=made[len(originals) - 1], use_cache=False).last_hidden_state)
    if not all(_same(end, ends[0]) for end in ends):
        raise _UnfitError("whose output depends on more than its last block's")
    if len(set(forms.values())) > 1:
        raise _UnfitError("whose blocks return tensors and tuples")
    return forms[makes[0]]


def _make_of(block: torch.nn.Module) -> object:
    """What blocks of the same code and shapes have in common."""
    return type(block), tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())


def _fill(trunk: PreTrainedModel, words: torch.nn.Embedding, tokens: torch.Tensor) -> None:
    """Give all but the blocks of a trunk values, which take next to no memory."""
    blocks, trunk.layers = trunk.layers, torch.nn.ModuleList()
    trunk.load_state_dict(_stand_ins(trunk.state_dict()), assign=True)
    trunk.layers = blocks
    table = torch.empty(words.weight.shape)  # rows that are never touched take no memory
    table[tokens] = _waves(*tokens.shape, table.shape[1])
    words.weight = torch.nn.Parameter(table, requires_grad=False)


def _stand_ins(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Values for parameters: one row for all rows of each."""
    return {
        name: (1 + _waves(*tensor.shape[-1:]) / 2).expand(tensor.shape) if tensor.is_meta else tensor
        for name, tensor in state.items()
    }


def _waves(*shape: int) -> torch.Tensor:
    """Values of which no two are the same, without a random generator to change."""
    return torch.arange(1.0, torch.Size(shape).numel() + 1).sin().view(shape)


def _returns_tuple(block: torch.nn.Module, hidden: torch.Tensor, arguments: dict[str, Any]) -> bool:
    """Whether a block returns a tuple; it is run on values that stand in for its parameters."""
    parameters = _stand_ins(block.state_dict())
    output = functional_call(block, parameters, (hidden,), arguments)
    try:
        functional_call(block, parameters, (hidden.expand(2, -1, -1),), arguments)
    except Exception as cause:
        raise _UnfitError("whose blocks do not run several texts with what they are given for one") from cause
    return isinstance(output, tuple)


def _check_kinds(arguments: Mapping[str, Any]) -> None:
    for name, value in arguments.items():
        for each in value if isinstance(value, (tuple, list)) else [value]:
            if not isinstance(each, (*_PLAIN, torch.Tensor)):
                raise _UnfitError(f"whose blocks share {name} ({type(each).__name__}) with each other")


def _same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, (tuple, list)):
        return isinstance(other, (tuple, list)) and len(one) == len(other) and all(map(_same, one, other))
    return one == other
