"""Hessians of the layer-wise error: the second moments of each linear layer's inputs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

import torch

from vllm_matquant.checkpoint.experts import Expert, ExpertLinear, Experts, Routed, routed_to
from vllm_matquant.quantize import ranks
from vllm_matquant.quantize.device import fast_moments


class Moments:
    """The second moments of a layer's inputs, which come batch by batch."""

    def __init__(self) -> None:
        self._sum: torch.Tensor | None = None
        self._tokens = 0

    def add(self, inputs: torch.Tensor, token_weights: torch.Tensor | None = None) -> None:
        """Count more inputs.

        Args:
            inputs: floating point [..., in_features].
            token_weights: float32 [tokens], how much each of them counts, from 0 up; by default all count 1.
        """
        flat = inputs.flatten(0, -2).float()
        if self._sum is None:
            self._sum = torch.zeros(flat.shape[1], flat.shape[1])
        self._tokens += flat.shape[0]
        # Both factors have the root of the weight: rounded, they are still the same, and their product is positive.
        if token_weights is not None:
            flat = flat * token_weights[:, None].sqrt()
        with fast_moments():
            self._sum.addmm_(flat.T, flat)

    def add_up(self) -> None:
        """Add what the other ranks have counted, each of which must have come here."""
        if self._sum is not None:
            ranks.sum_(self._sum)
        self._tokens = int(ranks.totals([self._tokens])[0])

    @property
    def tokens(self) -> int:
        """How many inputs were counted."""
        return self._tokens

    def mean(self, name: str) -> torch.Tensor:
        """float32 [in_features, in_features], the mean over tokens.

        Args:
            name: of the layer, for errors.

        Raises:
            ValueError: there were no inputs, or they were not finite.
        """
        if self._sum is None or not self._tokens:
            raise ValueError(f"{name}: the calibration text never reached this layer")
        if not torch.isfinite(self._sum).all():
            raise ValueError(f"{name}: its inputs on the calibration text hold values that are not finite")
        return self._sum / self._tokens


def enough_tokens(layer: torch.nn.Linear, share: float) -> float:
    """How many tokens a layer must be fitted to: one, and of an expert's at least ``share`` of its input features."""
    return max(1.0, share * layer.in_features) if isinstance(layer, ExpertLinear) else 1.0


class HessianCollector:
    """Sums ``x^T x`` over the inputs of a block's linear layers while the block runs.

    ``||X (W - W')^T||^2`` is the layer's output error, so ``H = X^T X / tokens`` weighs the errors of its columns
    (GPTQ, arXiv 2210.17323, eq. 1). Layers that are called with the same tensor, such as q, k and v, share one sum.

    An expert is given the tokens that are routed to it. The router multiplies its outputs with s, and their error with
    it, so a token counts s^2. An expert that few tokens reach can be shown all of its block, see :meth:`showing`.

    Args:
        layers: linear layers by name.
        token_weights: for each layer how much each token counts, float32 [sequences, length] in the order of its calls
            and the same for layers that share a sum, see :func:`vllm_matquant.quantize.sensitivity.token_weights`, in
            the place of the router's weights too; without a layer's, all tokens count 1, and s^2 in an expert.

    Attributes:
        shown: the layers of experts that were shown all tokens.
    """

    def __init__(
        self, layers: dict[str, torch.nn.Linear], token_weights: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        self._layers = layers
        self.shown: frozenset[str] = frozenset()
        self._seen = dict.fromkeys(layers, 0)  # tokens of the text so far
        self._token_weights = {name: weights.flatten() for name, weights in (token_weights or {}).items()}
        self._owner: dict[str, str] = {}  # layer -> the layer whose sum it shares
        self._moments = {name: Moments() for name in layers}
        self._last: tuple[str, torch.Tensor] | None = None

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Collect from the layers' calls inside the ``with`` statement, then add up what all ranks have collected.

        Raises:
            ValueError: the windows of one rank reached other layers than those of another.
        """
        hooks = [
            layer.register_forward_pre_hook(lambda layer, inputs, name=name: self._observe(name, layer, inputs[0]))
            for name, layer in self._layers.items()
        ]
        try:
            yield
        finally:
            self._last = None
            for hook in hooks:
                hook.remove()
        self._add_up()

    def starved(self, share: float) -> list[str]:
        """The layers of experts that no token reached, or fewer than ``share`` of their input features, in order."""
        return [name for name, layer in self.expert_layers.items() if self.tokens(name) < enough_tokens(layer, share)]

    @property
    def expert_layers(self) -> dict[str, ExpertLinear]:
        """Those of the layers that belong to experts, by name."""
        return {name: layer for name, layer in self._layers.items() if isinstance(layer, ExpertLinear)}

    def tokens(self, name: str) -> int:
        """How many tokens of the text reached a layer, over all ranks."""
        return self._moments[self._owner[name]].tokens

    @contextmanager
    def showing(self, block: torch.nn.Module, layers: Collection[str]) -> Iterator[None]:
        """Collect anew for layers of experts, from all tokens of their block, each of which counts 1.

        What the block computes inside the ``with`` statement is not changed: experts are called once more.

        Args:
            block: that of the layers.
            layers: names of layers of experts, which :meth:`collecting` has seen.
        """
        self.shown = frozenset(layers)
        names = {self._layers[name]: name for name in layers}
        hooks = []
        for module in block.modules():
            if isinstance(module, Experts):
                show = self._show(module, names)
                hooks.append(module.register_forward_pre_hook(show, with_kwargs=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self._add_up(layers)

    def _show(self, experts: Experts, names: Mapping[torch.nn.Linear, str]) -> Callable[..., None]:
        """A hook that has those layers of experts see all that these are given."""
        outer = Moments()  # gate and up projections are given the same in all experts
        inner: dict[Expert, Moments] = {}
        for expert in experts.each():
            for linear in expert.linears:
                if linear in names:
                    is_down = linear is expert.linears[-1]
                    moments = inner.setdefault(expert, Moments()) if is_down else outer
                    self._moments[self._owner[names[linear]]] = moments

        def hook(_: torch.nn.Module, given: tuple[torch.Tensor, ...], named: Mapping[str, torch.Tensor]) -> None:
            hidden = given[0] if given else named["hidden_states"]
            outer.add(hidden)
            for expert, moments in inner.items():
                moments.add(expert.inner(hidden))

        return hook

    def stages(self) -> list[list[str]]:
        """The layers in the order of their calls; those that are called with the same tensor together.

        Raises:
            ValueError: a layer was never called.
        """
        stages: dict[str, list[str]] = {}
        for name, owner in self._owner.items():
            stages.setdefault(owner, []).append(name)
        for name in self._layers:
            self._check_called(name)
        return list(stages.values())

    def hessian(self, name: str) -> torch.Tensor:
        """float32 [in_features, in_features], the mean over tokens.

        Raises:
            ValueError: the layer was never called, or its inputs were not finite.
        """
        self._check_called(name)
        return self._moments[self._owner[name]].mean(name)

    def _add_up(self, layers: Collection[str] | None = None) -> None:
        message = "the calibration text of one rank reached other layers than that of another; quantize with one rank"
        ranks.check_same(list(self._owner.items()), message)
        owners = self._owner.values() if layers is None else [self._owner[name] for name in layers]
        for moments in dict.fromkeys(self._moments[owner] for owner in owners):
            moments.add_up()

    def _check_called(self, name: str) -> None:
        if name not in self._owner:
            raise ValueError(f"{name}: the calibration text never reached this layer")

    def _observe(self, name: str, layer: torch.nn.Module, inputs: torch.Tensor) -> None:
        if self._last is not None and self._last[1] is inputs:
            self._owner[name] = self._last[0]
            return
        self._last = (name, inputs)
        self._owner[name] = name
        routed = routed_to(layer)
        self._moments[name].add(inputs, self._weights_of(name, inputs.shape[:-1].numel(), routed))

    def _weights_of(self, name: str, rows: int, routed: Routed | None) -> torch.Tensor | None:
        """How much each of the rows counts that a layer is given, None if all count 1."""
        start = self._seen[name]
        self._seen[name] += rows if routed is None else routed.count
        weights = self._token_weights.get(name)
        if weights is None:
            return None if routed is None else routed.scales.float().square()
        own = weights[start : self._seen[name]]
        return own if routed is None else own[routed.tokens]
