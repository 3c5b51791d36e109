"""Kernels outside Python: with sanitizers on this machine, and for 64-bit Arm under an emulator."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "csrc" / "cpu"
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [
    *AVX2,
    "-mavx512f",
    "-mavx512bw",
    "-mavx512vl",
    "-mavx512dq",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
]
# The compiler takes longest for these, most of it for checks of undefined behaviour. All that they are made of has such
# checks in the other files: the loops in those for AVX2, the instructions in that for VBMI.
ADDRESSES_ALONE = ["-fno-sanitize=undefined"]
FLAGS = {
    "x86_64": {
        "gemm_scalar": [],
        "gemm_avx2": AVX2,
        "gemm_vnni_avx2": AVX2,
        "gemm_avx512": [*AVX512, *ADDRESSES_ALONE],
        "gemm_vnni_avx512": [*AVX512, *ADDRESSES_ALONE],
        "gemm_vbmi_avx512": [*AVX512, "-mavx512vbmi"],
        # With tile registers in plain C++: few machines have them, and sanitizers do not see what they read.
        "gemm_amx_avx512": [
            *AVX512,
            "-mavx512vbmi",
            '-DMATQUANT_TILES="tiles_stand_in.h"',
            f"-I{Path(__file__).parent}",
        ],
    },
    "aarch64": {"gemm_scalar": [], "gemm_neon": []},
}


def build(compiler: str, architecture: str, folder: Path, *options: str) -> Path:
    """compare_kernels.cpp and the kernels of an architecture as a program."""
    common = [compiler, "-std=c++20", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", *options]
    common.append(f"-I{ROOT / 'csrc'}")
    sources = {FOLDER / f"{name}.cpp": flags for name, flags in FLAGS[architecture].items()}
    sources[Path(__file__).with_name("compare_kernels.cpp")] = []

    def compile_source(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        subprocess.run([*common, *sources[source], "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_source, sources))
    program = folder / "compare_kernels"
    subprocess.run([*common, *objects, "-o", program], check=True)
    return program


def check(*command: str | Path) -> None:
    # vLLM, once it is imported, has every program load libraries before that of the sanitizers, which refuses that.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert result.stdout.startswith("compared "), result.stdout


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in FLAGS, reason=f"{platform.machine()} has the scalar kernel alone")
def test_kernels_with_sanitizers(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    # Checks as calls and traps: in line they make the unrolled kernels a matter of ten minutes to compile. To optimize
    # them takes the compiler longer than it spares the program. A null pointer ends it without a check.
    sanitizers = ["-O0", "-fsanitize=address,undefined", "-fno-sanitize=null", "-fsanitize-undefined-trap-on-error"]
    sanitizers.append("--param=asan-instrumentation-with-call-threshold=0")
    check(build("g++", platform.machine(), tmp_path, *sanitizers))


@pytest.mark.slow
def test_neon_kernel_under_an_emulator(tmp_path: Path) -> None:
    compiler, emulator = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
    missing = [tool for tool in (compiler, emulator) if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"no {' and no '.join(missing)} (Debian: g++-aarch64-linux-gnu, qemu-user-static)")
    check(emulator, build(compiler, "aarch64", tmp_path, "-O2", "-static"))
