"""Hessians of the layer-wise error: the second moments of each linear layer's inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

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
            token_weights: float32 [tokens], how much each token counts that was or will be given, in that order, from 0
                up; by default all count 1.
        """
        flat = inputs.flatten(0, -2).float()
        if self._sum is None:
            self._sum = torch.zeros(flat.shape[1], flat.shape[1])
        end = self._tokens + flat.shape[0]
        # Both factors have the root of the weight: rounded, they are still the same, and their product is positive.
        if token_weights is not None:
            flat = flat * token_weights[self._tokens : end, None].sqrt()
        with fast_moments():
            self._sum.addmm_(flat.T, flat)
        self._tokens = end

    def add_up(self) -> None:
        """Add what the other ranks have counted, each of which must have come here."""
        if self._sum is not None:
            ranks.sum_(self._sum)
        self._tokens = int(ranks.totals([self._tokens])[0])

    def mean(self, name: str) -> torch.Tensor:
        """float32 [in_features, in_features], the mean over tokens.

        Args:
            name: of the layer, for errors.

        Raises:
            ValueError: there were no inputs, or they were not finite.
        """
        if self._sum is None:
            raise ValueError(f"{name}: the calibration text never reached this layer")
        if not torch.isfinite(self._sum).all():
            raise ValueError(f"{name}: its inputs on the calibration text hold values that are not finite")
        return self._sum / self._tokens


class HessianCollector:
    """Sums ``x^T x`` over the inputs of a block's linear layers while the block runs.

    ``||X (W - W')^T||^2`` is the layer's output error, so ``H = X^T X / tokens`` weighs the errors of its columns
    (GPTQ, arXiv 2210.17323, eq. 1). Layers that are called with the same tensor, such as q, k and v, share one sum.

    Args:
        layers: linear layers by name.
        token_weights: for each layer how much each token counts, float32 [sequences, length] in the order of its calls
            and the same for layers that share a sum, see :func:`vllm_matquant.quantize.sensitivity.token_weights`;
            without a layer's, all tokens count 1.
    """

    def __init__(
        self, layers: dict[str, torch.nn.Linear], token_weights: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        self._layers = layers
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
            layer.register_forward_pre_hook(lambda _, inputs, name=name: self._observe(name, inputs[0]))
            for name, layer in self._layers.items()
        ]
        try:
            yield
        finally:
            self._last = None
            for hook in hooks:
                hook.remove()
        self._add_up()

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

    def _add_up(self) -> None:
        message = "the calibration text of one rank reached other layers than that of another; quantize with one rank"
        ranks.check_same(list(self._owner.items()), message)
        for owner in dict.fromkeys(self._owner.values()):
            self._moments[owner].add_up()

    def _check_called(self, name: str) -> None:
        if name not in self._owner:
            raise ValueError(f"{name}: the calibration text never reached this layer")

    def _observe(self, name: str, inputs: torch.Tensor) -> None:
        if self._last is not None and self._last[1] is inputs:
            self._owner[name] = self._last[0]
            return
        self._last = (name, inputs)
        self._owner[name] = name
        self._moments[name].add(inputs, self._token_weights.get(name))
