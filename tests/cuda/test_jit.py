"""Kernels compiled at run time, as far as that goes without a GPU: the program, its key, and what is launched."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.cuda.emulation import SOURCES, Recorder
from tests.cuda.random_layers import make_input, make_segments
from vllm_matquant.kernels import cuda_jit, cuda_launch
from vllm_matquant.kernels.cuda_launch import Launch, kernel_definitions


def sizes(launch: Launch) -> list[int]:
    return [0 if memory is None else memory.size for memory in launch.pointers]


def test_many_tokens_dequantize_once_for_each_segment() -> None:
    recorder = Recorder(100)
    layer = make_segments([([70], (4,)), ([30], (2,))], 200, 64)
    result = cuda_launch.multiply(recorder, make_input(65, 200, torch.float16), layer.weight)
    assert result.shape == (65, 100)
    assert [launch.kernel for launch in recorder.launched] == ["matquant_dequantize_affine_float16_float16_2"] * 2
    weights = [launch.pointers[3] for launch in recorder.launched]
    assert [memory.size for memory in weights] == [2 * 70 * 256, 2 * 30 * 256]
    assert weights[1].address == weights[0].address + weights[0].size


def test_few_tokens_are_multiplied_once_for_each_segment() -> None:
    recorder = Recorder(100)
    layer = make_segments([([70], (4,)), ([30], (2,))], 200, 64)
    x, bias = make_input(4, 200, torch.float16), make_input(1, 100, torch.float16)[0]
    assert cuda_launch.multiply(recorder, x.view(2, 2, 200), layer.weight, bias).shape == (2, 2, 100)
    for launch, first, segment in zip(recorder.launched, (0, 70), layer.weight.segments, strict=True):
        planes, decoders = segment.resident.planes, segment.resident.decoders
        assert sizes(launch)[:6] == [
            *(2 * 4 * 256, planes.numel(), decoders.numel()),
            *(4, 2 * (100 - first), 2 * (400 - first)),
        ]
        tensors = (planes, decoders, segment.active_width, bias[first:])
        assert [memory.address for memory in launch.pointers[1:5]] == [tensor.data_ptr() for tensor in tensors]
    outputs = [launch.pointers[5].address for launch in recorder.launched]
    assert outputs[1] == outputs[0] + 2 * 70


def test_no_bias_is_a_null_pointer() -> None:
    recorder = Recorder()
    cuda_launch.multiply(recorder, make_input(4, 200, torch.float16), make_segments([([70], (4,))], 200, 64).weight)
    assert recorder.launched[0].pointers[4] is None


def test_what_a_launcher_raises_is_raised() -> None:
    class Refusing(Recorder):
        def launch(self, launch: Launch) -> None:
            super().launch(launch)
            raise OSError(f"no {launch.kernel}")

    refusing, layer = Refusing(), make_segments([([70], (4,)), ([30], (2,))], 200, 64)
    for tokens, kernel in ((4, "matquant_decode_affine_float16_float16_8_2"), (65, "matquant_dequantize_")):
        with pytest.raises(OSError, match=f"no {kernel}"):
            cuda_launch.multiply(refusing, make_input(tokens, 200, torch.float16), layer.weight)
    assert len(refusing.launched) == 2


def test_the_key_changes_with_sources_architecture_and_compiler(tmp_path: Path) -> None:
    shutil.copytree(SOURCES / "cuda", tmp_path / "cuda")
    shutil.copy(SOURCES / "decoder.h", tmp_path)
    (one, definition), (other, another), *_ = kernel_definitions().items()
    key = cuda_jit.key_of(one, definition, "sm_80", (13, 0), tmp_path)
    assert key == cuda_jit.key_of(one, definition, "sm_80", (13, 0), SOURCES)
    others = {cuda_jit.key_of(one, definition, "sm_90", (13, 0)), cuda_jit.key_of(one, definition, "sm_80", (13, 1))}
    others |= {cuda_jit.key_of(other, another, "sm_80", (13, 0)), cuda_jit.key_of(one, another, "sm_80", (13, 0))}
    for file in ("cuda/decode.cuh", "cuda/shape.h", "decoder.h"):
        with (tmp_path / file).open("a") as source:
            source.write("// changed\n")
        others.add(cuda_jit.key_of(one, definition, "sm_80", (13, 0), tmp_path))
    assert len(others | {key}) == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "matquant_decode_affine_float16_bfloat16_8_2",
        "matquant_decode_affine_int8_float16_8_1",
        "matquant_dequantize_affine_int8_float16_1",
    ],
)
def test_a_program_has_one_kernel_and_compiles(name: str, tmp_path: Path) -> None:
    """By nvcc; by NVRTC where CuPy is installed."""
    definition = kernel_definitions()[name]
    try:
        import cupy  # noqa: F401
    except ImportError:
        nvcc = shutil.which("nvcc")
        if nvcc is None:
            pytest.skip("no nvcc and no CuPy")
        source = tmp_path / "one.cu"
        source.write_text(cuda_jit.source_of([definition]))
        command = [nvcc, "-ptx", "-std=c++17", "-arch=sm_80", f"-I{SOURCES}", source, "-o", tmp_path / "one.ptx"]
        subprocess.run(command, check=True)
        entries = [line for line in (tmp_path / "one.ptx").read_text().splitlines() if ".entry" in line]
        assert len(entries) == 1
        assert name in entries[0]
    else:
        assert name.encode() in cuda_jit.compile_kernel(name, definition, "sm_80", cuda_jit.cuda_headers())
