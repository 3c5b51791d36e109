"""Every instruction set that this machine has, forced by the environment variable."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.test_linear import SHAPES
from vllm_matquant.kernels import ops


def run(isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # the layers are tiny
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=Path(__file__).parents[2],
        env=os.environ | threads | {"MATQUANT_CPU_ISA": isa},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_list_starts_with_what_every_machine_has():
    assert ops.cpu_isas()[0] == "scalar"


def test_an_unknown_name_is_an_error():
    result = run("sse9", "-c", "from vllm_matquant.kernels import ops; ops.cpu_isa()")
    assert result.returncode != 0
    names = ", ".join(ops.cpu_isas())
    assert f'MATQUANT_CPU_ISA: found "sse9", expected one that this machine has: {names}' in result.stderr


@pytest.mark.parametrize("isa", [isa for isa in ops.cpu_isas() if isa != ops.cpu_isa()])
def test_linear(isa):
    """Runs test_linear.py, which starts by looking which instruction set it got."""
    path = "tests/kernels/test_linear.py"
    of_every_isa = "not contradicting and not registered and not compiled"
    if isa != "scalar":  # activations of other bits than the default's have the bytes of the scalar kernel, see below
        of_every_isa += " and not bits_of_activations"
    result = run(isa, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", of_every_isa, path)
    assert result.returncode == 0, result.stdout[-4000:]


PRINT_DIGESTS = """
import hashlib
from tests.kernels.test_linear import DTYPES, FORMS, KINDS, SHAPES, bytes_of, make_input, make_layer

for output_sizes, columns, group_size in SHAPES:
    digest = hashlib.sha256()
    for index, (width, decoder_widths) in enumerate(FORMS):
        for kind in KINDS:
            layer = make_layer(output_sizes, columns, group_size, index, decoder_widths, kind)
            for activation_bits in (8, 16, 24):
                rounding = layer.rounding_to(activation_bits)
                # The dtype and the kind do not meet in the kernels, so the second kind needs not all of them.
                for dtype in DTYPES if kind is KINDS[0] else [DTYPES[(index + activation_bits // 8) % len(DTYPES)]]:
                    # Each width is of two forms or three, with one of these and with the other.
                    for rows in ((1, 3, 8, 30, 41), (2, 7, 9, 30, 33))[(index + activation_bits // 8) % 2]:
                        x = make_input(rows, columns, dtype)
                        digest.update(bytes_of(rounding.run(x, [width])))
    print(output_sizes, columns, group_size, digest.hexdigest())
"""


def test_every_instruction_set_gives_the_same_bytes():
    results = {isa: run(isa, "-c", PRINT_DIGESTS) for isa in ops.cpu_isas()}
    assert {isa: result.stderr for isa, result in results.items()} == dict.fromkeys(results, "")
    digests = {isa: result.stdout.splitlines() for isa, result in results.items()}
    assert len(digests["scalar"]) == len(SHAPES)
    for isa, digest in digests.items():
        assert digest == digests["scalar"], isa
