"""Quantize a model with a quantizer of another project, and write the weights of its layers dequantized.

tools/compare_quantizers.py runs this file with the interpreter of an environment that holds those projects: they want
other releases of torch and transformers than vLLM does. It therefore imports nothing of this project.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Task:
    """What to quantize.

    Attributes:
        model: folder of the source model.
        tokens: int64 [samples, sequence_length], to calibrate on.
    """

    model: Path
    tokens: torch.Tensor
    bits: int
    group_size: int


@dataclass(frozen=True)
class Peer:
    """A quantizer of another project with one setting of it.

    Attributes:
        package: its name on PyPI.
        quantize: makes the dequantized weights, float32, by layer, and says how many seconds quantizing took.
        widths: those it is worth running at.
        options: what differs from the package's defaults.
    """

    package: str
    quantize: Callable[[Task, Mapping[str, Any]], tuple[Weights, float]]
    widths: tuple[int, ...]
    options: Mapping[str, Any] = field(default_factory=dict)


def gptqmodel(task: Task, options: Mapping[str, Any]) -> tuple[Weights, float]:
    """GPTQModel, whose checkpoint is written, read again and decoded: float16 scales, integer zero points."""
    # By default it starts fewer workers on a machine of two cores than it asks for itself, and stops.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from gptqmodel.nn_modules.qlinear import BaseQuantLinear

    start = time.perf_counter()
    config = QuantizeConfig(bits=task.bits, group_size=task.group_size, **options)
    model = GPTQModel.load(str(task.model), config, device="cpu")
    windows = [{"input_ids": window.tolist(), "attention_mask": [1] * len(window)} for window in task.tokens]
    model.quantize(windows, batch_size=1)
    model.save("checkpoint")
    seconds = time.perf_counter() - start
    model = GPTQModel.load("checkpoint", device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16)
    weights = {}
    for name, layer in model.model.named_modules():
        if isinstance(layer, BaseQuantLinear):
            layer.scales = layer.scales.float()  # it would multiply in float16
            weights[name] = layer.dequantize_weight().T.contiguous()
    return weights, seconds


def auto_round(task: Task, options: Mapping[str, Any]) -> tuple[Weights, float]:
    """AutoRound."""
    from auto_round import AutoRound

    samples, sequence_length = task.tokens.shape
    start = time.perf_counter()
    model, _ = AutoRound(
        str(task.model),
        bits=task.bits,
        group_size=task.group_size,
        dataset=[window[None] for window in task.tokens],
        nsamples=samples,
        seqlen=sequence_length,
        device_map="cpu",
        **options,
    ).quantize()
    seconds = time.perf_counter() - start
    weights = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "scale") and hasattr(layer, "zp"):
            # The weights are on their grid but rounded to bfloat16, the scales are float16: back to whole steps.
            scale = layer.scale.float().reshape(len(layer.weight), -1, 1)
            steps = layer.weight.detach().float().unflatten(1, (-1, task.group_size)) / scale
            weights[name] = (steps.round() * scale).flatten(1)
    return weights, seconds


# AutoRound tunes the rounding of narrow widths: at 8 bits there is next to nothing to tune.
PEERS = {
    "gptqmodel": Peer("gptqmodel", gptqmodel, (2, 3, 4, 8)),
    "gptqmodel-best": Peer("gptqmodel", gptqmodel, (2, 3, 4, 8), {"sym": False, "mse": 2.4}),
    "auto-round": Peer("auto-round", auto_round, (2, 3, 4)),
    "auto-round-asym": Peer("auto-round", auto_round, (2, 3, 4), {"sym": False}),
}


@contextmanager
def scratch_folder() -> Iterator[None]:
    """A working folder that is removed: the peers leave checkpoints, logs and caches in it."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=PEERS, help="quantizer and its setting")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="folder of the source model")
    parser.add_argument(
        "--tokens", type=Path, required=True, metavar="FILE", help="safetensors file; tokens: int64 [samples, length]"
    )
    parser.add_argument("--bits", type=int, required=True, metavar="N", help="the one width")
    parser.add_argument("--group-size", type=int, required=True, metavar="N", help="columns that share a scale")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="safetensors file to write: each layer's weight"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = build_parser()
    options = parser.parse_args(arguments)
    peer = PEERS[options.peer]
    try:
        package = f"{peer.package} {version(peer.package)}"
    except PackageNotFoundError:
        parser.exit(1, f"{options.peer}: found no package {peer.package}, expected it: pip install {peer.package}\n")
    task = Task(options.model.resolve(), load_file(options.tokens)["tokens"], options.bits, options.group_size)
    output = options.output.resolve()
    with scratch_folder():
        weights, seconds = peer.quantize(task, peer.options)
    # In the checkpoints of either project each group has a float16 scale and a zero point as wide as a code.
    bits_per_weight = task.bits + (16 + task.bits) / task.group_size
    facts = {
        "package": package,
        "options": json.dumps(peer.options),
        "seconds": repr(seconds),
        "bits_per_weight": repr(bits_per_weight),
    }
    save_file(weights, output, metadata=facts)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
