"""Time of one linear layer at every width, beside a plain read of the same bytes and other libraries' layers."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_matquant.checkpoint.codebook import ENTRIES, PLACES, Codebook
from vllm_matquant.checkpoint.decoder import AFFINE_INT8, Affine, Decoder, DecoderKind
from vllm_matquant.checkpoint.spec import BASE_BITS, WIDTHS
from vllm_matquant.kernels import ops
from vllm_matquant.kernels.cpu_layout import PAIRS
from vllm_matquant.kernels.support import CPU
from vllm_matquant.kernels.weight import PackedSegment, PackedWeight, ResidentSegment

SHAPES = {  # out_features, in_features
    "smollm2-135m": ((960, 576), (576, 576), (3072, 576), (576, 1536)),
    "llama-3.2-1b": ((3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192)),
    "llama-3-8b": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
    "4096x11008": ((4096, 11008),),
}
BATCHES = (1, 2, 4, 8, 16, 32, 128, 512)
COLUMNS = ("bits", "m", "n", "k", "threads", "seconds", "gb_per_s", "read_gb_per_s", "roofline")
ROTATED_BYTES = 256 * 2**20  # of 8-bit weights: even their two planes at 2 bits are more than the caches hold
SECONDS = 0.4  # for the rounds of one layer and batch, at least ROUNDS of them
ROUNDS = 7


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        shapes: out_features and in_features of the layers.
        batches: tokens that are multiplied at once.
        widths: active widths.
        threads: numbers of threads.
        group_size: columns that share a decoder.
        activation_bits: see :func:`vllm_matquant.kernels.ops.linear`; None for the default of each width.
        peers: names in :data:`PEERS`.
        decoder_kind: of the layer's decoders.
    """

    shapes: Sequence[tuple[int, int]]
    batches: Sequence[int] = BATCHES
    widths: Sequence[int] = WIDTHS
    threads: Sequence[int] = (1, 2)
    group_size: int = 128
    activation_bits: int | None = None
    peers: Sequence[str] = ()
    decoder_kind: DecoderKind = AFFINE_INT8


class Layer:
    """One layer's weights, as often as it takes to fill more than the caches; every use takes the next copy."""

    def __init__(self, settings: Settings, rows: int, columns: int) -> None:
        self.settings, self.rows, self.columns = settings, rows, columns
        generator = torch.Generator().manual_seed(0)
        groups = -(-columns // settings.group_size)
        self.planes: list[torch.Tensor] = []
        self.weights: list[dict[int, PackedWeight]] = []
        for _ in range(copies_of(rows * columns)):
            packed = [
                torch.randint(0, 256, (rows, columns * bits // 8), dtype=torch.uint8, generator=generator)
                for bits in (BASE_BITS, *[1] * (WIDTHS[-1] - BASE_BITS))
            ]
            planes = PAIRS.pack_planes(packed[0], packed[1:], [rows])
            decoders = {width: random_decoder(settings.decoder_kind, width, rows, groups) for width in settings.widths}
            self.planes.append(planes)
            self.weights.append({width: self._weight(planes[:width], decoders[width]) for width in settings.widths})
        self.uses = 0

    def _weight(self, planes: torch.Tensor, decoder: Decoder) -> PackedWeight:
        # As if the layer had been loaded for this width: with its planes alone, in pairs. Codes are random anyway.
        width = len(planes)
        decoders = PAIRS.pack_decoders([decoder], [self.rows])
        resident = ResidentSegment(planes, decoders, (width,), (self.rows,), width)
        segment = PackedSegment(resident, torch.tensor([width], dtype=torch.int32))
        settings = self.settings
        return PackedWeight(
            *(CPU, PAIRS, settings.decoder_kind, self.columns, settings.group_size, (segment,)),
            activation_bits=settings.activation_bits,
        )

    def bytes_read(self, width: int) -> int:
        return self.weights[0][width].resident_bytes

    def multiply(self, x: torch.Tensor, width: int) -> None:
        ops.linear(x, self.weights[self._next()][width].handle, self.rows)

    def read(self, width: int) -> None:
        """A plain read of the planes that a product at ``width`` reads."""
        ops.read_memory(self.planes[self._next()][:width].view(-1))

    def _next(self) -> int:
        self.uses += 1
        return self.uses % len(self.planes)


def random_decoder(kind: DecoderKind, width: int, rows: int, groups: int) -> Decoder:
    """A decoder of random values, always the same."""
    generator = torch.Generator().manual_seed(width)
    scale = torch.rand(rows, groups, generator=generator)
    if kind.affine:
        return kind.encode(Affine(scale, torch.rand(rows, groups, generator=generator)), width)
    levels = torch.randn(ENTRIES, PLACES, generator=generator)
    halves = 0.5 ** torch.arange(width - BASE_BITS).view(-1, 1, 1)
    return kind.encode(Codebook(levels, halves.expand(-1, ENTRIES, PLACES), scale), width)


def copies_of(size: int) -> int:
    """How often weights of ``size`` bytes are kept."""
    return max(2, -(-ROTATED_BYTES // size))


def torch_bfloat16(rows: int, columns: int, group_size: int) -> Callable[[torch.Tensor], None]:
    """torch's linear layer in bfloat16."""
    weights = [torch.randn(rows, columns).bfloat16() for _ in range(copies_of(2 * rows * columns))]
    uses = iter(range(2**62))
    return lambda x: void(torch.nn.functional.linear(x, weights[next(uses) % len(weights)]))


def vllm_bfloat16(rows: int, columns: int, group_size: int) -> Callable[[torch.Tensor], None]:
    """vLLM's layer for weights in bfloat16 on a CPU, which packs them first."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    layers = []
    for _ in range(copies_of(2 * rows * columns)):
        layer: Any = torch.nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16).requires_grad_(False)
        dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
        layers.append(layer)
    uses = iter(range(2**62))

    def multiply(x: torch.Tensor) -> None:
        layer = layers[next(uses) % len(layers)]
        void(layer.cpu_linear(x, layer.weight, None))

    return multiply


def vllm_int4(rows: int, columns: int, group_size: int) -> Callable[[torch.Tensor], None]:
    """vLLM's layer for 4-bit weights on a CPU."""
    from vllm import _custom_ops
    from vllm.model_executor.kernels.linear.mixed_precision.cpu import _get_isa_hint

    hint, packed_in_word = _get_isa_hint(torch.bfloat16), 8
    weights = [
        torch.randint(-(2**31), 2**31 - 1, (rows // 16, columns * 16 // packed_in_word), dtype=torch.int32)
        for _ in range(copies_of(rows * columns // 2))
    ]
    # It serves only groups that divide the columns.
    scales = torch.rand(columns // math.gcd(columns, group_size), rows).bfloat16()
    uses = iter(range(2**62))

    def multiply(x: torch.Tensor) -> None:
        weight = weights[next(uses) % len(weights)]
        void(_custom_ops.cpu_gemm_wna16(x, weight, scales, None, None, packed_in_word, hint))

    return multiply


PEERS: dict[str, Callable[[int, int, int], Callable[[torch.Tensor], None]]] = {
    "torch-bf16": torch_bfloat16,
    "vllm-bf16": vllm_bfloat16,
    "vllm-int4": vllm_int4,
}


def void(_: Any) -> None:
    """Drops a result."""


def seconds_of(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def bench_kernel(settings: Settings) -> Iterator[dict[str, Any]]:
    """Rows of ``bench kernel``: medians over rounds, in each of which every width, its plain read and every peer had a
    turn, so that what else the machine does befalls them alike.

    Yields:
        Rows as in the JSON of ``bench kernel``; seconds of peers are those of the row's shape, batch and threads.
    """
    threads_before = torch.get_num_threads()
    try:
        for rows, columns in settings.shapes:
            layer = Layer(settings, rows, columns)
            # The most threads first, also where peers are tried: oneDNN keeps to no more than it first ran with.
            descending = sorted(settings.threads, reverse=True)
            torch.set_num_threads(descending[0])
            peers = dict(willing_peers(settings, rows, columns))
            for threads in descending:
                torch.set_num_threads(threads)
                for batch in settings.batches:
                    yield from measure(settings, layer, peers, threads, batch)
    finally:
        torch.set_num_threads(threads_before)


def willing_peers(settings: Settings, rows: int, columns: int) -> Iterator[tuple[str, Callable[[torch.Tensor], None]]]:
    """The peers that take a layer of this shape; of the others stderr tells."""
    for name in settings.peers:
        try:
            peer = PEERS[name](rows, columns, settings.group_size)
            peer(torch.zeros(1, columns).bfloat16())
        except RuntimeError as error:
            print(f"{name} refuses {rows} x {columns}: {str(error).splitlines()[0]}", file=sys.stderr)
        else:
            yield name, peer


def measure(
    settings: Settings, layer: Layer, peers: dict[str, Callable[[torch.Tensor], None]], threads: int, batch: int
) -> Iterator[dict[str, Any]]:
    x = random_activations(batch, layer.columns)
    multiplied: dict[int, list[float]] = {width: [] for width in settings.widths}
    read: dict[int, list[float]] = {width: [] for width in settings.widths}
    by_peers: dict[str, list[float]] = {name: [] for name in peers}
    end, rounds = time.perf_counter() + SECONDS, 0
    while rounds < ROUNDS or time.perf_counter() < end:
        # Not timed: in a model a layer comes after layers of its kind, not after another library's.
        layer.multiply(x, settings.widths[-1])
        layer.read(WIDTHS[-1])
        for width in settings.widths:
            multiplied[width].append(seconds_of(lambda w=width: layer.multiply(x, w)))  # type: ignore[misc]
            read[width].append(seconds_of(lambda w=width: layer.read(w)))  # type: ignore[misc]
        for name, peer in peers.items():
            by_peers[name].append(seconds_of(lambda p=peer: p(x)))  # type: ignore[misc]
        rounds += 1
    for width in settings.widths:
        seconds, bytes_read = statistics.median(multiplied[width]), layer.bytes_read(width)
        gb_per_s = bytes_read / seconds / 1e9
        read_gb_per_s = layer.planes[0][:width].nbytes / statistics.median(read[width]) / 1e9
        yield {
            "backend": "cpu",
            "kernel": "linear",
            "activation_bits": settings.activation_bits,
            "isa": ops.cpu_isa(),
            "bits": width,
            "m": batch,
            "n": layer.rows,
            "k": layer.columns,
            "group_size": settings.group_size,
            "decoders": settings.decoder_kind.name,
            "threads": threads,
            "seconds": seconds,
            "bytes": bytes_read,
            "gb_per_s": gb_per_s,
            "read_gb_per_s": read_gb_per_s,
            "roofline": gb_per_s / read_gb_per_s,
            "peer_seconds": {name: statistics.median(times) for name, times in by_peers.items()},
        }


def random_activations(tokens: int, columns: int) -> torch.Tensor:
    """Bfloat16 [tokens, columns], normal, in blocks of 64 columns whose sizes are log-normal.

    So a sixth of the spans is rounded to 16 bits at 4 bits and a fiftieth at 3, about as many as in SmolLM2-135M (0.13
    to 0.18, and 0.01 to 0.08 by the kind of layer). There tokens share some of them, which costs kernels less.
    """
    sizes = torch.exp(0.6 * torch.randn(tokens, -(-columns // 64)))
    return (torch.randn(tokens, columns) * sizes.repeat_interleave(64, 1)[:, :columns]).bfloat16()


def plot_kernel(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Time of the smallest batch against the width, one panel for each shape, with the limit of memory."""
    from matplotlib.figure import Figure

    batch, threads = min(row["m"] for row in rows), max(row["threads"] for row in rows)
    drawn = [row for row in rows if row["m"] == batch and row["threads"] == threads]
    shapes = list(dict.fromkeys((row["n"], row["k"]) for row in drawn))
    across = min(len(shapes), 4)
    down = -(-len(shapes) // across)
    figure = Figure(figsize=(1.5 + 3.5 * across, 3.2 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False)
    for index, (n, k) in enumerate(shapes):
        panel = panels[index // across][index % across]
        shown = [row for row in drawn if (row["n"], row["k"]) == (n, k)]
        bits = [row["bits"] for row in shown]
        panel.plot(bits, [row["seconds"] * 1e3 for row in shown], "o-", label="matquant")
        limit = [row["bytes"] / row["read_gb_per_s"] / 1e6 for row in shown]
        panel.plot(bits, limit, "--", color="tab:gray", label="limit of memory")
        for name, seconds in shown[0]["peer_seconds"].items():
            panel.axhline(seconds * 1e3, linewidth=1, label=name, color="tab:red" if "torch" in name else "tab:orange")
        panel.set(title=f"{n} x {k}", xlabel="bits", ylabel="ms")
        panel.set_ylim(bottom=0)
    for panel in panels.flat[len(shapes) :]:
        panel.axis("off")
    panels[0][0].legend()
    figure.suptitle(f"One linear layer, {batch} token(s), {threads} thread(s)")
    figure.savefig(file, dpi=150, format=file.suffix.removeprefix(".") or "png")
