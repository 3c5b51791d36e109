"""Loading of matquant checkpoints: only the files that the width reads are fetched and opened."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import torch
from vllm.logger import init_logger
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.weight_utils import get_lock, maybe_download_from_modelscope
from vllm.transformers_utils.repo_utils import hf_api

from vllm_matquant.checkpoint.names import shard_pattern
from vllm_matquant.checkpoint.reader import Checkpoint, open_checkpoint
from vllm_matquant.checkpoint.slice import Slice
from vllm_matquant.checkpoint.spec import QUANT_METHOD
from vllm_matquant.serve.embedding import check_embeddings
from vllm_matquant.serve.linear import predicted_bytes, quantized_layers, resident_bytes
from vllm_matquant.serve.precision import Precision

logger = init_logger(f"vllm.{__name__}")

LOAD_FORMATS = ("auto", "hf", "safetensors")


class MatquantModelLoader(DefaultModelLoader):
    """vLLM's default loader, save that matquant checkpoints are read by the checkpoint's own reader.

    The choice is made for each model, so that one process serves matquant models beside others.
    """

    def __init__(self, load_config: Any) -> None:
        super().__init__(load_config)
        self._opened: tuple[Checkpoint, Slice] | None = None

    def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> torch.nn.Module:
        if model_config.quantization != QUANT_METHOD:
            return super().load_model(vllm_config, model_config, prefix)
        quant_config = vllm_config.quant_config
        precision = quant_config.resolve_precision(vllm_config.additional_config)
        stored_width = quant_config.format.stored_width(precision.bits)
        folder = fetch(model_config, self.load_config.download_dir, ["*.json", shard_pattern(stored_width)])
        if precision.recipe is not None and quant_config.folder is None:  # a local folder has them, or is refused below
            decoders = precision.slice_of(open_checkpoint(folder, check_files=False)).decoders_file
            if decoders is not None:
                fetch(model_config, self.load_config.download_dir, [decoders])
        # A downloaded checkpoint could not be checked before; a faulty one must not cost an allocation.
        checkpoint = open_checkpoint(folder, check_files=False)
        served = precision.slice_of(checkpoint)
        checkpoint.check(served)
        self._opened = checkpoint, served
        model = super().load_model(vllm_config, model_config, prefix)
        logger.info(
            "Serving at %s with the kernel %s: codes and decoders take %d bytes on this rank, by the format %d",
            _described(precision),
            ", ".join(sorted({method.kernel.name for _, method in quantized_layers(model)})),
            resident_bytes(model),
            predicted_bytes(model),
        )
        return model

    def get_all_weights(self, model_config: Any, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        if model_config.quantization != QUANT_METHOD:
            yield from super().get_all_weights(model_config, model)
            return
        if self._opened is None:
            raise RuntimeError(f"{model_config.model}: a matquant model cannot be reloaded in place")
        self.counter_before_loading_weights = time.perf_counter()
        checkpoint, served = self._opened
        check_embeddings(model, checkpoint.layers)
        yield from checkpoint.tensors(served)
        for source in getattr(model, "secondary_weights", ()):
            yield from self._get_weights_iterator(source)


def fetch(model_config: Any, cache: str | None, patterns: list[str]) -> Path:
    """The checkpoint's folder; from a hub, with the files that match these globs only."""
    model = model_config.model
    model = maybe_download_from_modelscope(model, model_config.revision, cache, allow_patterns=patterns) or model
    if os.path.isdir(model):
        return Path(model)
    with get_lock(model, cache):
        folder = hf_api().snapshot_download(
            model,
            revision=model_config.revision,
            allow_patterns=patterns,
            cache_dir=cache,
            local_files_only=huggingface_hub.constants.HF_HUB_OFFLINE,
        )
    return Path(folder)


def _described(precision: Precision) -> str:
    """The widths of a model, for the log."""
    least = min(precision.recipe.values(), default=precision.bits) if precision.recipe else precision.bits
    return f"{precision.bits} bits" if least == precision.bits else f"{least} to {precision.bits} bits"
