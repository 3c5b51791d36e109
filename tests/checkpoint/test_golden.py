"""Checkpoints of every format version that there ever was: what comes of them is the same bytes for ever."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_matquant.checkpoint.codebook import Codebook
from vllm_matquant.checkpoint.files import read_json
from vllm_matquant.checkpoint.names import CONFIG_FILE, MANIFEST_FILE
from vllm_matquant.checkpoint.packing import pack_codes
from vllm_matquant.checkpoint.quantization_config import format_from_config, format_to_config
from vllm_matquant.checkpoint.reader import Checkpoint, open_checkpoint
from vllm_matquant.checkpoint.slice import Slice
from vllm_matquant.checkpoint.verify import verify
from vllm_matquant.kernels.support import REFERENCE, Request, select_kernel
from vllm_matquant.kernels.weight import StoredSegment

GOLDEN = Path(__file__).parent / "golden"
CHECKPOINTS = ["version-1/truncated", "version-1/rounded", "version-2/truncated", "version-3/codebooks"]


def digests_of(name: str) -> dict[str, dict[str, str]]:
    """The recorded digests of a checkpoint, by slice."""
    version, _, own = name.partition("/")
    recorded: dict[str, dict[str, dict[str, str]]] = json.loads((GOLDEN / version / "digests.json").read_text())
    return recorded[own]


SLICES = [(name, which) for name in CHECKPOINTS for which in digests_of(name)]


def digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 of layers' names and tensors."""
    sha256 = hashlib.sha256()
    for layer, tensor in tensors:
        sha256.update(layer.encode())
        sha256.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return sha256.hexdigest()


def stack(values: Any) -> torch.Tensor:
    """What a decoder consists of, in the order of golden/README.md."""
    if isinstance(values, Codebook):
        return torch.cat([each.flatten() for each in (values.levels, values.increments, values.scale)])
    return torch.stack([values.scale, values.offset])


def open_slice(name: str, which: str) -> tuple[Checkpoint, Slice]:
    checkpoint = open_checkpoint(GOLDEN / name)
    uniform = which.removeprefix("uniform-")
    return checkpoint, checkpoint.slice(int(uniform) if uniform.isdigit() else which)


def dense_input(columns: int) -> torch.Tensor:
    """Three rows of sixteenths, which bfloat16 holds."""
    return (((torch.arange(3 * columns) * 37) % 61 - 30) / 16).view(3, columns)


def sparse_input(columns: int) -> torch.Tensor:
    """A 1 and a 2 in each row: a product with it is rounded once, whatever the order of summation."""
    ones = torch.eye(columns)
    return ones + 2 * ones.roll(5, 1)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_opens_and_is_what_its_manifest_says(name: str) -> None:
    results = list(verify(GOLDEN / name))
    assert [result.text for result in results if not result.passed] == []
    listed = set(read_json(GOLDEN / name / MANIFEST_FILE)["files"])
    files = {path.relative_to(GOLDEN / name).as_posix() for path in (GOLDEN / name).rglob("*") if path.is_file()}
    assert listed == files - {MANIFEST_FILE}
    assert {f"{file}: SHA-256 as in {MANIFEST_FILE}" for file in listed} <= {result.text for result in results}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_slice_has_digests(name: str) -> None:
    checkpoint = open_checkpoint(GOLDEN / name)
    assert name.startswith(f"version-{checkpoint.format.decoder_kind.format_version}/")
    kinds = {"codes", "decoders", "weights", "reference"} | (
        {"cpu bfloat16", "cpu float32"} if name.startswith("version-1") else set()
    )
    assert all(digests.keys() == kinds for digests in digests_of(name).values())
    uniform = {f"uniform-{width}" for width in checkpoint.format.widths}
    assert digests_of(name).keys() == uniform | {recipe.name for recipe in checkpoint.recipes}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_config_is_written_as_it_was(name: str) -> None:
    text = (GOLDEN / name / CONFIG_FILE).read_text()
    config = json.loads(text)
    again = format_to_config(format_from_config(config["quantization_config"]))
    assert json.dumps(again) == json.dumps(config["quantization_config"])  # the order of the fields too
    assert json.dumps(config | {"quantization_config": again}, indent=2, ensure_ascii=False) + "\n" == text


@pytest.mark.parametrize(("name", "which"), SLICES)
def test_codes_decoders_and_weights(name: str, which: str) -> None:
    checkpoint, served = open_slice(name, which)
    layers = list(checkpoint.coded_layers(served))
    expected = digests_of(name)[which]
    assert digest((layer, codes) for layer, codes, _ in layers) == expected["codes"]
    stacked = ((layer, stack(decoder.values)) for layer, _, decoder in layers)
    assert digest(stacked) == expected["decoders"]
    assert digest(checkpoint.weights(served)) == expected["weights"]


@pytest.mark.parametrize(("name", "which"), SLICES)
def test_products(name: str, which: str) -> None:
    checkpoint, served = open_slice(name, which)
    products: dict[str, list[tuple[str, torch.Tensor]]] = {"reference": [], "cpu bfloat16": [], "cpu float32": []}
    for layer, codes, decoder in checkpoint.coded_layers(served):
        rows, columns = codes.shape
        group_size = checkpoint.format.group_size_of(columns, layer)
        base, planes = pack_codes(codes << (8 - decoder.width), decoder.width)
        segment = StoredSegment(base, planes, [decoder], [rows], [decoder.width])
        packed = REFERENCE.pack([segment], columns, group_size, "cpu")
        product = REFERENCE.linear(sparse_input(columns), packed.handle, rows)
        products["reference"].append((layer, product))
        for dtype in (torch.bfloat16, torch.float32):
            kind = checkpoint.format.decoder_kind
            kernel = select_kernel(Request("cpu", dtype, (decoder.width,), columns, group_size, kind))
            assert kernel.name == "cpu"
            # How far a kernel rounds activations by default is no property of a checkpoint: these were the recorder's.
            bits = 8 if decoder.width == 2 and dtype == torch.bfloat16 else None if dtype == torch.float32 else 16
            weight = kernel.pack([segment], columns, group_size, "cpu", bits)
            product = kernel.linear(dense_input(columns).to(dtype), weight.handle, rows)
            products[f"cpu {str(dtype).removeprefix('torch.')}"].append((layer, product))
    expected = digests_of(name)[which].items()
    recorded = {kind: sha256 for kind, sha256 in expected if kind in products}
    assert "reference" in recorded
    assert {kind: digest(products[kind]) for kind in recorded} == recorded
