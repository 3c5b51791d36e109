"""Runs engines one after another in this process: ``python -m ... JOBS.json RESULTS.pt``.

A job is an object with ``model``, ``llm`` (arguments of ``LLM``), ``adapters`` ({name: folder}) and ``steps``, each a
width to switch to (``switch``), or requests to run in one batch (``run``), lists of a prompt, the name of an adapter or
null, and the width to ask for or null; a step ``cached`` runs them without log-probabilities of their prompts, which
would keep vLLM from its cache of prompts. Its result holds for each run the log-probabilities and tokens of each
request, how many tokens of prompts were found in the cache, of how many drafts how many were accepted, and bytes; or
the ``error``.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from tests.serve.engine_runs import DEFAULTS, main
from vllm_matquant.serve.elastic.switch import switch
from vllm_matquant.serve.linear import predicted_bytes, resident_bytes

TOKENS = 6  # that each request generates


def run(llm: LLM, requests: list[Any], adapters: dict[str, LoRARequest], cached: bool) -> list[dict[str, Any]]:
    """For each request ``rows``, float32 [tokens, vocabulary] in the order of token ids, and ``tokens``."""
    params = [
        SamplingParams(
            max_tokens=TOKENS,
            temperature=0,
            ignore_eos=True,
            logprobs=-1,
            prompt_logprobs=None if cached else -1,
            extra_args=None if bits is None else {"matquant_bits": bits},
        )
        for _, _, bits in requests
    ]
    prompts = [{"prompt_token_ids": prompt} for prompt, _, _ in requests]
    chosen = [None if name is None else adapters[name] for _, name, _ in requests]
    results = []
    for output in llm.generate(prompts, params, lora_request=chosen, use_tqdm=False):
        rows = [*(output.prompt_logprobs or [None])[1:], *output.outputs[0].logprobs]
        results.append(
            {
                "rows": torch.tensor([[row[token].logprob for token in range(len(row))] for row in rows]),
                "tokens": list(output.outputs[0].token_ids),
                "cached": output.num_cached_tokens,
            }
        )
    return results


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    adapters = {
        name: LoRARequest(name, number, folder) for number, (name, folder) in enumerate(job["adapters"].items(), 1)
    }
    try:
        llm = LLM(job["model"], **(DEFAULTS | {"enable_lora": True, "disable_log_stats": False} | job["llm"]))
    except ValueError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    runs = []
    for step in job["steps"]:
        if "switch" in step:
            switch(llm, bits=step["switch"])
        else:
            cached = "cached" in step
            runs.append(run(llm, step["cached" if cached else "run"], adapters, cached))
    counted = {metric.name.rpartition("spec_decode_num_")[2]: metric for metric in llm.get_metrics()}
    return {
        "runs": runs,
        "drafts": counted["draft_tokens"].value if "draft_tokens" in counted else 0,
        "accepted": counted["accepted_tokens"].value if "accepted_tokens" in counted else 0,
        "resident_bytes": llm.apply_model(resident_bytes),
        "predicted_bytes": llm.apply_model(predicted_bytes),
    }


if __name__ == "__main__":
    main(run_job)
