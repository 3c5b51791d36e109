"""A checkpoint's slices as models: a transformers model, and vLLM's engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from vllm_matquant.bench.serve import check_vllm
from vllm_matquant.checkpoint.reader import Checkpoint, open_checkpoint
from vllm_matquant.checkpoint.slice import Slice
from vllm_matquant.measure.model import LayerModel, slice_model

if TYPE_CHECKING:
    from vllm import LLM


def load_model(
    checkpoint: Checkpoint | Path | str, which: Slice | float | str | None = None, dtype: torch.dtype = torch.bfloat16
) -> PreTrainedModel:
    """A transformers model with the weights of a slice, an ordinary one: for its hidden states, its gradients, a study.

    It takes the memory of the unquantized model.

    Args:
        checkpoint: an open checkpoint, or its folder.
        which: a slice, a width (4, 4.0 or "4"), or the name of a recipe; by default the widest width that the folder
            can serve.
        dtype: of its parameters.

    Raises:
        CheckpointError: the folder holds no sound checkpoint, it does not offer this slice, or files of it are not in
            the folder.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_checkpoint(checkpoint, check_files=False)
    served = which if isinstance(which, Slice) else checkpoint.slice(which)
    checkpoint.check(served)
    model = LayerModel(slice_model(checkpoint, dtype), checkpoint.layers)
    model.load(checkpoint.weights(served))
    return model.model


def serve(
    folder: Path | str,
    *,
    bits: float | None = None,
    memory: int | str | None = None,
    recipe: Path | str | Mapping[str, int] | None = None,
    activation_bits: int | None = None,
    elastic: str | Sequence[int | str] | None = None,
    speculate_bits: float | str | None = None,
    speculate_tokens: int | None = None,
    **engine: Any,
) -> LLM:
    """vLLM's engine with a slice of a checkpoint; without a choice the widest that the folder holds.

    Args:
        folder: the checkpoint, or its name on a hub.
        bits: a width (4), or the budget of an average (2.5, 3.0), within which the best recipe is served.
        memory: what all weights may take, in bytes or such as "90MiB": the best recipe that fits is served.
        recipe: a recipe's file, or the width of every layer.
        activation_bits: bits to which the CPU's kernels round activations, 8 or 16.
        elastic: widths and recipes among which :func:`switch` and requests can choose, "2..8" or (2, 4, 8).
        speculate_bits: a width, a budget or a recipe that is narrower than what is served: it guesses the next tokens.
        speculate_tokens: how many it guesses before they are checked.
        engine: further arguments of ``vllm.LLM``, such as ``max_model_len``.

    Raises:
        ValueError: vLLM is not installed, or it refuses the settings; its message holds that of the CheckpointError.
    """
    check_vllm()
    from vllm import LLM

    path = str(recipe) if isinstance(recipe, Path) else recipe
    offered = elastic if elastic is None or isinstance(elastic, str) else list(elastic)
    chosen = {
        "bits": bits,
        "memory": memory,
        "recipe": path,
        "activation_bits": activation_bits,
        "elastic": offered,
        "speculate_bits": speculate_bits,
        "speculate_tokens": speculate_tokens,
    }
    settings = {name: value for name, value in chosen.items() if value is not None}
    additional = dict(engine.pop("additional_config", {}))
    return LLM(str(folder), additional_config=additional | {"matquant": settings}, **engine)


def switch(llm: LLM, bits: int | None = None, recipe: str | None = None) -> Slice:
    """Make another slice the active one of an engine that :func:`serve` has made with ``elastic``.

    Nothing is loaded, repacked, compiled or allocated. Requests of later calls are computed with it.

    Args:
        llm: the engine; no request may be running.
        bits: a width that it offers.
        recipe: or the name of a recipe that it offers.

    Returns:
        The slice that is active now.

    Raises:
        ValueError: it is not offered, or the engine has one width, or requests are running.
        RuntimeError: a process of the engine did not switch.
    """
    from vllm_matquant.serve.elastic.switch import switch

    return switch(llm, bits, recipe)
