"""Decoders whose values are stored as they are: what solvers do without the rounding of a form that is served."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vllm_matquant.checkpoint.decoder import Affine, Decoder, DecoderForm, DecoderKind, OffsetsFor, TensorSpec


class ExactForm(DecoderForm):
    """Scale and offset in float32."""

    name = "exact"

    def parts(self, out_features: int, groups: int, layers: int = 1) -> dict[str, TensorSpec]:
        return dict.fromkeys(("scale", "offset"), TensorSpec(torch.float32, (out_features, groups)))

    def encode(self, values: Affine, width: int, offsets_for: OffsetsFor | None = None) -> Decoder:
        scale = values.scale.float()
        offset = offsets_for(scale) if offsets_for else values.offset.float()
        return Decoder(self, width, {"scale": scale, "offset": offset})

    def values(self, parts: Mapping[str, torch.Tensor], width: int) -> Affine:
        return Affine(parts["scale"], parts["offset"])

    def faults(self, parts: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Tensor, str]]:
        return []


EXACT = DecoderKind("exact", 2, 7 * (ExactForm(),))


def exact(scale: torch.Tensor, offset: torch.Tensor, width: int) -> Decoder:
    """A decoder of these very values."""
    return EXACT.encode(Affine(scale, offset), width)


def assert_same_decoders(found: Decoder, expected: Decoder) -> None:
    """The same tensors are stored."""
    assert (found.form, found.width, found.parts.keys()) == (expected.form, expected.width, expected.parts.keys())
    for name, part in found.parts.items():
        assert part.dtype == expected.parts[name].dtype
        assert torch.equal(part, expected.parts[name]), name
