"""What a kernel is: the protocols that kernels and their layouts follow, and what a layer asks of one.

:mod:`vllm_matquant.kernels.support` has all kernels that there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from vllm_matquant.checkpoint.decoder import Decoder, DecoderKind

if TYPE_CHECKING:
    from vllm_matquant.kernels.plane_store import SharedPlanes
    from vllm_matquant.kernels.weight import PackedWeight, StoredSegment


class Layout(Protocol):
    """How planes and decoders lie in memory."""

    @property
    def name(self) -> str:
        """The tag that a weight carries and kernels check."""
        ...

    @property
    def packs_on_cpu(self) -> bool:
        """Whether what is packed must be on the CPU, whatever the kernel's device."""
        ...

    def pack_planes(
        self, base: torch.Tensor, planes: Sequence[torch.Tensor], output_sizes: Sequence[int]
    ) -> torch.Tensor:
        """Codes as on disk (see :class:`StoredSegment`) to planes as in memory."""
        ...

    def pack_decoders(self, decoders: Sequence[Decoder], output_sizes: Sequence[int]) -> torch.Tensor:
        """Decoders as on disk (see :class:`StoredSegment`) to decoders as in memory."""
        ...


@dataclass(frozen=True)
class Request:
    """What a layer asks of a kernel.

    Attributes:
        device_type: "cpu", "cuda", ...
        dtype: of the activations.
        widths: the widths that are to be resident.
        in_features: columns.
        group_size: columns that share a decoder.
        decoder_kind: of its decoders.
    """

    device_type: str
    dtype: torch.dtype
    widths: tuple[int, ...]
    in_features: int
    group_size: int
    decoder_kind: DecoderKind


class Kernel(Protocol):
    """Computes products with packed weights; :mod:`vllm_matquant.kernels.support` has all that there are."""

    @property
    def name(self) -> str:
        """What logs and benchmarks call it."""
        ...

    @property
    def in_library(self) -> bool:
        """Whether the C++ library looks its weights up; if not, Python does."""
        ...

    def accepts(self, request: Request) -> list[str]:
        """Every reason why this kernel does not serve the request; none if it does."""
        ...

    def pack(
        self,
        segments: Sequence[StoredSegment],
        in_features: int,
        group_size: int,
        device: torch.device | str,
        activation_bits: int | None = None,
        shared: SharedPlanes | None = None,
    ) -> PackedWeight:
        """A weight in this kernel's layout.

        Args:
            segments: what is to be resident, in the order of the outputs.
            in_features: columns.
            group_size: columns that share a decoder.
            device: where the kernel runs.
            activation_bits: how far the kernel may round activations (see :func:`vllm_matquant.kernels.ops.linear`);
                by default it chooses.
            shared: where other users of the same layer find its tensors; by default they are this weight's own.
        """
        ...

    def linear(
        self, x: torch.Tensor, handle: torch.Tensor, out_features: int, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The product of activations and the weight that ``handle`` names, at the widths that are active now.

        ``torch.compile`` can trace it, and the same graph serves every weight of the same features.

        Args:
            x: [..., in_features].
            handle: :attr:`PackedWeight.handle`.
            out_features: of the weight.
            bias: [out_features] of the dtype of ``x``.

        Returns:
            [..., out_features] of the dtype of ``x``.
        """
        ...

    def embedding(self, rows: torch.Tensor, handle: torch.Tensor, in_features: int, dtype: torch.dtype) -> torch.Tensor:
        """Rows of the weight that ``handle`` names, at the width that is active now.

        ``torch.compile`` can trace it, and the same graph serves every weight of the same features.

        Args:
            rows: int64 [...], each below the rows of the weight, which has one partition.
            handle: :attr:`PackedWeight.handle`.
            in_features: columns of the weight.
            dtype: of the result.

        Returns:
            [..., in_features] of ``dtype``, rounded once from float32.
        """
        ...

    @property
    def takes_rows(self) -> bool:
        """Whether rows of one product can be computed with weights of their own."""
        ...

    def linear_by_row(
        self,
        x: torch.Tensor,
        handles: torch.Tensor,
        slots: torch.Tensor,
        out_features: int,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The product of each row with a weight of its own, if the kernel :attr:`takes_rows`.

        ``torch.compile`` can trace it.

        Args:
            x: [..., in_features].
            handles: int64 [slots] on the CPU, for each slot that is in use the number in a weight's handle: those of
                :meth:`PackedWeight.readers`, and zeros past the last.
            slots: int32 [at least the rows of ``x``] on its device, the slot of each row.
            out_features: of the weights.
            bias: [out_features] of the dtype of ``x``.

        Returns:
            [..., out_features] of the dtype of ``x``.
        """
        ...

    def grouped_linear(
        self,
        x: torch.Tensor,
        handles: torch.Tensor,
        groups: torch.Tensor,
        slots: torch.Tensor | None,
        out_features: int,
    ) -> torch.Tensor:
        """The product of each group of rows with a weight of its own: those of a mixture's experts.

        Args:
            x: [rows, in_features], those of a group, and in it those of a slot, side by side.
            handles: int64 [groups, slots] on the CPU, the numbers in weights' handles; 0 where there is none.
            groups: int32 [rows], ascending, the group of each row.
            slots: int32 [rows], the slot of each row, if the kernel :attr:`takes_rows`; None for the first.
            out_features: of the weights.

        Returns:
            [rows, out_features] of the dtype of ``x``.
        """
        ...

    def embedding_by_row(
        self, rows: torch.Tensor, handles: torch.Tensor, slots: torch.Tensor, in_features: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """Rows of weights, each of a weight of its own, if the kernel :attr:`takes_rows`.

        Args:
            rows: int64 [...], each below the rows of the weights, which have one partition.
            handles: int64 [slots] on the CPU, for each slot that is in use the number in a weight's handle.
            slots: int32 [at least ``rows.numel()``] on their device, the slot of each row.
            in_features: columns of the weights.
            dtype: of the result.

        Returns:
            [..., in_features] of ``dtype``, rounded once from float32.
        """
        ...
