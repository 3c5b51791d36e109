"""The only door to the C++ operators, ``torch.ops.matquant.*``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from vllm_matquant.checkpoint.spec import BASE_BITS
from vllm_matquant.kernels.layout import STEP_COLUMNS, planes_shape
from vllm_matquant.kernels.memory import WeightMemory
from vllm_matquant.kernels.reference import linear_shape

LIBRARY = Path(__file__).parents[1] / "_C.abi3.so"
BUILD_COMMAND = "python setup.py build_ext --inplace"

_loaded = False


class LibraryError(ImportError):
    """The C++ library is not built, or it was built for another machine or an older torch."""


def load_library() -> None:
    """Load the C++ operators, once.

    Every function of this module calls it. Call it before ``torch.compile`` traces one of them: the compiler cannot
    trace the loading itself.

    Raises:
        LibraryError: the library is missing or cannot be loaded.
    """
    global _loaded
    if _loaded:
        return
    if not LIBRARY.is_file():
        raise LibraryError(f"{LIBRARY}: found no C++ library, expected one built by: {BUILD_COMMAND}")
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        raise LibraryError(f"{LIBRARY}: {error}. Build it anew: {BUILD_COMMAND}") from error
    torch.library.register_fake("matquant::linear", linear_shape)
    _loaded = True


def linear(
    x: torch.Tensor,
    planes: torch.Tensor,
    decoders: torch.Tensor,
    active_width: torch.Tensor,
    decoder_widths: Sequence[int],
    output_sizes: Sequence[int],
    group_size: int,
    bias: torch.Tensor | None = None,
    activation_bits: int | None = None,
) -> torch.Tensor:
    """The product of ``x`` and the slices that are active now; planes past them are not read.

    Activations are rounded to integers of ``activation_bits`` with a scale for each token and each segment of at most
    128 columns of a group; products with codes are summed exactly within a segment, segments in float32, and a result
    is rounded once to the dtype of ``x``. Its bytes depend neither on the number of threads nor on the instruction set
    nor on the other rows of ``x``. A token with an infinity or a NaN gives NaNs. ``active_width`` is data: a compiled
    graph serves every width.

    Args:
        x: bfloat16, float16 or float32 [..., in_features].
        planes: uint8 [resident width, tile rows, tile columns, 64], see :mod:`vllm_matquant.kernels.layout`.
        decoders: float16 [len(decoder_widths), tile rows, groups, 2, 16].
        active_width: int32 [len(output_sizes)], the width of each partition.
        decoder_widths: the widths whose decoders are resident, in the order of ``decoders``.
        output_sizes: rows of each partition (q, k, v of a fused layer).
        group_size: columns that share a decoder: a multiple of 4, or at least in_features.
        bias: [sum(output_sizes)] of the dtype of ``x``.
        activation_bits: 16 loses no more than 2^-15 of a segment's largest activation, and nothing of bfloat16 and
            float16 that are within a factor 2^7 or 2^4 of it; 24 is the same for float32 with 2^-23; 8 loses up to
            1/254 of the largest and is faster. By default 16, for float32 24, and 8 while every partition is at 2 bits.

    Returns:
        [..., sum(output_sizes)] of the dtype of ``x``.

    Raises:
        RuntimeError: an argument contradicts another; the message names it, what was found and what was expected.
    """
    load_library()
    result: torch.Tensor = torch.ops.matquant.linear(
        x, planes, decoders, active_width, decoder_widths, output_sizes, group_size, bias, activation_bits
    )
    return result


def repack_codes(
    base: torch.Tensor,
    planes: Sequence[torch.Tensor],
    output_sizes: Sequence[int],
    decoder_widths: Sequence[int],
    memory: WeightMemory | None = None,
) -> torch.Tensor:
    """Codes as on disk to the planes that kernels read (on the CPU).

    Args:
        base: uint8 [sum(output_sizes), ceil(in_features/4)], the two most significant bits of each code.
        planes: for each further bit uint8 [sum(output_sizes), ceil(in_features/8)].
        output_sizes: rows of each partition.
        decoder_widths: as for :func:`linear`; which planes lie in pairs follows from them.
        memory: where the result is to lie, by default in memory of its own.

    Returns:
        uint8 [2 + len(planes), tile rows, tile columns, 64].

    Raises:
        RuntimeError: an argument contradicts another.
    """
    load_library()
    in_features = STEP_COLUMNS * base.shape[-1]
    shape = planes_shape(BASE_BITS + len(planes), output_sizes, in_features)
    result = (memory or WeightMemory()).take(shape, torch.uint8)
    torch.ops.matquant.repack_codes(base, planes, output_sizes, decoder_widths, result)
    return result


def solve_columns(
    copies: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor,
    group_of_column: torch.Tensor,
    coupling: torch.Tensor,
    current: torch.Tensor | None,
    fixed_bits: int,
    slices: torch.Tensor,
    lambdas: torch.Tensor,
    mean_error: bool,
    begin: int,
    end: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the parent codes of the columns ``begin..end``, one after the other (on the CPU).

    The inner loop of :mod:`vllm_matquant.quantize.columns`. A column's code is the parent q that minimises
    ``sum_r lambda_r (copies_r - (scale_r * slices[r, q] + offset_r))^2``; each width's error times the column's row of
    ``coupling`` is then subtracted from that width's later columns. The error is that of the decoded weight divided by
    the column's diagonal entry of ``coupling`` or, with ``current``, the change from the decoded weight of the current
    code.

    Args:
        copies: float32 [columns, widths, rows], the value wanted for each weight at each width; rows is a multiple
            of 16.
        scales, offsets: float32 [widths, groups, rows].
        group_of_column: int32 [columns].
        coupling: float32 [1 or widths, end - begin, end - begin]; one for all widths, or one for each.
        current: uint8 [columns, rows], parent codes.
        fixed_bits: leading bits of the current codes that the chosen ones must have too.
        slices: uint8 [widths, 256], the slice of each parent.
        lambdas: float32 [widths].
        mean_error: feed the widths' mean error back into every copy instead of each its own.

    Returns:
        Codes, uint8 [end - begin, rows], and errors, float32 [end - begin, widths, rows].

    Raises:
        RuntimeError: an argument contradicts another.
    """
    load_library()
    result: tuple[torch.Tensor, torch.Tensor] = torch.ops.matquant.solve_columns(
        copies, scales, offsets, group_of_column, coupling, current, fixed_bits, slices, lambdas, mean_error, begin, end
    )
    return result


def read_memory(data: torch.Tensor) -> int:
    """Read memory with all threads and do nothing else (on the CPU): what benchmarks measure kernels against.

    Args:
        data: uint8 [n]; a rest of less than 64 bytes is not read.

    Returns:
        The exclusive or of its 64-bit words.
    """
    load_library()
    result: int = torch.ops.matquant.read_memory(data)
    return result


def is_built_for(device_type: str) -> bool:
    """Whether the library has a product for devices of this type.

    Raises:
        LibraryError: there is no library.
    """
    load_library()
    key = getattr(torch._C.DispatchKey, device_type.upper(), None)
    return key is not None and bool(torch.ops.matquant.linear.default.has_kernel_for_dispatch_key(key))


def cpu_isa() -> str:
    """The instruction set in use on the CPU; the environment variable MATQUANT_CPU_ISA forces one of :func:`cpu_isas`.

    Raises:
        RuntimeError: the variable names one that this machine does not have.
    """
    load_library()
    result: str = torch.ops.matquant.cpu_isa()
    return result


def cpu_isas() -> list[str]:
    """The instruction sets with a kernel that this machine has, slowest first."""
    load_library()
    result: list[str] = torch.ops.matquant.cpu_isas()
    return result
