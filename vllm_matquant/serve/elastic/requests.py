"""Gives each request its slice when it arrives, and keys the cache of prompts by it.

A request keeps the slice that it began with, whatever is switched later: its row in each step says so. What vLLM has
cached of a prompt is found only by requests of the same slice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from vllm_matquant.checkpoint.slice import Slice
from vllm_matquant.checkpoint.spec import QUANT_METHOD
from vllm_matquant.serve.elastic.offer import Offer, OfferError

BITS = "matquant_bits"  # of a request's extra arguments: the width or recipe that it asks for
SLICE = "matquant_slice"  # the name of the slice that it was given


@dataclass
class Front:
    """What the process that takes requests knows of an elastic server.

    Attributes:
        offer: what is offered.
        active: what requests are computed with that ask for nothing.
    """

    offer: Offer
    active: Slice

    def slice_for(self, params: Any) -> Slice | None:
        """The slice that a request is to be computed with; None where all are computed with what is active then.

        Raises:
            VLLMValidationError: it asks for what it cannot have; vLLM's server answers 400.
        """
        wanted = _wanted(params)
        if wanted is not None:
            try:
                return self.offer.find_for_client(wanted)
            except OfferError as error:
                raise VLLMValidationError(f"{BITS}: {error}", parameter=BITS, value=wanted) from error
        return None if self.offer.refusal is not None else self.active


def _wanted(params: Any) -> Any:
    """What a request asks for, None for nothing."""
    return (params.extra_args or {}).get(BITS) if isinstance(params, SamplingParams) else None


def with_slices(process_inputs: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's ``InputProcessor.process_inputs``, save that requests to a matquant server are given their slices."""

    @functools.wraps(process_inputs)
    def wrapper(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        quant_config = self.vllm_config.quant_config
        if quant_config is None or quant_config.get_name() != QUANT_METHOD:
            return process_inputs(self, request_id, prompt, params, *args, **kwargs)
        front: Front | None = quant_config.front
        if front is None:
            if _wanted(params) is not None:
                reason = "this server has one width; with --elastic it would have several"
                raise VLLMValidationError(f"{BITS}: found {_wanted(params)!r}, but {reason}", parameter=BITS)
            return process_inputs(self, request_id, prompt, params, *args, **kwargs)
        chosen = front.slice_for(params)
        if kwargs.get("resumable") and chosen is not None:
            raise VLLMValidationError("a prompt that is streamed in parts cannot be served by an elastic server")
        request = process_inputs(self, request_id, prompt, params, *args, **kwargs)
        if chosen is not None:
            own = request.sampling_params  # a copy of the caller's
            own.extra_args = {**(own.extra_args or {}), SLICE: chosen.name}
            request.cache_salt = f"matquant/{chosen.name}/{request.cache_salt or ''}"
        return request

    return wrapper
