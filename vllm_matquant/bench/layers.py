"""Measured time of a checkpoint's layers: what a budget of milliseconds is spent on."""

from __future__ import annotations

from typing import Any

import torch
from tqdm import tqdm

from vllm_matquant.bench import kernel
from vllm_matquant.checkpoint.reader import Checkpoint


def layer_milliseconds(checkpoint: Checkpoint) -> dict[str, dict[int, float]]:
    """Milliseconds of each layer at each of its widths for one token on this machine; equal layers share a figure."""
    format = checkpoint.format
    shapes = {layer: (shape, format.group_size_of(shape[1], layer)) for layer, shape in checkpoint.layers.items()}
    widths = sorted({width for layer in shapes for width in format.widths_of(layer)})
    seconds: dict[Any, dict[int, float]] = {}
    for shape, group_size in tqdm(sorted(set(shapes.values())), desc="milliseconds", unit="shape"):
        threads = [torch.get_num_threads()]
        settings = kernel.Settings([shape], [1], widths, threads, group_size, decoder_kind=format.decoder_kind)
        seconds[shape, group_size] = {row["bits"]: 1e3 * row["seconds"] for row in kernel.bench_kernel(settings)}
    return {layer: {width: seconds[key][width] for width in format.widths_of(layer)} for layer, key in shapes.items()}
