"""Checkpoints of random codes and decoders, and what their tests share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_matquant.checkpoint.codebook import Codebook, CodebookForm
from vllm_matquant.checkpoint.decoder import Affine, Decoder, DecoderForm, DecoderKind
from vllm_matquant.checkpoint.reader import Checkpoint, open_checkpoint
from vllm_matquant.checkpoint.spec import Format
from vllm_matquant.checkpoint.vectors import VectorBooks, VectorForm

PARTS = {
    "float16": ("scale", "offset"),
    "int8": ("scale", "centre", "step"),
    "codebook": ("scale", "step", "codebook"),
    "vectors": ("scale", "step", "codebook"),
}
"""What the decoders of each form consist of, as docs/reference/format.md has it."""


@dataclass
class Sample:
    """A checkpoint on disk and what was written to it."""

    folder: Path
    format: Format
    codes: dict[str, torch.Tensor]
    decoders: dict[str, dict[int, Decoder]]
    unquantized: dict[str, torch.Tensor]


def random_decoder(
    kind: DecoderKind | DecoderForm, width: int, rows: int, groups: int, generator: torch.Generator
) -> Decoder:
    """Scales in 0..1, and offsets or levels around 0, as a kind or form stores them."""
    scale = torch.rand(rows, groups, generator=generator)
    form = kind.form(width) if isinstance(kind, DecoderKind) else kind
    if isinstance(form, VectorForm):
        return form.encode(
            VectorBooks(torch.randn(form.parts(rows, groups)["codebook"].shape, generator=generator)), width
        )
    if form.name == "codebook":
        return kind.encode(random_codebook(width, scale, generator), width)
    return kind.encode(Affine(scale, torch.randn(rows, groups, generator=generator)), width)


def random_codebook(width: int, scale: torch.Tensor, generator: torch.Generator) -> Codebook:
    """Levels around 0, and increments that become smaller from bit to bit."""
    shape = (width - 2, 64, 4)
    halves = 0.5 ** torch.arange(width - 2).view(-1, 1, 1)
    increments = torch.rand(shape, generator=generator) * halves
    return Codebook(torch.randn(64, 4, generator=generator), increments, scale)


def open_slice(folder: Path, which: Any = None, *, values: bool = True) -> Checkpoint:
    """Open a folder and check what serving one slice reads."""
    checkpoint = open_checkpoint(folder, check_files=False)
    checkpoint.check(checkpoint.slice(which), values=values)
    return checkpoint


def same_decoder(found: Decoder, expected: Decoder) -> bool:
    """Whether two decoders are the same in every stored byte."""
    return (
        (found.form, found.width) == (expected.form, expected.width)
        and found.parts.keys() == expected.parts.keys()
        and all(
            found.parts[part].dtype == tensor.dtype and torch.equal(found.parts[part], tensor)
            for part, tensor in expected.parts.items()
        )
    )


def decoder_names(kind: DecoderKind, width: int) -> set[str]:
    """Names, within a layer, of the tensors of one width's decoder."""
    return {f"weight_{part}{width}" for part in PARTS[kind.form(width).name]}


def decoder_bytes(form: DecoderForm, rows: int, groups: int) -> int:
    """Bytes of one width's decoder of a layer, as docs/reference/format.md has it."""
    if isinstance(form, CodebookForm):
        planes = form.width - 1 if form.width <= 4 else form.width + min(form.width, 6) - 2
        return rows * groups + 2 * rows + 256 * planes
    return {"float16": 4 * rows * groups, "int8": 2 * rows * groups + 4 * rows}[form.name]
