"""Let another project's tool write quantized checkpoints, and beside each the weights that it reads from it itself.

tools/check_imports.py runs this file with the interpreter of an environment that holds that tool: some want other
releases of torch and transformers than vLLM does. It therefore imports nothing of this project
but tools/peer_quantizers.py, of which the same is true.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peer_quantizers import scratch_folder
from safetensors.torch import load_file, save_file

Weights = dict[str, torch.Tensor]
WEIGHTS_FILE = "weights.safetensors"
FAILED_FILE = "failed.txt"  # in the place of a checkpoint: why the tool made none
_SKIPPED = ("lm_head", "embed_tokens", "norm")


def gptqmodel(model: Path, output: Path, options: Mapping[str, Any]) -> Weights:
    """GPTQModel: GPTQ, or by ``method`` "awq" AWQ, on random tokens."""
    # By default it starts fewer workers on a machine of two cores than it asks for itself, and stops.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from gptqmodel.nn_modules.qlinear import BaseQuantLinear
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    loaded = GPTQModel.load(str(model), QuantizeConfig(**options), device="cpu")
    tokens = torch.randint(1000, (32, 64), generator=torch.Generator().manual_seed(0)).tolist()
    loaded.quantize([{"input_ids": window, "attention_mask": [1] * 64} for window in tokens], batch_size=1)
    loaded.save(str(output))
    awq = options.get("method") == "awq"
    backend = BACKEND.AWQ_TORCH if awq else BACKEND.GPTQ_TORCH
    loaded = GPTQModel.load(str(output), device="cpu", backend=backend, dtype=torch.float16)
    weights = {}
    for name, layer in loaded.model.named_modules():
        if isinstance(layer, BaseQuantLinear):
            layer.scales = layer.scales.float()  # it would multiply in float16
            if awq:
                decoded = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, layer.bits, layer.group_size)
            else:
                decoded = layer.dequantize_weight()
            weights[name] = decoded.T.float().contiguous()
    return weights


def auto_round(model: Path, output: Path, options: Mapping[str, Any]) -> Weights:
    """AutoRound without its tuning, in its own format."""
    from auto_round import AutoRound

    tokens = torch.randint(1000, (4, 1, 64), generator=torch.Generator().manual_seed(0))
    quantizer = AutoRound(str(model), dataset=list(tokens), nsamples=4, seqlen=64, iters=0, device_map="cpu", **options)
    quantized, _ = quantizer.quantize()
    weights = {}
    for name, layer in quantized.named_modules():
        if hasattr(layer, "scale") and hasattr(layer, "zp"):
            # The weights are on their grid but rounded, the stored scales are float16: back to whole steps.
            scale = layer.scale.half().float().reshape(len(layer.weight), -1, 1)
            steps = layer.weight.detach().float().unflatten(1, (-1, options["group_size"])) / scale
            weights[name] = (steps.round() * scale).flatten(1)
    quantizer.save_quantized(str(output), format="auto_round")
    return weights


def compressed_tensors(model: Path, output: Path, options: Mapping[str, Any]) -> Weights:
    """compressed-tensors' packing of weights that are rounded to the nearest."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    arguments = QuantizationArgs(**options)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    packer = BaseCompressor.get_value_from_registry("pack-quantized")
    state, weights = load_file(model / "model.safetensors"), {}
    for name in list(state):
        layer, _, suffix = name.rpartition(".")
        if suffix != "weight" or any(skipped in layer for skipped in _SKIPPED):
            continue
        weight = state.pop(name).float()
        groups = weight.unflatten(1, (-1, arguments.group_size or weight.shape[1]))
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
        given = {"weight": weight, "weight_scale": scale.half(), "weight_zero_point": zero.to(torch.int8)}
        packed = packer.compress(given, scheme)
        exact = packed | {"weight_scale": packed["weight_scale"].float()}  # it would multiply in float16
        weights[layer] = packer.decompress(exact, scheme)["weight"].contiguous()
        state |= {f"{layer}.{part}": tensor.contiguous() for part, tensor in packed.items()}
    shutil.copytree(model, output, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(state, output / "model.safetensors", {"format": "pt"})
    group = {**scheme.model_dump(mode="json"), "format": "pack-quantized"}
    config = json.loads((output / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
        "version": version("compressed-tensors"),
    }
    (output / "config.json").write_text(json.dumps(config))
    return weights


TOOLS: dict[str, Callable[[Path, Path, Mapping[str, Any]], Weights]] = {
    "gptqmodel": gptqmodel,
    "auto-round": auto_round,
    "compressed-tensors": compressed_tensors,
}
"""What writes a checkpoint of a model's folder to another one, with options, by the tool's name on PyPI."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="folder of the unquantized model")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write one for each into")
    parser.add_argument("--options", type=json.loads, required=True, metavar="JSON", help="a list: those of each")
    options = parser.parse_args(arguments)
    model, output = options.model.resolve(), options.output.resolve()
    for number, chosen in enumerate(options.options):
        folder = output / str(number)
        try:
            with scratch_folder():
                weights = TOOLS[options.tool](model, folder, chosen)
        except Exception as cause:  # whatever a tool may raise: the others are still to be made
            folder.mkdir(parents=True, exist_ok=True)
            (folder / FAILED_FILE).write_text(f"{type(cause).__name__}: {cause}")
            continue
        save_file(weights, folder / WEIGHTS_FILE, {"package": f"{options.tool} {version(options.tool)}"})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
