"""Runs vLLM engines one after another in this process: ``python engine_runs.py JOBS.json RESULTS.pt``.

A process of its own, for engines leave global state behind. A job is an object with ``model``, ``tokens`` (a prompt),
``llm`` (arguments of ``LLM``) and, to switch widths while the engine runs, ``decoders`` (the widths whose decoders are
kept) and ``switch`` (a list of {part of a layer's name: active widths}, each set before one more run). Its result holds
``log_probabilities`` (of the start and of each switch) and the bytes of each rank, or the ``error``.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

from vllm_matquant.checkpoint.reader import Checkpoint
from vllm_matquant.checkpoint.spec import offset_name, scale_name
from vllm_matquant.serve.linear import predicted_bytes, quantized_layers, resident_bytes
from vllm_matquant.serve.precision import LayerPrecision

DEFAULTS = {
    "dtype": "float32",
    "enforce_eager": True,
    "skip_tokenizer_init": True,
    "max_model_len": 64,
    "max_num_seqs": 4,
    "max_logprobs": -1,
    "disable_log_stats": True,
}


def log_probabilities(llm: LLM, tokens: list[int]) -> torch.Tensor:
    """Float32 [len(tokens) - 1, vocabulary], in the order of token ids."""
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=-1)
    [output] = llm.generate({"prompt_token_ids": tokens}, params, use_tqdm=False)
    rows = output.prompt_logprobs[1:]
    return torch.tensor([[row[token].logprob for token in range(len(row))] for row in rows])


def set_active_widths(model: torch.nn.Module, widths: dict[str, list[int]]) -> None:
    for layer, method in quantized_layers(model):
        [chosen] = [value for part, value in widths.items() if part in method.parts[0]]
        layer.active_width.copy_(torch.tensor(chosen, dtype=torch.int32))


@contextlib.contextmanager
def decoders_of(widths: list[int]) -> Iterator[None]:
    """Within, engines keep the decoders of all these widths in memory."""
    one_width = Checkpoint.tensors

    def several_widths(self: Checkpoint, width: int) -> Iterator[tuple[str, torch.Tensor]]:
        yield from one_width(self, width)
        for layer in self.layers:
            for other in set(widths) - {width}:
                scale, offset = self.decoder(layer, other)
                yield f"{layer}.{scale_name(other)}", scale
                yield f"{layer}.{offset_name(other)}", offset

    with (
        mock.patch.object(Checkpoint, "tensors", several_widths),
        mock.patch.object(LayerPrecision, "decoder_widths", property(lambda self: tuple(widths))),
    ):
        yield


def run(job: dict[str, Any]) -> dict[str, Any]:
    try:
        llm = LLM(job["model"], **(DEFAULTS | job["llm"]))
    except ValueError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    rows = [log_probabilities(llm, job["tokens"])]
    for widths in job.get("switch", []):
        llm.apply_model(functools.partial(set_active_widths, widths=widths))
        llm.reset_prefix_cache()
        rows.append(log_probabilities(llm, job["tokens"]))
    return {
        "log_probabilities": rows,
        "resident_bytes": llm.apply_model(resident_bytes),
        "predicted_bytes": llm.apply_model(predicted_bytes),
    }


def main(jobs_path: Path, results_path: Path) -> None:
    results = []
    for job in json.loads(jobs_path.read_text()):
        with decoders_of(job["decoders"]) if "decoders" in job else contextlib.nullcontext():
            results.append(run(job))
        cleanup_dist_env_and_memory()
    torch.save(results, results_path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
