"""GPTQ: codes packed along the inputs, zero points along the outputs, both as [packed, ...] of the transposed weight.

What the tools that write it do:

- Version 1 (``checkpoint_format`` "gptq") stores each zero point less one, version 2 ("gptq_v2") as it is. GPTQModel
  takes the one off whole words at 2, 4 and 8 bits: a zero point of 0 borrows from the field after it, which adding to
  whole words gives back. At 3 bits it does so for each field, modulo 8.
- Codes of 2, 3, 4 and 8 bits are one stream. GPTQModel's "gptq_p" has planes, with zero points as they are, at 3 bits
  and at 5 to 7, in words of the same shape. AutoRound's 5 to 7 bits are a stream.
- ``g_idx`` says which group's scale and zero point a column takes; columns are never stored in another order.
- Layers may have other bits and groups than config.json says (``dynamic``, ``extra_config``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_matquant.checkpoint.errors import ConfigError, TensorShapeError
from vllm_matquant.quantize.imports.fields import Fields
from vllm_matquant.quantize.imports.layer import (
    FLOATS,
    WORDS,
    GivenLayer,
    Outline,
    StoredLayer,
    bits_of_words,
    even_groups,
)
from vllm_matquant.quantize.imports.words import add_one, plane_words_of, unpack_planes, unpack_stream, words_of

_STREAM_BITS = (2, 3, 4, 8)  # that every tool stores as a stream
_VERSIONS = ("gptq", "gptq_v2", "gptq_p")


@dataclass(frozen=True)
class GPTQ:
    """The layout of one checkpoint.

    Attributes:
        bits: of a code, where a layer does not have its own.
        group_size: columns of a group; 0 for a whole row.
        own_bits: whether layers may have their own bits and groups.
        less_one: whether zero points are stored less one.
        planes: whether codes lie in planes.
        name: of the format.
    """

    bits: int
    group_size: int
    own_bits: bool = False
    less_one: bool = True
    planes: bool = False
    name: str = "gptq"
    marker: str = "qweight"

    @classmethod
    def of(cls, fields: Fields) -> GPTQ:
        """From ``quantization_config``.

        Raises:
            ConfigError: a field is missing or of another value than this reads.
        """
        fields.refuse("adapter", "rotation")
        bits, group_size = fields.bits("bits"), fields.group_size("group_size")
        version = fields.one_of(("checkpoint_format", "format"), _VERSIONS, "gptq")
        planes = version == "gptq_p"
        own = bool(fields.get("dynamic") or fields.get("extra_config"))
        stream_of_any = bool(fields.get("autoround_version"))
        if not planes and not stream_of_any and bits not in _STREAM_BITS:
            expected = (
                f"one of {list(_STREAM_BITS)}, or 'gptq_p' as checkpoint_format, which says how others are packed"
            )
            raise ConfigError(fields.where, f"{fields.subject}.bits", bits, expected)
        return cls(bits, group_size, own, version == "gptq", planes, version)

    def outline(self, layer: StoredLayer) -> Outline:
        rows, columns = layer.shape
        words = layer.found("qweight", WORDS, 2).shape[0]
        bits = self.bits
        if self.own_bits and words != self._words(columns, bits):
            bits = bits_of_words(layer, "qweight", words, columns)
        layer.expect("qweight", WORDS, self._words(columns, bits), rows)
        groups = layer.found("scales", FLOATS, 2).shape[0]
        if layer.spec("g_idx") is not None:
            layer.expect("g_idx", WORDS, columns)
            group_of = layer.groups_of_columns("g_idx", groups)
        else:
            group_of = even_groups(columns, self._group_size(layer, groups))
            groups = int(group_of[-1]) + 1
        layer.expect("scales", FLOATS, groups, rows)
        layer.expect("qzeros", WORDS, groups, self._words(rows, bits))
        return Outline(bits, groups, group_of)

    def read(self, layer: StoredLayer, outline: Outline) -> GivenLayer:
        (rows, columns), bits = layer.shape, outline.bits
        codes = self._unpack(layer.read("qweight").T, bits, columns)
        words = layer.read("qzeros")
        if self.less_one and bits != 3:
            words = add_one(words, bits)
        zeros = self._unpack(words, bits, rows)
        if self.less_one and bits == 3:
            zeros = (zeros + 1) & 7
        return GivenLayer(codes, bits, layer.read("scales").T.float(), zeros.T.float(), outline.group_of)

    def _words(self, count: int, bits: int) -> int:
        return plane_words_of(count, bits) if self.planes else words_of(count, bits)

    def _unpack(self, words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
        return unpack_planes(words, bits, count) if self.planes else unpack_stream(words, bits, count)

    def _group_size(self, layer: StoredLayer, groups: int) -> int:
        """Columns of a group of a layer that has so many and no index of them."""
        columns = layer.shape[1]
        size = self.group_size or columns
        if -(-columns // size) == groups:
            return size
        if self.own_bits and groups and columns % groups == 0:
            return columns // groups
        name, expected = f"shape of {layer.name}.scales", f"{-(-columns // size)} by group_size, or a g_idx"
        raise TensorShapeError(layer.path("scales"), name, f"{groups} groups", expected)
