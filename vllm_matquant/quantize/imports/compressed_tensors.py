"""compressed-tensors, "pack-quantized": codes in words along the inputs, zero points, if any, along the outputs.

Codes and zero points are signed, and stored with half of their range added. Up to release 0.17 a word holds whole codes
alone; from 0.18 on they are one dense stream. Both have the same name: the packed width tells them apart, by the
layer's ``weight_shape``, wherever they differ.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vllm_matquant.checkpoint.errors import ConfigError, TensorShapeError, TensorValueError
from vllm_matquant.quantize.imports.fields import Fields
from vllm_matquant.quantize.imports.layer import FLOATS, WORDS, GivenLayer, Outline, StoredLayer, even_groups
from vllm_matquant.quantize.imports.words import padded_words_of, unpack_padded, unpack_stream, words_of

_STRATEGIES = ("tensor", "channel", "group")
_DENSE_SINCE = (0, 18)


@dataclass(frozen=True)
class _Scheme:
    """How the layers of a group of the configuration are quantized.

    Attributes:
        targets: names of layers or of their classes; after "re:" regular expressions that match from the start.
        bits: of a code.
        group_size: columns of a group; 0 for a whole row.
        one_scale: whether all rows share a scale.
        symmetric: whether there are no zero points.
    """

    targets: Sequence[str]
    bits: int
    group_size: int
    one_scale: bool
    symmetric: bool

    def matches(self, layer: str) -> int:
        """How closely: 2 by name, 1 by class, 0 not at all."""
        for target in self.targets:
            by_name = re.match(target[3:], layer) if target.startswith("re:") else target == layer
            if by_name:
                return 2
        return int("Linear" in self.targets)


@dataclass(frozen=True)
class PackQuantized:
    """The layout of one checkpoint.

    Attributes:
        schemes: of its layers.
        dense: what its version says of codes that lie in one stream; None if it says nothing.
    """

    schemes: Sequence[_Scheme]
    dense: bool | None
    name: ClassVar[str] = "compressed-tensors pack-quantized"
    marker: ClassVar[str] = "weight_packed"

    @classmethod
    def of(cls, fields: Fields) -> PackQuantized:
        """From ``quantization_config``.

        Raises:
            ConfigError: a field is missing or of another value than this reads.
        """
        fields.one_of(("format",), ("pack-quantized",), None)
        fields.refuse("transform_config", "sparsity_config", "kv_cache_scheme")
        groups = fields.part("config_groups", fields.get("config_groups"))
        schemes = [_scheme(groups.part(name, content)) for name, content in groups.content.items()]
        if not schemes:
            raise fields.fail("config_groups", "an object with one group at least")
        found = re.match(r"(\d+)\.(\d+)", str(fields.get("version", default="")))
        return cls(schemes, found and (int(found[1]), int(found[2])) >= _DENSE_SINCE)

    def outline(self, layer: StoredLayer) -> Outline:
        rows, columns = layer.shape
        scheme = self._scheme_of(layer)
        layer.expect("weight_shape", (torch.int64, torch.int32), 2)
        if (stored := layer.read("weight_shape").tolist()) != [rows, columns]:
            expected = f"{[rows, columns]} by config.json"
            raise TensorShapeError(layer.path("weight_shape"), f"{layer.name}.weight_shape", stored, expected)
        group_of = even_groups(columns, scheme.group_size or columns)
        groups = int(group_of[-1]) + 1
        scales = (1,) if scheme.one_scale else (rows, groups)
        layer.expect("weight_scale", FLOATS, *scales)
        if layer.spec("weight_g_idx") is not None:
            layer.expect("weight_g_idx", WORDS, columns)
            if bool((layer.read("weight_g_idx") >= 0).all()):  # -1 in all places: not used
                group_of = layer.groups_of_columns("weight_g_idx", groups)
        self._is_dense(layer, "weight_packed", layer.found("weight_packed", WORDS, 2).shape[1], columns, scheme.bits)
        if not scheme.symmetric:
            self._zeros_are_dense(layer, scheme)
        return Outline(scheme.bits, groups, group_of)

    def read(self, layer: StoredLayer, outline: Outline) -> GivenLayer:
        (rows, columns), scheme = layer.shape, self._scheme_of(layer)
        words, half = layer.read("weight_packed"), 2 ** (scheme.bits - 1)
        dense = self._is_dense(layer, "weight_packed", words.shape[1], columns, scheme.bits)
        codes = (unpack_stream if dense else unpack_padded)(words, scheme.bits, columns)
        scale = layer.read("weight_scale").float().expand(rows, outline.groups)
        zero = torch.full_like(scale, half)
        if not scheme.symmetric and scheme.one_scale:
            zero = zero + layer.read("weight_zero_point").float()
        elif not scheme.symmetric:
            words = layer.read("weight_zero_point").T
            zero = (unpack_stream if self._zeros_are_dense(layer, scheme) else unpack_padded)(
                words, scheme.bits, rows
            ).T.float()
        return GivenLayer(codes, scheme.bits, scale, zero, outline.group_of)

    def _scheme_of(self, layer: StoredLayer) -> _Scheme:
        best = max(self.schemes, key=lambda scheme: scheme.matches(layer.name))
        if not best.matches(layer.name):
            path = layer.path(self.marker)
            targets = [target for scheme in self.schemes for target in scheme.targets]
            expected = f"a layer that a target of config_groups matches: {targets}"
            raise ConfigError(path, layer.name, "codes", expected)
        return best

    def _zeros_are_dense(self, layer: StoredLayer, scheme: _Scheme) -> bool:
        rows, columns = layer.shape
        if scheme.one_scale:
            layer.expect("weight_zero_point", (torch.int8,), 1)
            return False
        words, groups = layer.found("weight_zero_point", WORDS, 2).shape
        expected = -(-columns // (scheme.group_size or columns))
        if groups != expected:
            layer.expect("weight_zero_point", WORDS, words, expected)
        return self._is_dense(layer, "weight_zero_point", words, rows, scheme.bits)

    def _is_dense(self, layer: StoredLayer, suffix: str, words: int, count: int, bits: int) -> bool:
        """Whether codes lie in one stream, by the words that they take.

        Raises:
            TensorShapeError: they would be neither.
            TensorValueError: they may be both, and the version does not tell.
        """
        dense, padded = words == words_of(count, bits), words == padded_words_of(count, bits)
        path, name = layer.path(suffix), f"{layer.name}.{suffix}"
        if not dense and not padded:
            expected = f"{words_of(count, bits)} words, or {padded_words_of(count, bits)} of whole codes"
            raise TensorShapeError(
                path, f"shape of {name}", f"{words} words for {count} codes of {bits} bits", expected
            )
        if dense and padded and 32 % bits:
            if self.dense is None:
                found = f"{words} words for {count} codes of {bits} bits, which releases pack in two ways"
                raise TensorValueError(path, name, found, "a version in quantization_config, which tells")
            return self.dense
        return dense


def _scheme(fields: Fields) -> _Scheme:
    """From one of the configuration's groups."""
    if fields.get("input_activations") or fields.get("output_activations"):
        name = "input_activations" if fields.get("input_activations") else "output_activations"
        raise fields.fail(name, "null: activations that are not quantized")
    targets = fields.get("targets", default=[])
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise fields.fail("targets", "a list of names")
    weights = fields.part("weights", fields.get("weights"))
    weights.one_of(("type",), ("int",), "int")
    strategy = weights.one_of(("strategy",), _STRATEGIES, _default_strategy(weights.content))
    group_size = weights.group_size("group_size") if strategy == "group" else 0
    symmetric = weights.one_of(("symmetric",), (True, False), True)
    return _Scheme(targets, weights.bits("num_bits"), group_size, strategy == "tensor", symmetric)


def _default_strategy(weights: Mapping[str, Any]) -> str:
    size = weights.get("group_size")
    return "tensor" if size is None else "channel" if size == -1 else "group"
