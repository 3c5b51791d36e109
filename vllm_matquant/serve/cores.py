"""Whether vLLM computes with all the cores that the machine has for it."""

from __future__ import annotations

import os
from collections import Counter

import torch
from vllm.logger import init_logger
from vllm.platforms import current_platform

logger = init_logger(f"vllm.{__name__}")

_BIND = "VLLM_CPU_OMP_THREADS_BIND"
_LEAST_SHARE = 0.9  # of the cores: to leave more than the rest idle costs more than a tenth of the speed


def usable_cores(ranks: int) -> int:
    """Physical cores that so many ranks may use, of one memory node each; 0 where the model is not on the CPU.

    To be asked before vLLM binds a process to the cores that it chose.
    """
    if not current_platform.is_cpu():
        return 0
    from vllm.utils.cpu_resource_utils import get_allowed_cpu_list

    cores = {(each.numa_node, each.physical_core) for each in get_allowed_cpu_list()}
    return sum(count for _, count in Counter(node for node, _ in cores).most_common(ranks))


def warn_of_idle_cores(cores: int, ranks: int) -> None:
    """Warn if this machine's ranks compute with fewer threads than it has cores.

    vLLM 0.32 leaves a core of each rank to its scheduler, which on a machine of two is half of them.

    Args:
        cores: what :func:`usable_cores` said before.
        ranks: processes of this machine that compute.
    """
    threads = torch.get_num_threads() * ranks
    if threads >= _LEAST_SHARE * cores:
        return
    cure = f"{_BIND}=nobind"
    if os.environ.get(_BIND) == "nobind":  # then torch's own number of threads holds
        cure = f"OMP_NUM_THREADS={cores // ranks}"
    logger.warning(
        "%d of the %d cores that this server may use compute the model: a token takes up to %.1f times as long as it "
        "could. To use all of them, set %s.",
        *(threads, cores, cores / threads, cure),
    )
