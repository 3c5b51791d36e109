"""Which slice each row of a step is computed with.

The layers of a model read two tensors whose addresses never change: the slots of a step's tokens, and those of the
rows that an output head is given. They are filled before each step from what is in the batch then, and from nothing
that an earlier step has left: requests come and go between any two.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import Module
from vllm.forward_context import get_forward_context, is_forward_context_available


class RowSlots:
    """The slots of the rows of the current step, in one process of the engine.

    Attributes:
        tokens: int32 [rows], of the rows of every layer but output heads.
        heads: int32 [rows], of the rows of output heads.
        active: of rows that belong to no request, and of requests that have no slice of their own.
        requests: of each request in the batch, in the batch's order.
        computed: how many tokens were computed with each slot.
    """

    def __init__(self, rows: int, slots: int, active: int) -> None:
        """For steps of at most so many ``rows``."""
        self.tokens = torch.full((rows,), active, dtype=torch.int32)
        self.heads = torch.full((rows,), active, dtype=torch.int32)
        self.active = active
        self.requests: list[int] = []
        self.computed = [0] * slots
        self._output = 0  # address of what the model's last step gave

    def switch(self, slot: int) -> None:
        """Make ``slot`` the active one. Requests in the batch keep theirs."""
        self.active = slot
        self.tokens.fill_(slot)
        self.heads.fill_(slot)

    def begin_step(self, starts: Sequence[int]) -> None:
        """Fill the slots of tokens.

        Args:
            starts: where each request's tokens begin, and where the last one's end; of no request for a step that is
                made up to warm the engine up.
        """
        if len(starts) <= len(self.requests):
            raise RuntimeError(f"rows: found {len(starts) - 1} requests in a step, expected {len(self.requests)}")
        lengths = [end - begin for begin, end in itertools.pairwise(starts[: len(self.requests) + 1])]
        for slot, length in zip(self.requests, lengths, strict=True):
            self.computed[slot] += length
        if self.requests:
            slots = torch.tensor(self.requests, dtype=torch.int32)
            rows = slots.repeat_interleave(torch.tensor(lengths))
            self.tokens[: len(rows)] = rows
            self.tokens[len(rows) :] = self.requests[-1]  # of rows that pad the step
        else:
            self.tokens.fill_(self.active)

    def begin_head(self, hidden: torch.Tensor) -> None:
        """Fill the slots of the rows that an output head is about to be given.

        Args:
            hidden: [rows, hidden size]: a part of what the model gave for the step, as for log-probabilities of a
                prompt, or one row for each request.
        """
        count = len(hidden)
        if not self.requests:
            self.heads.fill_(self.active)
        elif hidden.untyped_storage().data_ptr() == self._output:
            first = hidden.storage_offset() // hidden.stride(0)
            self.heads[:count] = self.tokens[first : first + count]
        elif count == len(self.requests):
            self.heads[:count] = torch.tensor(self.requests, dtype=torch.int32)
        else:
            raise RuntimeError(f"rows of the output head: found {count}, expected one for each of {len(self.requests)}")

    def attach(self, model: Module) -> None:
        """Have the slots filled whenever ``model`` is about to run a step or its output head."""
        model.register_forward_pre_hook(lambda *_: self.begin_step(_starts()))
        model.register_forward_hook(lambda _model, _inputs, output: self._end_step(output))
        compute_logits: Callable[..., Any] | None = getattr(model, "compute_logits", None)
        if compute_logits is None:
            return

        def with_slots(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.begin_head(hidden_states)
            return compute_logits(hidden_states, *args, **kwargs)

        model.compute_logits = with_slots  # type: ignore[assignment]

    def _end_step(self, output: Any) -> None:
        self._output = output.untyped_storage().data_ptr() if isinstance(output, torch.Tensor) else 0


def _starts() -> list[int]:
    """Where each request's tokens begin in the current step, and where the last one's end."""
    metadata = get_forward_context().attn_metadata if is_forward_context_available() else None
    layers = metadata.values() if isinstance(metadata, dict) else ()
    for each in layers:
        if hasattr(each, "query_start_loc"):
            starts: list[int] = each.query_start_loc.tolist()
            return starts
    return [0]
