"""lm-eval on a served model, with a task of a few lines: its log-likelihoods are those of the slice."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.quantize.tiny_sources import VOCABULARY, byte_tokenizer
from tests.serve.tiny_models import log_probabilities, reference_model, write_checkpoint
from vllm_matquant.checkpoint.spec import Format

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("lm_eval") is None, reason="lm-eval is not installed (pip install 'vllm_matquant[eval]')"
    ),
]

BITS = 3
DOCUMENTS = [
    {"question": "the cat sat on", "choices": ["the mat", "a mouse", "it"], "answer": 0},
    {"question": "and the other cat", "choices": ["thought", "that it had"], "answer": 1},
]
TASK = """
task: cats
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
ENGINE = {"dtype": "float32", "max_model_len": 64, "enforce_eager": True, "gpu_memory_utilization": 0.3}
START_SECONDS = 300


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm_eval") / "nested"
    write_checkpoint(folder, "llama", Format(group_size=32), vocab_size=VOCABULARY)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the task ``cats``."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = "".join(json.dumps(document) + "\n" for document in DOCUMENTS)
    (folder / "cats.jsonl").write_text(lines)
    (folder / "cats.yaml").write_text(TASK.format(file=folder / "cats.jsonl"))
    return folder


@contextlib.contextmanager
def served(checkpoint: Path, log: Path) -> Iterator[str]:
    """Address of a server of the checkpoint, which is gone afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [f"--{name.replace('_', '-')}={value}" for name, value in ENGINE.items() if value is not True]
    command = [Path(sys.executable).with_name("vllm"), "serve", checkpoint, "--bits", BITS, "--port", port]
    command += ["--host", "127.0.0.1", "--served-model-name", "nested", "--enforce-eager", *options]
    with log.open("w") as output:
        server = subprocess.Popen([*map(str, command)], stdout=output, stderr=output, start_new_session=True)
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + START_SECONDS
        while not healthy(address):
            if server.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"{' '.join(map(str, command))}: no server\n{log.read_text()[-5000:]}")
            time.sleep(0.5)
        yield address
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def healthy(address: str) -> bool:
    try:
        return urllib.request.urlopen(f"{address}/health", timeout=5).status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def lm_eval(model: str, arguments: dict[str, Any], tasks: Path, output: Path) -> list[dict[str, Any]]:
    """Run the task; what lm-eval noted of each document."""
    program = str(Path(sys.executable).with_name("lm-eval"))
    command = [program, "run", "--model", model, "--model_args", json.dumps(arguments)]
    command += ["--tasks", "cats", "--include_path", str(tasks), "--log_samples", "--output_path", str(output)]
    environment = os.environ | {"HF_HOME": str(output / "cache"), "VLLM_LOGGING_LEVEL": "WARNING"}
    output.mkdir()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    samples = next(output.glob("*/samples_cats_*.jsonl"), None)
    # A thread of a library that lm-eval loads can abort the interpreter at its exit, when all samples have been saved.
    if samples is None or done.returncode not in (0, -signal.SIGABRT):
        pytest.fail(f"{' '.join(command)}: exit status {done.returncode}\n{done.stderr[-5000:]}")
    return [json.loads(line) for line in samples.read_text().splitlines()]


def expected(checkpoint: Path, bits: int) -> list[list[float]]:
    """Log-likelihood of each choice of each document at this width, by transformers."""
    model, tokenizer = reference_model(checkpoint, bits), byte_tokenizer()
    likelihoods = []
    for document in DOCUMENTS:
        question = tokenizer.encode(document["question"], add_special_tokens=False)
        sums = []
        for choice in document["choices"]:
            tokens = tokenizer.encode(f"{document['question']} {choice}", add_special_tokens=False)
            assert tokens[: len(question)] == question
            rows = log_probabilities(model, tokens)[len(question) - 1 :]
            sums.append(rows.gather(1, torch.tensor(tokens[len(question) :])[:, None]).sum().item())
        likelihoods.append(sums)
    return likelihoods


def assert_of_the_slice(samples: list[dict[str, Any]], checkpoint: Path) -> None:
    found = [[float(likelihood) for likelihood, _ in sample["filtered_resps"]] for sample in samples]
    for likelihoods, slice_, other in zip(found, expected(checkpoint, BITS), expected(checkpoint, 8), strict=True):
        assert likelihoods == pytest.approx(slice_, abs=1e-3)
        assert likelihoods != pytest.approx(other, abs=1e-2)  # another width would be seen
    right = [
        max(range(len(sums)), key=sums.__getitem__) == document["answer"]
        for sums, document in zip(expected(checkpoint, BITS), DOCUMENTS, strict=True)
    ]
    assert [sample["acc"] for sample in samples] == right


def test_a_server(checkpoint: Path, tasks: Path, tmp_path: Path) -> None:
    with served(checkpoint, tmp_path / "server.log") as address:
        arguments = {"model": "nested", "base_url": f"{address}/v1/completions", "tokenizer": str(checkpoint)}
        samples = lm_eval("local-completions", arguments | {"num_concurrent": 2}, tasks, tmp_path / "out")
    assert_of_the_slice(samples, checkpoint)


def test_an_engine_of_its_own(checkpoint: Path, tasks: Path, tmp_path: Path) -> None:
    arguments = {"pretrained": str(checkpoint), "additional_config": {"matquant": {"bits": BITS}}}
    samples = lm_eval("vllm", ENGINE | arguments, tasks, tmp_path / "out")
    assert_of_the_slice(samples, checkpoint)
