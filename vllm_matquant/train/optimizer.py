"""What moves positions and decoders: AdamW, with a rate for positions and one for the decoders of each width."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from vllm_matquant.quantize.training import BETAS, relative_rate
from vllm_matquant.train.latent import local
from vllm_matquant.train.settings import TrainingSettings

CODES = "codes"
# Derivatives by a position are tiny: by the weight over a parent's step. Adam's usual 1e-8 would be of their size.
_EPSILON = 1e-15


class Optimizer:
    """AdamW (arXiv 1711.05101) over what is trained.

    Attributes:
        parameters: by name, ``LAYER.shift`` and ``LAYER.changes.R``.

    Args:
        parameters: what is trained, by name.
        settings: rates, their schedule, decay and the largest norm.
    """

    def __init__(self, parameters: Iterable[tuple[str, torch.nn.Parameter]], settings: TrainingSettings) -> None:
        self.parameters = dict(parameters)
        self._settings = settings
        groups: dict[str, list[torch.nn.Parameter]] = {}
        for name, parameter in self.parameters.items():
            groups.setdefault(_group_of(name), []).append(parameter)
        self._adam = torch.optim.AdamW(
            [{"params": group, "name": name, "lr": 0.0} for name, group in groups.items()],
            betas=BETAS,
            eps=_EPSILON,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        for parameter in self.parameters.values():
            self._adam.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        """All that is trained."""
        return list(self.parameters.values())

    def rates(self, step: int) -> dict[str, float]:
        """The rate of each group in a step, which counts from 0: ``codes``, and each width as a text."""
        factor = self._settings.factor(step)
        rates = {}
        for group in self._adam.param_groups:
            name = group["name"]
            first = (
                self._settings.decoder_rate * relative_rate(int(name)) if name != CODES else self._settings.code_rate
            )
            rates[name] = first * factor
        return rates

    def step(self, step: int) -> torch.Tensor:
        """Move along the gradients, and forget them.

        Args:
            step: counts from 0.

        Returns:
            The norm of all gradients together before it was limited, a scalar.
        """
        rates = self.rates(step)
        for group in self._adam.param_groups:
            group["lr"] = rates[group["name"]]
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self._settings.clip_norm)
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        return norm

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """What must be kept of a parameter from step to step: its value and moments, this process's part of them."""
        parameter = self.parameters[name]
        state: dict[str, Any] = self._adam.state[parameter]
        kept = {"value": parameter.data, "first": state["exp_avg"], "second": state["exp_avg_sq"]}
        return {key: local(tensor) for key, tensor in kept.items()}

    @torch.no_grad()
    def restore(self, name: str, kept: dict[str, torch.Tensor], steps: int) -> None:
        """Take over what :meth:`tensors` gave after so many steps."""
        for key, tensor in self.tensors(name).items():
            tensor.copy_(kept[key])
        self._adam.state[self.parameters[name]]["step"].fill_(steps)


def _group_of(name: str) -> str:
    """The group of a parameter: ``codes``, or the width of a decoder."""
    last = name.rpartition(".")[2]
    return last if last.isdigit() else CODES
