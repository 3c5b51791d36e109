"""Rows of an embedding, from the planes and decoders in the CPU's layout that the product reads too.

In plain PyTorch, for every device: what the reference looks rows up with.
"""

from __future__ import annotations

import torch

from vllm_matquant.kernels.cpu_layout import (
    STEP_COLUMNS,
    TILE_ROWS,
    CpuLayout,
    split_planes,
    unpack_decoder,
    unpack_steps,
)
from vllm_matquant.kernels.layout import unpack_shared
from vllm_matquant.kernels.operators import define_embedding
from vllm_matquant.kernels.weight import PackedWeight


def look_up(rows: torch.Tensor, weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """The rows asked for of a weight with one partition, decoded at the active width (waits for the device).

    Planes past the active width are not read, nor bytes of other rows but of decoders.

    Args:
        rows: int64 [...], each below the weight's rows.
        weight: in the CPU's layout, on any device.
        dtype: of the result.

    Returns:
        [..., in_features] of ``dtype``, rounded once from float32.
    """
    layout, [segment] = weight.layout, weight.segments
    assert isinstance(layout, CpuLayout)
    resident, [width] = segment.resident, segment.active_width.tolist()
    tile, lane = rows.flatten() // TILE_ROWS, rows.flatten() % TILE_ROWS

    # The four bytes of the row in each tile: [rows, tile columns, 2 or 1, 4].
    fields = [
        field.unflatten(-1, (TILE_ROWS, STEP_COLUMNS))[tile, :, :, lane]
        for field in split_planes(resident.planes[:width], layout.paired)
    ]
    codes = unpack_steps(fields).flatten(1)[:, : weight.in_features]

    form, every = weight.decoder_kind.form(width), torch.arange(len(lane), device=lane.device)
    decoders = weight.decoders_of(segment, TILE_ROWS)[width][tile]
    parts = {name: part[every, lane] for name, part in unpack_decoder(form, decoders).items()}
    shared = unpack_shared(form, weight.shared_of(segment, TILE_ROWS)[width][0])
    result = form.values(parts | shared, width).decode(codes, weight.group_size).to(dtype)
    return result.view(*rows.shape, weight.in_features)


reference_embedding = define_embedding("reference_embedding", look_up)
"""Rows of a weight on any device, see :meth:`vllm_matquant.kernels.kernel.Kernel.embedding`."""
