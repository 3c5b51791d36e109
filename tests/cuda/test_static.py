"""What the compiled CUDA kernels look like: registers, and whether the instructions leave memory as the limit.

For the second, a program that reads SASS divides the weights that a multiprocessor's instructions allow for each clock
by those that memory delivers. It lies where the environment variable MATQUANT_SASS_REPORT says.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda.emulation import SOURCES
from vllm_matquant.checkpoint.spec import WIDTHS

VARIABLE = "MATQUANT_SASS_REPORT"
MAX_REGISTERS = 255
ARCHITECTURES = {"A100-80": "sm_80", "RTX4090": "sm_89", "H100": "sm_90"}

# The least ratio at each width: with 8 tokens at once 2, for bfloat16 1.9, with 16 tokens 2 - except where
# docs/design/cuda-kernels.md says why not.
FLOORS = {
    ("Half", 1, "A100-80"): {2: 1.88, 3: 2.15, 4: 2.6} | dict.fromkeys(range(5, 9), 2.2),
    ("Half", 1, "H100"): {2: 1.8, 3: 2.0, 4: 2.4, 5: 2.05, 6: 2.3, 7: 2.3, 8: 2.5},
    ("Half", 1, "RTX4090"): dict.fromkeys(WIDTHS, 2.0),
    ("BFloat16", 1, "A100-80"): {2: 1.8, 3: 1.9, 4: 2.0, 5: 2.0, 6: 2.0, 7: 2.0, 8: 2.0},
    ("BFloat16", 1, "H100"): {2: 1.65, 3: 1.75, 4: 1.9, 5: 1.9, 6: 2.0, 7: 2.0, 8: 1.95},
    ("Half", 2, "A100-80"): {2: 1.12, 3: 1.65, 4: 2.0, 5: 2.0, 6: 2.0, 7: 2.0, 8: 2.0},
    ("Half", 2, "H100"): {2: 1.28, 3: 1.8, 4: 2.0, 5: 2.0, 6: 2.0, 7: 2.0, 8: 2.0},
}
# With codebooks look-ups are what limits most of them.
CODEBOOK_FLOORS = {
    ("Half", 1, "A100-80"): {2: 1.3, 3: 1.7, 4: 1.7, 8: 0.8},
    ("BFloat16", 1, "A100-80"): {2: 0.95, 3: 1.35, 4: 1.7},
}


def products_of(kind: str, element: str, width: int, token_tiles: int) -> int:
    """With a tile, which has 16 operands of weights, or twice as many where a code is two parts, and with constants."""
    if kind == "kCodebook":
        excess = 4 if element == "Half" and width <= 3 else 0
        return token_tiles * (16 * (2 if width > 4 else 1) + excess)
    parts = 2 if element == "BFloat16" and width == 8 else 1
    return token_tiles * (16 * parts + (4 if token_tiles == 1 else 2))


def compile_cubin(source: Path, architecture: str, folder: Path, *flags: str) -> tuple[Path, str]:
    """The compiled file and what the assembler says of its kernels."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    target = folder / f"{source.stem}.{architecture}.cubin"
    command = ["nvcc", "-cubin", "-std=c++17", "-O3", f"-arch={architecture}", f"-I{SOURCES}", *flags]
    result = subprocess.run([*command, source, "-o", target], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return target, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        *(("sm_80", kind) for kind in ("affine_float16", "affine_int8", "codebook")),
        *(("sm_90", "affine_int8"), ("sm_120", "affine_float16")),
    ],
)
def test_no_kernel_spills_registers(architecture: str, kind: str, tmp_path: Path) -> None:
    _, report = compile_cubin(SOURCES / "cuda" / f"kernels_{kind}.cu", architecture, tmp_path, "-Xptxas", "-v")
    names = re.findall(r"Compiling entry function '(\w+)'", report)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", report)]
    assert len(names) == len(registers) == len(spills) > 0
    assert {name: spill for name, spill in zip(names, spills, strict=True) if spill != ("0", "0")} == {}
    assert max(registers) <= MAX_REGISTERS


def environment() -> dict[str, str]:
    """With a variable that says where Triton has cuobjdump: a program that looks for it in all packages takes longer
    for that than for its work."""
    triton = importlib.util.find_spec("triton")
    for folder in triton.submodule_search_locations or [] if triton else []:
        program = Path(folder) / "backends" / "nvidia" / "bin" / "cuobjdump"
        if program.is_file():
            return {"CUOBJDUMP": str(program)} | os.environ
    return dict(os.environ)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("element", "token_tiles", "gpu", "kind"),
    [
        *((*form, "kAffineInt8") for form in FLOORS),
        *(
            (*form, "kAffineFloat16")
            for form in (("Half", 1, "H100"), ("BFloat16", 1, "A100-80"), ("Half", 2, "A100-80"))
        ),
        *((*form, "kCodebook") for form in CODEBOOK_FLOORS),
    ],
)
def test_memory_is_the_limit(element: str, token_tiles: int, gpu: str, kind: str, tmp_path: Path) -> None:
    if not os.environ.get(VARIABLE):
        pytest.skip(f"{VARIABLE} does not name a program that reads SASS")
    source = Path(__file__).with_name("one_width.cu")
    defined = [f"-DELEMENT={element}", f"-DKIND={kind}", f"-DTOKEN_TILES={token_tiles}"]
    cubin, _ = compile_cubin(source, ARCHITECTURES[gpu], tmp_path, *defined)
    ratios = {}
    floors = (CODEBOOK_FLOORS if kind == "kCodebook" else FLOORS)[element, token_tiles, gpu]
    for width in floors:
        report = tmp_path / "report.json"
        # A block of copies counts as it is.
        command = [sys.executable, os.environ[VARIABLE], cubin, "--bits", str(width), "--copy-bonus", "100"]
        command += ["--kernel", rf"one_width<[^,]*, [^,]*, (?:\(int\))?{width}"]
        bits = 8 if kind == "kCodebook" else 16 if kind == "kAffineInt8" and width <= 4 else 32
        command += ["--scale-bits", str(bits / 128)]  # of a group's decoder, for each weight
        command += ["--reuse", str(products_of(kind, element, width, token_tiles) / 16)]
        command += ["--threads", "128", "--gpus", gpu, "--json", report]
        result = subprocess.run(command, env=environment(), capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        [row] = json.loads(report.read_text())
        assert row["weights_per_warp_pass"] == (4096 if kind == "kCodebook" and width > 4 else 8192)
        assert row["local"] == row["spill_in_loop"] == 0
        ratios[width] = row["gpu"][gpu]["ratio"]
    print(kind, element, token_tiles, gpu, {width: round(ratio, 2) for width, ratio in sorted(ratios.items())})
    assert {width: ratio for width, ratio in ratios.items() if ratio < floors[width]} == {}
