"""What each process of the engine does when it is told to switch."""

from __future__ import annotations

from typing import Any

from torch.nn import Module

from vllm_matquant.serve.linear import quantized_layers, resident_bytes


class ElasticWorker:
    """Methods that vLLM adds to its worker, called between two steps in all processes of an engine.

    None of them raises: vLLM reads no further process's answer after a failure, and would take it for that to the next
    call. A failure is part of the answer.
    """

    vllm_config: Any
    model_runner: Any

    def matquant_switch(self, name: str) -> dict[str, Any]:
        """Make the slice ``name`` the active one. Nothing is allocated, and no address changes.

        Returns:
            ``{}``, or ``{"error": text}`` where all stayed as it was.
        """
        try:
            quant_config = self.vllm_config.quant_config
            slot = quant_config.offer.slot(name)
            if quant_config.rows is not None:
                quant_config.rows.switch(slot)
            else:
                switch_layers(self.model_runner.get_model(), slot, quant_config.active_slot)
            quant_config.active_slot = slot
            return {}
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}

    def matquant_state(self) -> dict[str, Any]:
        """What this process computes with.

        Returns:
            ``active``, the name of a slice; ``bytes`` of codes and decoders; ``tokens``, how many were computed with
            each slice, by its name, empty where requests have no slices of their own.
        """
        quant_config = self.vllm_config.quant_config
        slices, rows = quant_config.offer.slices, quant_config.rows
        counts = [] if rows is None else rows.computed
        return {
            "active": slices[quant_config.active_slot].name,
            "bytes": resident_bytes(self.model_runner.get_model()),
            "tokens": {each.name: count for each, count in zip(slices, counts, strict=False)},
        }


def switch_layers(model: Module, slot: int, before: int) -> None:
    """Have all layers read the slice of a slot from the next product on, or none of them.

    Args:
        model: vLLM's model.
        slot: of the slice.
        before: the slot that they read now.
    """
    done = []
    try:
        for _, method in quantized_layers(model):
            done.append(method)
            method.switch(slot)
    except Exception:
        for method in done:
            method.switch(before)
        raise
