"""Checkpoints that are there to be measured alone, refused by whatever would compute with their codes."""

from __future__ import annotations

from pathlib import Path

from vllm_matquant.checkpoint.decoder import KINDS
from vllm_matquant.checkpoint.errors import ConfigError
from vllm_matquant.checkpoint.names import CONFIG_FILE
from vllm_matquant.checkpoint.slicing import SLICE_RULES
from vllm_matquant.checkpoint.spec import Format


def check_served(format_: Format, where: Path | str = CONFIG_FILE) -> None:
    """Refuse a checkpoint that is there to be evaluated.

    Args:
        format_: its format.
        where: the file to name in an error.

    Raises:
        ConfigError: its decoders are of a kind that no kernel reads, or its slices have more levels than their bits.
    """
    kind = format_.decoder_kind
    if kind.one_width:
        raise ConfigError(
            where,
            "quantization_config.decoder_kind",
            f"{kind.name!r}, which no kernel reads: the checkpoint is for evaluation and comparison",
            f"one of {list(KINDS)}",
            "Quantize with --method nested-vq to serve codebooks, or measure this one with matquant evaluate",
        )
    if not format_.slice_rule.fits_width:
        raise ConfigError(
            where,
            "quantization_config.slicing",
            f"{format_.slicing!r}, whose slices of r bits have 2^r + 1 levels: the checkpoint is for evaluation and "
            "comparison",
            f"one of {[name for name, rule in SLICE_RULES.items() if rule.fits_width]}",
            "For 2.05 bits that are served, see --bits 2.05 with a recipe (matquant search), or measure this one with "
            "matquant evaluate",
        )
