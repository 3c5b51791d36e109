"""Check the CUDA kernels on this machine's GPU and measure them: one file to attach to a report."""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from vllm_matquant.bench.cuda import bench_cuda
from vllm_matquant.checkpoint.files import publish_json
from vllm_matquant.jobs.arguments import output_file
from vllm_matquant.kernels import ops

ROOT = Path(__file__).resolve().parents[1]


def describe_machine() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    smi = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm,clocks.max.mem,power.limit", "--format=csv"],
        capture_output=True,
        text=True,
    )
    return {
        "gpu": properties.name,
        "capability": list(torch.cuda.get_device_capability()),
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "nvidia_smi": smi.stdout.splitlines(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def run_tests() -> dict[str, Any]:
    """The tests that need a device; their output goes to the terminal too."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "tests/cuda"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line.rstrip())
    return {"exit_status": process.wait(), "output": lines[-200:]}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output",
        type=output_file,
        default=ROOT / "gpu-report.json",
        help="where the report is written (default: %(default)s)",
    )
    parser.add_argument("--no-bench", action="store_true", help="run the tests alone")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu_check: torch finds no CUDA device", file=sys.stderr)
        return 1
    if not ops.is_built_for("cuda"):
        print(
            f"gpu_check: {ops.LIBRARY} has no CUDA kernels; {ops.BUILD_COMMAND} with nvcc on the PATH", file=sys.stderr
        )
        return 1

    report: dict[str, Any] = {"machine": describe_machine(), "tests": run_tests(), "refusals": [], "rows": []}
    if not options.no_bench:
        for row in bench_cuda(report=report["refusals"].append):
            report["rows"].append(row)
            peers = ", ".join(f"{name} {1e6 * seconds:.1f}" for name, seconds in row["peer_seconds"].items())
            print(
                f"{row['n']} x {row['k']}, {row['m']} tokens, {row['bits']} bits: {1e6 * row['seconds']:.1f} us, "
                f"{row['gb_per_s']:.0f} GB/s of {row['read_gb_per_s']:.0f} ({peers})",
                flush=True,
            )
    publish_json(options.output, report)
    print(f"The report is in {options.output}.")
    return int(report["tests"]["exit_status"] != 0)


if __name__ == "__main__":
    sys.exit(main())
