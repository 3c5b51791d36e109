"""The widths that a model runs at.

Today one width serves the whole model, but for layers that have widths of their own. Everything downstream asks for
the precision of one layer, with a width for each of its output partitions (q, k and v of a fused layer), and takes the
widths of different layers or partitions as they come.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_matquant.checkpoint.errors import ConfigError
from vllm_matquant.checkpoint.reader import open_checkpoint
from vllm_matquant.checkpoint.spec import QUANT_METHOD, WIDTHS, Format, served_width

SETTINGS_KEY = QUANT_METHOD  # of the plugin's own part in vLLM's additional_config
SETTINGS = ("bits", "activation_bits")
ACTIVATION_BITS = (8, 16)


@dataclass(frozen=True)
class LayerPrecision:
    """The widths of one linear layer.

    Attributes:
        active_widths: the width that each output partition is computed at.
    """

    active_widths: tuple[int, ...]

    @property
    def resident_width(self) -> int:
        """Bits of each code that are kept in memory."""
        return max(self.active_widths)

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Widths whose decoders are kept in memory, ascending."""
        return tuple(sorted(set(self.active_widths)))


@dataclass(frozen=True)
class Precision:
    """The widths of a model.

    Attributes:
        bits: the width of every layer that has no widths of its own.
        activation_bits: bits to which kernels round activations, None for the default of each width, see
            :func:`vllm_matquant.kernels.ops.linear`.
    """

    bits: int
    activation_bits: int | None = None

    def of_layer(self, widths: Sequence[Sequence[int]]) -> LayerPrecision:
        """The widths of a layer whose output partitions have ``widths``, each ascending."""
        return LayerPrecision(tuple(served_width(offered, self.bits) for offered in widths))


def requested_bits(additional_config: Any) -> int | None:
    """``bits`` of ``additional_config["matquant"]``, None where it is not given.

    Raises:
        ConfigError: the settings are not an object, hold an unknown key, or bits is not an integer in 2..8.
    """
    return _setting(additional_config, "bits", WIDTHS)


def requested_activation_bits(additional_config: Any) -> int | None:
    """``activation_bits`` of ``additional_config["matquant"]``, None where it is not given.

    Raises:
        ConfigError: the settings are not an object, hold an unknown key, or activation_bits is not 8 or 16.
    """
    return _setting(additional_config, "activation_bits", ACTIVATION_BITS)


def _setting(additional_config: Any, name: str, expected: Sequence[int]) -> int | None:
    settings = additional_config.get(SETTINGS_KEY, {}) if isinstance(additional_config, Mapping) else {}
    if not isinstance(settings, Mapping):
        raise ConfigError("additional_config", SETTINGS_KEY, repr(settings), 'an object such as {"bits": 4}')
    unknown = sorted(set(settings) - set(SETTINGS))
    if unknown:
        raise ConfigError("additional_config", SETTINGS_KEY, f"unknown keys {unknown}", f"keys of {list(SETTINGS)}")
    value = settings.get(name)
    if value is not None and (type(value) is not int or value not in expected):
        raise ConfigError("additional_config", f"{SETTINGS_KEY}.{name}", repr(value), f"one of {list(expected)}")
    return value


def with_bits(additional_config: Mapping[str, Any], bits: int) -> dict[str, Any]:
    """A copy of ``additional_config`` whose settings ask for ``bits``."""
    return {**additional_config, SETTINGS_KEY: {**additional_config.get(SETTINGS_KEY, {}), "bits": bits}}


def resolve(bits: int | None, checkpoint_format: Format, folder: Path | None) -> Precision:
    """Check that a checkpoint serves ``bits``; without ``bits``, take the widest width that it serves.

    Args:
        bits: the width asked for.
        checkpoint_format: what the checkpoint's config.json declares.
        folder: the checkpoint, validated whole at the width; None if it is not yet downloaded.

    Raises:
        CheckpointError: the width is not offered, its files are not in the folder, or the files are not sound.
    """
    if folder is None:
        bits = bits or checkpoint_format.max_width
        checkpoint_format.check_width(bits, "quantization_config")
        return Precision(bits)
    if bits is None:
        servable = open_checkpoint(folder, check_values=False).servable_widths
        # With no width on disk the narrowest is asked for, and its check below names the files that are missing.
        bits = max(servable, default=checkpoint_format.widths[0])
    open_checkpoint(folder, bits)
    return Precision(bits)
