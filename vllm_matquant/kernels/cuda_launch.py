"""Which CUDA kernel computes a product, on what grid and with which arguments.

What csrc/cuda/linear.cu does in C++, for kernels that are compiled at run time and for those that an emulator executes.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from vllm_matquant.checkpoint.spec import BASE_BITS, PARENT_BITS
from vllm_matquant.kernels.cuda_layout import TILE_COLUMNS, TILE_ROWS, partition_starts
from vllm_matquant.kernels.layout import ceil_div

# The same figures as in csrc/cuda.
SOURCES = Path(__file__).parents[1] / "csrc"
STEP_COLUMNS = 2 * TILE_COLUMNS
WARPS = 4
THREADS = 32 * WARPS
MAX_PARTITIONS = 8
MOST_TOKENS = 64  # more are multiplied by torch's library
BLOCKS_PER_PROCESSOR = 3
NO_DECODER = 0xFF
PLANE_BYTES_OF_STEP = 1024
DECODER_BYTES = 256


@dataclass(frozen=True)
class Instance:
    """A line of csrc/cuda/instances.h.

    Attributes:
        name: of the kernel.
        line: what the list has of it.
        dtype: of activations.
        tokens: the most at once, 0 for a kernel that dequantizes.
        groups: in a step of 128 columns.
    """

    name: str
    line: str
    dtype: torch.dtype
    tokens: int
    groups: int

    def shared_bytes(self, width: int) -> int:
        """Dynamic shared memory of a block whose layer has slices of up to ``width`` bits."""
        if self.tokens == 0:
            return 0
        decoders = self.groups * DECODER_BYTES
        narrow = 3 * (min(width, 4) * PLANE_BYTES_OF_STEP + decoders)
        wide = 2 * (width * PLANE_BYTES_OF_STEP + decoders) if width > 4 else 0
        return WARPS * max(narrow, wide, TILE_ROWS * self.tokens * 4)


def read_instances(sources: Path = SOURCES) -> list[Instance]:
    """The kernels that there are."""
    text = (sources / "cuda" / "instances.h").read_text()
    found = []
    lines = re.findall(r"INSTANCE(\((matquant_\w+?_(b?float16)_(\w+)), [^)]*\))", text)
    for line, name, dtype, kind in lines:
        numbers = [int(number) for number in kind.split("_")]
        tokens, groups = (0, *numbers) if len(numbers) == 1 else numbers
        found.append(Instance(name, line, getattr(torch, dtype), tokens, groups))
    return found


def choose_instance(instances: Sequence[Instance], dtype: torch.dtype, tokens: int, groups: int) -> Instance:
    """The kernel for the fewest tokens that are enough, or for the most there are; ``tokens`` 0: one that dequantizes.

    Raises:
        ValueError: there is none for the dtype or the groups.
    """
    candidates = [
        instance
        for instance in instances
        if (instance.dtype, instance.groups) == (dtype, groups) and (instance.tokens == 0) == (tokens == 0)
    ]
    if not candidates:
        raise ValueError(f"no kernel for {dtype} and {groups} groups in {STEP_COLUMNS} columns")
    enough = [instance for instance in candidates if instance.tokens >= tokens]
    return min(enough, key=lambda instance: instance.tokens) if enough else max(candidates, key=lambda one: one.tokens)


def grouping_of(group_size: int, in_features: int) -> tuple[int, int]:
    """Groups in a step, and the number of times that a step doubles to a group.

    Raises:
        ValueError: kernels do not serve the group size.
    """
    if group_size >= in_features and group_size not in (32, 64):
        return 1, 31
    if group_size < 32 or group_size & (group_size - 1):
        raise ValueError(
            f"group_size: found {group_size}, expected 32, 64, 128 or a greater power of two, or at least the "
            f"{in_features} input features"
        )
    return max(1, STEP_COLUMNS // group_size), max(0, (group_size // STEP_COLUMNS).bit_length() - 1)


class Launcher(Protocol):
    """Starts kernels; tensors among the arguments are passed as pointers, None as the null pointer, bytes by value."""

    instances: Sequence[Instance]
    processors: int  # of the device

    def launch(
        self,
        instance: Instance,
        grid: tuple[int, ...],
        shared_bytes: int,
        arguments: Sequence[torch.Tensor | bytes | None],
    ) -> None: ...


def describe(
    planes: torch.Tensor,
    decoders: torch.Tensor,
    decoder_widths: Sequence[int],
    output_sizes: Sequence[int],
    tokens: int,
    shift: int,
) -> bytes:
    """The kernels' Shape, see csrc/cuda/shape.cuh.

    Raises:
        ValueError: there are more partitions than kernels take.
    """
    if len(output_sizes) > MAX_PARTITIONS:
        raise ValueError(f"output_sizes: found {len(output_sizes)} partitions, expected at most {MAX_PARTITIONS}")
    tile_rows, tile_columns, resident_width, _ = planes.shape
    by_width = 0
    for width in range(BASE_BITS, PARENT_BITS + 1):
        known = width in decoder_widths and width <= resident_width
        by_width |= (list(decoder_widths).index(width) if known else NO_DECODER) << 8 * (width - BASE_BITS)
    by_width |= NO_DECODER << 56
    numbers = [tokens, sum(output_sizes), tile_rows, tile_columns, resident_width, decoders.shape[2], shift]
    numbers.append(len(output_sizes))
    for starts in partition_starts(output_sizes):
        numbers += [*starts, *[0] * (MAX_PARTITIONS - len(starts))]
    return struct.pack(f"{len(numbers)}iQ", *numbers, by_width)


def multiply(
    launcher: Launcher,
    x: torch.Tensor,
    planes: torch.Tensor,
    decoders: torch.Tensor,
    active_width: torch.Tensor,
    decoder_widths: Sequence[int],
    output_sizes: Sequence[int],
    group_size: int,
    bias: torch.Tensor | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    """The product as :func:`vllm_matquant.kernels.ops.linear` defines it, in the layout of the CUDA kernels.

    Args:
        launcher: starts the kernels.
        splits: blocks that the columns of a row of tiles are divided among; by default as many as fill the device.

    Raises:
        ValueError: kernels do not serve the dtype, the group size or the number of partitions.
    """
    in_features, rows = x.shape[-1], sum(output_sizes)
    groups, shift = grouping_of(group_size, in_features)
    tokens = x.numel() // in_features
    if tokens == 0:
        return x.new_zeros(*x.shape[:-1], rows)
    padded = torch.nn.functional.pad(x.reshape(tokens, in_features), (0, -in_features % STEP_COLUMNS)).contiguous()
    tile_rows, _, resident_width, _ = planes.shape
    shape = describe(planes, decoders, decoder_widths, output_sizes, tokens, shift)
    if tokens > MOST_TOKENS:
        weight = dequantize(launcher, planes, decoders, active_width, shape, groups, rows, padded)
        return torch.nn.functional.linear(padded, weight, bias).view(*x.shape[:-1], rows)

    instance = choose_instance(launcher.instances, x.dtype, tokens, groups)
    passes, steps = ceil_div(tokens, instance.tokens), padded.shape[1] // STEP_COLUMNS
    if splits is None:
        wanted = ceil_div(BLOCKS_PER_PROCESSOR * launcher.processors, tile_rows * passes)
        splits = min(wanted, max(1, steps // WARPS))
    output = x.new_empty(tokens, rows)
    partial_sums = x.new_empty(splits * tile_rows * tokens * TILE_ROWS if splits > 1 else 0, dtype=torch.float32)
    arrivals = x.new_zeros(passes * tile_rows if splits > 1 else 0, dtype=torch.int32)
    arguments = (padded, planes, decoders, active_width, bias, output, partial_sums, arrivals, shape)
    launcher.launch(instance, (tile_rows, splits, passes), instance.shared_bytes(resident_width), arguments)
    return output.view(*x.shape[:-1], rows)


def dequantize(
    launcher: Launcher,
    planes: torch.Tensor,
    decoders: torch.Tensor,
    active_width: torch.Tensor,
    shape: bytes,
    groups: int,
    rows: int,
    padded: torch.Tensor,
) -> torch.Tensor:
    """The weights [rows, columns of ``padded``] in its dtype, for kernels' ``shape``."""
    instance = choose_instance(launcher.instances, padded.dtype, 0, groups)
    weight = padded.new_empty(rows, padded.shape[1])
    grid = (planes.shape[0], ceil_div(padded.shape[1] // TILE_COLUMNS, WARPS))
    launcher.launch(instance, grid, 0, (planes, decoders, active_width, weight, shape))
    return weight
