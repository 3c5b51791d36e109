"""The product in Triton, by Triton's interpreter in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import torch
from tests.cuda.random_layers import TRITON, make_input, make_layer, make_segments
from vllm_matquant.checkpoint.spec import WIDTHS

LAYERS = ((32, 136, [70, 30]), (64, 320, [64]), (96, 200, [20]), (10**6, 100, [40]))

def run(layer, x, widths, bias=None):
    layer.activate(widths)
    return TRITON.linear(x, layer.weight.handle, layer.weight.out_features, bias)

for index, kind in enumerate(TRITON.decoder_kinds):
    for width in WIDTHS:
        # Each kind in either dtype at every other width.
        dtype = (torch.float16, torch.bfloat16)[(width + index) % 2]
        for group_size, columns, sizes in LAYERS:
            layer = make_layer(sizes, columns, group_size, seed=width, kind=kind, kernel=TRITON)
            widths = [width, 3][: len(sizes)]
            for tokens in (1, 17):
                x, bias = make_input(tokens, columns, dtype), make_input(1, sum(sizes), dtype)[0]
                result = run(layer, x, widths, bias)
                # The interpreter truncates to bfloat16.
                layer.check(result, x, widths, bias, rounded_weights=True, truncates=dtype == torch.bfloat16)
            poisoned = layer.planes.clone()
            poisoned[:, :, max(widths):] = 255
            assert torch.equal(run(layer.with_planes(poisoned), x, widths, bias), result)

    layer, x = make_layer([20], 64, 32, [2, 4], kind=kind, kernel=TRITON), make_input(2, 64, torch.float16)
    for width in (0, 1, 3, 8, 9, 100):
        assert run(layer, x, [width]).isnan().all()
    assert run(layer, x.view(1, 2, 64), [4]).shape == (1, 2, 20)
    assert run(layer, x[:0], [4]).shape == (0, 20)

    layer = make_segments([([100, 30], WIDTHS), ([20], (2, 3))], 200, 64, kind=kind, kernel=TRITON)
    x, bias = make_input(3, 200, torch.float16), make_input(1, 150, torch.float16)[0]
    layer.check(run(layer, x, [4, 8, 3], bias), x, [4, 8, 3], bias, rounded_weights=True)
print("checked")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")
def test_every_width_by_the_interpreter() -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout == "checked\n"


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vllm_matquant.kernels import triton_linear

ARGUMENTS = {
    "x": "*fp16", "planes": "*i32", "decoders": "*u8", "steps": "*bf16", "active_width": "*i32",
    "rows_of_tiles": "*i32", "decoders_of_width": "*i64", "bias": "*fp16", "output": "*fp16", "tokens": "i32",
    "columns": "i32", "output_stride": "i32", "tile_columns": "i32", "resident_width": "i32", "groups": "i32",
    "group_size": "i32",
}
SETTINGS = {"HAS_BIAS": True, "BLOCK_TOKENS": 16, "IN_FLOAT32": False}
KERNELS = (
    (triton_linear._affine_kernel, {"halves": "*fp16"}, {"WIDEST_INT8": 4}),
    (triton_linear.codebook_kernel, {"partitions": "i32"}, {}),
)
for kernel, more, settings in KERNELS:
    settings = SETTINGS | settings
    arguments = ARGUMENTS | more | dict.fromkeys(settings, "constexpr")
    constants = {(list(arguments).index(name),): value for name, value in settings.items()}
    compiled = compile(ASTSource(kernel, arguments, constants), GPUTarget("cuda", 80, 32))
    assert "mma.sync" in compiled.asm["ptx"]
print("compiled")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")
def test_the_compiler_takes_them(tmp_path: Path) -> None:
    """For a GPU of the first generation that they serve, which need not be here; the interpreter takes more."""
    result = subprocess.run(
        [sys.executable, "-c", COMPILE],
        cwd=Path(__file__).parents[2],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout == "compiled\n"
