"""Runs engines one after another in this process: ``python -m ... JOBS.json RESULTS.pt``.

A job is an object with ``model``, ``llm`` (arguments of ``LLM``), ``prompts`` (lists of tokens) and ``runs``, each a
list of the sampling parameters of its requests, one for each prompt, or one for all of them. Its result holds the
``tokens`` of each run, how many drafts were made and ``accepted``, the ``bytes`` of codes and decoders, how many
``blocks`` the KV cache has, and the addresses of ``parameters``; or the ``error``.
"""

from __future__ import annotations

from typing import Any

from vllm import LLM, SamplingParams

from tests.serve.engine_runs import DEFAULTS, main
from vllm_matquant.serve.linear import predicted_bytes, resident_bytes


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    try:
        llm = LLM(job["model"], **(DEFAULTS | {"disable_log_stats": False} | job["llm"]))
    except ValueError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    prompts = [{"prompt_token_ids": tokens} for tokens in job["prompts"]]
    tokens = []
    for fields in job["runs"]:
        params = [SamplingParams(**({"ignore_eos": True} | each)) for each in fields]
        many = params if len(params) > 1 else params * len(prompts)
        outputs = llm.generate(prompts if len(prompts) > 1 else prompts * len(many), many, use_tqdm=False)
        tokens.append([list(output.outputs[0].token_ids) for output in outputs])
    counted = {metric.name.rpartition("spec_decode_num_")[2]: metric for metric in llm.get_metrics()}
    return {
        "tokens": tokens,
        "drafts": counted["draft_tokens"].value if "draft_tokens" in counted else 0,
        "accepted": counted["accepted_tokens"].value if "accepted_tokens" in counted else 0,
        "by_position": counted["accepted_tokens_per_pos"].values if "accepted_tokens_per_pos" in counted else [],
        "bytes": llm.apply_model(resident_bytes),
        "predicted": llm.apply_model(predicted_bytes),
        "blocks": llm.llm_engine.vllm_config.cache_config.num_gpu_blocks,
    }


if __name__ == "__main__":
    main(run_job)
