"""Runs vLLM engines one after another in this process: ``python -m ... JOBS.json RESULTS.pt``.

A process of its own, for engines leave global state behind. A job is an object with ``model``, ``tokens`` (a prompt),
``llm`` (arguments of ``LLM``) and, to switch widths while the engine runs, ``switch`` (a list of {part of a layer's
name: its width}, each set before one more run), or ``pooling`` ("embed" or "classify"). Its result holds
``log_probabilities`` (of the start and of each switch), bytes of each rank and ``generated``, how many programs
torch.compile wrote that it had not written before; or what pooling gave as ``pooled``; or the ``error``.
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, SamplingParams, envs
from vllm.distributed import cleanup_dist_env_and_memory

from tests.serve.engine_jobs import BEGINNING
from vllm_matquant.serve.linear import predicted_bytes, quantized_layers, resident_bytes, set_active
from vllm_matquant.serve.step_bytes import step_bytes

DEFAULTS = {
    "dtype": "float32",
    "enforce_eager": True,
    "skip_tokenizer_init": True,
    "max_model_len": 64,
    "max_num_seqs": 4,
    "max_logprobs": -1,
    "disable_log_stats": True,
}

POOLED = {"embed": "embedding", "classify": "probs"}


def log_probabilities(llm: LLM, tokens: list[int]) -> torch.Tensor:
    """Float32 [len(tokens) - 1, vocabulary], in the order of token ids."""
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=-1)
    [output] = llm.generate({"prompt_token_ids": tokens}, params, use_tqdm=False)
    rows = output.prompt_logprobs[1:]
    return torch.tensor([[row[token].logprob for token in range(len(row))] for row in rows])


def switch(model: torch.nn.Module, widths: dict[str, int]) -> None:
    """Compute each layer at the width that is given for a part of its name."""
    names = {name for _, method in quantized_layers(model) for name in method.parts}
    set_active(model, {name: width for name in names for part, width in widths.items() if part in name})


def generated_programs() -> set[bytes]:
    """Digests of all that torch.compile wrote for vLLM, be it compiled already or not."""
    digests = set()
    for suffix in ("py", "cpp"):
        for file in Path(envs.VLLM_CACHE_ROOT).rglob(f"*.{suffix}"):
            # A comment numbers the graphs of a process.
            lines = [line for line in file.read_bytes().splitlines() if not line.startswith(b"# AOT ID")]
            digests.add(hashlib.sha256(b"\n".join(lines)).digest())
    return digests


def run(job: dict[str, Any]) -> dict[str, Any]:
    before = generated_programs()
    try:
        llm = LLM(job["model"], **(DEFAULTS | job["llm"]))
    except ValueError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    if "pooling" in job:
        [output] = getattr(llm, job["pooling"])({"prompt_token_ids": job["tokens"]}, use_tqdm=False)
        return {"pooled": torch.tensor(getattr(output.outputs, POOLED[job["pooling"]]))}
    rows = [log_probabilities(llm, job["tokens"])]
    for widths in job.get("switch", []):
        llm.apply_model(functools.partial(switch, widths=widths))
        llm.reset_prefix_cache()
        rows.append(log_probabilities(llm, job["tokens"]))
    return {
        "log_probabilities": rows,
        "resident_bytes": llm.apply_model(resident_bytes),
        "predicted_bytes": llm.apply_model(predicted_bytes),
        "step_bytes": llm.apply_model(step_bytes),
        "generated": len(generated_programs() - before),
    }


def main(run_job: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Run the jobs of the file that the command names first, and write their results to the second one."""
    jobs_path, results_path = map(Path, sys.argv[1:])
    results = []
    for job in json.loads(jobs_path.read_text()):
        print(BEGINNING, flush=True)
        results.append(run_job(job))
        cleanup_dist_env_and_memory()
    torch.save(results, results_path)


if __name__ == "__main__":
    main(run)
