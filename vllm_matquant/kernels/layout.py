"""What the layouts of weights in memory have in common: rows of tiles, padded for each partition of a fused layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_matquant.checkpoint.decoder_form import Decoder, DecoderForm


def ceil_div(value: int, divisor: int) -> int:
    """``value / divisor``, rounded up."""
    return -(-value // divisor)


def tile_count(output_sizes: Sequence[int], tile_rows: int) -> int:
    """Rows of tiles over all partitions, each padded to whole tiles."""
    return sum(ceil_div(size, tile_rows) for size in output_sizes)


def pad_to_tiles(rows: torch.Tensor, output_sizes: Sequence[int], tile_rows: int) -> torch.Tensor:
    """Cut rows into tiles, each partition into tiles of its own.

    Args:
        rows: [sum(output_sizes), ...].
        output_sizes: rows of each partition.
        tile_rows: rows of a tile.

    Returns:
        [tiles, tile_rows, ...], the padding rows zero.
    """
    padded = rows.new_zeros(tile_count(output_sizes, tile_rows), tile_rows, *rows.shape[1:])
    tile = 0
    for part in rows.split(list(output_sizes)):
        padded[tile:].flatten(0, 1)[: len(part)] = part
        tile += ceil_div(len(part), tile_rows)
    return padded


def pack_shared(decoder: Decoder) -> torch.Tensor:
    """What all rows of a partition share of the decoders of one width: uint8 [partitions, bytes], maybe none."""
    shared = [decoder.parts[name].flatten() for name in sorted(decoder.form.shared)]
    return torch.cat(shared) if shared else torch.empty(0, dtype=torch.uint8)


def unpack_shared(form: DecoderForm, packed: torch.Tensor) -> dict[str, torch.Tensor]:
    """The parts of a decoder that all rows of a partition share, as their form names them.

    Args:
        form: of the decoders.
        packed: uint8 [bytes], of one partition and width.
    """
    parts = {name: spec for name, spec in form.parts(0, 0).items() if name in form.shared}
    split = packed.split([spec.nbytes for spec in parts.values()]) if parts else ()
    return {name: each.view(spec.shape) for (name, spec), each in zip(parts.items(), split, strict=True)}
