"""The sampling parameters of requests, spread over their draft tokens."""

from __future__ import annotations

import torch
from vllm.v1.sample import rejection_sampler


def spread(
    x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> torch.Tensor:
    """What vLLM's ``expand_batch_to_tokens`` says that it does: [a, b] over 2 and 3 tokens is [a, a, b, b, b].

    Args:
        x: [requests], of any dtype.
        cu_num_tokens: [requests], how many tokens these requests and all before them have.
        num_tokens: of all requests.
        replace_from: a value of ``x`` in whose place stands ``replace_to``.
        replace_to: that value.
    """
    replaced = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    return replaced.repeat_interleave(counts, output_size=num_tokens)


def mend_sampling() -> None:
    """Have vLLM's rejection sampler in this process, which is one of a CPU engine, use :func:`spread`.

    What takes the place of its kernel on CPUs drops the result, so that temperature, top_k and top_p of draft tokens
    were whatever the memory held (vLLM's issue 55005).
    """
    rejection_sampler.expand_batch_to_tokens = spread
