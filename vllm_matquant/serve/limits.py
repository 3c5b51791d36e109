"""What an engine may be asked for that cannot be done with a matquant checkpoint, refused before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.platforms import current_platform

from vllm_matquant.checkpoint.errors import ConfigError
from vllm_matquant.checkpoint.spec import Format
from vllm_matquant.checkpoint.tensor_parallel import SIZES, find_misfit


def check_engine(vllm_config: Any, format_: Format, layers: Mapping[str, tuple[int, int]]) -> None:
    """Refuse what would else fail long after the start, or in every process of the engine.

    Args:
        vllm_config: vLLM's configuration.
        format_: of the checkpoint.
        layers: (out_features, in_features) of its quantized layers, by the checkpoint's names.

    Raises:
        ConfigError: experts are to be adapted, moved between ranks, divided between replicas or computed on a GPU,
            adapters to be computed on a GPU, a tensor parallel size that would cut a group, the Transformers backend
            with a quantized embedding, or pooling with a quantized output head, be it tied where a classifier is made
            of it.
    """
    _check_adapters(vllm_config, layers)
    model_config = vllm_config.model_config
    if format_.quantized_embeddings and model_config.using_transformers_backend():
        raise ConfigError(
            "model_config",
            "model_impl",
            f"vLLM's Transformers backend, which cannot look up quantized {' and '.join(format_.quantized_embeddings)}",
            "a model class of vLLM's own, or a checkpoint quantized without --quantize-embeddings",
        )
    heads = [name for name in layers if "." not in name]  # a head lies outside of the model's trunk
    if heads and model_config.runner_type == "pooling":
        raise ConfigError(
            "model_config",
            "runner",
            f"pooling, for which vLLM drops {' and '.join(heads)}, and the checkpoint has it quantized",
            f"runner generate, or a checkpoint quantized with --ignore {heads[0]}",
        )
    _check_experts(vllm_config, layers)
    text_config = model_config.hf_config.get_text_config()
    tied = format_.quantized_embeddings if getattr(text_config, "tie_word_embeddings", False) else ()
    if tied and getattr(text_config, "classifier_from_token", None):
        raise ConfigError(
            "model_config",
            "hf_overrides.classifier_from_token",
            f"a classifier made of the output head's rows, and the checkpoint has it quantized as {' and '.join(tied)}",
            "a checkpoint quantized without --quantize-embeddings",
        )
    _check_ranks(vllm_config.parallel_config, format_, layers)


def _check_ranks(parallel: Any, format_: Format, layers: Mapping[str, tuple[int, int]]) -> None:
    """Refuse to divide a layer between so many ranks that a group of columns would be cut."""
    size = parallel.tensor_parallel_size
    experts = {name: shape for name, shape in layers.items() if _is_expert(name)}
    others = {name: shape for name, shape in layers.items() if name not in experts}
    misfit = find_misfit(format_, others, size)
    if misfit is not None:
        fitting = [1, *(each for each in SIZES if find_misfit(format_, others, each) is None)]
        raise ConfigError(
            "parallel_config",
            "tensor_parallel_size",
            f"{size}, and {misfit}, the columns that must stay together",
            f"one of --tensor-parallel-size {', '.join(map(str, fitting))}, or a checkpoint quantized with a smaller "
            "--group-size",
        )
    misfit = None if parallel.enable_expert_parallel else find_misfit(format_, experts, size)
    if misfit is not None:
        raise ConfigError(
            "parallel_config",
            "enable_expert_parallel",
            f"False on {size} ranks, and {misfit}, the columns that must stay together",
            "--enable-expert-parallel, which gives each rank whole experts, or fewer ranks",
        )


def _check_adapters(vllm_config: Any, layers: Mapping[str, tuple[int, int]]) -> None:
    """Refuse what adapters cannot be computed with."""
    lora = vllm_config.lora_config
    if lora is None:
        return
    if not current_platform.is_cpu():
        raise ConfigError("lora_config", "enable_lora", "True on a GPU", "a CPU: no GPU has run adapters yet")
    # Without a list of targets vLLM wraps every layer that it can, experts too.
    targets = lora.target_modules
    if any(map(_is_expert, layers)) and (targets is None or any("experts" in target.split(".") for target in targets)):
        raise ConfigError(
            "lora_config",
            "target_modules",
            f"{'every module' if targets is None else targets}, which includes quantized experts",
            "modules that have no adapters on experts: --lora-target-modules q_proj k_proj v_proj o_proj",
        )


def _is_expert(layer: str) -> bool:
    return ".experts." in layer


def _check_experts(vllm_config: Any, layers: Mapping[str, tuple[int, int]]) -> None:
    """Refuse what cannot be done with experts yet."""
    if not any(map(_is_expert, layers)):
        return
    if not current_platform.is_cpu():
        raise ConfigError(
            "device_config", "device", "a GPU and quantized experts", "a CPU: no kernel serves them elsewhere"
        )
    parallel = vllm_config.parallel_config
    if parallel.enable_eplb:
        raise ConfigError("parallel_config", "enable_eplb", True, "false: quantized experts stay on their ranks")
    if parallel.data_parallel_size > 1:
        raise ConfigError(
            "parallel_config",
            "data_parallel_size",
            f"{parallel.data_parallel_size} and experts, to whose ranks vLLM 0.32 cannot pass tokens on a CPU",
            "1, with --tensor-parallel-size and --enable-expert-parallel",
        )
