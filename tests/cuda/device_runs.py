"""Calls the library's launch on a stand-in of the CUDA runtime: ``python device_runs.py LIBRARY``.

A process of its own, for the library defines the operators that the package's own defines. What the runtime is asked to
start is compared with what a launcher in Python is, which the emulator's tests run.
"""

from __future__ import annotations

import ctypes
import itertools
import sys
from pathlib import Path

import torch

from tests.cuda.emulation import Recorder
from tests.cuda.random_layers import KINDS, Layer, make_input, make_layer, make_segments
from vllm_matquant.kernels import cuda_launch, ops
from vllm_matquant.kernels.cuda_launch import Launch

PROCESSORS = 100
STREAM = 0x5EED
GPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
FUNCTION = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint * 3),
    ctypes.POINTER(ctypes.c_uint * 3),
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_size_t,
    ctypes.c_size_t,
    ctypes.c_int,
)
Call = tuple[str, tuple[int, ...], tuple[int, ...], list[int | None], bytes, int, int, int]


class Runtime:
    """What the stand-in was asked to start."""

    def __init__(self, library: Path) -> None:
        self.calls: list[Call] = []
        self.refuses = False
        self._function = FUNCTION(self._start)  # kept, for C++ keeps its address alone
        ctypes.CDLL(str(library)).stand_in(self._function, PROCESSORS)

    def _start(self, kernel, grid, block, arguments, shared, stream, most_shared) -> int:  # type: ignore[no-untyped-def]
        pointers = 4 if b"dequantize" in kernel else 9
        values = [ctypes.c_void_p.from_address(arguments[index]).value for index in range(pointers)]
        shape = ctypes.string_at(arguments[pointers], SHAPE_BYTES)
        self.calls.append(
            (kernel.decode(), tuple(grid[0]), tuple(block[0]), values, shape, shared, stream, most_shared)
        )
        return int(self.refuses)


SHAPE_BYTES = 4 * (10 + 8 + 8 + 7)


def linear(layer: Layer, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    arguments = (x, layer.weight.handle, layer.weight.out_features, bias)
    result: torch.Tensor = torch.ops.matquant.linear.default.redispatch(GPU, *arguments)
    return result


def check_rows(runtime: Runtime, layer: Layer, x: torch.Tensor) -> None:
    readers = layer.weight.readers([[8, 2, 3, 4], [5, 5, 5, 4]])
    handles = torch.cat([*(reader.handle for reader in readers), torch.zeros(3, dtype=torch.int64)])
    slots = torch.arange(len(x), dtype=torch.int32) % 2
    recorder, features = Recorder(PROCESSORS), layer.weight.out_features
    cuda_launch.multiply_by_row(recorder, x, handles, slots, features)
    runtime.calls.clear()
    torch.ops.matquant.linear_by_row.default.redispatch(GPU, x, handles, slots, features, None)
    assert len(runtime.calls) == len(recorder.launched) == len(layer.weight.segments)
    for call, launch in zip(runtime.calls, recorder.launched, strict=True):
        check_call(call, launch)
        assert not launch.dequantizes


def check(runtime: Runtime, layer: Layer, x: torch.Tensor, bias: torch.Tensor | None) -> None:
    recorder = Recorder(PROCESSORS)
    expected = cuda_launch.multiply(recorder, x, layer.weight, bias)
    runtime.calls.clear()
    result = linear(layer, x, bias)
    assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
    assert len(runtime.calls) == len(recorder.launched) == (len(layer.weight.segments) if x.numel() else 0)
    for call, launch in zip(runtime.calls, recorder.launched, strict=True):
        check_call(call, launch)


def check_call(call: Call, launch: Launch) -> None:
    kernel, grid, block, values, shape, shared, stream, most_shared = call
    assert (kernel, grid, block) == (launch.kernel, launch.grid, (launch.threads, 1, 1))
    assert (shape, shared, stream) == (launch.shape, launch.shared_bytes, STREAM)
    assert most_shared == launch.shared_bytes or not launch.shared_bytes
    # The tensors of the weight and the bias are where they are; what a product allocates is anywhere.
    kept = range(3) if launch.dequantizes else (1, 2, 3, 4, 8)
    for index, (value, memory) in enumerate(zip(values, launch.pointers, strict=True)):
        assert (value is None) == (memory is None), index
        assert memory is None or index not in kept or value == memory.address, index


def main(library: Path) -> None:
    ops.LIBRARY = library
    ops.load_library()
    implementations = torch.library.Library("matquant", "IMPL")
    add = torch.ops.matquant.add_segment.default
    implementations.impl("add_segment", lambda *arguments: add.redispatch(GPU, *arguments), "CPU")
    runtime = Runtime(library)
    for kind, dtype, group_size in itertools.product(KINDS, (torch.float16, torch.bfloat16), (32, 64, 128, 10**6)):
        layer = make_segments([([100, 30], range(2, 9)), ([70], (3, 5)), ([8], (4,))], 1100, group_size, kind=kind)
        for tokens in (0, 1, 8, 9, 16, 17, 24, 64, 65, 200):
            x, bias = make_input(tokens, 1100, dtype), make_input(1, 208, dtype)[0]
            check(runtime, layer, x, bias)
            check(runtime, layer, x.view(tokens, 1, 1100), None)
            if tokens:
                check_rows(runtime, layer, x)
    check(runtime, make_layer([4096], 8192, 128, [2]), make_input(3, 8192, torch.float16), None)  # columns divided

    layer = make_layer([70], 200, 64, [4])
    for x, message in (
        (make_input(3, 200), "x: found dtype Float, expected BFloat16 or Half"),
        (make_input(3, 199, torch.float16), "x: found 199 columns, expected the weight's 200"),
    ):
        runtime.calls.clear()
        assert message in refusal(layer, x)
        assert not runtime.calls
    runtime.refuses = True
    for tokens in (4, 65):
        said = refusal(layer, make_input(tokens, 200, torch.float16))
        assert f"{runtime.calls[-1][0]}: refused by the test" in said


def refusal(layer: Layer, x: torch.Tensor) -> str:
    try:
        linear(layer, x, None)
    except RuntimeError as error:
        return str(error)
    raise AssertionError("nothing was refused")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
