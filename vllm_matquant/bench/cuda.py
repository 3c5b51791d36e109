"""Time of one linear layer on a GPU at every width, beside a copy in its memory and other libraries' layers."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from vllm_matquant.bench.kernel import ROTATED_BYTES, copies_of, random_decoder
from vllm_matquant.checkpoint.decoder import AFFINE_INT8, CODEBOOK, DecoderKind
from vllm_matquant.checkpoint.spec import WIDTHS
from vllm_matquant.kernels import cuda_layout, ops
from vllm_matquant.kernels.cuda_layout import TILE_ROWS
from vllm_matquant.kernels.layout import pack_shared
from vllm_matquant.kernels.support import CUDA
from vllm_matquant.kernels.weight import PackedSegment, PackedWeight, ResidentSegment

# out_features, in_features: of Llama 3 8B, then of TinyLlama 1.1B, fused as vLLM fuses them.
SHAPES = (
    *((28672, 4096), (4096, 14336), (6144, 4096), (4096, 4096)),
    *((11264, 2048), (2048, 5632), (2560, 2048), (2048, 2048)),
)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 512)
CODEBOOK_SHAPES, CODEBOOK_BATCHES = SHAPES[3:4], (1, 8, 64)  # as much as shows what look-ups take
ROUNDS = 20
DEVICE = "cuda"


class Layer:
    """One layer's weights with random codes, as often as it takes to fill more than the caches."""

    def __init__(self, rows: int, columns: int, width: int, group_size: int, kind: DecoderKind = AFFINE_INT8) -> None:
        self.rows = rows
        shape = cuda_layout.planes_shape(width, [rows], columns)
        layout = cuda_layout.layout_of(kind)
        # Those of one tile's rows, as often as there are tiles: to pack them all takes longer than to measure.
        decoder = random_decoder(kind, width, TILE_ROWS, -(-columns // group_size))
        shared = pack_shared(decoder).flatten()
        of_tile = layout.pack_decoders([decoder], [TILE_ROWS])[len(shared) :]
        decoders = torch.cat([shared, of_tile.repeat(-(-rows // TILE_ROWS))]).to(DEVICE)
        active_width = torch.tensor([width], dtype=torch.int32, device=DEVICE)
        self.weights = []
        for _ in range(copies_of(rows * columns * width // 8)):
            planes = torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE)
            resident = ResidentSegment(planes, decoders.clone(), (width,), (rows,), width)
            segments = (PackedSegment(resident, active_width),)
            self.weights.append(PackedWeight(CUDA, layout, kind, columns, group_size, segments))
        self.uses = 0

    @property
    def bytes_read(self) -> int:
        return self.weights[0].resident_bytes

    def multiply(self, x: torch.Tensor) -> None:
        self.uses += 1
        ops.linear(x, self.weights[self.uses % len(self.weights)].handle, self.rows)


def torch_bfloat16(rows: int, columns: int) -> Callable[[torch.Tensor], Any]:
    """torch's linear layer in bfloat16."""
    copies = range(copies_of(2 * rows * columns))
    weights = itertools.cycle([torch.randn(rows, columns, device=DEVICE).bfloat16() for _ in copies])
    return lambda x: torch.nn.functional.linear(x, next(weights))


def marlin_int4(rows: int, columns: int) -> Callable[[torch.Tensor], Any]:
    """vLLM's Marlin kernel for 4-bit weights in groups of 128."""
    from vllm.model_executor.layers.quantization.utils.marlin_utils import (
        apply_gptq_marlin_linear,
        marlin_make_empty,
        marlin_make_workspace_new,
    )
    from vllm.scalar_type import scalar_types

    device = torch.device(DEVICE)
    weights = [
        torch.randint(-(2**31), 2**31 - 1, (columns // 16, rows * 2), dtype=torch.int32, device=device)
        for _ in range(copies_of(rows * columns // 2))
    ]
    scales = torch.rand(columns // 128, rows, device=device).bfloat16()
    empty, workspace = marlin_make_empty(device), marlin_make_workspace_new(device)
    uses = itertools.cycle(weights)
    return lambda x: apply_gptq_marlin_linear(
        input=x,
        weight=next(uses),
        weight_scale=scales,
        weight_zp=empty,
        workspace=workspace,
        wtype=scalar_types.uint4b8,
        output_size_per_partition=rows,
        input_size_per_partition=columns,
    )


def humming(bits: int, rows: int, columns: int) -> Callable[[torch.Tensor], Any]:
    """Humming's kernel (package humming-kernels) for weights of ``bits`` bits in groups of 128."""
    from humming.layer import HummingLayer

    weight = torch.randn(rows, columns, device=DEVICE).bfloat16()
    layers = []
    for _ in range(copies_of(rows * columns * bits // 8)):
        schema = {"dtype": f"int{bits}", "group_size": 128}
        layer = HummingLayer(shape_n=rows, shape_k=columns, weight_config=schema, torch_dtype=torch.bfloat16).to(DEVICE)
        layer.load_from_unquantized(weight)
        layer.transform()
        layers.append(layer)
    uses = itertools.cycle(layers)
    return lambda x: next(uses)(x)


PEERS: dict[str, Callable[[int, int], Callable[[torch.Tensor], Any]]] = {
    "torch-bfloat16": torch_bfloat16,
    "vllm-marlin-int4": marlin_int4,
    **{f"humming-int{bits}": partial(humming, bits) for bits in (2, 3, 4, 6, 8)},
}


def seconds_of(call: Callable[[], Any]) -> float:
    """The median time on the device, after a warm-up; the calls wait in line, so that the host's time does not show."""
    for _ in range(3):
        call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(ROUNDS + 1)]
    torch.cuda.synchronize()
    torch.cuda._sleep(20_000_000)  # clocks: while the device sleeps, the host gets ahead
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in itertools.pairwise(events)) / 1e3


def copy_gb_per_s() -> float:
    """How fast memory is read and written at once by a copy."""
    source = torch.empty(ROTATED_BYTES, dtype=torch.uint8, device=DEVICE).fill_(1)
    target = torch.empty_like(source)
    return 2 * ROTATED_BYTES / seconds_of(lambda: target.copy_(source)) / 1e9


def bench_cuda(
    shapes: Sequence[tuple[int, int]] = SHAPES,
    batches: Sequence[int] = BATCHES,
    widths: Sequence[int] = WIDTHS,
    group_size: int = 128,
    report: Callable[[str], None] = print,
) -> Iterator[dict[str, Any]]:
    """Rows as those of ``matquant bench kernel``; ``read_gb_per_s`` is what a copy reads and writes.

    Args:
        shapes: out_features and in_features of the layers.
        batches: tokens that are multiplied at once.
        widths: active widths, each with its planes alone in memory.
        group_size: columns that share a decoder.
        report: gets a line for each library that refuses.
    """
    read_gb_per_s = copy_gb_per_s()
    for rows, columns in shapes:
        peer_seconds: dict[int, dict[str, float]] = {batch: {} for batch in batches}
        for name, make in PEERS.items():
            try:
                peer = make(rows, columns)
                for batch in batches:
                    x = torch.randn(batch, columns, device=DEVICE).bfloat16()
                    peer_seconds[batch][name] = seconds_of(lambda call=peer, x=x: call(x))  # type: ignore[misc]
            except (ImportError, AttributeError, RuntimeError, TypeError, ValueError) as error:
                report(f"{name} refuses {rows} x {columns}: {str(error).splitlines()[0]}")
        kinds = [AFFINE_INT8, *([CODEBOOK] if (rows, columns) in CODEBOOK_SHAPES else [])]
        for kind, width in itertools.product(kinds, widths):
            layer = Layer(rows, columns, width, group_size, kind)
            for batch in batches if kind.affine else sorted({*batches} & {*CODEBOOK_BATCHES}):
                x = torch.randn(batch, columns, device=DEVICE).bfloat16()
                seconds = seconds_of(lambda layer=layer, x=x: layer.multiply(x))  # type: ignore[misc]
                gb_per_s = layer.bytes_read / seconds / 1e9
                yield {
                    "backend": "cuda",
                    "kernel": "linear",
                    "isa": "sm_{}{}".format(*torch.cuda.get_device_capability()),
                    "bits": width,
                    "m": batch,
                    "n": rows,
                    "k": columns,
                    "group_size": group_size,
                    "decoders": kind.name,
                    "threads": 0,
                    "seconds": seconds,
                    "bytes": layer.bytes_read,
                    "gb_per_s": gb_per_s,
                    "read_gb_per_s": read_gb_per_s,
                    "roofline": gb_per_s / read_gb_per_s,
                    "peer_seconds": peer_seconds[batch],
                }
