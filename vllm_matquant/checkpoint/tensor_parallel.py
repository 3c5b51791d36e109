"""Tensor parallelism: between how many ranks the layers of a checkpoint can be divided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vllm_matquant.checkpoint.spec import Format

SIZES = (2, 4, 8)  # that a model is commonly served with
_BYTE = 8  # columns whose bits of a plane lie in one byte
# Layers whose columns vLLM divides, by their usual names; of all others it divides the rows, which any size may.
_BY_COLUMNS = frozenset({"o_proj", "down_proj", "out_proj", "dense", "dense_4h_to_h", "fc2", "c_proj", "w2", "wo"})


@dataclass(frozen=True)
class Misfit:
    """A layer that a tensor parallel size would cut within a group of columns, or within a byte or four of columns.

    Attributes:
        layer: its name.
        columns: its input features.
        unit: columns that must stay together.
        size: the tensor parallel size.
    """

    layer: str
    columns: int
    unit: int
    size: int

    def __str__(self) -> str:
        return f"{self.layer} has {self.columns} input features, no multiple of {self.size} x {self.unit}"


def find_misfit(format_: Format, shapes: Mapping[str, tuple[int, int]], size: int) -> Misfit | None:
    """The first layer that a tensor parallel size would cut where it cannot be cut.

    Args:
        format_: of the checkpoint.
        shapes: (out_features, in_features) of its quantized layers.
        size: ranks.
    """
    for name, (_, columns) in shapes.items():
        if name.rpartition(".")[2] in _BY_COLUMNS:
            whole_rows = format_.group_size_setting(name) == "channel"
            part = max(_BYTE, format_.decoder_kind.group_multiple)
            unit = part if whole_rows else format_.group_size_of(columns, name)
            if columns % (size * unit):
                return Misfit(name, columns, unit, size)
    return None


def describe_misfits(found: Sequence[Misfit]) -> str:
    """Which tensor parallel sizes are refused and why, in one line: "refused on 4, 8 ranks: ...".

    Args:
        found: at least one, see :func:`misfits`.
    """
    return f"refused on {', '.join(str(each.size) for each in found)} ranks: {found[0]}"


def misfits(format_: Format, shapes: Mapping[str, tuple[int, int]]) -> list[Misfit]:
    """For each of ``SIZES`` that cannot be served, the first layer that it would cut; none where nothing is served.

    Args:
        format_, shapes: as of :func:`find_misfit`.
    """
    if format_.decoder_kind.one_width:
        return []
    found = (find_misfit(format_, shapes, size) for size in SIZES)
    return [each for each in found if each is not None]
