"""Starts the CUDA kernels that the library's plan names, for kernels that are compiled at run time.

What csrc/cuda/linear.cu does in C++ with the same plan (csrc/cuda/plan.cpp).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from vllm_matquant.kernels import ops
from vllm_matquant.kernels.weight import PackedWeight


@dataclass(frozen=True)
class Plan:
    """How one segment of a weight is multiplied.

    Attributes:
        kernel: its name.
        grid: blocks.
        threads: of a block.
        shared_bytes: dynamic shared memory of a block.
        columns: of the input, which is padded with zeros.
        first_output: of the segment.
        partial_sums: values of scratch memory, float32.
        arrivals: values of scratch memory, int32, zero before and after.
        shape: what the kernel is passed by value, uint8.
    """

    kernel: str
    grid: list[int]
    threads: int
    shared_bytes: int
    columns: int
    first_output: int
    partial_sums: int
    arrivals: int
    shape: torch.Tensor

    @property
    def dequantizes(self) -> bool:
        """Whether the kernel writes weights, for so many tokens that a library's product is faster."""
        return self.kernel.startswith("matquant_dequantize_")


class Launcher(Protocol):
    """Starts kernels; tensors among the arguments are passed as pointers, None as the null pointer, bytes by value."""

    @property
    def processors(self) -> int:
        """Multiprocessors of the device."""
        ...

    def launch(self, plan: Plan, arguments: Sequence[torch.Tensor | bytes | None]) -> None:
        """Start the plan's kernel."""
        ...


def kernel_definitions() -> dict[str, str]:
    """For each kernel that there is the line of a program that defines it."""
    ops.load_library()
    names, definitions = torch.ops.matquant.cuda_instances()
    return dict(zip(names, definitions, strict=True))


def plans_of(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, processors: int, splits: int | None = None
) -> Iterator[Plan]:
    """The plans for the segments of a weight.

    Args:
        x: float16 or bfloat16 [..., in_features].
        weight: in the layout of the CUDA kernels, known to the library.
        bias: [out_features] of the dtype of ``x``.
        processors: multiprocessors of the device.
        splits: blocks that the columns of a row of tiles are divided among; by default as many as fill the device.

    Raises:
        RuntimeError: an argument contradicts the weight.
    """
    for segment in range(len(weight.segments)):
        arguments = (x, weight.handle, weight.out_features, bias, segment, processors, splits)
        yield Plan(*torch.ops.matquant.cuda_plan(*arguments))


def multiply(
    launcher: Launcher,
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    """The product of ``x`` [..., in_features] and a weight, at the widths that are active now.

    Args:
        launcher: starts the kernels.
        x: float16 or bfloat16 [..., in_features].
        weight: in the layout of the CUDA kernels, known to the library.
        bias: [out_features] of the dtype of ``x``.
        splits: blocks that the columns of a row of tiles are divided among; by default as many as fill the device.

    Returns:
        [..., out_features] of the dtype of ``x``.

    Raises:
        RuntimeError: an argument contradicts the weight.
    """
    plans = list(plans_of(x, weight, bias, launcher.processors, splits))
    tokens, columns = x.numel() // weight.in_features, plans[0].columns
    shape = (*x.shape[:-1], weight.out_features)
    if tokens == 0:
        return x.new_empty(shape)
    padded = x.reshape(tokens, weight.in_features)
    padded = torch.nn.functional.pad(padded, (0, columns - weight.in_features)).contiguous()
    if plans[0].dequantizes:
        weights = dequantize(launcher, weight, plans, x)
        return torch.nn.functional.linear(padded, weights, bias).view(shape)
    output = x.new_empty(tokens, weight.out_features)
    for plan, segment in zip(plans, weight.segments, strict=True):
        resident = segment.resident
        partial_sums = x.new_empty(plan.partial_sums, dtype=torch.float32)
        arrivals = x.new_zeros(plan.arrivals, dtype=torch.int32)
        # Views of the tensors from the segment's first output on.
        own_bias = None if bias is None else bias[plan.first_output :]
        own_output = output.flatten()[plan.first_output :]
        tensors = (padded, resident.planes, resident.decoders, segment.active_width, own_bias, own_output)
        launcher.launch(plan, (*tensors, partial_sums, arrivals, bytes(plan.shape.tolist())))
    return output.view(shape)


def dequantize(launcher: Launcher, weight: PackedWeight, plans: Sequence[Plan], like: torch.Tensor) -> torch.Tensor:
    """The weights at the widths that are active now.

    Args:
        launcher: starts the kernels.
        weight: in the layout of the CUDA kernels.
        plans: for its segments, all of which dequantize.
        like: a tensor of the dtype and on the device that the result is to have.

    Returns:
        [out_features, plans[0].columns].
    """
    weights = like.new_empty(weight.out_features, plans[0].columns)
    for plan, segment in zip(plans, weight.segments, strict=True):
        tensors = (segment.resident.planes, segment.resident.decoders, segment.active_width)
        launcher.launch(plan, (*tensors, weights[plan.first_output :], bytes(plan.shape.tolist())))
    return weights
