"""AWQ ("gemm"): a word has eight codes of 4 bits, of outputs 0 2 4 6 1 3 5 7; zero points lie so too, as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_matquant.quantize.imports.fields import Fields
from vllm_matquant.quantize.imports.layer import FLOATS, WORDS, GivenLayer, Outline, StoredLayer, even_groups
from vllm_matquant.quantize.imports.words import unpack_stream, words_of

_BITS = 4
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output, among eight, of each field of a word


@dataclass(frozen=True)
class AWQ:
    """The layout of one checkpoint.

    Attributes:
        group_size: columns of a group; 0 for a whole row.
    """

    group_size: int
    name: ClassVar[str] = "awq"
    marker: ClassVar[str] = "qweight"

    @classmethod
    def of(cls, fields: Fields) -> AWQ:
        """From ``quantization_config``.

        Raises:
            ConfigError: a field is missing or of another value than this reads.
        """
        fields.bits("bits", "w_bit", known=(_BITS,))
        fields.one_of(("version", "format", "checkpoint_format"), ("gemm", "GEMM"), "gemm")
        fields.one_of(("zero_point",), (True,), True)
        return cls(fields.group_size("group_size", "q_group_size"))

    def outline(self, layer: StoredLayer) -> Outline:
        rows, columns = layer.shape
        group_of = even_groups(columns, self.group_size or columns)
        groups = int(group_of[-1]) + 1
        layer.expect("qweight", WORDS, columns, words_of(rows, _BITS))
        layer.expect("qzeros", WORDS, groups, words_of(rows, _BITS))
        layer.expect("scales", FLOATS, groups, rows)
        return Outline(_BITS, groups, group_of)

    def read(self, layer: StoredLayer, outline: Outline) -> GivenLayer:
        rows = layer.shape[0]
        codes, zeros = (_unpack(layer.read(suffix), rows).T for suffix in ("qweight", "qzeros"))
        scale = layer.read("scales").T.float()
        return GivenLayer(codes.contiguous(), _BITS, scale, zeros.float(), outline.group_of)


def _unpack(words: torch.Tensor, count: int) -> torch.Tensor:
    """Codes of words [rows, words]: uint8 [rows, count]."""
    eights = unpack_stream(words, _BITS, words.shape[1] * len(_ORDER)).unflatten(1, (-1, len(_ORDER)))
    ordered = torch.empty_like(eights)
    ordered[..., _ORDER] = eights
    return ordered.flatten(1)[:, :count]
