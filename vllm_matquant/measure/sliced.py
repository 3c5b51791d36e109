"""A model in memory whose layers change their widths in place: what every candidate of a search is measured on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from transformers import PreTrainedModel

from vllm_matquant.checkpoint.affine import Affine
from vllm_matquant.checkpoint.decoder_form import Decoder, Values
from vllm_matquant.checkpoint.packing import slice_codes
from vllm_matquant.checkpoint.reader import Checkpoint
from vllm_matquant.checkpoint.spec import PARENT_BITS
from vllm_matquant.measure.model import LayerModel, slice_model

REFERENCE = 0  # what stands for a width where a layer has the weights of the model to compare with


class SlicedModel(LayerModel):
    """transformers' model of a checkpoint, with the codes of all its layers beside it.

    To change a layer's width takes the time that it takes to decode it; nothing is read from the disk.

    Attributes:
        passes: tokens that went through the model so far, those of a backward pass counted twice more.

    Args:
        checkpoint: with every width on the disk.
        source: the model that was quantized, to measure divergence from; None for the widest slices.
        dtype: of weights and activations; products are summed in float32.
        device: of all that is computed.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        source: PreTrainedModel | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: str = "cpu",
    ) -> None:
        model = (slice_model(checkpoint) if source is None else source).to(dtype).to(device)
        super().__init__(model.requires_grad_(False), checkpoint.layers)
        self._format = checkpoint.format
        self._device = torch.device(device)
        self.passes = 0
        self._codes: dict[str, torch.Tensor] = {}
        self._decoders: dict[tuple[str, int], Values] = {}
        for layer in self.layers:
            widths = self.widths_of(layer)
            stored = self._format.stored_width(widths[-1])
            codes = checkpoint.stored_codes(layer, stored) << (PARENT_BITS - stored)
            self._codes[layer] = codes.to(self._device)
            for width in widths:
                self._decoders[layer, width] = checkpoint.decoder(layer, width).values.to(self._device)
        self._reference = None
        if source is not None:
            self._reference = {layer: weight.detach().clone() for layer, weight in self._weights.items()}
        self._current = dict.fromkeys(self.layers, REFERENCE)
        self.set(dict.fromkeys(self.layers, REFERENCE))

    def widths_of(self, layer: str) -> tuple[int, ...]:
        """The widths that a layer can have, ascending."""
        return self._format.widths_of(layer)

    def decode(self, layer: str, width: int) -> torch.Tensor:
        """A layer's weight at a width, a new tensor in float32, or at ``REFERENCE``: [out_features, in_features]."""
        if width == REFERENCE:
            if self._reference is not None:
                return self._reference[layer]
            width = self.widths_of(layer)[-1]
        codes = slice_codes(self._codes[layer], PARENT_BITS, width, self._format.slicing)
        values = self._decoders[layer, width]
        if not isinstance(values, Affine):
            return values.decode(codes)
        # As the decoder does it, in place: half of a search's time that is not the model's is spent here.
        groups = codes.unflatten(1, (values.groups, -1)).float()
        return groups.mul_(values.scale.unsqueeze(-1)).add_(values.offset.unsqueeze(-1)).flatten(1)

    def set(self, widths: Mapping[str, int]) -> None:
        """Give layers their widths, each one that the layer has or ``REFERENCE``; those not named keep theirs."""
        for layer, width in widths.items():
            if self._current[layer] != width or self._current[layer] == REFERENCE:
                self.load([(layer, self.decode(layer, width))])
                self._current[layer] = width

    @contextlib.contextmanager
    def other_decoders(self, decoders: Mapping[str, Decoder]) -> Iterator[None]:
        """Within, layers have other decoders, each at the width that the decoder is of."""
        before = {(layer, each.width): self._decoders[layer, each.width] for layer, each in decoders.items()}
        for layer, each in decoders.items():
            self._decoders[layer, each.width] = each.values.to(self._device)
            self._current[layer] = REFERENCE  # whatever it has is decoded anew
        try:
            yield
        finally:
            self._decoders |= before
            self._current |= dict.fromkeys(decoders, REFERENCE)

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """What the model says of each following token; counted in ``passes``.

        Args:
            tokens: int64 [windows, length].

        Returns:
            float32 [windows, length - 1, vocabulary].
        """
        self.passes += tokens.numel()
        return super().logits(tokens)

    def gradients(self, loss: torch.Tensor, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """The derivative of ``loss``, computed from :meth:`logits` of ``tokens``, by each layer's weight."""
        self.passes += 2 * tokens.numel()
        found = torch.autograd.grad(loss, [self._weights[layer] for layer in self.layers])
        return dict(zip(self.layers, found, strict=True))

    @contextlib.contextmanager
    def differentiable(self) -> Iterator[None]:
        """Within, :meth:`gradients` is possible; what goes through the model takes more memory then."""
        for weight in self._weights.values():
            weight.requires_grad_(True)
        try:
            yield
        finally:
            for weight in self._weights.values():
                weight.requires_grad_(False)

    @torch.no_grad()
    def products(self, layer: str, directions: torch.Tensor) -> dict[int, torch.Tensor]:
        """Products of directions with what a layer's weight at each of its widths differs by from ``REFERENCE``.

        Args:
            layer: its name.
            directions: float32 [count, weights of the layer].

        Returns:
            For each width float32 [count].
        """
        reference = self.decode(layer, REFERENCE).float()
        return {
            width: directions @ self.decode(layer, width).sub_(reference).flatten() for width in self.widths_of(layer)
        }
