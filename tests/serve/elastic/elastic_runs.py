"""Runs engines one after another in this process: ``python -m ... JOBS.json RESULTS.pt``.

A job is an object with ``model``, ``llm`` (arguments of ``LLM``) and ``steps``, each a width or a recipe to switch to
(``switch``), or requests to run in one batch (``run``), a list of what each asks for, null for nothing. Its result
holds for each run the log-probabilities of each request, of its prompt and of what it generates; the addresses of what
layers read, which are compared after each step; what each process tells of itself; and how many programs torch.compile
wrote; or the ``error``.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError

from tests.serve.engine_runs import DEFAULTS, generated_programs, main
from vllm_matquant.serve.elastic.switch import switch
from vllm_matquant.serve.linear import quantized_layers

PROMPTS = [[3, 14, 15, 92, 65], [27, 18, 28, 18, 28, 45, 90], [57, 72, 15, 66, 49, 1, 53, 2, 88], [1, 2, 3]]


def run(llm: LLM, asked: list[Any]) -> list[torch.Tensor]:
    """For each request float32 [tokens, vocabulary] in the order of token ids."""
    params = [
        SamplingParams(
            max_tokens=6,
            temperature=0,
            ignore_eos=True,
            logprobs=-1,
            prompt_logprobs=-1,
            extra_args=None if bits is None else {"matquant_bits": bits},
        )
        for bits in asked
    ]
    prompts = [{"prompt_token_ids": tokens} for tokens in PROMPTS[: len(asked)]]
    results = []
    for output in llm.generate(prompts, params, use_tqdm=False):
        rows = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        results.append(torch.tensor([[row[token].logprob for token in range(len(row))] for row in rows]))
    return results


def addresses(model: torch.nn.Module) -> list[int]:
    """Of every tensor that a compiled graph or a kernel reads of the layers."""
    found = []
    for layer, method in quantized_layers(model):
        found += [buffer.data_ptr() for buffer in layer.buffers()]
        for weight in (method.weight, *getattr(method, "readers", ())):
            for segment in weight.segments:
                tensors = (segment.resident.planes, segment.resident.decoders, segment.active_width)
                found += [tensor.data_ptr() for tensor in tensors]
    return found


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    before = generated_programs()
    try:
        llm = LLM(job["model"], **(DEFAULTS | job["llm"]))
    except ValueError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    runs, at_first, moved = [], llm.apply_model(addresses), False
    for step in job["steps"]:
        try:
            if "switch" in step:
                choice = step["switch"]
                switch(llm, **{"recipe" if isinstance(choice, str) else "bits": choice})
            else:
                runs.append(run(llm, step["run"]))
        except (ValueError, VLLMValidationError) as error:
            runs.append(f"{type(error).__name__}: {error}")
        moved |= llm.apply_model(addresses) != at_first
    elastic = "elastic" in job["llm"].get("additional_config", {}).get("matquant", {})
    return {
        "runs": runs,
        "moved": moved,
        "states": llm.collective_rpc("matquant_state") if elastic else [],
        "generated": len(generated_programs() - before),
    }


if __name__ == "__main__":
    main(run_job)
