"""Which matrices of a source a format quantizes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from vllm_matquant.checkpoint.names import CONFIG_FILE
from vllm_matquant.checkpoint.spec import Format
from vllm_matquant.quantize.source import Source


@dataclass(frozen=True)
class Selection:
    """The matrices of a source that a format quantizes.

    Attributes:
        source: the model.
        format: of the checkpoint in the making.
    """

    source: Source
    format: Format

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of every quantized layer, in the model's order; tied ones once.

        Raises:
            ConfigError: an embedding is not the model's, or the format says different things of tied layers.
        """
        return self.source.skeleton.quantized_layers(self.format, self.source.folder / CONFIG_FILE)

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """The shapes of those inside of transformer blocks."""
        return {name: shape for name, shape in self.shapes.items() if self.source.matrices[name].block is not None}

    @property
    def outer(self) -> dict[str, tuple[int, int]]:
        """The shapes of those outside of transformer blocks: input embedding and output head."""
        return {name: shape for name, shape in self.shapes.items() if self.source.matrices[name].block is None}

    def group_sizes(self, block: int) -> dict[str, int]:
        """Columns that share a decoder in the quantized layers of a transformer block, by full name."""
        return {
            name: self.format.group_size_of(columns, name)
            for name, (_, columns) in self.shapes.items()
            if self.source.matrices[name].block == block
        }

    def outer_owner(self, name: str | None) -> str | None:
        """Under which name a layer outside of blocks is quantized: its own or one it is tied to; None if it is not."""
        owner = owner_of(self.source, name) if name else None
        return owner if owner in self.outer else None

    @property
    def unquantized(self) -> list[str]:
        """The source's tensors that the checkpoint keeps as they are."""
        tied, quantized = self.source.skeleton.tied, {self.source.matrices[name].parameter for name in self.shapes}
        return [name for name in self.source.tensors.names if tied.get(name, name) not in quantized]


def owner_of(source: Source, layer: str) -> str:
    """The first layer with the weight that ``layer`` uses: itself, or the one that it is tied to."""
    parameter = source.matrices[layer].parameter
    return next(name for name, matrix in source.matrices.items() if matrix.parameter == parameter)
