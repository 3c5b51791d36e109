"""vLLM tells logits processors which requests enter and leave the batch, before each step: this one only listens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.sample.logits_processor.interface import BatchUpdate, LogitsProcessor, MoveDirectionality

from vllm_matquant.serve.elastic.requests import SLICE

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class BatchSlots(LogitsProcessor):
    """Keeps the slots of the requests in the batch, in the batch's order; changes no logits."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        quant_config: Any = vllm_config.quant_config
        self._offer = quant_config.offer
        self._rows = quant_config.row_slots(vllm_config)
        self._slots: dict[int, int] = {}

    def is_argmax_invariant(self) -> bool:
        return True

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._slots.pop(index, None)
        for index, params, _, _ in batch_update.added:
            name = (params.extra_args or {}).get(SLICE)
            self._slots[index] = self._rows.active if name is None else self._offer.slot(name)
        for source, target, direction in batch_update.moved:
            moved, other = self._slots.pop(source, None), self._slots.pop(target, None)
            if moved is not None:
                self._slots[target] = moved
            if other is not None and direction == MoveDirectionality.SWAP:
                self._slots[source] = other
        # A request that is missing here would be a fault of vLLM's: a KeyError is better than a wrong width.
        self._rows.requests = [self._slots[index] for index in range(batch_update.batch_size)]
