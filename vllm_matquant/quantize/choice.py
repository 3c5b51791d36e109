"""The choice of layers by regular expressions: which are quantized, in which groups and at which widths."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from vllm_matquant.checkpoint.decoder import AFFINE_FLOAT16, AFFINE_INT8, EVERY_KIND, DecoderKind
from vllm_matquant.checkpoint.quantization_config import check_kind_widths, check_layer_widths
from vllm_matquant.checkpoint.spec import Format, GroupSize
from vllm_matquant.quantize.embeddings import layer_method
from vllm_matquant.quantize.method import Method
from vllm_matquant.quantize.selection import Selection, owner_of
from vllm_matquant.quantize.source import Source

_Setting = TypeVar("_Setting")


def plan_format(
    source: Source,
    method: Method,
    group_size: GroupSize,
    ignore: Sequence[str],
    group_size_for: Sequence[tuple[str, GroupSize]] = (),
    bits_for: Sequence[tuple[str, tuple[int, ...]]] = (),
    *,
    quantize_embeddings: bool = False,
    decoder_kind: DecoderKind | None = None,
) -> Format:
    """The format of the checkpoint to be written, with the settings checked against every layer.

    Args:
        source: the model.
        method: what will choose the codes.
        group_size: columns that share a decoder.
        ignore: regular expressions; a layer whose full name one of them matches anywhere is not quantized.
        group_size_for: regular expressions with the group size of the layers they match; the last match counts.
        bits_for: regular expressions with the widths, ascending, of the layers they match; the last match counts.
        quantize_embeddings: quantize the input embedding and the output head too, but for those that are ignored. Where
            they are tied, one cannot be without the other.
        decoder_kind: how decoders are stored; by default the first kind that the method can fill; of scales and offsets
            those in 8 bits, but where a whole row is one group: that gains nothing from 8 bits and has float16.

    Raises:
        ConfigError: the group size does not divide a layer's input features, or a layer's width would never be served.
        ValueError: an expression is none, or matches no layer, or no layer is left; or embeddings shall be quantized
            and none is left; or the method can do no embeddings, or not the widths or decoders asked for.
    """
    kind = decoder_kind or _default_kind(method, group_size)
    if kind not in method.decoder_kinds:
        expected = " or ".join(name for name, each in EVERY_KIND.items() if each in method.decoder_kinds)
        raise ValueError(f"decoder: found {kind.name}, expected {expected} for method {method.name}")
    embeddings = list(source.skeleton.embeddings) if quantize_embeddings else []
    layers = [name for name in source.matrices if name in embeddings or name in source.skeleton.linears]
    choice = _Choice(layers, "linear layers and embeddings" if embeddings else "linear layers")
    ignored = [name for expression in ignore for name in choice.matching(expression, "ignore")]
    outer = _outer_layers_but(source, ignored, method) if quantize_embeddings else []
    others = [name for name in source.skeleton.linears if source.matrices[name].block is None]
    ignored = [name for name in (*others, *ignored) if name not in (*embeddings, *outer)]
    if not {name for name in layers if source.matrices[name].block is not None} - set(ignored):
        raise ValueError(
            f"ignore: found {list(ignore)}, which match every linear layer, expected some layer to be left"
        )
    format_ = Format(
        method.widths,
        group_size,
        tuple(dict.fromkeys(ignored)),
        method.slicing,
        quantized_embeddings=tuple(name for name in embeddings if name in outer),
        decoder_kind=kind,
    )
    shapes = Selection(source, format_).shapes

    def settings(option: str, rules: Sequence[tuple[str, _Setting]]) -> dict[str, _Setting]:
        # Tied layers are one, which bears the first's name.
        found = {owner_of(source, name): value for name, value in choice.settings(option, rules)}
        return {name: found[name] for name in shapes if name in found}

    widths = settings("bits-for", bits_for)
    format_ = replace(
        format_,
        layer_group_sizes=settings("group-size-for", group_size_for),
        layer_widths={name: own for name, own in widths.items() if own != method.widths},
    )
    _check(source, method, format_)
    return format_


def _default_kind(method: Method, group_size: GroupSize) -> DecoderKind:
    if AFFINE_INT8 not in method.decoder_kinds:
        return method.decoder_kinds[0]
    return AFFINE_FLOAT16 if group_size == "channel" else AFFINE_INT8


def _check(source: Source, method: Method, format_: Format) -> None:
    """Refuse group sizes and widths that a layer, or the method, cannot have."""
    if format_.layer_widths and not method.takes_layer_widths:
        raise ValueError(f"bits-for: found method {method.name}, expected one that takes layers with other widths")
    hint = "A codebook has at most 256 entries: choose other --bits, or another --decoder"
    check_kind_widths(format_.decoder_kind, format_.widths, "widths", source.folder, hint)
    for name, widths in format_.layer_widths.items():
        check_layer_widths(widths, method.widths, f"widths of {name}", source.folder)
        check_kind_widths(format_.decoder_kind, widths, f"widths of {name}", source.folder, hint)
        method.with_widths(widths)  # which refuses those that the method cannot do
    for name, (_, in_features) in Selection(source, format_).shapes.items():
        format_.group_size_of(in_features, name, source.folder)


def _outer_layers_but(source: Source, ignored: Sequence[str], method: Method) -> list[str]:
    """Input embedding and output head, without those that share their weight with one of ``ignored``.

    Raises:
        ValueError: none is left, or ``method`` cannot quantize them.
    """
    layer_method(method)
    left_out = {owner_of(source, name) for name in ignored}
    found = [name for name in (source.embedding, source.output_head) if name is not None]
    layers = [name for name in found if owner_of(source, name) not in left_out]
    if not layers:
        raise ValueError(
            f"quantize-embeddings: found {' and '.join(found) or 'no embedding'}, of which ignore leaves none, "
            "expected an embedding or output head to quantize (tied ones are both ignored if one is)"
        )
    return layers


@dataclass(frozen=True)
class _Choice:
    """Layers to choose from by regular expressions, and what to call them in an error."""

    layers: Sequence[str]
    kind: str

    def matching(self, expression: str, option: str) -> list[str]:
        """The layers that an expression matches anywhere in their names."""
        try:
            matching = [name for name in self.layers if re.search(expression, name)]
        except re.error as cause:
            raise ValueError(f"{option}: found {expression!r}, expected a regular expression ({cause})") from cause
        if not matching:
            raise ValueError(f"{option}: {expression!r} matches none of the model's {len(self.layers)} {self.kind}")
        return matching

    def settings(self, option: str, rules: Sequence[tuple[str, _Setting]]) -> list[tuple[str, _Setting]]:
        """Layer and setting of every match, in the rules' order."""
        return [(name, value) for expression, value in rules for name in self.matching(expression, option)]
