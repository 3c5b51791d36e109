"""A layer as another tool has stored it: its tensors in the files, and what they mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from vllm_matquant.checkpoint.decoder import TensorSpec
from vllm_matquant.checkpoint.errors import MissingTensorError, TensorDtypeError, TensorShapeError, TensorValueError
from vllm_matquant.checkpoint.spec import WIDTHS

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
WORDS = (torch.int32,)


class Tensors(Protocol):
    """Tensors in files, see :class:`vllm_matquant.quantize.imports.model.StoredTensors`."""

    def spec(self, name: str) -> TensorSpec | None:
        """Dtype and shape of a tensor, None if there is none."""

    def path(self, name: str) -> Path:
        """The file of a tensor; the folder if there is none."""

    def read(self, name: str) -> torch.Tensor:
        """A tensor."""


@dataclass(frozen=True)
class StoredLayer:
    """The tensors of a layer in the files.

    Attributes:
        name: of the layer.
        shape: (out_features, in_features), by config.json.
        tensors: of the model.
    """

    name: str
    shape: tuple[int, int]
    tensors: Tensors

    def spec(self, suffix: str) -> TensorSpec | None:
        """Dtype and shape of one of its tensors, None if it has no such."""
        return self.tensors.spec(f"{self.name}.{suffix}")

    def path(self, suffix: str) -> Path:
        """The file of one of its tensors."""
        return self.tensors.path(f"{self.name}.{suffix}")

    def read(self, suffix: str) -> torch.Tensor:
        """One of its tensors."""
        return self.tensors.read(f"{self.name}.{suffix}")

    def found(self, suffix: str, dtypes: Sequence[torch.dtype], rank: int) -> TensorSpec:
        """The spec of a tensor that the layer must have.

        Args:
            suffix: its name within the layer.
            dtypes: what it may have.
            rank: its dimensions.

        Raises:
            MissingTensorError, TensorDtypeError, TensorShapeError: it is not there, or another.
        """
        spec, name, path = self.spec(suffix), f"{self.name}.{suffix}", self.path(suffix)
        if spec is None:
            raise MissingTensorError(path, name, "in no file", "one for each quantized layer")
        if spec.dtype not in dtypes:
            raise TensorDtypeError(path, name, spec.dtype, " or ".join(map(str, dtypes)))
        if len(spec.shape) != rank:
            raise TensorShapeError(path, f"shape of {name}", list(spec.shape), f"{rank} dimensions")
        return spec

    def expect(self, suffix: str, dtypes: Sequence[torch.dtype], *shape: int) -> None:
        """Refuse a tensor that is not there, or another, see :meth:`found`."""
        spec = self.found(suffix, dtypes, len(shape))
        if spec.shape != shape:
            name = f"shape of {self.name}.{suffix}"
            raise TensorShapeError(self.path(suffix), name, list(spec.shape), f"{list(shape)} by config.json")

    def groups_of_columns(self, suffix: str, groups: int) -> torch.Tensor:
        """A stored index of groups: int64 [in_features].

        Raises:
            TensorValueError: it names a group that is not there.
        """
        index = self.read(suffix).long()
        if len(index) and (int(index.min()) < 0 or int(index.max()) >= groups):
            found = f"groups {int(index.min())} to {int(index.max())}"
            raise TensorValueError(self.path(suffix), f"{self.name}.{suffix}", found, f"some of 0 to {groups - 1}")
        return index


@dataclass(frozen=True)
class Outline:
    """What is known of a layer before its codes are read.

    Attributes:
        bits: of a code.
        groups: of columns, each with a scale and a zero point.
        group_of: int64 [in_features], the group of each column.
    """

    bits: int
    groups: int
    group_of: torch.Tensor


@dataclass(frozen=True)
class GivenLayer:
    """The weight ``scale * (code - zero)``, as the other tool means it.

    Attributes:
        codes: uint8 [out_features, in_features].
        bits: of a code.
        scale: float32 [out_features, groups]; may be negative.
        zero: float32 [out_features, groups], whole numbers.
        group_of: int64 [in_features], the group of each column.
    """

    codes: torch.Tensor
    bits: int
    scale: torch.Tensor
    zero: torch.Tensor
    group_of: torch.Tensor

    def weight(self) -> torch.Tensor:
        """The weight: float32 [out_features, in_features]."""
        return self.scale[:, self.group_of] * (self.codes - self.zero[:, self.group_of])


class Layout(Protocol):
    """How a format stores layers."""

    @property
    def name(self) -> str:
        """Of the format, as a card tells it."""

    @property
    def marker(self) -> str:
        """A tensor that every quantized layer has."""

    def outline(self, layer: StoredLayer) -> Outline:
        """Check a layer's tensors by their headers alone, but for an index of its groups.

        Raises:
            CheckpointError: they are not what the format has; names file, tensor, found and expected.
        """

    def read(self, layer: StoredLayer, outline: Outline) -> GivenLayer:
        """The layer."""


def even_groups(columns: int, group_size: int) -> torch.Tensor:
    """The group of each column where groups lie one after the other, the last perhaps with fewer columns: int64."""
    return torch.arange(columns) // group_size


def bits_of_words(layer: StoredLayer, suffix: str, words: int, count: int) -> int:
    """Bits of a code of which ``count`` fill so many words.

    Raises:
        TensorShapeError: they are no codes of 2 to 8 bits.
    """
    bits, rest = divmod(words * 32, count)
    if rest or bits not in WIDTHS:
        name = f"shape of {layer.name}.{suffix}"
        expected = f"words of 32 bits with {count} codes of {WIDTHS[0]} to {WIDTHS[-1]} bits"
        raise TensorShapeError(layer.path(suffix), name, f"{words} words", expected)
    return bits
