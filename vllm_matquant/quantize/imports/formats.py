"""Which format a checkpoint is of, by the ``quantization_config`` of its config.json."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_matquant.checkpoint.errors import ConfigError
from vllm_matquant.checkpoint.spec import QUANT_METHOD
from vllm_matquant.quantize.imports.auto_round import layout_of_auto_round
from vllm_matquant.quantize.imports.awq import AWQ
from vllm_matquant.quantize.imports.compressed_tensors import PackQuantized
from vllm_matquant.quantize.imports.fields import Fields
from vllm_matquant.quantize.imports.gptq import GPTQ
from vllm_matquant.quantize.imports.layer import Layout

FORMATS: dict[str, Callable[[Fields], Layout]] = {
    "gptq": GPTQ.of,
    "awq": AWQ.of,
    "auto-round": layout_of_auto_round,
    "compressed-tensors": PackQuantized.of,
}
"""What reads ``quantization_config``, by its ``quant_method``."""


def find_layout(config: Any, where: Path) -> Layout:
    """The layout of a checkpoint's layers.

    Args:
        config: the value of ``quantization_config``.
        where: the file, to name in an error.

    Raises:
        ConfigError: the model is not quantized, or in a way that this does not read.
    """
    if not config:
        expected = f"what a quantizer writes, with quant_method one of {list(FORMATS)}"
        raise ConfigError(
            where, "quantization_config", "nothing", expected, "matquant quantize takes unquantized models"
        )
    if not isinstance(config, dict):
        raise ConfigError(where, "quantization_config", repr(config), "an object")
    fields = Fields(config, where)
    method = config.get("quant_method")
    if method == QUANT_METHOD:
        raise fields.fail("quant_method", f"one of {list(FORMATS)}", "It is a matquant checkpoint already")
    if not isinstance(method, str) or method not in FORMATS:
        raise fields.fail("quant_method", f"one of {list(FORMATS)}")
    return FORMATS[method](fields)
