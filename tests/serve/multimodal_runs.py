"""Runs engines of multimodal models one after another in this process: ``python -m ... JOBS.json RESULTS.pt``.

A job is an object with ``model``, ``llm`` (arguments of ``LLM``), ``prompts`` (token ids, each with a picture or null,
[height, width, 3] of bytes) and ``bits``: widths to serve all prompts at, in one batch if the server is elastic. Its
result holds ``runs``, for each width and prompt the log-probabilities of the prompt, and ``prompts``, their token ids
as vLLM has them; or the ``error``.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from PIL import Image
from vllm import LLM, SamplingParams

from tests.serve.engine_runs import DEFAULTS, main, switch


def run(
    llm: LLM, prompts: list[dict[str, Any]], asked: list[dict[str, Any] | None]
) -> tuple[list[torch.Tensor], list[list[int]]]:
    """For each prompt float32 [tokens - 1, vocabulary], in the order of token ids; and its tokens."""
    params = [SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=-1, extra_args=own) for own in asked]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [
        torch.tensor([[row[token].logprob for token in range(len(row))] for row in output.prompt_logprobs[1:]])
        for output in outputs
    ], [output.prompt_token_ids for output in outputs]


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    options = DEFAULTS | {"skip_tokenizer_init": False, "max_model_len": 128} | job["llm"]
    try:
        llm = LLM(job["model"], **options)
    except ValueError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    prompts: list[dict[str, Any]] = []
    for tokens, picture in job["prompts"]:
        prompts.append({"prompt_token_ids": tokens})
        if picture is not None:
            prompts[-1]["multi_modal_data"] = {"image": Image.fromarray(np.array(picture, dtype=np.uint8))}
    widths, elastic = job["bits"], "elastic" in options.get("additional_config", {}).get("matquant", {})
    if elastic:  # all widths in one batch
        asked = [{"matquant_bits": width} for width in widths for _ in prompts]
        found, expanded = run(llm, prompts * len(widths), asked)
        runs = [found[start : start + len(prompts)] for start in range(0, len(found), len(prompts))]
    else:
        runs = []
        for width in widths:
            llm.apply_model(functools.partial(switch, widths={"": width}))
            llm.reset_prefix_cache()
            found, expanded = run(llm, prompts, [None] * len(prompts))
            runs.append(found)
    return {"runs": runs, "prompts": expanded[: len(prompts)]}


if __name__ == "__main__":
    main(run_job)
