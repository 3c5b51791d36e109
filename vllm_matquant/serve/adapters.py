"""LoRA adapters on a CPU: each row of a step has the deltas of its request's adapter, and none without one.

vLLM wraps the layers of a model, quantized or not, keeps the matrices of the adapters in slots, and says at each step
which rows are of which slot. What it computes with these on a CPU (0.32) is wrong where rows have an adapter and others
none: slot -1 is taken for the last one. It also copies the matrices once for each row. Here they are multiplied where
they lie, once for all rows of an adapter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import Module
from vllm.lora.layers import LoRAMapping
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from vllm_matquant.checkpoint.spec import QUANT_METHOD

# Rows that have the same adapter: a slice where they follow one another, else their numbers (int64 [rows]).
_Rows = slice | torch.Tensor
_Groups = Sequence[tuple[int, _Rows]]  # of a step: the slot of each adapter that it needs, with its rows


class AdapterRows(PunicaWrapperCPU):
    """vLLM's door to the products with adapters' matrices, save that they are grouped by adapter.

    Matrices are [slots, 1, out, in], with zeros beyond an adapter's rank.
    """

    _tokens: _Groups = ()
    _samples: _Groups = ()

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        super().update_metadata(*args, **kwargs)
        self._tokens = group_rows(self.token_lora_indices)
        self._samples = group_rows(self.sampler_indices)

    def add_lora_linear(self, *args: Any, **kwargs: Any) -> None:
        if self._tokens:
            super().add_lora_linear(*args, **kwargs)

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        *,
        buffer: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """Add to logits ``y`` [rows, at least vocabulary] what adapters of the output head make of ``x`` [rows, in]."""
        part = y[:, : lora_b_stacked.shape[2]]
        for slot, rows in self._of_head(x):
            part[rows] += _times(_times(x[rows], lora_a_stacked[slot]) * scale, lora_b_stacked[slot])

    def _apply_shrink(self, y: torch.Tensor, x: torch.Tensor, w_t_all: torch.Tensor, scale: float) -> None:
        for slot, rows in self._tokens:
            y[rows] = (_times(x[rows], w_t_all[slot]) * scale).to(y.dtype)

    def _apply_expand(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        w_t_all: torch.Tensor,
        y_offset: int,
        y_slice_size: int,
        add_inputs: bool = True,
    ) -> None:
        part = y[:, y_offset : y_offset + y_slice_size]
        for slot, rows in self._tokens:
            delta = _times(x[rows], w_t_all[slot])
            part[rows] = part[rows] + delta if add_inputs else delta

    def _expand_prefill(self, y: torch.Tensor, x: torch.Tensor, w_t_all: torch.Tensor, add_inputs: bool) -> None:
        self._apply_expand(y, x, w_t_all, 0, w_t_all.shape[2], add_inputs)

    _expand_decode = _expand_prefill

    def _of_head(self, hidden: torch.Tensor) -> _Groups:
        """The groups of the rows that an output head is given.

        These are rows that were picked to be sampled from, or a view of the step's output where log-probabilities of a
        prompt are wanted.
        """
        tokens, samples = (self.indices_len[place] for place in range(2))
        count = len(hidden)
        if hidden.untyped_storage().nbytes() > hidden.nbytes or (count == tokens and count != samples):
            first = hidden.storage_offset() // hidden.stride(0)
            return group_rows(self.token_lora_indices[first : first + count])
        if count != samples:
            raise RuntimeError(f"rows of the output head: found {count}, expected {samples} to sample from")
        return self._samples


def group_rows(slots: torch.Tensor) -> _Groups:
    """The rows of each adapter.

    Args:
        slots: int64 [rows], -1 for a row without one.
    """
    groups: list[tuple[int, _Rows]] = []
    for slot in slots.unique().tolist():
        if slot < 0:
            continue
        rows = (slots == slot).nonzero().flatten()
        first, last = int(rows[0]), int(rows[-1])
        groups.append((slot, slice(first, last + 1) if last - first + 1 == len(rows) else rows))
    return groups


def _times(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """``x`` [rows, in] times one adapter's matrix [1, out, in]: [rows, out] of the matrix's dtype."""
    return torch.nn.functional.linear(x.to(matrix.dtype), matrix[0])


@functools.cache
def compute_adapters_by_row() -> None:
    """Have matquant models of this process computed with :class:`AdapterRows`; a second call does nothing."""
    LoRAModelManager._init_punica_wrapper = _by_row(LoRAModelManager._init_punica_wrapper)


def _by_row(init_punica_wrapper: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init_punica_wrapper)
    def wrapper(self: Any, max_num_batched_tokens: int, vllm_config: Any) -> None:
        init_punica_wrapper(self, max_num_batched_tokens, vllm_config)
        quant_config = vllm_config.quant_config
        if quant_config is None or quant_config.get_name() != QUANT_METHOD:
            return
        for each in self.punica_wrapper_mapping.values():
            each.__class__ = AdapterRows

    return wrapper


@contextmanager
def one_row_each(model: Module, starts: torch.Tensor) -> Iterator[None]:
    """Passes over one row of each request, with its adapter. For a model without any it does nothing.

    Args:
        model: vLLM's model, of text alone.
        starts: int64 or int32 [requests], where the rows of each begin in the current step.
    """
    manager: Any = getattr(model, "lora_manager", None)
    if manager is None:
        yield
        return
    [wrapper] = manager.punica_wrapper_mapping.values()
    slots = wrapper.token_lora_indices.tolist(), wrapper.sampler_indices.tolist()
    tokens, samples = (
        tuple(0 if slot < 0 else manager.lora_index_to_id[slot] for slot in of_rows) for of_rows in slots
    )
    requests = tuple(tokens[start] for start in starts.tolist())
    manager.set_adapter_mapping(LoRAMapping(requests, requests, is_prefill=True))
    try:
        yield
    finally:
        manager.set_adapter_mapping(LoRAMapping(tokens, samples, is_prefill=True))
