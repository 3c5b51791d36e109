"""What vLLM is asked for where drafts are made with a slice, and what an engine cannot be asked for besides."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm_matquant.checkpoint.errors import ConfigError
from vllm_matquant.checkpoint.spec import QUANT_METHOD
from vllm_matquant.serve.request import given_settings
from vllm_matquant.serve.speculation.settings import DEFAULT_TOKENS


@contextmanager
def drafting(engine_args: Any) -> Iterator[None]:
    """Have the configuration that is made of these arguments speculate, if the plugin's settings ask for a draft.

    To vLLM the draft is a model of its own in the same folder, of which the workers load nothing
    (:mod:`vllm_matquant.serve.speculation.proposer`).

    Args:
        engine_args: vLLM's ``EngineArgs``; they are as before afterwards.

    Raises:
        ConfigError: they ask for a draft of another kind too.
    """
    settings = given_settings(engine_args.additional_config, ("speculate_bits", "speculate_tokens"))
    given = engine_args.speculative_config
    if "speculate_bits" not in settings:
        yield
        return
    if given is not None:
        found = f"{given} and {QUANT_METHOD}.speculate_bits {settings['speculate_bits']}"
        raise ConfigError("engine", "speculative_config", found, "one of them")
    engine_args.speculative_config = {
        "method": "draft_model",
        "model": engine_args.model,
        "revision": engine_args.revision,
        "num_speculative_tokens": settings.get("speculate_tokens", DEFAULT_TOKENS),
        "draft_sample_method": "probabilistic",
    }
    try:
        yield
    finally:
        engine_args.speculative_config = given


def check_speculation(vllm_config: Any) -> None:
    """Refuse what a model cannot do while its own slices draft for it.

    Raises:
        ConfigError: the engine is asked for it.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    device = vllm_config.device_config.device_type
    if device != "cpu":
        raise _refused("device_config", "device_type", device, "a CPU: no GPU has run drafts yet")
    if model.runner_type == "pooling":
        raise _refused("model_config", "runner", "pooling, which generates nothing", "runner generate")
    if vllm_config.use_v2_model_runner:
        raise _refused("environment", "VLLM_USE_V2_MODEL_RUNNER", "vLLM's model runner V2", "V1, by setting it to 0")
    if model.use_mla:
        found = "attention with latent keys and values, for which vLLM decodes weights once, at the start"
        raise _refused("model_config", "use_mla", found, "another model")
    if model.has_inner_state:
        found = "a model whose state each token changes, drafts too"
        raise _refused("model_config", "has_inner_state", found, "attention alone")
    if model.is_multimodal_model:
        raise _refused("model_config", "architectures", f"{model.architectures}, of more than text", "a text model")
    if vllm_config.kv_transfer_config is not None:
        found = "a cache that others read, where drafts leave what is not checked yet"
        raise _refused("kv_transfer_config", "kv_connector", found, "none")
    if parallel.pipeline_parallel_size > 1:
        raise _refused("parallel_config", "pipeline_parallel_size", parallel.pipeline_parallel_size, "1")
    if parallel.data_parallel_size > 1:
        raise _refused("parallel_config", "data_parallel_size", parallel.data_parallel_size, "1")


def _refused(where: str, subject: str, found: object, expected: str) -> ConfigError:
    return ConfigError(where, subject, found, expected, "Or serve without --speculate-bits.")
