"""The quantization config that vLLM makes from a checkpoint's config.json."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from vllm_matquant.checkpoint.errors import ConfigError
from vllm_matquant.checkpoint.names import CONFIG_FILE, shard_pattern
from vllm_matquant.checkpoint.quantization_config import format_from_config
from vllm_matquant.checkpoint.spec import BASE_BITS, QUANT_METHOD, Format
from vllm_matquant.serve import precision
from vllm_matquant.serve.embedding import MatquantEmbeddingMethod
from vllm_matquant.serve.linear import MatquantLinearMethod
from vllm_matquant.serve.loader import LOAD_FORMATS, fetch

logger = init_logger(f"vllm.{__name__}")  # vLLM's handlers serve the loggers under "vllm"

# vLLM names the layers of a speculative draft with this prefix; the draft's checkpoint does not.
_DRAFT_PREFIX = "draft_model."


class MatquantConfig(QuantizationConfig):
    """What vLLM knows of a matquant checkpoint while it builds a model.

    Attributes:
        format: the checkpoint's format, from ``quantization_config``.
        folder: the checkpoint's folder, None while it is not on this machine.
        precision: the widths to serve, None until they are resolved; its recipe has the checkpoint's names.
    """

    def __init__(self, checkpoint_format: Format) -> None:
        super().__init__()
        self.format = checkpoint_format
        self.folder: Path | None = None
        self.precision: precision.Precision | None = None
        self._mappers: list[Any] = []  # from the checkpoint's names to vLLM's
        self.ignored_layers = frozenset(checkpoint_format.ignored_layers)
        self.quantized_embeddings = frozenset(checkpoint_format.quantized_embeddings)

    @classmethod
    def get_name(cls) -> str:
        return QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        return [CONFIG_FILE]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MatquantConfig:
        return cls(format_from_config(config))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        folder = Path(model_name)
        if folder.is_dir():
            self.folder = folder

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self._mappers.append(hf_to_vllm_mapper)
        self.ignored_layers = frozenset(hf_to_vllm_mapper.apply_list(sorted(self.ignored_layers)))
        self.quantized_embeddings = frozenset(hf_to_vllm_mapper.apply_list(sorted(self.quantized_embeddings)))
        group_sizes = hf_to_vllm_mapper.apply_dict(dict(self.format.layer_group_sizes))
        widths = hf_to_vllm_mapper.apply_dict(dict(self.format.layer_widths))
        self.format = replace(self.format, layer_group_sizes=group_sizes, layer_widths=widths)

    def resolve_precision(self, additional_config: Any) -> precision.Precision:
        """The widths to serve; the first call checks them against the checkpoint.

        Raises:
            CheckpointError: the settings are wrong or the checkpoint cannot serve them.
        """
        if self.precision is None:
            request = precision.read_request(additional_config)
            self.precision = precision.resolve(request, self.format, self.folder, logger.info)
        return self.precision

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, RoutedExperts):
            raise ConfigError(prefix, "layer", "a mixture of experts", "linear layers and embeddings only")
        if isinstance(layer, VocabParallelEmbedding):
            return self._embedding_method(layer, prefix)
        if not isinstance(layer, LinearBase):
            return None
        parts = self._parts(prefix)
        ignored = [part for part in parts if part in self.ignored_layers]
        if len(ignored) == len(parts):
            return UnquantizedLinearMethod()
        if ignored:
            raise ConfigError(
                CONFIG_FILE,
                "quantization_config.ignored_layers",
                ignored,
                f"all or none of {parts}, which vLLM computes as the one layer {prefix}",
            )
        return MatquantLinearMethod(self.format, self._current_precision(), parts)

    def _embedding_method(self, layer: VocabParallelEmbedding, prefix: str) -> MatquantEmbeddingMethod | None:
        name = prefix.removeprefix(_DRAFT_PREFIX).removeprefix(".")
        if isinstance(layer, ParallelLMHead):
            # A head without a name is taken for an ignored one; where it is not, the loader finds out.
            quantized = name != "" and name not in self.ignored_layers
        else:
            name = name or next(iter(self.quantized_embeddings), "")  # vLLM's Llama gives its embedding no name
            quantized = name in self.quantized_embeddings
        return MatquantEmbeddingMethod(self.format, self._current_precision(), [name]) if quantized else None

    def _current_precision(self) -> precision.Precision:
        """The widths to serve, by vLLM's names."""
        settled = self.resolve_precision(get_current_vllm_config().additional_config)
        if settled.recipe is None:
            return settled
        recipe = dict(settled.recipe)
        for mapper in self._mappers:
            recipe = mapper.apply_dict(recipe)
        return replace(settled, recipe=recipe)

    def _parts(self, prefix: str) -> list[str]:
        """Names in the checkpoint of the layers that vLLM fuses into the layer ``prefix``."""
        parent, dot, name = prefix.removeprefix(_DRAFT_PREFIX).rpartition(".")
        names: Iterable[str] = self.packed_modules_mapping.get(name, [name])
        return [f"{parent}{dot}{part}" for part in names]


def settle_precision(vllm_config: Any) -> None:
    """Check the settings of a vLLM configuration before any process of the engine starts, and make the bits explicit.

    vLLM's compile cache is keyed by additional_config but not by the quantization config: a width that was chosen by
    default must not share a key with another one.

    Raises:
        CheckpointError: the settings are wrong, or the checkpoint cannot serve them.
    """
    request = precision.read_request(vllm_config.additional_config)
    quant_config = vllm_config.quant_config
    if isinstance(quant_config, MatquantConfig):
        load_config = vllm_config.load_config
        if load_config.load_format not in LOAD_FORMATS:
            raise ConfigError("load_config", "load_format", load_config.load_format, f"one of {list(LOAD_FORMATS)}")
        if quant_config.folder is None and request.needs_recipes:
            wanted = ["*.json", shard_pattern(BASE_BITS)]  # every recipe needs these, and they say what fits
            folder = fetch(vllm_config.model_config, load_config.download_dir, wanted)
            quant_config.precision = precision.resolve(request, quant_config.format, folder, logger.info, partial=True)
        settled = quant_config.resolve_precision(vllm_config.additional_config)
        vllm_config.additional_config = precision.with_precision(vllm_config.additional_config, settled)
    elif not _has_matquant_draft(vllm_config):
        settings = (
            vllm_config.additional_config.get(precision.SETTINGS_KEY, {}) if request != precision.Request() else {}
        )
        for name, value in settings.items():
            if value is not None:
                found = f"{value} for a model whose quantization is {vllm_config.model_config.quantization}"
                expected = f"no {name}, or a {QUANT_METHOD} checkpoint"
                raise ConfigError("additional_config", f"matquant.{name}", found, expected)


def _has_matquant_draft(vllm_config: Any) -> bool:
    speculation = vllm_config.speculative_config
    draft = speculation.draft_model_config if speculation is not None else None
    return draft is not None and draft.quantization == QUANT_METHOD
