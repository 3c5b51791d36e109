"""Layers of a transformers model that multiply with codes, in the place of its linear layers and its embedding."""

from __future__ import annotations

import torch

from vllm_matquant.checkpoint.decoder import part_name
from vllm_matquant.checkpoint.errors import ConfigError
from vllm_matquant.checkpoint.names import WEIGHT_BASE, plane_name
from vllm_matquant.checkpoint.packing import slice_planes
from vllm_matquant.checkpoint.spec import BASE_BITS, Format
from vllm_matquant.kernels.kernel import Request
from vllm_matquant.kernels.support import TableKernel, select_kernel
from vllm_matquant.kernels.weight import PackedWeight, StoredSegment


class PackedLayer(torch.nn.Module):
    """A layer at one width: until :meth:`pack`, buffers on the meta device for transformers to load.

    These are the base, the planes and the decoder of the layer's slice, under the names that the files have.

    Args:
        name: of the layer in the checkpoint.
        format_: of the checkpoint.
        shape: (out_features, in_features).
        width: one that the layer has.
        dtype: of activations.

    Attributes:
        kernel: what multiplies, once the layer is packed.
        packed: the weight, once the layer is packed.
    """

    kernel: TableKernel
    packed: PackedWeight

    def __init__(self, name: str, format_: Format, shape: tuple[int, int], width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self._name, self._format, self._width, self._dtype = name, format_, width, dtype
        specs = {
            suffix: spec
            for tensors in format_.tensors_of_layer(*shape, name).values()
            for suffix, spec in tensors.items()
        }
        form = format_.decoder_kind.form(width)
        self._planes = [plane_name(plane) for plane in range(BASE_BITS + 1, format_.stored_width(width) + 1)]
        self._stored = [WEIGHT_BASE, *self._planes, *(part_name(part, width) for part in form.parts(1, 1))]
        for suffix in self._stored:
            spec = specs[suffix]
            self.register_buffer(suffix, torch.empty(spec.shape, dtype=spec.dtype, device="meta"))

    def pack(self, activation_bits: int | None) -> None:
        """Pack what was loaded for a kernel, and let go of it.

        Args:
            activation_bits: how far products may round activations, see :func:`vllm_matquant.kernels.ops.linear`.

        Raises:
            ConfigError: the layer was put on the disk.
            UnsupportedError: no kernel serves it.
        """
        device = self.get_buffer(WEIGHT_BASE).device
        if device.type == "meta":
            raise ConfigError("device_map", self._name, "a layer that is not in memory", "a device for each layer")
        width, kind = self._width, self._format.decoder_kind
        group_size = self._format.group_size_of(self.in_features, self._name)
        self.kernel = select_kernel(Request(device.type, self._dtype, (width,), self.in_features, group_size, kind))
        # A rule that rounds makes the slice of one plane more.
        read = self.get_buffer(WEIGHT_BASE), list(map(self.get_buffer, self._planes))
        base, planes = slice_planes(*read, self.in_features, width, self._format.slicing)
        decoder = kind.form(width).from_tensors(self.get_buffer, width)
        segment = StoredSegment(base, planes, [decoder], [self.out_features], [width])
        self.packed = self.kernel.pack([segment], self.in_features, group_size, device, activation_bits)
        for suffix in self._stored:
            delattr(self, suffix)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``x @ weight.T + bias``, [..., out_features], for ``x`` [..., in_features]."""
        return self.kernel.linear(x, self.packed.handle, self.out_features, bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self._width}"


class PackedLinear(PackedLayer):
    """A linear layer.

    Args:
        bias: [out_features] or None.
        name, format_, shape, width, dtype: see :class:`PackedLayer`.
    """

    def __init__(
        self,
        bias: torch.nn.Parameter | None,
        name: str,
        format_: Format,
        shape: tuple[int, int],
        width: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(name, format_, shape, width, dtype)
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Its outputs, [..., out_features]."""
        return self.product(x, self.bias)


class PackedEmbedding(PackedLayer):
    """An input embedding."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The rows of tokens (int64 [...]): [..., in_features]."""
        return self.kernel.embedding(tokens, self.packed.handle, self.in_features, self._dtype)


class TiedHead(torch.nn.Module):
    """An output head that multiplies with the input embedding.

    Args:
        embedding: what it is tied to.
        bias: [out_features] or None.
    """

    def __init__(self, embedding: PackedEmbedding, bias: torch.nn.Parameter | None) -> None:
        super().__init__()
        self._embedding = [embedding]  # in a list, for its tensors are the embedding's alone
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The logits, [..., vocabulary]."""
        return self._embedding[0].product(x, self.bias)
