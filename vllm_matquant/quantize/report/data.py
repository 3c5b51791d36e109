"""What was measured during a quantization, and the figures that page and model card derive from it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from vllm_matquant.checkpoint.quantization_config import format_to_config
from vllm_matquant.checkpoint.spec import Format

REPORT_VERSION = 1
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class LayerRow:
    """One quantized layer.

    Attributes:
        name: its full name in the source.
        shape: (out_features, in_features).
        errors: relative output error on the calibration text at each width of the model, see
            :func:`vllm_matquant.quantize.layer.relative_error`, before decoders are trained end to end; empty for a
            method without Hessians.
        shown: whether it is a layer of an expert that too few tokens reached: it was fitted to all tokens of its block.
    """

    name: str
    shape: tuple[int, int]
    errors: dict[int, float]
    shown: bool = False

    @property
    def kind(self) -> str:
        """What layers of the same role in other blocks share: "self_attn.q_proj" of "model.layers.3.self_attn.q_proj".

        A number after the block's, such as that of an expert, becomes a star; a layer outside of blocks is a kind of
        its own.
        """
        _, _, role = self._parts()
        return _NUMBER.sub("*", role) if role else self.name

    @property
    def depth(self) -> int | None:
        """Number of the layer's block, None for a layer outside of blocks."""
        _, number, _ = self._parts()
        return int(number) if number else None

    def _parts(self) -> tuple[str, str, str]:
        match = re.match(r"(.*?)\.(\d+)\.(.+)", self.name, re.DOTALL)
        return (match[1], match[2], match[3]) if match else (self.name, "", "")


@dataclass(frozen=True)
class Report:
    """Everything measured during a quantization.

    Attributes:
        model: name of the source: of its folder, or on the hub.
        method: name of the method.
        settings: the method's fields, as JSON has them.
        format: of the checkpoint.
        layers: the quantized layers, in the model's order.
        quality: rows of :func:`vllm_matquant.measure.evaluate.evaluate`; empty if it was not run.
        quality_text: what they were measured on: ``name``, ``sha256``, ``samples``, ``sequence_length``,
            ``beginning_of_text``.
        calibration: :attr:`vllm_matquant.measure.windows.Windows.source`, None for a method without Hessians.
        bytes: size of the files needed to serve each width.
        seconds: wall time of each step, and of all as ``total``.
        peak_memory_bytes: largest resident set of the process.
        software: version of each package; processor, threads.
        command: the command line, without folders of the machine.
        source_bytes: size of the source's weight files.
        tower: the parts of a multimodal source that are not of its language model, and are not quantized.
        license: the source's ``license``, ``license_name`` and ``license_link``, as far as its model card states them.
    """

    model: str
    method: str
    settings: dict[str, Any]
    format: Format
    layers: Sequence[LayerRow]
    quality: Sequence[dict[str, Any]]
    quality_text: dict[str, Any]
    calibration: dict[str, Any] | None
    bytes: dict[int, int]
    seconds: dict[str, float]
    peak_memory_bytes: int
    software: dict[str, str]
    command: Sequence[str] = ()
    source_bytes: int | None = None
    tower: Sequence[str] = ()
    license: dict[str, str] = field(default_factory=dict)

    @property
    def weights(self) -> int:
        """Number of quantized weights."""
        return sum(rows * columns for rows, columns in (layer.shape for layer in self.layers))

    @property
    def shown(self) -> list[LayerRow]:
        """The layers of experts that too few tokens reached."""
        return [layer for layer in self.layers if layer.shown]

    @property
    def source_perplexity(self) -> float | None:
        """Of the source model, None if it was not measured."""
        return finite(self.quality[0]["reference_perplexity"]) if self.quality else None

    def width_rows(self) -> list[WidthRow]:
        """The figures of each offered width, the widest first."""
        quality = {row["bits"]: row for row in self.quality}
        return [self._width_row(width, quality.get(width, {})) for width in reversed(self.format.widths)]

    def _width_row(self, width: int, quality: dict[str, Any]) -> WidthRow:
        perplexity, source = finite(quality.get("perplexity")), self.source_perplexity
        resident = sum(self.format.resident_bytes(*layer.shape, width, layer.name) for layer in self.layers)
        return WidthRow(
            bits=width,
            bits_per_weight=8 * resident / self.weights,
            bytes=self.bytes[width],
            perplexity=perplexity,
            gap=math.log(perplexity / source) if perplexity and source else None,
            kl=finite(quality.get("kl")),
        )

    def to_dict(self) -> dict[str, Any]:
        """The content of report.json: the fields, with null for a figure that is not finite."""
        fields = asdict(self) | {"format": format_to_config(self.format)}
        return {"report_version": REPORT_VERSION, **_json_able(fields)}


class WidthRow(NamedTuple):
    """What a reader wants to know of one width; None where it was not measured, or is not finite.

    ``bits_per_weight`` counts codes and decoder of the quantized layers, ``bytes`` every file that serving reads.
    ``gap`` is the log-perplexity minus the source's and ``kl`` the KL divergence from the source, in nats per token.
    """

    bits: int
    bits_per_weight: float
    bytes: int
    perplexity: float | None
    gap: float | None
    kl: float | None


def finite(value: float | None) -> float | None:
    """``value``, or None in place of infinity and NaN, which a model that diverged gives and JSON has no word for."""
    return value if value is not None and math.isfinite(value) else None


def _json_able(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _json_able(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_able(item) for item in value]
    return finite(value) if isinstance(value, float) else value
