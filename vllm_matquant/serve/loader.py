"""Loading of matquant checkpoints: only the files that the width reads are fetched and opened."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from vllm_matquant.checkpoint.reader import Checkpoint
from vllm_matquant.checkpoint.spec import QUANT_METHOD
from vllm_matquant.serve.adapters import compute_adapters_by_row
from vllm_matquant.serve.cores import warn_of_idle_cores
from vllm_matquant.serve.embedding import check_embeddings
from vllm_matquant.serve.experts import reads_for
from vllm_matquant.serve.files import fetch, opened
from vllm_matquant.serve.linear import predicted_bytes, quantized_layers, resident_bytes
from vllm_matquant.serve.request import read_request, resident_files
from vllm_matquant.serve.served import Served
from vllm_matquant.serve.speculation.proposer import draft_with_slices

logger = init_logger(f"vllm.{__name__}")

LOAD_FORMATS = ("auto", "hf", "safetensors")


class MatquantModelLoader(DefaultModelLoader):
    """vLLM's default loader, save that matquant checkpoints are read by the checkpoint's own reader.

    The choice is made for each model, so that one process serves matquant models beside others.
    """

    def __init__(self, load_config: Any) -> None:
        super().__init__(load_config)
        self._opened: tuple[Checkpoint, Served, Any] | None = None

    def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> torch.nn.Module:
        if model_config.quantization != QUANT_METHOD:
            return super().load_model(vllm_config, model_config, prefix)
        quant_config = vllm_config.quant_config
        cache = self.load_config.download_dir
        served = quant_config.settle(read_request(vllm_config.additional_config), cache)
        files = ["*.json", *resident_files(served.resident)]
        checkpoint = opened(fetch(model_config.model, model_config.revision, cache, files))
        # A downloaded checkpoint could not be checked before; a faulty one must not cost an allocation.
        checkpoint.check(*served.resident)
        self._opened = checkpoint, served, quant_config
        if vllm_config.lora_config is not None:
            compute_adapters_by_row()
        model = super().load_model(vllm_config, model_config, prefix)
        logger.info(
            "Serving at %s with the kernel %s: codes and decoders take %d bytes on this rank, by the format %d",
            _described(served),
            ", ".join(sorted({method.kernel.name for _, method in quantized_layers(model)})),
            resident_bytes(model),
            predicted_bytes(model),
        )
        warn_of_idle_cores(quant_config.cores, vllm_config.parallel_config.local_world_size)
        if served.draft is not None:
            draft_with_slices()
            logger.info(
                "Drafts are made with %s: this costs %d bytes on this rank that %s alone does not, and no KV cache",
                served.draft.name,
                sum(method.predicted_bytes() - method.bytes_alone() for _, method in quantized_layers(model)),
                served.active.name,
            )
        if served.offer is not None:
            logger.info(
                "Offered: %s. This costs %d bytes more on this rank than %s alone",
                ", ".join(each.name for each in served.offer.slices),
                sum(method.predicted_bytes() - method.bytes_alone() for _, method in quantized_layers(model)),
                served.active.name,
            )
            if quant_config.rows is not None and served.offer.refusal is None:
                quant_config.rows.attach(model)
        return model

    def get_all_weights(self, model_config: Any, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        if model_config.quantization != QUANT_METHOD:
            yield from super().get_all_weights(model_config, model)
            return
        if self._opened is None:
            raise RuntimeError(f"{model_config.model}: a matquant model cannot be reloaded in place")
        self.counter_before_loading_weights = time.perf_counter()
        checkpoint, served, quant_config = self._opened
        check_embeddings(model, quant_config.vllm_names(checkpoint.layers))
        yield from checkpoint.tensors(*served.resident, suffixes=served.suffixes, reads=reads_for(model))
        checkpoint.close()
        for source in getattr(model, "secondary_weights", ()):
            yield from self._get_weights_iterator(source)


def _described(served: Served) -> str:
    """The widths of a server, for the log."""
    active = served.active
    bits = f"{active.narrowest} to {active.widest}" if active.narrowest < active.widest else f"{active.widest}"
    others = ", ".join(each.name for each in served.resident if each != active)
    return f"{bits} bits" + (f" ({others} resident too)" if others else "")
