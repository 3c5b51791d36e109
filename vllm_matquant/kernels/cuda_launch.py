"""The product that a GPU computes, its kernels started from Python: for kernels that are compiled at run time.

Which kernels, on what grids and with which arguments is the library's to say (csrc/cuda/plan.cpp and linear.cpp), as it
is where the library starts them itself (csrc/cuda/device.cu).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Protocol

import torch

from vllm_matquant.kernels import ops
from vllm_matquant.kernels.weight import PackedWeight


@dataclass(frozen=True)
class Memory:
    """What a pointer points to.

    Attributes:
        address: where it begins.
        size: bytes.
    """

    address: int
    size: int


@dataclass(frozen=True)
class Launch:
    """A kernel to start.

    Attributes:
        kernel: its name.
        grid: blocks in three dimensions.
        threads: of a block.
        shared_bytes: dynamic shared memory of a block.
        pointers: its first arguments, None for the null pointer. Of a kernel that multiplies: activations, planes,
            decoders, active widths, bias, output, scratch memory for partial sums and for arrivals, which are zero
            before and after, and slots. Of one that dequantizes: planes, decoders, active widths, weights.
        shape: its last argument, which is passed by value.
    """

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    pointers: tuple[Memory | None, ...]
    shape: bytes

    @property
    def dequantizes(self) -> bool:
        """Whether the kernel writes weights, for so many tokens that a library's product is faster."""
        return self.kernel.startswith("matquant_dequantize_")


class Launcher(Protocol):
    """Starts kernels on the device that has the weight."""

    @property
    def processors(self) -> int:
        """Multiprocessors of the device."""
        ...

    def launch(self, launch: Launch) -> None:
        """Start a kernel."""
        ...


def kernel_definitions() -> dict[str, str]:
    """For each kernel that there is the line of a program that defines it."""
    ops.load_library()
    names, definitions = torch.ops.matquant.cuda_instances()
    return dict(zip(names, definitions, strict=True))


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
        Exception: what the launcher raises.
    """
    return _multiply(launcher, x, weight.handle, None, weight.out_features, bias, splits)


def multiply_by_row(
    launcher: Launcher,
    x: torch.Tensor,
    handles: torch.Tensor,
    slots: torch.Tensor,
    out_features: int,
    bias: torch.Tensor | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    """The product of ``x`` [..., in_features] and a weight, each row at the widths of its slot.

    Args:
        launcher: starts the kernels.
        x: float16 or bfloat16 [..., in_features].
        handles: int64 [slots] on the CPU with the handles of a weight's readers (:meth:`PackedWeight.readers`), zero
            past the last.
        slots: int32 [at least the rows of ``x``] on the device of ``x``; a row with one that has no reader gives NaNs.
        out_features: of the weight.
        bias: [out_features] of the dtype of ``x``.
        splits: blocks that the columns of a row of tiles are divided among; by default as many as fill the device.

    Returns:
        [..., out_features] of the dtype of ``x``.

    Raises:
        RuntimeError: an argument contradicts the weight.
        Exception: what the launcher raises.
    """
    return _multiply(launcher, x, handles, slots, out_features, bias, splits)


def _multiply(
    launcher: Launcher,
    x: torch.Tensor,
    handles: torch.Tensor,
    slots: torch.Tensor | None,
    out_features: int,
    bias: torch.Tensor | None,
    splits: int | None,
) -> torch.Tensor:
    failed: list[Exception] = []

    @_FUNCTION
    def start(told: ctypes._Pointer[_Launch]) -> int:
        try:
            launcher.launch(told.contents.read())
        except Exception as cause:  # C++ knows none of Python's
            failed.append(cause)
        return len(failed)

    address = ctypes.cast(start, ctypes.c_void_p).value
    try:
        result: torch.Tensor = torch.ops.matquant.cuda_linear(
            x, handles, slots, out_features, bias, address, launcher.processors, splits
        )
        return result
    except RuntimeError:
        if failed:
            raise failed[0] from None
        raise


class _Memory(ctypes.Structure):
    """As csrc/cuda/launcher.h has it."""

    _fields_ = (("data", ctypes.c_void_p), ("bytes", ctypes.c_int64))


class _Launch(ctypes.Structure):
    """As csrc/cuda/callback.cpp has it."""

    _fields_ = (
        ("kernel", ctypes.c_char_p),
        ("grid", ctypes.c_int32 * 3),
        ("threads", ctypes.c_int32),
        ("shared_bytes", ctypes.c_int32),
        ("pointers", ctypes.c_int32),
        ("memory", ctypes.POINTER(_Memory)),
        ("shape", ctypes.c_void_p),
        ("shape_bytes", ctypes.c_int64),
    )

    def read(self) -> Launch:
        memory = self.memory[: self.pointers]
        return Launch(
            self.kernel.decode(),
            tuple(self.grid),
            self.threads,
            self.shared_bytes,
            tuple(Memory(each.data, each.bytes) if each.data else None for each in memory),
            ctypes.string_at(self.shape, self.shape_bytes),
        )


_FUNCTION = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Launch))
