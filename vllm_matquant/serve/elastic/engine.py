"""What an engine's configuration must have for an elastic server, and what it cannot have."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vllm import envs
from vllm.logger import init_logger

from vllm_matquant.checkpoint.errors import ConfigError
from vllm_matquant.serve.elastic.requests import Front

logger = init_logger(f"vllm.{__name__}")

WORKER = "vllm_matquant.serve.elastic.worker.ElasticWorker"
LISTENER = "vllm_matquant.serve.elastic.batch:BatchSlots"


def settle_elastic(vllm_config: Any) -> None:
    """Have an engine's processes listen to switches, and to which requests are in the batch where these can differ.

    Raises:
        ConfigError: the engine is asked for what an elastic server cannot do.
    """
    _check(vllm_config)
    quant_config = vllm_config.quant_config
    refusal = _why_no_rows(vllm_config)
    if refusal is None:
        processors = vllm_config.model_config.logits_processors or []
        vllm_config.model_config.logits_processors = [*processors, LISTENER]
    else:
        logger.warning("All requests are computed at the server's width, none at one of its own: %s", refusal)
    offer = replace(quant_config.offer, refusal=refusal)
    quant_config.served = replace(quant_config.served, offer=offer)
    quant_config.front = Front(offer, quant_config.served.active)
    vllm_config.parallel_config.worker_extension_cls = WORKER


def takes_rows(vllm_config: Any) -> bool:
    """Whether requests of the engine can have slices of their own, as far as its device goes."""
    return bool(vllm_config.device_config.device_type == "cpu")


def most_rows(vllm_config: Any) -> int:
    """The most rows that a step has."""
    scheduler = vllm_config.scheduler_config
    return int(max(scheduler.max_num_batched_tokens, scheduler.max_num_seqs))


def graph_key(vllm_config: Any) -> dict[str, Any]:
    """What vLLM's compile cache must tell apart: a graph that takes the slots of rows, and how many rows it takes.

    How many slices there are, and which of them is active, is not part of it.
    """
    if vllm_config.quant_config.offer is None or not takes_rows(vllm_config):
        return {}
    return {"matquant_rows": most_rows(vllm_config)}


def _why_no_rows(vllm_config: Any) -> str | None:
    """Why requests cannot have slices of their own, None if they can."""
    if not takes_rows(vllm_config):
        return "no GPU has run the kernels that compute each row at its own width"
    if vllm_config.model_config.runner_type == "pooling":
        return "vLLM does not tell plugins which pooling requests are in a step"
    if vllm_config.model_config.return_sampling_mask:
        return "vLLM tells no plugin which requests are in a step where it returns masks of the sampling"
    if vllm_config.model_config.is_multimodal_model and vllm_config.quant_config.quantized_embeddings:
        return "vLLM looks tokens of a multimodal model up before the step that tells which requests they are of"
    if vllm_config.use_v2_model_runner:
        return "vLLM's model runner V2 does not tell plugins which requests are in a step; VLLM_USE_V2_MODEL_RUNNER=0"
    return None


def _check(vllm_config: Any) -> None:
    parallel = vllm_config.parallel_config
    own = [each.name for each in vllm_config.quant_config.offer.slices if each.decoders_file]
    if own and not takes_rows(vllm_config):
        found = f"{', '.join(own)} with decoders of their own"
        raise ConfigError("additional_config", "matquant.elastic", found, "slices that share decoders, on a GPU")
    if envs.VLLM_USE_RUST_FRONTEND:
        found = "set: a server of another language, which asks no plugin"
        raise ConfigError("environment", "VLLM_USE_RUST_FRONTEND", found, "none with --elastic")
    if vllm_config.speculative_config is not None:
        found = f"{vllm_config.speculative_config.method}, which leaves no room for slices of requests"
        raise ConfigError("speculative_config", "method", found, "none with --elastic")
    if vllm_config.model_config.use_mla:
        found = "attention with latent keys and values, for which vLLM decodes weights once, at the start"
        raise ConfigError("model_config", "use_mla", found, "another model, or --bits without --elastic")
    if parallel._api_process_count > 1:
        found = parallel._api_process_count
        raise ConfigError("parallel_config", "api_server_count", found, "--api-server-count 1 with --elastic")
    if parallel.data_parallel_size > 1:
        raise ConfigError("parallel_config", "data_parallel_size", parallel.data_parallel_size, "1 with --elastic")
    if parallel.worker_extension_cls not in ("", WORKER):
        found = parallel.worker_extension_cls
        raise ConfigError("parallel_config", "worker_extension_cls", found, "none with --elastic, which needs its own")
