"""Random LoRA adapters in PEFT's files, and what transformers computes with their deltas added to the weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

PREFIX = "base_model.model."  # that PEFT has every name begin with


def write_adapter(
    folder: Path, model: torch.nn.Module, targets: Sequence[str], rank: int, alpha: int, seed: int
) -> Path:
    """Write an adapter of every linear layer and embedding whose name ends with one of ``targets``."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] not in targets:
            continue
        embedding = isinstance(module, torch.nn.Embedding)
        rows, columns = module.weight.T.shape if embedding else module.weight.shape
        first = torch.randn(rank, columns, generator=generator) / (1 if embedding else columns**0.5)
        second = torch.randn(rows, rank, generator=generator) * 0.3
        for which, matrix in (("A", first), ("B", second)):
            tensors[PREFIX + name + (f".lora_embedding_{which}" if embedding else f".lora_{which}.weight")] = matrix
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": list(targets)}))
    return folder


@torch.no_grad()
def add_adapter(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """Add an adapter's deltas to the weights of transformers' ``model``; of tied ones each gets its own."""
    config, tensors = (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapter_model.safetensors"),
    )
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    for key in tensors:
        name, marker, ending = key.removeprefix(PREFIX).rpartition(".lora_")
        if not ending.endswith(("A", "A.weight")):
            continue
        second = tensors[PREFIX + name + marker + ending.replace("A", "B")]
        delta = config["lora_alpha"] / config["r"] * second @ tensors[key]
        weight = model.get_submodule(name).weight
        weight += delta.T if ending.startswith("embedding") else delta
    return model
