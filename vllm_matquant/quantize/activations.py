"""Hidden states on their way through the model: the source's own, and those of its slices."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from vllm_matquant.measure.mapped import mapped
from vllm_matquant.quantize import ranks
from vllm_matquant.quantize.device import fast_products
from vllm_matquant.quantize.runner import run_block

BATCH_TOKENS = 2048  # that run through a block at a time


class Embedder(Protocol):
    """What gives the first block its inputs, such as :class:`vllm_matquant.quantize.source.Runner`."""

    @property
    def hidden_size(self) -> int:
        """Values in a token's hidden state."""

    def embed(self, tokens: torch.Tensor, hidden: torch.Tensor) -> list[dict[str, Any]]:
        """Fill in the first block's inputs; returns the other arguments of every block."""


class Activations:
    """What the next transformer block is given, for every window of a text that is this rank's.

    Args:
        embedder: of the source whose blocks these are the inputs of.
        tokens: int64 [windows, length], the whole text.
        widths: slices to follow besides the source; each sees the outputs of its own blocks only.
        folder: keep the states in files on its disk, mapped into memory, instead of in memory. The files have no names,
            so that they go with the process, however it ends.
        exact: run blocks in float32 even where bfloat16 is faster, as figures to be reported need it.

    Attributes:
        windows: of the whole text.
        reference: float32 [sequences, length, hidden_size], what the source's next block is given.
        slices: what the next block of each of ``widths`` is given, in the same shape.

    Raises:
        WriteError: the disk has no room for the files.
    """

    def __init__(
        self,
        embedder: Embedder,
        tokens: torch.Tensor,
        widths: Sequence[int] = (),
        folder: Path | None = None,
        exact: bool = False,
    ) -> None:
        self.windows = len(tokens)
        tokens = ranks.spread(tokens)
        shape = (*tokens.shape, embedder.hidden_size)
        self.reference = allocate(shape, folder)
        self._outputs = allocate(shape, folder)
        self.slices = {width: allocate(shape, folder) for width in widths}
        self._arguments = embedder.embed(tokens, self.reference)
        for hidden in self.slices.values():
            hidden.copy_(self.reference)
        self._outputs_known = False
        self._index = 0
        self._exact = exact

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the next block; they broadcast over sequences."""
        return self._arguments[self._index]

    def outputs(self, block: torch.nn.Module) -> torch.Tensor:
        """What ``block``, the source's, makes of :attr:`reference`; it is run only once."""
        if not self._outputs_known:
            self._run(block, self.reference, self._outputs, {})
            self._outputs_known = True
        return self._outputs

    def run_again(self, block: torch.nn.Module) -> None:
        """Run ``block``, the source's, once more for those who look on: :meth:`outputs` stay what they are."""
        self._run(block, self.reference, self._outputs, {})

    def advance(self, block: torch.nn.Module, decoded: Callable[[int], Mapping[str, torch.Tensor]]) -> None:
        """Go on to the next block.

        Args:
            block: the source's.
            decoded: gives for a followed width the block's parameters to replace, by their names within the block. It
                is called for one width after the other, so that no two need be in memory.
        """
        self.reference, self._outputs = self.outputs(block), self.reference
        for width, hidden in self.slices.items():
            self._run(block, hidden, hidden, decoded(width))
        self._outputs_known = False
        self._index += 1

    def products(self) -> contextlib.AbstractContextManager[object]:
        """The context in which the model's blocks are run."""
        return contextlib.nullcontext() if self._exact else fast_products()

    def _run(
        self, block: torch.nn.Module, inputs: torch.Tensor, outputs: torch.Tensor, replacing: Mapping[str, torch.Tensor]
    ) -> None:
        with self.products():
            run_block(block, inputs, outputs, self.arguments, BATCH_TOKENS, replacing)


def allocate(shape: Sequence[int], folder: Path | None = None) -> torch.Tensor:
    """A float32 tensor, in a file on the disk of ``folder`` if given."""
    if folder is None:
        return torch.empty(shape)
    return mapped(shape, folder, "Leave out --activations-on-disk, or ask for fewer windows (--samples)")
