"""Several processes, each with a part of what is trained: FSDP2, over GPUs or CPUs.

Every transformer block is a group whose parameters are gathered when it runs and freed when it has run
(``torch.distributed.fsdp.fully_shard``); gradients are averaged over the processes. Codes, a byte for each weight, lie
whole on all of them.
"""

from __future__ import annotations

import torch

from vllm_matquant.quantize import ranks
from vllm_matquant.train.latent import LatentWeight
from vllm_matquant.train.model import NestedModel


def backend_of(device: str) -> str:
    """What the processes exchange tensors with."""
    return "cpu:gloo,cuda:nccl" if torch.device(device).type == "cuda" else "gloo"


def claim(device: str) -> None:
    """Make a GPU the one that this process uses, before the processes wait for each other with it."""
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)


def place(model: NestedModel, device: str) -> None:
    """Bring a model to the device of this process, where there are several a part of it.

    What is trained must be asked of the model afterwards.
    """
    if ranks.count() > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(torch.device(device).type, (ranks.count(),))
        for block in model.model.get_decoder().layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model.model, mesh=mesh)
        model.sharded = True
    model.model.to(device)
    model.device = device


def own_rows(latent: LatentWeight) -> slice:
    """The rows of a layer whose positions this process has."""
    if latent.shift is None or not hasattr(latent.shift, "to_local"):
        return slice(None)
    rows = latent.shift.shape[0]
    part = -(-rows // ranks.count())  # as torch.chunk cuts
    start = min(rows, part * ranks.own_rank())
    return slice(start, min(rows, start + part))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of which each process has a part, on all of them; every process must ask for it."""
    found: torch.Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found.detach()
