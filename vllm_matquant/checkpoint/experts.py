"""Mixtures of experts with a linear layer for each matrix of an expert, under the names that their files have.

transformers keeps the experts of a block in two parameters, ``gate_up_proj`` [experts, 2 * intermediate, hidden] and
``down_proj`` [experts, hidden, intermediate], and joins them of the files' matrices while it loads a model. Here they
are taken apart again, so that whatever deals with linear layers, their names and their weights deals with experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

M = TypeVar("M", bound=PreTrainedModel)

_JOINED = {"gate_up_proj", "down_proj"}
_MATRIX = re.compile(r"experts\.\*\.(\w+)\.weight")
_FOLDER = re.compile(r"\.(\w+)\.")
_ROUTERS = ("gate", "router")  # modules in which some architectures keep the router's linear layer


@dataclass(frozen=True)
class Routed:
    """Which tokens the rows are that an expert is given.

    Attributes:
        tokens: int64 [rows], places among the tokens that the mixture is given.
        scales: floating point [rows], what the router multiplies the expert's outputs with.
        count: tokens that the mixture is given.
    """

    tokens: torch.Tensor
    scales: torch.Tensor
    count: int


class ExpertLinear(torch.nn.Linear):
    """A matrix of an expert.

    Attributes:
        routed: which tokens its rows are, while it is called by the mixture that it belongs to; None at other times.
    """

    routed: Routed | None = None


def routed_to(layer: torch.nn.Module) -> Routed | None:
    """Which tokens the rows of the call are that ``layer`` is in; None of a layer that is given all tokens."""
    return layer.routed if isinstance(layer, ExpertLinear) else None


class Expert(torch.nn.Module):
    """An expert: ``down(act(gate(x)) * up(x))``.

    Args:
        names: of its gate, up and down projection.
        weights: of these, [intermediate, hidden], [intermediate, hidden] and [hidden, intermediate]; not copied.
        act: its activation.
    """

    def __init__(self, names: tuple[str, str, str], weights: tuple[torch.Tensor, ...], act: Any) -> None:
        super().__init__()
        self._names, self._act = names, act
        for name, weight in zip(names, weights, strict=True):
            linear = ExpertLinear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = torch.nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
            self.add_module(name, linear)

    @property
    def linears(self) -> list[ExpertLinear]:
        """Its gate, up and down projection."""
        return [getattr(self, name) for name in self._names]

    def inner(self, rows: torch.Tensor) -> torch.Tensor:
        """What the down projection is given for rows [rows, hidden]: [rows, intermediate]."""
        gate, up, _ = self.linears
        found: torch.Tensor = self._act(gate(rows)) * up(rows)
        return found

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Its outputs, [rows, hidden], for rows [rows, hidden]."""
        found: torch.Tensor = self.linears[-1](self.inner(rows))
        return found

    @contextmanager
    def told(self, routed: Routed) -> Iterator[None]:
        """Within, its layers know which tokens their rows are."""
        for linear in self.linears:
            linear.routed = routed
        try:
            yield
        finally:
            for linear in self.linears:
                linear.routed = None


class Experts(torch.nn.ModuleList):
    """The experts of a block, in the place of transformers' module.

    Every expert is called, also by no token: each layer of each is then seen by hooks and has a gradient.
    """

    def each(self) -> Iterator[Expert]:
        """The experts, in their order."""
        for expert in self:
            assert isinstance(expert, Expert)
            yield expert

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The sum of the experts' outputs, each multiplied as the router says.

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: int64 [tokens, k], the experts of each token; numbers past the last expert are none.
            top_k_weights: [tokens, k], what their outputs are multiplied with.

        Returns:
            [tokens, hidden] of the dtype of ``hidden_states``.
        """
        result = torch.zeros_like(hidden_states)
        for index, expert in enumerate(self.each()):
            tokens, place = torch.where(top_k_index == index)
            scales = top_k_weights[tokens, place]
            with expert.told(Routed(tokens, scales.detach(), len(hidden_states))):
                found = expert(hidden_states[tokens]) * scales[:, None]
            result.index_add_(0, tokens, found.to(result.dtype))
        return result


def separate_experts(model: M) -> M:
    """Give each matrix of each expert a linear layer of its own, which shares the memory of the joined parameter.

    Experts that compute something else, or whose matrices the files do not have one by one, are left as they are.

    Args:
        model: transformers' causal language model, on the meta device or with weights; it is changed.

    Returns:
        The same model.
    """
    mapping = _mapping(model)
    names = _matrix_names(mapping)
    for path, module in list(model.named_modules()):
        if names is not None and _is_plain(module):
            parent, _, own = path.rpartition(".")
            setattr(model.get_submodule(parent), own, _separated(module, names))
    _name_as_stored(model, mapping)
    return model


def gate_layers(model: torch.nn.Module) -> set[str]:
    """Names of the linear layers that choose or weigh experts: routers, and the gates of shared experts.

    Args:
        model: with separate experts.
    """
    found = set()
    for path, module in model.named_modules():
        experts = [child for child in module.children() if isinstance(child, Experts)]
        if experts:
            sizes = {1, len(experts[0])}
            for name, child in module.named_modules():
                parts = name.split(".")
                near = len(parts) == 1 or parts[0] in _ROUTERS
                if near and isinstance(child, torch.nn.Linear) and child.out_features in sizes:
                    found.add(f"{path}.{name}")
    return found


def joined_experts(model: torch.nn.Module) -> str | None:
    """The first parameter of experts that are not separate, None if there is none.

    Args:
        model: as :func:`separate_experts` left it.
    """
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    some = any(isinstance(module, Experts) for module in model.modules())
    for name, parameter in model.named_parameters():
        of_experts = any(word in name for word in ("experts", "moe")) and name.rpartition(".")[0] not in linears
        if of_experts and (parameter.ndim > 2 or not some):
            return name
    return None


def _mapping(model: PreTrainedModel) -> list[Any]:
    """How transformers renames and joins the tensors of the model's files."""
    names = (type(model).__name__, model.config.model_type)  # it keeps some by class, some by type
    return next((found for name in names if (found := get_checkpoint_conversion_mapping(name))), [])


def _matrix_names(mapping: list[Any]) -> tuple[str, str, str] | None:
    """The files' names of an expert's gate, up and down projection, None where experts lie there in another way."""
    found: dict[str, list[str]] = {}
    for each in mapping:
        for target in each.target_patterns:
            matches = [_MATRIX.search(source.replace("\\", "")) for source in each.source_patterns]
            if all(matches):
                found[target.rpartition(".")[2]] = [match[1] for match in matches if match]
    if found.keys() != _JOINED or len(found["gate_up_proj"]) != 2 or len(found["down_proj"]) != 1:
        return None
    gate, up = found["gate_up_proj"]
    return gate, up, found["down_proj"][0]


def _is_plain(module: torch.nn.Module) -> bool:
    """Whether a module is transformers' of gated experts without biases, whose parameters lie as [out, in]."""
    gating = getattr(type(module), "_apply_gate", None)
    if gating is None or {name for name, _ in module.named_parameters()} != _JOINED or any(module.buffers()):
        return False
    forms = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}
    plain = all(getattr(module, name, None) is value for name, value in forms.items())
    return plain and gating.__name__ == "_default_apply_gate"


def _separated(joined: torch.nn.Module, names: tuple[str, str, str]) -> Experts:
    both, down = joined.get_parameter("gate_up_proj"), joined.get_parameter("down_proj")
    pairs = zip(both, down, strict=True)
    return Experts(Expert(names, (*first.chunk(2), second), joined.act_fn) for first, second in pairs)


def _name_as_stored(model: torch.nn.Module, mapping: list[Any]) -> None:
    """Register mixtures under the name that the files have for them; the code of their blocks finds them by its own."""
    renamed: dict[str, str] = {}
    for each in mapping:
        stored, own = (_FOLDER.fullmatch(pattern[0]) for pattern in (each.source_patterns, each.target_patterns))
        if stored and own:
            renamed[own[1]] = stored[1]
    for block in list(model.modules()) if renamed else []:
        for name, child in list(block.named_children()):
            if name in renamed and any(isinstance(each, Experts) for each in child.children()):
                block._modules = {renamed.get(key, key): each for key, each in block._modules.items()}
                block.__dict__[name] = child
