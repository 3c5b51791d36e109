"""The values of a source's tensors: refused before the long work where one is not finite, or no decoder holds it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
from tqdm import tqdm

from vllm_matquant.checkpoint.decoder import FLOAT16
from vllm_matquant.checkpoint.errors import TensorValueError
from vllm_matquant.quantize.selection import Selection

_CHECKED_VALUES = 2**24  # at a time
# Half of float16's range, for an offset may lie beyond the weights of its group.
_LARGEST = torch.finfo(torch.float16).max / 2
# Below it a scale is one of float16's subnormals with less than seven bits, and a code at the edge off by a whole step.
_LEAST_SCALE = 2.0**-17


def checking(size: int) -> tqdm[NoReturn]:
    """The progress of reading ``size`` bytes of a source."""
    return tqdm(total=size, desc="checking the source", unit="B", unit_scale=True)


def check_values(selection: Selection, progress: Callable[[int], object] = lambda size: None) -> None:
    """Read every tensor of the source once.

    Decoders in 8 bits have float32's range and hold any weight; those in float16 do not. For which widths there are
    which, see :class:`vllm_matquant.checkpoint.decoder.DecoderKind`.

    Args:
        selection: what is quantized.
        progress: called with the bytes of each tensor.

    Raises:
        TensorValueError: a tensor holds NaN or infinity, or a layer to quantize has weights too large for its decoders,
            or nothing but weights too small for them.
    """
    source = selection.source
    layers: defaultdict[str, list[str]] = defaultdict(list)
    for name in selection.shapes:
        layers[source.matrices[name].parameter].append(name)
    for path, parameter, tensor in source.tensors.each():
        if not all(part.isfinite().all() for part in tensor.flatten().split(_CHECKED_VALUES)):
            raise TensorValueError(path, parameter, "NaN or infinity", "finite weights")
        for name in layers[parameter]:
            index = source.matrices[name].index
            _check_magnitude(selection, name, path, tensor if index is None else tensor[index])
        progress(tensor.nbytes)


def _check_magnitude(selection: Selection, name: str, path: Path, weight: torch.Tensor) -> None:
    """Refuse a layer that its decoders cannot hold."""
    format_ = selection.format
    wide = [width for width in format_.widths_of(name) if format_.decoder_kind.form(width) is FLOAT16]
    if not wide:
        return
    largest = max(abs(float(bound)) for bound in weight.aminmax())
    least = _LEAST_SCALE * (2 ** wide[-1] - 1) / 2
    if largest > _LARGEST or 0 < largest < least:
        bounds = f"up to {_LARGEST:.0f}" if largest > _LARGEST else f"some of {least:.1g} or more"
        widths = ", ".join(map(str, wide))
        raise TensorValueError(
            path,
            selection.source.matrices[name].parameter,
            f"weights of up to {largest:.3g}",
            f"{bounds}, which decoders in float16 hold (those of {widths} bits, as --decoder "
            f"{format_.decoder_kind.name} stores them); --decoder affine-int8 with --bits 2,3,4 holds any, or "
            f"--ignore the layer",
        )
