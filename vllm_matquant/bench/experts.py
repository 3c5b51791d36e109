"""Time of one mixture of experts at every width, beside a plain read of the experts that are hit and vLLM's own."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from vllm_matquant.bench.kernel import ROUNDS, SECONDS, random_activations, random_decoder, seconds_of, void
from vllm_matquant.checkpoint.decoder import AFFINE_INT8, DecoderKind
from vllm_matquant.checkpoint.spec import BASE_BITS, WIDTHS
from vllm_matquant.kernels import ops
from vllm_matquant.kernels.cpu_layout import PAIRS
from vllm_matquant.kernels.experts import experts
from vllm_matquant.kernels.support import CPU
from vllm_matquant.kernels.weight import PackedSegment, PackedWeight, ResidentSegment


class Shape(NamedTuple):
    """Of a mixture: its experts, how many of them each token is routed to, and their features."""

    experts: int
    chosen: int
    hidden: int
    inner: int


MIXTURES = {
    "qwen3-30b-a3b": Shape(128, 8, 2048, 768),
    "olmoe-1b-7b": Shape(64, 8, 2048, 1024),
    "deepseek-v2-lite": Shape(64, 6, 2048, 1408),
}
BATCHES = (1, 8, 32)
COLUMNS = ("bits", "m", "experts", "hit", "threads", "seconds", "gb_per_s", "read_gb_per_s", "roofline")
VLLM = "vllm-bf16"


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        shapes: of the mixtures.
        batches: tokens that are computed at once.
        widths: active widths.
        threads: numbers of threads.
        group_size: columns that share a decoder.
        peers: :data:`VLLM` or none.
        decoder_kind: of the experts' decoders.
    """

    shapes: Sequence[Shape]
    batches: Sequence[int] = BATCHES
    widths: Sequence[int] = WIDTHS
    threads: Sequence[int] = (2,)
    group_size: int = 128
    peers: Sequence[str] = (VLLM,)
    decoder_kind: DecoderKind = AFFINE_INT8


class Mixture:
    """The experts of one width, side by side in memory, each with its planes alone as if loaded for this width."""

    def __init__(self, settings: Settings, shape: Shape, width: int) -> None:
        self.shape = shape
        products = (2 * shape.inner, shape.hidden), (shape.hidden, shape.inner)
        parts = [_Part(settings, width, *product) for product in products]
        self._planes = torch.randint(0, 256, (shape.experts, sum(part.nbytes for part in parts)), dtype=torch.uint8)
        self._weights = []
        for own in self._planes:
            planes = own.split([part.nbytes for part in parts])
            self._weights.append([part.weight(each) for part, each in zip(parts, planes, strict=True)])
        self.handles = torch.stack([torch.stack([weight.handle for weight in pair]) for pair in self._weights])
        self.expert_bytes = sum(weight.resident_bytes for weight in self._weights[0])
        self._reads = 0

    def compute(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> None:
        """The mixture's outputs."""
        experts(x, weights, ids, self.handles, self.shape.inner, "silu")

    def read(self, count: int) -> int:
        """A plain read of the planes of so many experts; gives its bytes."""
        self._reads = (self._reads + count) % max(1, len(self._planes) - count)
        planes = self._planes[self._reads : self._reads + count].view(-1)
        ops.read_memory(planes)
        return planes.nbytes


class _Part:
    """One product of every expert."""

    def __init__(self, settings: Settings, width: int, rows: int, columns: int) -> None:
        self._settings, self._width, self._rows, self._columns = settings, width, rows, columns
        empty = [torch.zeros(rows, columns * bits // 8, dtype=torch.uint8) for bits in (BASE_BITS, *[1] * 6)]
        self._shape = PAIRS.pack_planes(empty[0], empty[1:], [rows])[:width].shape
        self.nbytes = self._shape.numel()
        groups = -(-columns // settings.group_size)
        decoder = random_decoder(settings.decoder_kind, width, rows, groups)
        self._decoders = PAIRS.pack_decoders([decoder], [rows])

    def weight(self, planes: torch.Tensor) -> PackedWeight:
        """An expert's, over its bytes of random codes."""
        width, settings = self._width, self._settings
        resident = ResidentSegment(planes.view(self._shape), self._decoders.clone(), (width,), (self._rows,), width)
        segment = PackedSegment(resident, torch.tensor([width], dtype=torch.int32))
        return PackedWeight(CPU, PAIRS, settings.decoder_kind, self._columns, settings.group_size, (segment,))


def vllm_bfloat16(shape: Shape) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]:
    """vLLM's experts with weights in bfloat16 on a CPU, which packs them first."""
    from vllm import _custom_ops
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts, X86CPUUnquantizedExperts

    isa = (
        X86CPUUnquantizedExperts if X86CPUUnquantizedExperts._supports_current_device() else CPUUnquantizedExperts
    ).isa
    outer = torch.randn(shape.experts, 2 * shape.inner, shape.hidden, dtype=torch.bfloat16)
    packed = [_custom_ops.cpu_prepack_moe_weight(outer, isa)]
    del outer
    down = torch.randn(shape.experts, shape.hidden, shape.inner, dtype=torch.bfloat16)
    packed.append(_custom_ops.cpu_prepack_moe_weight(down, isa))

    def compute(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> None:
        void(_custom_ops.cpu_fused_moe(torch.empty_like(x), x, *packed, None, None, weights, ids, "silu", isa, False))

    return compute


def bench_experts(settings: Settings) -> Iterator[dict[str, Any]]:
    """Rows of ``bench experts``: medians over rounds, in each of which every width, its plain read and the peer had a
    turn with the same routing, drawn anew for each round.

    Yields:
        Rows as in the JSON of ``bench experts``; ``hit`` is how many experts a round hit, on average.
    """
    before = torch.get_num_threads()
    try:
        for shape in settings.shapes:
            # The most threads first, also where the peer is tried: oneDNN keeps to no more than it first ran with.
            descending = sorted(settings.threads, reverse=True)
            torch.set_num_threads(descending[0])
            mixtures = {width: Mixture(settings, shape, width) for width in settings.widths}
            peer = _willing_peer(shape) if VLLM in settings.peers else None
            for threads in descending:
                torch.set_num_threads(threads)
                for batch in settings.batches:
                    yield from _measure(settings, shape, mixtures, peer, threads, batch)
    finally:
        torch.set_num_threads(before)


def _willing_peer(shape: Shape) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None] | None:
    """vLLM's experts, or None where it has none for the shape: stderr tells."""
    try:
        return vllm_bfloat16(shape)
    except (ImportError, RuntimeError) as error:
        print(f"{VLLM} refuses {'x'.join(map(str, shape))}: {str(error).splitlines()[0]}", file=sys.stderr)
        return None


def _measure(
    settings: Settings,
    shape: Shape,
    mixtures: dict[int, Mixture],
    peer: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None] | None,
    threads: int,
    batch: int,
) -> Iterator[dict[str, Any]]:
    x, generator = random_activations(batch, shape.hidden), torch.Generator().manual_seed(batch)
    seconds: dict[int, list[float]] = {width: [] for width in settings.widths}
    speeds: dict[int, list[float]] = {width: [] for width in settings.widths}
    reads: dict[int, list[float]] = {width: [] for width in settings.widths}
    by_peer: list[float] = []
    hits: list[int] = []
    end = time.perf_counter() + SECONDS
    while len(hits) < ROUNDS or time.perf_counter() < end:
        logits = torch.rand(batch, shape.experts, generator=generator)
        weights, ids = logits.topk(shape.chosen)
        ids = ids.int()
        hits.append(len(ids.unique()))
        for width, mixture in mixtures.items():
            taken = seconds_of(partial(mixture.compute, x, weights, ids))
            seconds[width].append(taken)
            speeds[width].append(hits[-1] * mixture.expert_bytes / taken / 1e9)
            start = time.perf_counter()
            nbytes = mixture.read(hits[-1])
            reads[width].append(nbytes / (time.perf_counter() - start) / 1e9)
        if peer:
            by_peer.append(seconds_of(partial(peer, x, weights, ids)))
    for width, mixture in mixtures.items():
        gb_per_s, read_gb_per_s = statistics.median(speeds[width]), statistics.median(reads[width])
        yield {
            "backend": "cpu",
            "kernel": "experts",
            "isa": ops.cpu_isa(),
            "bits": width,
            "m": batch,
            **shape._asdict(),
            "hit": statistics.mean(hits),
            "group_size": settings.group_size,
            "decoders": settings.decoder_kind.name,
            "threads": threads,
            "seconds": statistics.median(seconds[width]),
            "bytes": statistics.mean(hits) * mixture.expert_bytes,
            "gb_per_s": gb_per_s,
            "read_gb_per_s": read_gb_per_s,
            "roofline": gb_per_s / read_gb_per_s,
            "peer_seconds": {VLLM: statistics.median(by_peer)} if by_peer else {},
        }
