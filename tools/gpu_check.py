"""Check the CUDA kernels on this machine's GPU and measure them, in parts: one file to attach to a report.

The most telling parts come first, each in a process of its own, so that a fault ends that part alone. What a part has
found is in the report at once, and a second run goes on after the parts that are done. It needs torch with CUDA and, if
the library was not built for this GPU, nvcc, g++ and CMake; neither an installed package nor a network.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "gpu-check"
LIBRARY = ROOT / "vllm_matquant" / "_C.abi3.so"
RESULT = "gpu-check-result "  # what a line begins with that holds a result, as JSON

Row = dict[str, Any]


# The parts, as they run in processes of their own. Each gives rows of what it found, and raises where that is wrong.


def build() -> Iterator[Row]:
    """The library, for this GPU alone."""
    begun = time.perf_counter()
    configure = ["cmake", f"-S{ROOT}", f"-B{BUILD}", f"-DPython3_EXECUTABLE={sys.executable}"]
    subprocess.run([*configure, f"-DMATQUANT_CUDA_ARCHITECTURES={_capability()}"], check=True)
    subprocess.run(["cmake", "--build", BUILD, "--parallel", str(os.cpu_count())], check=True)
    from vllm_matquant.kernels import ops

    if not ops.is_built_for("cuda"):
        raise RuntimeError(f"{LIBRARY} has no CUDA kernels: is nvcc on the PATH?")
    yield {"seconds": time.perf_counter() - begun, "architecture": _capability()}


def products() -> Iterator[Row]:
    """Products of small ragged layers at every width, beside float64."""
    import torch

    from tests.cuda.random_layers import KINDS, make_input, make_segments

    for kind in KINDS:
        for dtype in (torch.float16, torch.bfloat16):
            for group_size in (32, 128):
                segments = [([100, 30], range(2, 9)), ([70], (3, 8))]
                layer = make_segments(segments, 1100, group_size, kind=kind, device="cuda")
                for width in range(2, 9):
                    widths = [width, 2, 3]
                    layer.weight.set_active(widths)
                    for tokens in (1, 9, 24, 65):
                        x = make_input(tokens, 1100, dtype, seed=width)
                        found = layer.weight.kernel.linear(x.cuda(), layer.weight.handle, 200, None).cpu()
                        layer.check(found, x, widths, rounded_weights=tokens > 64)
            yield {"decoders": kind.name, "dtype": str(dtype), "right": True}


def speed() -> Iterator[Row]:
    """Seconds of layers at every width and batch, beside a copy in memory and other libraries."""
    from vllm_matquant.bench.cuda import bench_cuda

    yield from bench_cuda(report=lambda line: print(line, flush=True))


def graph() -> Iterator[Row]:
    """A captured graph, whose width is switched between replays."""
    import torch

    from tests.cuda.random_layers import KINDS, make_input, make_segments
    from vllm_matquant.bench.cuda import seconds_of

    for kind in KINDS:
        layer = make_segments([([4096], range(2, 9))], 4096, 128, kind=kind, device="cuda")
        x = make_input(4, 4096, torch.float16).cuda()

        def product(layer: Any = layer, x: Any = x) -> Any:
            return layer.weight.kernel.linear(x, layer.weight.handle, 4096, None)

        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            product()
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured, stream=stream):
                result = product()
        for width in (8, 2, 5, 3, 8):
            layer.weight.set_active([width])
            captured.replay()
            torch.cuda.synchronize()
            layer.check(result.cpu(), x.cpu(), [width])
            yield {
                "decoders": kind.name,
                "bits": width,
                "replay_seconds": seconds_of(captured.replay),
                "call_seconds": seconds_of(product),
            }


def tests() -> Iterator[Row]:
    """The tests that need a device."""
    yield _ended("pytest", [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "tests/cuda"])


def one_product() -> Iterator[Row]:
    """A product of each kernel that multiplies and that dequantizes, for a sanitizer to watch."""
    import torch

    from tests.cuda.random_layers import KINDS, make_input, make_segments

    for kind in KINDS:
        layer = make_segments([([70], (3, 8))], 600, 64, kind=kind, device="cuda")
        for width in (3, 8):
            layer.weight.set_active([width])
            for tokens in (1, 9, 24, 65):
                x = make_input(tokens, 600, torch.bfloat16)
                found = layer.weight.kernel.linear(x.cuda(), layer.weight.handle, 70, None).cpu()
                layer.check(found, x, [width], rounded_weights=tokens > 64)
        readers = layer.weight.readers([[8], [3]])
        handles, slots = torch.cat([reader.handle for reader in readers]), torch.arange(9, dtype=torch.int32) % 2
        x = make_input(9, 600, torch.bfloat16)
        found = layer.weight.kernel.linear_by_row(x.cuda(), handles, slots.cuda(), 70, None).cpu()
        for slot, width in enumerate((8, 3)):
            layer.check(found[slot::2], x[slot::2], [width])
        yield {"decoders": kind.name}


def memcheck() -> Iterator[Row]:
    """One product of each kernel under compute-sanitizer's memcheck."""
    yield from _sanitized("memcheck")


def racecheck() -> Iterator[Row]:
    """One product of each kernel under compute-sanitizer's racecheck."""
    yield from _sanitized("racecheck")


def serve() -> Iterator[Row]:
    """vLLM serves a small random model at every width; log-probabilities beside those of the dequantized model."""
    import torch

    from tests.serve.tiny_models import VOCABULARY, log_probabilities, reference_model, write_checkpoint
    from vllm_matquant.checkpoint.spec import Format

    tokens = torch.randint(VOCABULARY, (20,), generator=torch.Generator().manual_seed(0)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        model = write_checkpoint(Path(folder) / "model", "llama", Format(group_size=32))
        engine = {"dtype": "bfloat16", "gpu_memory_utilization": 0.3}
        settings = [engine | {"additional_config": {"matquant": {"bits": width}}} for width in range(2, 9)]
        jobs = [{"model": str(model), "tokens": tokens, "llm": llm} for llm in settings]
        jobs_path, results_path = Path(folder) / "jobs.json", Path(folder) / "results.pt"
        jobs_path.write_text(json.dumps(jobs))
        runner = ROOT / "tests" / "serve" / "engine_runs.py"
        command = [sys.executable, str(runner), str(jobs_path), str(results_path)]
        subprocess.run(command, check=True, env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
        for width, result in zip(range(2, 9), torch.load(results_path, weights_only=True), strict=True):
            if "error" in result:
                raise RuntimeError(f"{width} bits: {result['error']}")
            expected = log_probabilities(reference_model(model, width), tokens)
            away = float((result["log_probabilities"][0] - expected).abs().max())
            yield {"bits": width, "largest_difference": away}
            if away > 0.2:  # what bfloat16 makes of these models is a tenth of that
                raise RuntimeError(f"{width} bits: log-probabilities {away:.3f} away from the dequantized model's")


def _sanitized(tool: str) -> Iterator[Row]:
    watch = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
    yield _ended(f"compute-sanitizer's {tool}", [*watch, sys.executable, __file__, "--part", "one_product"])


def _ended(what: str, command: Sequence[str]) -> Row:
    """The row of a program that ended well; raises if it did not."""
    if status := subprocess.run(command, cwd=ROOT).returncode:
        raise RuntimeError(f"{what} ended with {status}")
    return {"exit_status": 0}


def _capability() -> str:
    import torch

    return "{}{}".format(*torch.cuda.get_device_capability())


@dataclass(frozen=True)
class Part:
    """A part of the check.

    Attributes:
        run: gives its rows.
        seconds: the most it may take.
        lacking: what this machine lacks for it, empty if nothing.
    """

    run: Callable[[], Iterator[Row]]
    seconds: float
    lacking: Callable[[], str] = lambda: ""


def _without(*programs: str) -> Callable[[], str]:
    return lambda: ", ".join(program for program in programs if shutil.which(program) is None)


def _without_module(name: str) -> Callable[[], str]:
    return lambda: "" if importlib.util.find_spec(name) else name


PARTS = {
    "build": Part(build, 240, _without("nvcc", "g++", "cmake")),
    "products": Part(products, 90),
    "speed": Part(speed, 150),
    "graph": Part(graph, 45),
    "tests": Part(tests, 150, _without_module("pytest")),
    "memcheck": Part(memcheck, 90, _without("compute-sanitizer")),
    "racecheck": Part(racecheck, 90, _without("compute-sanitizer")),
    "serve": Part(serve, 400, _without_module("vllm")),
}
HIDDEN_PARTS = {"one_product": Part(one_product, 0)}


def run_part(name: str, seconds: float) -> Row:
    """Run a part in a process of its own, its output going to the terminal too."""
    begun = time.perf_counter()
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, __file__, "--part", name]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    late: list[bool] = []

    def stop() -> None:
        late.append(True)
        os.killpg(process.pid, 9)

    timer = threading.Timer(seconds, stop)
    timer.start()
    rows, lines = [], []
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(RESULT):
            rows.append(json.loads(line.removeprefix(RESULT)))
        else:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
    status = process.wait()
    timer.cancel()
    outcome = "right" if status == 0 else f"cut off after {seconds:.0f} s" if late else f"ended with {status}"
    return {"outcome": outcome, "seconds": time.perf_counter() - begun, "rows": rows, "output": lines[-100:]}


def describe_machine() -> Row:
    """The GPU and what is installed, without keeping the device busy."""
    code = (
        "import json, torch; p = torch.cuda.get_device_properties(0); print(json.dumps({'gpu': p.name, 'capability': "
        "[p.major, p.minor], 'multiprocessors': p.multi_processor_count, 'memory_bytes': p.total_memory, 'torch': "
        "torch.__version__, 'cuda': torch.version.cuda}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"gpu_check: torch finds no CUDA device: {done.stderr.strip().splitlines()[-1]}")
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit", "--format=csv"]
    smi = subprocess.run(query, capture_output=True, text=True) if shutil.which("nvidia-smi") else None
    machine: Row = json.loads(done.stdout)
    return machine | {"python": platform.python_version(), "nvidia_smi": smi.stdout.splitlines() if smi else []}


def sources() -> str:
    """A digest of what is checked."""
    digest = hashlib.sha256()
    for folder in ("csrc", "vllm_matquant", "tests/cuda", "tools"):
        for file in sorted((ROOT / folder).rglob("*")):
            if file.suffix in (".py", ".cpp", ".cu", ".cuh", ".h"):
                digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def summary(report: Row) -> str:
    """What the report says, in a few lines."""
    lines = [f"{report['machine']['gpu']}, torch {report['machine']['torch']}"]
    for name, part in report["parts"].items():
        lines.append(f"{name:<12}{part['outcome']}, {part.get('seconds', 0):.0f} s")
    for row in report["parts"].get("speed", {}).get("rows", []):
        if row["m"] == 1:
            peers = ", ".join(f"{name} {1e6 * seconds:.1f}" for name, seconds in row["peer_seconds"].items())
            lines.append(
                f"{row['n']} x {row['k']}, 1 token, {row['bits']} bits, {row['decoders']}: "
                f"{1e6 * row['seconds']:.1f} us, {row['roofline']:.2f} of a copy's "
                f"{row['read_gb_per_s']:.0f} GB/s ({peers})"
            )
    return "\n".join(lines)


def publish(path: Path, report: Row) -> None:
    """Write the report in one step."""
    temporary = path.with_name(f".{path.name}.unfinished")
    with temporary.open("w") as file:
        file.write(json.dumps(report, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def earlier(path: Path, machine: Row, digest: str) -> dict[str, Row]:
    """The parts that an earlier run on this machine has found right, of these very sources."""
    try:
        report = json.loads(path.read_text())
        same = (report["machine"], report["sources"]) == (machine, digest)
        return {name: part for name, part in report["parts"].items() if same and part["outcome"] == "right"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def check(path: Path, names: Sequence[str], minutes: float, *, fresh: bool) -> int:
    """Run the parts in their order, as far as the time goes; returns the exit status."""
    end = time.perf_counter() + 60 * minutes
    machine, digest = describe_machine(), sources()
    done = {} if fresh else earlier(path, machine, digest)
    report: Row = {"machine": machine, "sources": digest, "parts": {}}
    for name in names:
        part, left = PARTS[name], end - time.perf_counter()
        if name in done and (name != "build" or LIBRARY.is_file()):
            report["parts"][name] = done[name]
        elif lacking := part.lacking():
            report["parts"][name] = {"outcome": f"left out: no {lacking}"}
        elif left < min(15, part.seconds):
            report["parts"][name] = {"outcome": "left out: no time left; run it again to go on"}
        else:
            print(f"[{name}] {(part.run.__doc__ or '').rstrip('.')}", flush=True)
            report["parts"][name] = run_part(name, min(left, part.seconds))
        publish(path, report)
        if name == "build" and report["parts"][name]["outcome"] != "right" and not LIBRARY.is_file():
            break
    print(f"\n{summary(report)}\nThe report is in {path}.")
    outcomes = [part["outcome"] for part in report["parts"].values()]
    return int(any(outcome != "right" and not outcome.startswith("left out") for outcome in outcomes))


def main(arguments: list[str] | None = None) -> int:
    sys.path.insert(0, str(ROOT))  # the package need not be installed
    from vllm_matquant.jobs.arguments import output_file

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output",
        type=output_file,
        default=ROOT / "gpu-report.json",
        help="where the report is written, and looked for to go on (default: %(default)s)",
    )
    parser.add_argument("--minutes", type=float, default=8, help="what it may take in all (default: %(default)s)")
    parser.add_argument("--parts", default=",".join(PARTS), help="which, in this order (default: %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="run the parts again that an earlier report has")
    parser.add_argument("--part", choices=[*PARTS, *HIDDEN_PARTS], help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.part:
        for row in (PARTS | HIDDEN_PARTS)[options.part].run():
            print(RESULT + json.dumps(row), flush=True)
        return 0
    names = options.parts.split(",")
    if unknown := sorted(set(names) - PARTS.keys()):
        parser.error(f"--parts: found {', '.join(unknown)}, expected some of {', '.join(PARTS)}")
    return check(options.output, names, options.minutes, fresh=options.fresh)


if __name__ == "__main__":
    sys.exit(main())
