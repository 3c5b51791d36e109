"""Import checkpoints that other projects' tools have written, and compare them with the weights that these read.

A small random model is quantized by the tool, in an environment of its own, and imported here. In the table stand, of
all its layers, the largest difference between the widest slice and the tool's own dequantized weights, in steps between
two codes, and the error of the next narrower slices.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import vllm_matquant.cli.threads  # noqa: F401 - before torch

# isort: split
import torch
from fetch_model import fetch_model
from peer_checkpoints import FAILED_FILE, WEIGHTS_FILE
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from vllm_matquant.checkpoint.errors import CheckpointError
from vllm_matquant.checkpoint.files import publish_json
from vllm_matquant.checkpoint.reader import open_checkpoint
from vllm_matquant.jobs.import_model import ImportModel

SHAPE: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
Row = dict[str, Any]


def _gptq(bits: int, **options: Any) -> Row:
    return {"bits": bits, "group_size": 32, "sym": False, **options}


def _auto_round(bits: int, **options: Any) -> Row:
    return {"bits": bits, "group_size": 32, "sym": True, **options}


def _compressed(bits: int, **options: Any) -> Row:
    return {"num_bits": bits, "symmetric": False, "strategy": "group", "group_size": 32, **options}


CASES: dict[str, list[Row]] = {
    "gptqmodel": [
        _gptq(4, method="awq", format="gemm"),
        *(_gptq(bits, format="gptq") for bits in (2, 3, 4, 8)),
        *(_gptq(bits, format="gptq_v2") for bits in (3, 4)),
        *(_gptq(bits, format="gptq_p") for bits in (3, 5, 6, 7)),
        _gptq(4, sym=True),
        _gptq(4, desc_act=True),
    ],
    "auto-round": [
        # Release 0.16.1 fails to write asymmetric codes of 4 bits, which have AWQ's packing.
        *(_auto_round(bits) for bits in (2, 3, 4, 8)),
        *(_auto_round(bits, sym=False) for bits in (2, 3)),
    ],
    "compressed-tensors": [
        *(_compressed(bits) for bits in (2, 3, 4, 5, 6, 7, 8)),
        _compressed(4, symmetric=True),
        _compressed(8, symmetric=True, strategy="channel", group_size=None),
    ],
}
"""The options of each tool."""


def write_source(folder: Path) -> Path:
    """A random model in float16, with a tokenizer of 49,152 words."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(fetch_model())
    config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=False, **SHAPE)
    AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def check(options: Row, given: Path, nested: Path) -> Row:
    """Import what a tool has written, and compare.

    Args:
        options: of the tool.
        given: the folder that it has written.
        nested: folder to import it to.
    """
    if (given / FAILED_FILE).exists():
        return {"options": options, "result": f"the tool failed: {(given / FAILED_FILE).read_text()[:200]}"}
    with safe_open(given / WEIGHTS_FILE, framework="pt") as file:
        package = file.metadata()["package"]
    weights = load_file(given / WEIGHTS_FILE)
    (given / WEIGHTS_FILE).unlink()
    row: Row = {"package": package, "options": options, "method": "exact"}
    try:
        outcome = ImportModel(given, nested, no_report=True).run()
    except CheckpointError as error:
        row |= {"refused": f"{error.subject}: found {error.found}", "method": "nearest"}
        outcome = ImportModel(given, nested, method="nearest", no_report=True).run()
    checkpoint = open_checkpoint(nested)
    widest, steps = checkpoint.slice(), []
    if (found := checkpoint.layers.keys()) != weights.keys():
        return row | {"result": f"other layers than the tool has: {sorted(found ^ weights.keys())}"}
    for layer, weight in checkpoint.weights(widest):
        scale = checkpoint.decoder(layer, checkpoint.format.max_width).affine.scale
        difference = (weight - weights[layer]).abs().unflatten(1, (scale.shape[1], -1)).amax(-1)
        steps.append(float((difference / scale).max()))
    errors = {width: max(of_layer[width] for of_layer in outcome.errors.values()) for width in checkpoint.format.widths}
    return row | {"result": "imported", "layers": len(found), "steps": max(steps), "errors": errors}


def table(rows: Sequence[Row]) -> Iterator[str]:
    """The rows in Markdown."""
    yield "| tool | options | imported | largest difference, in steps |"
    yield "|---|---|---|---|"
    for row in rows:
        options = ", ".join(f"{name} {value}" for name, value in row["options"].items())
        steps = f"{row['steps']:.2g}" if "steps" in row else row["result"]
        yield f"| {row.get('package', '')} | {options} | {row.get('method', '')} | {steps} |"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tool", choices=CASES, help="the tool that quantizes")
    parser.add_argument(
        "--python", type=Path, default=Path(sys.executable), help="interpreter of its environment (default: this one)"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the rows there")
    options = parser.parse_args(arguments)
    rows, cases = [], CASES[options.tool]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        program = str(Path(__file__).with_name("peer_checkpoints.py"))
        made = [str(options.python), program, options.tool, "--model", str(write_source(folder / "source"))]
        subprocess.run([*made, "--output", str(folder / "given"), "--options", json.dumps(cases)], check=True)
        for number, case in enumerate(cases):
            rows.append(check(case, folder / "given" / str(number), folder / "nested" / str(number)))
            print(json.dumps(rows[-1]), flush=True)
    print("\n".join(table(rows)))
    if options.json:
        publish_json(options.json, rows)
    return int(any(row["result"] != "imported" for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
