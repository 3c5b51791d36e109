"""A real model from its source to tokens: quantized once by the command line, then verified, served and evaluated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.serve.engine_jobs import run_jobs
from tests.serve.rank_bytes import bytes_of_rank
from vllm_matquant.checkpoint.decoder import AFFINE_INT8, CODEBOOK, DecoderKind
from vllm_matquant.checkpoint.names import shard_width
from vllm_matquant.checkpoint.reader import Checkpoint, open_checkpoint
from vllm_matquant.checkpoint.spec import WIDTHS
from vllm_matquant.cli import main
from vllm_matquant.measure.model import LayerModel
from vllm_matquant.measure.windows import draw_windows, load_tokenizer
from vllm_matquant.quantize.activations import Activations
from vllm_matquant.quantize.hessian import HessianCollector
from vllm_matquant.quantize.layer import relative_error
from vllm_matquant.quantize.methods import METHODS
from vllm_matquant.quantize.source import SourceModel

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
PROMPT = "The capital of France is Paris, and the city is known for its museums."
SERVED = (8, 4, 3, 2)
RANKS = 3  # the model has nine heads, which two ranks cannot share
TOLERANCE = 2e-3  # of log-probabilities in float32, after 30 blocks


def run(*command: object, **environment: str) -> str:
    """Run a Python program, fail with what it said unless it succeeds."""
    parts = [sys.executable, *map(str, command)]
    done = subprocess.run(parts, env=os.environ | environment, capture_output=True, text=True, timeout=3600)
    if done.returncode:
        pytest.fail(f"{' '.join(parts)}: exit status {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout


@pytest.fixture(scope="session")
def nested(real_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real") / "nested"
    # Without the sweeps, which the layers of the last test get, and with little training it takes half the time.
    few = ["--samples", "8", "--sequence-length", "256", "--held-out-samples", "1"]
    few += ["--setting", "sweeps=0", "--setting", "end_to_end.epochs=0.5"]
    run(REPOSITORY / "tools" / "quantize.py", real_model, "--output", folder, "--group-size", "64", *few)
    return folder


@pytest.fixture(scope="session")
def first_planes(nested: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same folder without the files of the widths 4 to 8."""
    folder = tmp_path_factory.mktemp("real") / "first planes"
    folder.mkdir()
    for file in nested.iterdir():
        if file.is_file() and (shard_width(file.name) or 0) <= 3:
            (folder / file.name).hardlink_to(file)
    return folder


@pytest.fixture(scope="session")
def tokens(real_model: Path) -> list[int]:
    return load_tokenizer(real_model).ids(PROMPT)


@pytest.fixture(scope="session")
def engines(
    nested: Path, first_planes: Path, tokens: list[int], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What vLLM's engines gave, all of them run by one process."""

    def job(folder: Path, bits: int, **llm: Any) -> dict[str, Any]:
        settings = {"additional_config": {"matquant": {"bits": bits}}, "gpu_memory_utilization": 0.5}
        return {"model": str(folder), "tokens": tokens, "llm": settings | llm}

    jobs = {f"{bits} bits": job(nested, bits) for bits in SERVED}
    jobs["parallel"] = job(nested, 4, tensor_parallel_size=RANKS, distributed_executor_backend="mp")
    jobs["first planes"] = job(first_planes, 3)
    jobs["missing planes"] = job(first_planes, 4)

    return run_jobs("engine_runs", jobs, tmp_path_factory.mktemp("engines"))[0]


@torch.no_grad()
def reference(model: Path, checkpoint: Checkpoint, width: int, tokens: list[int]) -> torch.Tensor:
    """Log-probabilities of transformers' model with the slice's decoded weights in it."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    LayerModel(loaded, checkpoint.layers).load(checkpoint.weights(checkpoint.slice(width)))
    return loaded(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)


def served(engines: dict[str, dict[str, Any]], name: str) -> torch.Tensor:
    assert "error" not in engines[name], engines[name]["error"]
    [rows] = engines[name]["log_probabilities"]
    return rows


def test_the_checkpoint_is_sound(nested: Path) -> None:
    assert run(REPOSITORY / "tools" / "verify.py", nested).splitlines()[-1] == f"{nested}: sound"
    checkpoint = open_checkpoint(nested)
    assert checkpoint.servable_widths == WIDTHS
    assert len(checkpoint.layers) == 210


@pytest.mark.parametrize("bits", SERVED)
def test_served_logits(engines: dict, real_model: Path, nested: Path, tokens: list[int], bits: int) -> None:
    checkpoint, rows = open_checkpoint(nested), served(engines, f"{bits} bits")
    expected = reference(real_model, checkpoint, bits, tokens)
    torch.testing.assert_close(rows, expected, rtol=0, atol=TOLERANCE)
    assert engines[f"{bits} bits"]["resident_bytes"] == [checkpoint.slice(bits).resident_bytes]


def test_widths_differ_by_more_than_the_tolerance(engines: dict) -> None:
    for narrow, wide in ((2, 3), (3, 4), (4, 8)):
        gap = served(engines, f"{narrow} bits") - served(engines, f"{wide} bits")
        assert gap.abs().max() > 20 * TOLERANCE


def test_tensor_parallelism(engines: dict, nested: Path) -> None:
    torch.testing.assert_close(served(engines, "parallel"), served(engines, "4 bits"), rtol=0, atol=TOLERANCE)
    checkpoint = open_checkpoint(nested)
    share = bytes_of_rank(checkpoint, checkpoint.slice(4).widths, RANKS)
    assert engines["parallel"]["resident_bytes"] == [share] * RANKS


def test_a_folder_without_the_last_planes(engines: dict, first_planes: Path) -> None:
    assert torch.equal(served(engines, "first planes"), served(engines, "3 bits"))
    refusal = engines["missing planes"]["error"]
    assert refusal.startswith("MissingFileError")
    assert "no model-width4-00001-of-00001.safetensors" in refusal
    assert "The folder serves 2, 3 bits" in refusal


def test_quality(nested: Path, real_model: Path, real_text: Path, tmp_path: Path) -> None:
    arguments = [str(nested), "--reference", str(real_model), "--text", str(real_text), "--json"]
    few = ["--bits", "8,4", "--samples", "4", "--sequence-length", "256"]
    assert main(["evaluate", *arguments, str(tmp_path / "rows.json"), *few]) == 0
    four, eight = json.loads((tmp_path / "rows.json").read_text())
    assert (four["bits"], eight["bits"]) == (4, 8)
    assert 0 < eight["kl"] < 0.02
    assert eight["kl"] < four["kl"] < 1
    assert eight["perplexity"] == pytest.approx(eight["reference_perplexity"], rel=0.05)
    assert eight["perplexity"] < four["perplexity"] < 2 * four["reference_perplexity"]


@torch.no_grad()
def test_nested_is_better_on_real_layers(real_model: Path) -> None:
    """Than MatGPTQ at every width of three layers, and than GPTQ run for 2, 3 or 4 bits alone on one.

    With codebooks it is better still at 2 and 3 bits, with a parent for other widths too and for 2 bits alone.
    """
    source = SourceModel(real_model)
    calibration = draw_windows(None, load_tokenizer(real_model), samples=8, sequence_length=256, seed=0)
    activations = Activations(source.runner, calibration.tokens)
    activations.advance(source.runner.load_block(0), {})
    block = source.runner.load_block(1)
    layers = {name: block.get_submodule(name) for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")}
    hessians = HessianCollector(layers)
    with hessians.collecting():
        activations.outputs(block)

    def errors(
        name: str, method_name: str, widths: tuple[int, ...] = WIDTHS, kind: DecoderKind = AFFINE_INT8
    ) -> dict[int, float]:
        method, weight, hessian = METHODS[method_name](widths), layers[name].weight, hessians.hessian(name)
        quantized = method.quantize(weight, hessian, 64, kind)
        return relative_error(
            [weight] * len(widths), quantized, method.slices(quantized.codes), [hessian] * len(widths)
        )

    nested = {name: errors(name, "nested") for name in layers}
    for name in layers:
        for width, error in errors(name, "matgptq").items():
            assert nested[name][width] < error, (name, width)
    for width in (2, 3, 4):
        assert nested["self_attn.q_proj"][width] < errors("self_attn.q_proj", "gptq", (width,))[width], width
    codebooks = errors("self_attn.q_proj", "nested-vq", (2, 3, 4, 8), CODEBOOK)
    for width in (2, 3):
        assert codebooks[width] < 0.95 * nested["self_attn.q_proj"][width], width
    alone = errors("self_attn.q_proj", "nested-vq", (2,), CODEBOOK)[2]
    assert alone < 0.95 * errors("self_attn.q_proj", "nested", (2,))[2]
