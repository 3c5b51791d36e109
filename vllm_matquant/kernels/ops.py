"""The only door to the C++ operators, ``torch.ops.matquant.*``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

LIBRARY = Path(__file__).parents[1] / "_C.abi3.so"
BUILD_COMMAND = "pip install --no-build-isolation --no-deps --force-reinstall SOURCES (their folder)"

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
    torch.library.register_fake("matquant::linear", linear_fake)
    torch.library.register_fake("matquant::embedding", embedding_fake)
    torch.library.register_fake("matquant::linear_by_row", linear_by_row_fake)
    torch.library.register_fake("matquant::embedding_by_row", embedding_by_row_fake)
    _loaded = True


def linear_fake(
    x: torch.Tensor, weight: torch.Tensor, out_features: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """An empty result of a product: what ``torch.compile`` is to know of every operator that computes one."""
    return x.new_empty(*x.shape[:-1], out_features)


def embedding_fake(rows: torch.Tensor, weight: torch.Tensor, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """An empty result of a look-up: what ``torch.compile`` is to know of every operator that does one."""
    return rows.new_empty(*rows.shape, columns, dtype=dtype)


def linear_by_row_fake(
    x: torch.Tensor,
    weights: torch.Tensor,
    slots: torch.Tensor,
    out_features: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """An empty result of a product by rows: what ``torch.compile`` is to know of it."""
    return x.new_empty(*x.shape[:-1], out_features)


def embedding_by_row_fake(
    rows: torch.Tensor, weights: torch.Tensor, slots: torch.Tensor, columns: int, dtype: torch.dtype
) -> torch.Tensor:
    """An empty result of a look-up by rows: what ``torch.compile`` is to know of it."""
    return rows.new_empty(*rows.shape, columns, dtype=dtype)


def new_weight(
    in_features: int, group_size: int, decoder_kind: str, layout: str, activation_bits: int | None = None
) -> int:
    """Make a weight that has no rows yet.

    Args:
        in_features: columns.
        group_size: columns that share a decoder.
        decoder_kind: the name of a kind of :mod:`vllm_matquant.checkpoint.decoder`.
        layout: the name of the layout in which its planes and decoders lie, such as "cpu-pairs".
        activation_bits: how far products round activations, see :func:`linear`.

    Returns:
        The weight's number, which no other ever has: what a handle holds.

    Raises:
        RuntimeError: an argument is out of range.
    """
    load_library()
    result: int = torch.ops.matquant.new_weight(in_features, group_size, decoder_kind, layout, activation_bits)
    return result


def add_segment(
    weight: int,
    planes: torch.Tensor,
    decoders: torch.Tensor,
    active_width: torch.Tensor,
    decoder_widths: Sequence[int],
    output_sizes: Sequence[int],
) -> None:
    """Give a weight rows after those that it has.

    Everything is checked here, so that products need not do it: but for ``active_width``, which is read anew by each.
    The tensors are referred to, not copied.

    Args:
        weight: a number that :func:`new_weight` gave.
        planes: the codes' bits in the weight's layout; on a CPU uint8 [resident width, tile rows, tile columns, 64],
            see :mod:`vllm_matquant.kernels.cpu_layout`.
        decoders: uint8 [bytes] in the weight's layout: those of each of ``decoder_widths``, one after the other.
        active_width: int32 [len(output_sizes)], the width of each partition.
        decoder_widths: the widths whose decoders are resident, in the order of ``decoders``.
        output_sizes: rows of each partition (q, k, v of a fused layer).

    Raises:
        RuntimeError: an argument contradicts another or the weight; the message names it, what was found and what was
            expected.
    """
    load_library()
    torch.ops.matquant.add_segment(weight, planes, decoders, active_width, decoder_widths, output_sizes)


def free_weight(weight: int) -> None:
    """Forget a weight and its tensors. A product that has begun with it still ends.

    Raises:
        RuntimeError: there is no weight of this number.
    """
    load_library()
    torch.ops.matquant.free_weight(weight)


def linear(x: torch.Tensor, handle: torch.Tensor, out_features: int, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The product of ``x`` and the slices of a weight that are active now; planes past them are not read.

    Activations are rounded to integers of 8, 16 or 24 bits with a scale for each token and each span of at most 128
    columns of a group; products with codes are summed exactly within a span, spans in float32, and a result is rounded
    once to the dtype of ``x``. Its bytes depend neither on the number of threads nor on the instruction set nor on the
    other rows of ``x``. A token with an infinity or a NaN gives NaNs.

    Of the numbers of bits, 16 loses no more than 2^-15 of a span's largest activation, and nothing of bfloat16 and
    float16 that are within a factor 2^7 or 2^4 of it; 24 is the same for float32 with 2^-22; 8 loses up to 1/254 of the
    largest and is faster. The weight says which. By default it is 24 for float32, else 16 if any partition has more
    than 4 bits, and 8 otherwise: at 3 and 4 bits but for spans with outliers, which have 16 (see
    :func:`vllm_matquant.kernels.reference.default_rounding`).

    Args:
        x: bfloat16, float16 or float32 [..., in_features].
        handle: int64 [1] on the CPU with the number of a weight.
        out_features: rows of the weight.
        bias: [out_features] of the dtype of ``x``.

    Returns:
        [..., out_features] of the dtype of ``x``.

    Raises:
        RuntimeError: an argument contradicts the weight, there is no such weight, or an active width is not resident;
            the message names it, what was found and what was expected.
    """
    load_library()
    result: torch.Tensor = torch.ops.matquant.linear(x, handle, out_features, bias)
    return result


def embedding(rows: torch.Tensor, handle: torch.Tensor, in_features: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of a weight with one partition, decoded at the width that is active now (on the CPU).

    Only the bytes that hold these rows and their decoders are read; planes past the active width are not.

    Args:
        rows: int64 [...].
        handle: int64 [1] on the CPU with the number of a weight.
        in_features: columns of the weight.
        dtype: of the result: bfloat16, float16 or float32.

    Returns:
        [..., in_features] of ``dtype``, rounded once from float32.

    Raises:
        RuntimeError: a row is not one of the weight's, or another argument contradicts the weight; there is no such
            weight, or its active width is not resident.
    """
    load_library()
    result: torch.Tensor = torch.ops.matquant.embedding(rows, handle, in_features, dtype)
    return result


def linear_by_row(
    x: torch.Tensor,
    handles: torch.Tensor,
    slots: torch.Tensor,
    out_features: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The product of each row of ``x`` with a weight of its own.

    The weights are one layer's, read at several widths. On a CPU their planes are read from memory once, and the bytes
    are those that :func:`linear` gives. On a GPU the slots are read when the kernels run, so that a captured graph
    follows them; each slot that some of up to 24 rows have reads the planes anew.

    Args:
        x: bfloat16, float16 or (on a CPU) float32 [..., in_features].
        handles: int64 [slots] on the CPU with the number of each slot's weight, or 0 where it has none. On a GPU the
            readers of one :meth:`PackedWeight.readers`, in their order, and zeros past the last.
        slots: int32 [at least the rows of ``x``] on its device, which of the handles each row is multiplied with. On a
            GPU a row whose slot has no weight gives NaNs.
        out_features: rows of the weights.
        bias: [out_features] of the dtype of ``x``.

    Returns:
        [..., out_features] of the dtype of ``x``.

    Raises:
        RuntimeError: as of :func:`linear`; or there are too few slots, one has no weight (on a CPU), or weights do not
            share their planes.
    """
    load_library()
    result: torch.Tensor = torch.ops.matquant.linear_by_row(x, handles, slots, out_features, bias)
    return result


def grouped_linear(
    x: torch.Tensor, handles: torch.Tensor, groups: torch.Tensor, slots: torch.Tensor | None, out_features: int
) -> torch.Tensor:
    """The product of each group of rows with a weight of its own, all in one call (on the CPU).

    Threads do not wait for each other between groups. The bytes are those that :func:`linear` gives for each.

    Args:
        x: bfloat16, float16 or float32 [rows, in_features]; rows of a group, and in it of a slot, stand side by side.
        handles: int64 [groups, slots] on the CPU with the number of each weight, or 0 where there is none; the weights
            of a group are one layer's, read at several widths.
        groups: int32 [rows], ascending, which row of the handles each is multiplied with.
        slots: int32 [rows], which of its group's handles each row is multiplied with; None for the first.
        out_features: rows of the weights.

    Returns:
        [rows, out_features] of the dtype of ``x``.

    Raises:
        RuntimeError: an argument contradicts the weights, or one of them is not there.
    """
    load_library()
    result: torch.Tensor = torch.ops.matquant.grouped_linear(x, handles, groups, slots, out_features)
    return result


def embedding_by_row(
    rows: torch.Tensor, handles: torch.Tensor, slots: torch.Tensor, in_features: int, dtype: torch.dtype
) -> torch.Tensor:
    """Rows of weights with one partition, each looked up in a weight of its own (on the CPU), see :func:`embedding`.

    Args:
        rows: int64 [...].
        handles: int64 [slots] on the CPU with the number of each slot's weight, or 0 where it has none.
        slots: int32 [at least ``rows.numel()``], in which of them each row is looked up.
        in_features: columns of the weights.
        dtype: of the result: bfloat16, float16 or float32.

    Returns:
        [..., in_features] of ``dtype``, rounded once from float32.

    Raises:
        RuntimeError: as of :func:`embedding`; or there are too few slots, or one has no weight.
    """
    load_library()
    result: torch.Tensor = torch.ops.matquant.embedding_by_row(rows, handles, slots, in_features, dtype)
    return result


def repack_codes(
    base: torch.Tensor, planes: Sequence[torch.Tensor], output_sizes: Sequence[int], layout: str, result: torch.Tensor
) -> None:
    """Codes as on disk to the planes that kernels read (on the CPU).

    Args:
        base: uint8 [sum(output_sizes), ceil(in_features/4)], the two most significant bits of each code.
        planes: for each further bit uint8 [sum(output_sizes), ceil(in_features/8)].
        output_sizes: rows of each partition.
        layout: "cpu-pairs" or "cpu-planes".
        result: where the planes go, uint8 [2 + len(planes), tile rows, tile columns, 64].

    Raises:
        RuntimeError: an argument contradicts another.
    """
    load_library()
    torch.ops.matquant.repack_codes(base, planes, output_sizes, layout, result)


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


def solve_fours(
    copies: torch.Tensor,
    scales: torch.Tensor,
    group_of_column: torch.Tensor,
    factors: torch.Tensor,
    coupling: torch.Tensor,
    current: torch.Tensor | None,
    books: torch.Tensor,
    widths: Sequence[int],
    lambdas: torch.Tensor,
    begin: int,
    end: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the parent codes of the columns ``begin..end`` for codebooks, four after four (on the CPU).

    The inner loop of :mod:`vllm_matquant.quantize.fours`. The errors of a four, times its rows of ``coupling``, are
    subtracted from each width's later columns. With F the four's factor, x its copies and v what its codes decode to,
    they are ``(x - v) F`` or, with ``current``, v less what the current codes decode to.

    Args:
        copies: float32 [columns, widths, rows], the value wanted for each weight at each width; rows is a multiple
            of 16.
        scales: float32 [widths, groups, rows].
        group_of_column: int32 [columns], the same for all of a four.
        factors: float32 [fours, 4, 4], upper triangles: an error e of a four weighs ``|e F|^2``.
        coupling: float32 [end - begin, end - begin].
        current: uint8 [columns, rows], parent codes.
        books: float32 [planes, 256, 4], of each width its levels and increments.
        widths: ascending.
        lambdas: float32 [widths].

    Returns:
        Codes, uint8 [end - begin, rows], and errors, float32 [end - begin, widths, rows].

    Raises:
        RuntimeError: an argument contradicts another.
    """
    load_library()
    result: tuple[torch.Tensor, torch.Tensor] = torch.ops.matquant.solve_fours(
        copies, scales, group_of_column, factors, coupling, current, books, widths, lambdas, begin, end
    )
    return result


def codebook_levels(codes: torch.Tensor, planes: torch.Tensor) -> torch.Tensor:
    """What codes decode to with a codebook, before scaling (on the CPU).

    Args:
        codes: uint8 [rows, columns], each of as many bits as planes has matrices and one more; columns is a multiple
            of 16.
        planes: float32 [width - 1, 256, 4], the levels of each index, then what each further bit adds.

    Returns:
        float32 [rows, columns].

    Raises:
        RuntimeError: an argument contradicts another.
    """
    load_library()
    result: torch.Tensor = torch.ops.matquant.codebook_levels(codes, planes)
    return result


def codebook_sums(codes: torch.Tensor, weights: torch.Tensor, width: int) -> torch.Tensor:
    """The transpose of :func:`codebook_levels`: sums of what has each index, and each further bit besides (on the CPU).

    Args:
        codes: uint8 [rows, columns], each of ``width`` bits; columns is a multiple of 16.
        weights: float32 [rows, columns], what is summed, in float64.
        width: of the codes, in 2..8.

    Returns:
        float32 [width - 1, 256, 4].

    Raises:
        RuntimeError: an argument contradicts another.
    """
    load_library()
    result: torch.Tensor = torch.ops.matquant.codebook_sums(codes, weights, width)
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
