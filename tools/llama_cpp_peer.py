"""Quantize a model with llama.cpp's types, and write the weights of its layers dequantized.

tools/compare_quantizers.py runs this file: once to ``prepare`` what all types share, a GGUF file of the source's values
and an importance matrix, and then once to ``quantize`` to each type. The importance matrix holds the mean square of
every input of a layer over the calibration tokens, which is what llama.cpp's own llama-imatrix measures; the source
model gives them here, in float32, so that the tokens are those of all other methods.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import vllm_matquant.cli.threads  # noqa: F401 - before torch

# isort: split
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from vllm_matquant.measure.model import batches
from vllm_matquant.quantize.source import SourceModel, read_matrix

# Types of whole models, as llama-quantize calls them, and the width that each is meant for. Which type a tensor gets is
# llama.cpp's choice: some get a wider one, and where 256 does not divide a row, a fallback.
TYPES = {"Q2_K": 2, "IQ2_XS": 2, "IQ2_M": 2, "Q3_K_M": 3, "Q4_K_M": 4, "Q8_0": 8}
CONVERTER, PROGRAM = Path("convert_hf_to_gguf.py"), Path("build", "bin", "llama-quantize")  # in llama.cpp's folder
MODEL_FILE = "model.gguf"  # the source's values in float32, or in a type's folder the quantized model
IMPORTANCE_FILE = "importance.gguf"
WEIGHTS_FILE = "weights.safetensors"  # a type's dequantized weights


def llama_cpp_folder(text: str) -> Path:
    """The path of llama.cpp's source, with what this file runs of it."""
    folder = Path(text)
    for file, remedy in (
        (CONVERTER, "llama.cpp's source, which llama-cpp-python brings along in vendor/llama.cpp: "
                    "pip download --no-deps --no-binary llama-cpp-python llama-cpp-python"),
        (PROGRAM, f"it built: cmake -S {folder} -B {folder / 'build'} -DCMAKE_BUILD_TYPE=Release && "
                  f"cmake --build {folder / 'build'} --target {PROGRAM.name}"),
    ):  # fmt: skip
        if not (folder / file).is_file():
            raise argparse.ArgumentTypeError(f"found no {folder / file}, expected {remedy}")
    return folder.resolve()


def import_gguf() -> Any:
    """The package gguf.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise ValueError("gguf: found no such package, expected it for llama.cpp's files: pip install gguf") from None
    return gguf


def linear_layers(source: SourceModel) -> list[str]:
    """Names of the layers that are compared: the linear ones of the transformer blocks."""
    return [matrix.name for matrix in source.matrices.values() if matrix.block is not None]


def tensor_names(layers: Sequence[str], architecture: str, blocks: int) -> dict[str, str]:
    """What llama.cpp calls the weight of each layer.

    Args:
        layers: names of layers, as transformers has them.
        architecture: llama.cpp's name of it.
        blocks: how many transformer blocks the model has.

    Raises:
        ValueError: it has no tensor for a layer.
    """
    gguf = import_gguf()
    known = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        raise ValueError(f"architecture: found {architecture!r}, expected one that the package gguf knows; renew it")
    names = gguf.get_tensor_name_map(known[architecture], blocks)
    found = {layer: names.get_name(layer) for layer in layers}
    for layer, name in found.items():
        if name is None:
            raise ValueError(f"{layer}: found no tensor of llama.cpp's {architecture} for it, expected one of its own")
    return {layer: f"{name}.weight" for layer, name in found.items()}


class GgufFile:
    """A model's GGUF file.

    Args:
        path: of the file.
        layers: names of the layers to read, as transformers has them.

    Attributes:
        tensors: the tensor of each layer, as the package gguf reads it.

    Raises:
        ValueError: it holds no tensor of a layer.
    """

    def __init__(self, path: Path, layers: Sequence[str]) -> None:
        self._gguf = import_gguf()
        reader = self._gguf.GGUFReader(path)
        stored = {tensor.name: tensor for tensor in reader.tensors}
        architecture = reader.fields["general.architecture"].contents()
        names = tensor_names(layers, architecture, reader.fields[f"{architecture}.block_count"].contents())
        absent = [name for name in names.values() if name not in stored]
        if absent:
            raise ValueError(f"{path}: found no tensor {absent[0]}, expected one for each layer")
        self.tensors = {layer: stored[name] for layer, name in names.items()}

    def weight(self, layer: str) -> np.ndarray:
        """A layer's dequantized weight, float32 [out_features, in_features], its rows as they lie in the file."""
        tensor = self.tensors[layer]
        weight: np.ndarray = self._gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        return weight

    @property
    def bits_per_weight(self) -> float:
        """Bits in the file for a weight of the layers: codes, scales and all else of a type's blocks."""
        tensors = self.tensors.values()
        return 8 * sum(int(tensor.n_bytes) for tensor in tensors) / sum(int(tensor.n_elements) for tensor in tensors)

    @property
    def types(self) -> dict[str, float]:
        """Which share of the layers' weights has which type, largest first."""
        weights: Counter[str] = Counter()
        for tensor in self.tensors.values():
            weights[tensor.tensor_type.name] += int(tensor.n_elements)
        return {name: count / weights.total() for name, count in weights.most_common()}


def row_places(converted: np.ndarray, source: np.ndarray) -> np.ndarray:
    """Where a converted matrix holds each row of its source.

    llama.cpp's converter interleaves the rows of each head's queries and keys for some architectures. Rows are
    quantized one by one, so the places undo that for the quantized matrix too. Rows that are equal may be taken for
    each other.

    Args:
        converted: float32, what the converter wrote.
        source: float32 of the same shape.

    Returns:
        int64 [rows]: ``converted[places]`` equals ``source``.

    Raises:
        ValueError: a row of the source is not there.
    """
    places = {row.tobytes(): place for place, row in enumerate(converted)}
    if converted.shape != source.shape or not all(row.tobytes() in places for row in source):
        raise ValueError("found other values than the source's, expected its rows in some order")
    return np.array([places[row.tobytes()] for row in source], dtype=np.int64)


@torch.no_grad()
def square_sums(model: Path, layers: Sequence[str], tokens: torch.Tensor) -> dict[str, np.ndarray]:
    """What the squares of each layer's inputs add up to over all tokens.

    Args:
        model: folder of the source model.
        layers: names of linear layers.
        tokens: int64 [samples, sequence_length].

    Returns:
        float32 [in_features] for each layer.
    """
    source = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, trust_remote_code=False).eval()
    sums: dict[str, torch.Tensor] = {}

    def add(layer: str, inputs: torch.Tensor) -> None:
        squares = inputs.flatten(0, -2).double().square().sum(0)
        sums[layer] = sums[layer] + squares if layer in sums else squares

    for layer in layers:
        source.get_submodule(layer).register_forward_pre_hook(
            lambda _, inputs, layer=layer: add(layer, inputs[0])  # one that gives None leaves the inputs
        )
    for batch in batches(tokens):
        source.base_model(batch, use_cache=False)  # without the output head
    return {layer: total.float().numpy() for layer, total in sums.items()}


def write_importance(
    path: Path, sums: Mapping[str, np.ndarray], names: Mapping[str, str], tokens: torch.Tensor
) -> None:
    """Write an importance matrix as llama-imatrix does.

    Args:
        path: of the file.
        sums: for each layer what the squares of its inputs add up to.
        names: what llama.cpp calls the weight of each layer.
        tokens: those that were added up, int64 [samples, sequence_length].
    """
    gguf = import_gguf()
    writer = gguf.GGUFWriter(path, arch="")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["calibration"])
    writer.add_uint32("imatrix.chunk_count", tokens.shape[0])
    writer.add_uint32("imatrix.chunk_size", tokens.shape[1])
    for layer, total in sums.items():
        writer.add_tensor(f"{names[layer]}.in_sum2", total[None])
        writer.add_tensor(f"{names[layer]}.counts", np.full((1, 1), tokens.numel(), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run(*command: object) -> None:
    """Run a program of llama.cpp; what it writes goes where this process writes.

    Raises:
        ValueError: it failed.
    """
    words = [str(word) for word in command]
    status = subprocess.run(words, stderr=subprocess.STDOUT, check=False).returncode
    if status != 0:
        raise ValueError(f"{' '.join(words)} ended with status {status}")


def prepare(options: argparse.Namespace) -> None:
    """Write the source's GGUF file and the importance matrix."""
    layers = linear_layers(SourceModel(options.model))
    file = options.output / MODEL_FILE
    # Values in float32 are the source's, whatever type it has.
    converter = options.llama_cpp_folder / CONVERTER
    run(sys.executable, converter, options.model, "--outtype", "f32", "--outfile", file)
    converted, tokens = GgufFile(file, layers), load_file(options.tokens)["tokens"]
    names = {layer: tensor.name for layer, tensor in converted.tensors.items()}
    write_importance(options.output / IMPORTANCE_FILE, square_sums(options.model, layers, tokens), names, tokens)


def quantize(options: argparse.Namespace) -> None:
    """Write a type's GGUF file and its weights."""
    start = time.perf_counter()
    source, file, quantized_file = (
        SourceModel(options.model),
        options.prepared / MODEL_FILE,
        options.output / MODEL_FILE,
    )
    program, importance = options.llama_cpp_folder / PROGRAM, options.prepared / IMPORTANCE_FILE
    run(program, "--imatrix", importance, file, quantized_file, options.type, torch.get_num_threads())
    seconds = time.perf_counter() - start
    layers = linear_layers(source)
    converted, quantized = GgufFile(file, layers), GgufFile(quantized_file, layers)
    weights = {}
    for layer in layers:
        try:
            places = row_places(converted.weight(layer), read_matrix(source, layer).float().numpy())
        except ValueError as error:
            raise ValueError(f"{file}: {layer}: {error}") from None
        weights[layer] = torch.from_numpy(quantized.weight(layer)[places])
    facts = {
        "seconds": repr(seconds),
        "bits_per_weight": repr(quantized.bits_per_weight),
        "types": json.dumps(quantized.types),
    }
    save_file(weights, options.output / WEIGHTS_FILE, metadata=facts)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    jobs = parser.add_subparsers(dest="job", required=True)
    first, second = jobs.add_parser("prepare", help=prepare.__doc__), jobs.add_parser("quantize", help=quantize.__doc__)
    second.add_argument("type", choices=TYPES, help="as llama-quantize calls it")
    for job in (first, second):
        job.add_argument("--llama-cpp-folder", type=llama_cpp_folder, required=True, metavar="DIR", help="llama.cpp")
        job.add_argument("--model", type=Path, required=True, metavar="DIR", help="folder of the source model")
        job.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write into")
    first.add_argument(
        "--tokens", type=Path, required=True, metavar="FILE", help="safetensors file; tokens: int64 [samples, length]"
    )
    second.add_argument("--prepared", type=Path, required=True, metavar="DIR", help="what prepare wrote into")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        {"prepare": prepare, "quantize": quantize}[options.job](options)
    except (ValueError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
