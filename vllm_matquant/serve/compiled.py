"""Where a start finds the code that an earlier one compiled."""

from __future__ import annotations

import os

from vllm.platforms import current_platform

_AOT = "VLLM_USE_AOT_COMPILE"


def reuse_compiled_code() -> None:
    """Have vLLM compile for a CPU by way of torch's own cache, unless the environment says otherwise.

    vLLM 0.32 saves what it compiled ahead of time. Of a graph for a CPU it cannot load that again (`'function' object
    has no attribute 'finalize_loading'`), and compiles all of it anew at every start. Without this way torch finds each
    piece of code in its cache.
    """
    if current_platform.is_cpu():
        os.environ.setdefault(_AOT, "0")
