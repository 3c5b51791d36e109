"""The quantization config that vLLM makes from a checkpoint's config.json."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import vllm
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts, UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from vllm_matquant.checkpoint.errors import ConfigError
from vllm_matquant.checkpoint.names import CONFIG_FILE, shard_pattern
from vllm_matquant.checkpoint.quantization_config import format_from_config
from vllm_matquant.checkpoint.servable import check_served
from vllm_matquant.checkpoint.spec import BASE_BITS, QUANT_METHOD, Format
from vllm_matquant.serve.compiled import reuse_compiled_code
from vllm_matquant.serve.cores import usable_cores
from vllm_matquant.serve.elastic.engine import graph_key, most_rows, settle_elastic, takes_rows
from vllm_matquant.serve.elastic.offer import Offer
from vllm_matquant.serve.elastic.requests import Front
from vllm_matquant.serve.elastic.rows import RowSlots
from vllm_matquant.serve.embedding import MatquantEmbeddingMethod
from vllm_matquant.serve.experts import ExpertProductMethod, MatquantExpertsMethod
from vllm_matquant.serve.files import fetch, identity, opened
from vllm_matquant.serve.limits import check_engine
from vllm_matquant.serve.linear import MatquantLinearMethod
from vllm_matquant.serve.loader import LOAD_FORMATS
from vllm_matquant.serve.request import Request, given_settings, read_request, without_settings
from vllm_matquant.serve.served import Served
from vllm_matquant.serve.speculation.engine import check_speculation
from vllm_matquant.serve.version import untested

logger = init_logger(f"vllm.{__name__}")  # vLLM's handlers serve the loggers under "vllm"

_Value = TypeVar("_Value")

# vLLM names the layers of a speculative draft with this prefix; the draft's checkpoint does not.
_DRAFT_PREFIX = "draft_model."


class MatquantConfig(QuantizationConfig):
    """What vLLM knows of a matquant checkpoint while it builds a model.

    Attributes:
        format: the checkpoint's format, from ``quantization_config``.
        model: the checkpoint's folder, or its name on a hub.
        revision: of the hub's files.
        served: what is served, by the checkpoint's names of layers; None until that is settled.
        checkpoint: what tells the checkpoint from any other, None until it is settled.
        layers: (out_features, in_features) of the checkpoint's quantized layers, empty until it is settled.
        cores: that the engine's processes on this machine may compute with, 0 until that is settled.
        front: of an elastic server in the process that takes requests, else None.
        rows: which slice each row is computed with, in a process of the engine; None where rows have none of their own.
        active_slot: the slot of the slice that is active now, in a process of the engine.
    """

    def __init__(self, checkpoint_format: Format) -> None:
        super().__init__()
        self.format = checkpoint_format
        self.model = ""
        self.revision: str | None = None
        self.served: Served | None = None
        self.checkpoint: Hashable = None
        self.layers: dict[str, tuple[int, int]] = {}
        self.cores = 0
        self.front: Front | None = None
        self.rows: RowSlots | None = None
        self.active_slot = 0
        self._mappers: list[Any] = []  # from the checkpoint's names to vLLM's
        # Names in the checkpoint of what has a tensor "weight", as quantized layers do not.
        self._weights: list[str] = []
        self._plain: dict[int, frozenset[str]] = {}  # the same by vLLM's names, for so many mappers
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
        self.model, self.revision = model_name, revision

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self._mappers.append(hf_to_vllm_mapper)
        rename = partial(_renamed, hf_to_vllm_mapper)
        self.ignored_layers = frozenset(rename(dict.fromkeys(self.ignored_layers)))
        self.quantized_embeddings = frozenset(rename(dict.fromkeys(self.quantized_embeddings)))
        group_sizes, widths = rename(self.format.layer_group_sizes), rename(self.format.layer_widths)
        self.format = replace(self.format, layer_group_sizes=group_sizes, layer_widths=widths)

    def vllm_names(self, layers: Iterable[str]) -> frozenset[str]:
        """vLLM's names of layers of the checkpoint."""
        names = dict.fromkeys(layers)
        for mapper in self._mappers:
            names = _renamed(mapper, names)
        return frozenset(names)

    def settle(self, request: Request, cache: str | None) -> Served:
        """What is served; the first call finds it in the checkpoint, and checks the files if they are local.

        Args:
            request: what is asked for.
            cache: the folder for downloads, None for the hub's default.

        Raises:
            CheckpointError: the checkpoint cannot serve it.
        """
        if self.served is None:
            check_served(self.format)
            local = Path(self.model).is_dir()
            # A size depends on the tensors that are not quantized too: the narrowest shards tell of them.
            wanted = ["*.json", *([shard_pattern(BASE_BITS)] if request.memory else [])]
            folder = fetch(self.model, self.revision, cache, wanted)
            checkpoint = opened(folder)
            self.checkpoint, self.layers = identity(folder), checkpoint.layers
            self._weights = [name.removesuffix(".weight") for name in checkpoint.weight_map if name.endswith(".weight")]
            self.served = request.served(checkpoint, logger.info, partial=not local)
            if local:
                checkpoint.check(*self.served.resident)
            if self.offer is not None:
                self.active_slot = self.offer.slot(self.served.active.name)
        return self.served

    @property
    def offer(self) -> Offer | None:
        """What an elastic server offers."""
        return None if self.served is None else self.served.offer

    def row_slots(self, vllm_config: Any) -> RowSlots | None:
        """Which slice each row of a step is computed with; None where kernels compute all with the active one."""
        if self.rows is None and self.offer is not None and takes_rows(vllm_config):
            self.rows = RowSlots(most_rows(vllm_config), len(self.offer.slices), self.active_slot)
        return self.rows

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, RoutedExperts):
            return self._experts_method(layer, prefix)
        if isinstance(layer, VocabParallelEmbedding):
            return self._embedding_method(layer, prefix)
        if not isinstance(layer, LinearBase):
            return None
        parts = self._parts(prefix)
        if self._are_ignored(parts, prefix):
            return UnquantizedLinearMethod()
        served = self._current()
        if self._plain_layers().issuperset(parts):  # the router of a mixture, which is no layer to quantize
            return UnquantizedLinearMethod()
        return MatquantLinearMethod(self.format, served, parts, self.checkpoint, self._rows())

    def _experts_method(self, layer: RoutedExperts, prefix: str) -> QuantizeMethodBase:
        own = prefix.removeprefix(_DRAFT_PREFIX)
        gate, up, down = layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name
        parts = [
            ([f"{own}.{index}.{gate}", f"{own}.{index}.{up}"], [f"{own}.{index}.{down}"])
            for index in range(layer.moe_config.num_logical_experts)
        ]
        if self._are_ignored([name for pair in parts for names in pair for name in names], prefix):
            return UnquantizedFusedMoEMethod(layer.moe_config)
        served, rows = self._current(), self._rows()

        def make(names: list[str]) -> ExpertProductMethod:
            return ExpertProductMethod(self.format, served, names, self.checkpoint, rows)

        return MatquantExpertsMethod(layer.moe_config, parts, make, rows)

    def _are_ignored(self, parts: Sequence[str], prefix: str) -> bool:
        """Whether the layers that vLLM computes as one are not quantized.

        Raises:
            ConfigError: some are, and others not.
        """
        ignored = [part for part in parts if part in self.ignored_layers]
        if ignored and len(ignored) < len(parts):
            raise ConfigError(
                CONFIG_FILE,
                "quantization_config.ignored_layers",
                ignored,
                f"all or none of {parts}, which vLLM computes as the one layer {prefix}",
            )
        return bool(ignored)

    def _plain_layers(self) -> frozenset[str]:
        """What the checkpoint has a tensor named "weight" of, by vLLM's names of layers."""
        count = len(self._mappers)
        if count not in self._plain:
            self._plain[count] = self.vllm_names(self._weights)
        return self._plain[count]

    def _embedding_method(self, layer: VocabParallelEmbedding, prefix: str) -> MatquantEmbeddingMethod | None:
        name = prefix.removeprefix(_DRAFT_PREFIX).removeprefix(".")
        if isinstance(layer, ParallelLMHead):
            # A head without a name is taken for an ignored one; where it is not, the loader finds out.
            quantized = name != "" and not _ending_in(name, self.ignored_layers)
        else:
            name = name or next(iter(self.quantized_embeddings), "")  # vLLM's Llama gives its embedding no name
            quantized = name in self.quantized_embeddings
        if not quantized:
            return None
        served = self._current()
        # vLLM's Qwen3-VL names its head without the part that it is in, which widths are found by.
        name = _ending_in(name, served.active.widths) or name
        return MatquantEmbeddingMethod(self.format, served, [name], self.checkpoint, self._rows())

    def _rows(self) -> RowSlots | None:
        return self.row_slots(get_current_vllm_config())

    def _current(self) -> Served:
        """What is served, by vLLM's names of layers."""
        config = get_current_vllm_config()
        served = self.settle(read_request(config.additional_config), config.load_config.download_dir)
        for mapper in self._mappers:
            served = served.renamed(partial(_renamed, mapper))
        return served

    def _parts(self, prefix: str) -> list[str]:
        """Names in the checkpoint of the layers that vLLM fuses into the layer ``prefix``."""
        parent, dot, name = prefix.removeprefix(_DRAFT_PREFIX).rpartition(".")
        names: Iterable[str] = self.packed_modules_mapping.get(name, [name])
        return [f"{parent}{dot}{part}" for part in names]


def _renamed(mapper: Any, layers: Mapping[str, _Value]) -> dict[str, _Value]:
    """Values by vLLM's names of layers: its mappers are made for names of tensors, and go by what ends in a dot."""
    suffix = ".weight"
    found = mapper.apply_dict({f"{name}{suffix}": value for name, value in layers.items()})
    return {name.removesuffix(suffix): value for name, value in found.items()}


def _ending_in(name: str, names: Iterable[str]) -> str | None:
    """The first of ``names`` that is ``name``, or ends in it as a part of its own; None if none does."""
    return next((each for each in names if f".{each}".endswith(f".{name}")), None)


def settle(vllm_config: Any) -> None:
    """Settle what a vLLM configuration serves before any process of the engine starts; each of them is handed it.

    The settings are then taken out of ``additional_config``, by which vLLM's compile cache is keyed: one compiled graph
    serves every width and recipe.

    Raises:
        CheckpointError: the settings are wrong, or the checkpoint cannot serve them, or the engine is asked for
            what cannot be done with it, see :mod:`vllm_matquant.serve.limits`.
    """
    request = read_request(vllm_config.additional_config)
    quant_config = vllm_config.quant_config
    if isinstance(quant_config, MatquantConfig):
        if warning := untested(vllm.__version__):
            logger.warning(warning)
        load_config = vllm_config.load_config
        if load_config.load_format not in LOAD_FORMATS:
            raise ConfigError("load_config", "load_format", load_config.load_format, f"one of {list(LOAD_FORMATS)}")
        served = quant_config.settle(request, load_config.download_dir)
        quant_config.cores = usable_cores(vllm_config.parallel_config.local_world_size)
        reuse_compiled_code()
        check_engine(vllm_config, quant_config.format, quant_config.layers)
        if quant_config.offer is not None:
            settle_elastic(vllm_config)
        if served.draft is not None:
            check_speculation(vllm_config)
        # A draft that is another checkpoint is settled later, by the same settings.
        if served.draft is not None or not _has_matquant_draft(vllm_config):
            vllm_config.additional_config = without_settings(vllm_config.additional_config) | graph_key(vllm_config)
    elif not _has_matquant_draft(vllm_config):
        for name, value in given_settings(vllm_config.additional_config).items():
            found = f"{value} for a model whose quantization is {vllm_config.model_config.quantization}"
            raise ConfigError(
                "additional_config", f"matquant.{name}", found, f"no {name}, or a {QUANT_METHOD} checkpoint"
            )


def _has_matquant_draft(vllm_config: Any) -> bool:
    speculation = vllm_config.speculative_config
    draft = speculation.draft_model_config if speculation is not None else None
    return draft is not None and draft.quantization == QUANT_METHOD
