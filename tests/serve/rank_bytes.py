"""The bytes that a rank holds of a checkpoint, counted by hand."""

from __future__ import annotations

from collections.abc import Mapping

from vllm_matquant.checkpoint.reader import Checkpoint

ROW_PARALLEL = ("o_proj", "down_proj")  # cut along their columns; all other layers are cut along their rows


def bytes_of_rank(checkpoint: Checkpoint, widths: Mapping[str, int], ranks: int) -> int:
    """Codes and decoders that each of some ranks holds, of the layers that ``widths`` names.

    Of a layer that is cut along its columns every rank has all rows, and so the two steps of each that a decoder in 8
    bits has.
    """
    assert checkpoint.format.decoder_kind.name == "affine-int8"
    total = 0
    for layer, width in widths.items():
        rows, columns = checkpoint.layers[layer]
        groups = columns // checkpoint.format.group_size_of(columns, layer)
        if layer.endswith(ROW_PARALLEL):
            assert columns % ranks == groups % ranks == 0
            columns, groups = columns // ranks, groups // ranks
        else:
            assert rows % ranks == 0
            rows //= ranks
        decoder = 2 * groups + 2 * 2 if width <= 4 else 4 * groups
        total += rows * (columns * width // 8 + decoder)
    return total
