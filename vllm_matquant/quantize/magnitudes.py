"""Weights that decoders in float16 cannot hold: too large for an offset, or so small that scales lose their digits."""

from __future__ import annotations

import torch

from vllm_matquant.checkpoint.decoder import FLOAT16
from vllm_matquant.checkpoint.errors import TensorValueError
from vllm_matquant.quantize.selection import Selection
from vllm_matquant.quantize.source import read_matrix

# Half of float16's range, for an offset may lie beyond the weights of its group.
_LARGEST = torch.finfo(torch.float16).max / 2
# Below it a scale is one of float16's subnormals with less than seven bits, and a code at the edge off by a whole step.
_LEAST_SCALE = 2.0**-17


def check_magnitudes(selection: Selection) -> None:
    """Read every layer to quantize once, and refuse one that its decoders cannot hold.

    Decoders in 8 bits have float32's range and hold any weight; for which widths there are such, see
    :class:`vllm_matquant.checkpoint.decoder.DecoderKind`.

    Args:
        selection: what is quantized.

    Raises:
        TensorValueError: a layer has weights too large for float16, or nothing but weights too small for it.
    """
    source, format_ = selection.source, selection.format
    for name in selection.shapes:
        wide = [width for width in format_.widths_of(name) if format_.decoder_kind.form(width) is FLOAT16]
        if not wide:
            continue
        largest = max(abs(float(bound)) for bound in read_matrix(source, name).aminmax())
        least = _LEAST_SCALE * (2 ** wide[-1] - 1) / 2
        if largest > _LARGEST or 0 < largest < least:
            bounds = f"up to {_LARGEST:.0f}" if largest > _LARGEST else f"some of {least:.1g} or more"
            widths = ", ".join(map(str, wide))
            raise TensorValueError(
                source.folder,
                source.matrices[name].parameter,
                f"weights of up to {largest:.3g}",
                f"{bounds}, which decoders in float16 hold (those of {widths} bits, as --decoder "
                f"{format_.decoder_kind.name} stores them); --decoder affine-int8 with --bits 2,3,4 holds any, or "
                f"--ignore the layer",
            )
