"""What the compiled CUDA kernels look like: registers, and whether the instructions leave memory as the limit.

For the second, a program that reads SASS divides the weights that a multiprocessor's instructions allow for each clock
by those that memory delivers. It lies where the environment variable MATQUANT_SASS_REPORT says.
"""

from __future__ import annotations

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
PRODUCTS = {(2, 3, 4): 20, (5, 6, 7, 8): 36}  # of a tile and 8 tokens; it has 16 operands of weights

# The least ratio at each width: with 8 tokens at once 2, at 2 bits 1.7, for bfloat16 15 % less, with 16 tokens 1.6 -
# except where docs/design/cuda-kernels.md says why not.
FLOORS = {
    ("Half", 1, "A100-80"): {2: 1.7} | dict.fromkeys(range(3, 9), 2.0),
    ("Half", 1, "H100"): {2: 1.7, 3: 1.99, 4: 2.0, 5: 1.85, 6: 2.0, 7: 2.0, 8: 2.0},
    ("Half", 1, "RTX4090"): dict.fromkeys(WIDTHS, 2.0),
    ("BFloat16", 1, "A100-80"): {2: 1.44, 3: 1.69, 4: 1.7, 5: 1.6, 6: 1.7, 7: 1.7, 8: 1.7},
    ("BFloat16", 1, "H100"): {2: 1.44, 3: 1.54, 4: 1.7, 5: 1.48, 6: 1.7, 7: 1.7, 8: 1.7},
    ("Half", 2, "A100-80"): {2: 1.0, 3: 1.48, 4: 1.6, 5: 1.35, 6: 1.6, 7: 1.6, 8: 1.6},
    ("Half", 2, "H100"): {2: 1.15, 3: 1.6, 4: 1.6, 5: 1.55, 6: 1.6, 7: 1.6, 8: 1.6},
}


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
    [("sm_80", "affine_float16"), ("sm_80", "affine_int8"), ("sm_90", "affine_int8"), ("sm_120", "affine_float16")],
)
def test_no_kernel_spills_registers(architecture: str, kind: str, tmp_path: Path) -> None:
    _, report = compile_cubin(SOURCES / "cuda" / f"kernels_{kind}.cu", architecture, tmp_path, "-Xptxas", "-v")
    names = re.findall(r"Compiling entry function '(\w+)'", report)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", report)]
    assert len(names) == len(registers) == len(spills) > 0
    assert {name: spill for name, spill in zip(names, spills, strict=True) if spill != ("0", "0")} == {}
    assert max(registers) <= MAX_REGISTERS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("element", "token_tiles", "gpu", "kind"),
    [
        *((*form, "kAffineInt8") for form in FLOORS),
        *(
            (*form, "kAffineFloat16")
            for form in (("Half", 1, "H100"), ("BFloat16", 1, "A100-80"), ("Half", 2, "A100-80"))
        ),
    ],
)
def test_memory_is_the_limit(element: str, token_tiles: int, gpu: str, kind: str, tmp_path: Path) -> None:
    if not os.environ.get(VARIABLE):
        pytest.skip(f"{VARIABLE} does not name a program that reads SASS")
    source = Path(__file__).with_name("one_width.cu")
    defined = [f"-DELEMENT={element}", f"-DKIND={kind}", f"-DTOKEN_TILES={token_tiles}"]
    cubin, _ = compile_cubin(source, ARCHITECTURES[gpu], tmp_path, *defined)
    ratios = {}
    for widths, products in PRODUCTS.items():
        report = tmp_path / "report.json"
        width = r"one_width<[^,]*, [^,]*, (?:\(int\))?(\d)"
        # A block of copies counts as it is.
        command = [sys.executable, os.environ[VARIABLE], cubin, "--bits-re", width, "--copy-bonus", "100"]
        command += ["--kernel", width.replace(r"\d", "|".join(map(str, widths)))]
        in_int8 = kind == "kAffineInt8" and max(widths) <= 4
        command += ["--scale-bits", str((16 if in_int8 else 32) / 128)]  # of a group's decoder, for each weight
        command += ["--reuse", str(token_tiles * products / 16), "--threads", "128", "--gpus", gpu, "--json", report]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        for row in json.loads(report.read_text()):
            assert row["weights_per_warp_pass"] == 8192
            assert row["local"] == row["spill_in_loop"] == 0
            ratios[int(row["bits"])] = row["gpu"][gpu]["ratio"]
    assert sorted(ratios) == list(WIDTHS)
    print(kind, element, token_tiles, gpu, {width: round(ratio, 2) for width, ratio in sorted(ratios.items())})
    low = {width: ratio for width, ratio in ratios.items() if ratio < FLOORS[element, token_tiles, gpu][width]}
    assert low == {}
