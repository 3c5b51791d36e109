"""Benchmarks: of the kernels, and of a nested checkpoint that vLLM serves."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# Before `arguments` is imported, which lets threads sleep soon: to wake one takes as long as a small layer. This is
# what they do where nothing is set, and so in a server.
os.environ.setdefault("GOMP_SPINCOUNT", "300000")

from arguments import (
    add_recipes_argument,
    chosen_slices,
    figures,
    headings,
    output_file,
    positive,
    positive_list,
    width_list,
)
from bench_kernel import BATCHES, PEERS, SHAPES, Settings, bench_kernel, plot_kernel
from bench_kernel import COLUMNS as KERNEL_COLUMNS

from vllm_matquant.checkpoint.files import publish_json
from vllm_matquant.checkpoint.names import CONFIG_FILE
from vllm_matquant.checkpoint.reader import open_checkpoint
from vllm_matquant.checkpoint.slice import Slice
from vllm_matquant.checkpoint.spec import WIDTHS
from vllm_matquant.serve.precision import ACTIVATION_BITS

PROMPT = "What is the capital of France, and what is it known for?"
ANSWER_TOKENS = 48
PROMPT_TOKENS = 16  # where there is no tokenizer
UNQUANTIZED_BITS = 16
COLUMNS = ("bits", "output_tokens_per_s", "resident_bytes", "load_seconds", "batch")


@dataclass(frozen=True)
class Load:
    """What is asked of a served model.

    Attributes:
        batch: requests at a time.
        output_tokens: tokens to generate for each.
        prompt: what to ask; models without a tokenizer get PROMPT_TOKENS numbers.
        activation_bits: see ``--activation-bits`` of ``vllm serve``.
    """

    batch: int = 1
    output_tokens: int = 64
    prompt: str = PROMPT
    activation_bits: int | None = None


def serve_one(folder: Path, part: Slice | None, load: Load) -> dict[str, Any]:
    """Serve a slice in this process, or (None) a model that is not quantized, and measure it.

    Returns:
        A row of ``bench serve`` but for what it is called, with the greedy ``answer`` to the prompt beside it.
    """
    # The engine in this process: its model can be asked for its size, and nothing outlives the process.
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams, TokensPrompt

    from vllm_matquant.serve.linear import resident_bytes

    start = time.perf_counter()
    settings = {}
    if part is not None:
        widths = {"recipe": dict(part.widths)} if part.width is None else {"bits": part.width}
        settings = {"matquant": widths | {"activation_bits": load.activation_bits}}
    has_tokenizer = (folder / "tokenizer_config.json").exists()
    llm = LLM(
        str(folder),
        additional_config=settings,
        max_model_len=1024,
        max_num_seqs=load.batch,
        skip_tokenizer_init=not has_tokenizer,
    )
    load_seconds = time.perf_counter() - start

    numbers = TokensPrompt(prompt_token_ids=list(range(100, 100 + PROMPT_TOKENS)))
    prompts = [load.prompt if has_tokenizer else numbers] * load.batch
    fixed_length = SamplingParams(
        temperature=0, max_tokens=load.output_tokens, ignore_eos=True, detokenize=has_tokenizer
    )
    llm.generate(prompts, fixed_length, use_tqdm=False)  # warms up
    start = time.perf_counter()
    outputs = llm.generate(prompts, fixed_length, use_tqdm=False)
    seconds = time.perf_counter() - start
    generated = sum(len(output.outputs[0].token_ids) for output in outputs)

    greedy = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS)
    answer = ""
    if has_tokenizer and llm.get_tokenizer().chat_template:
        answer = llm.chat([{"role": "user", "content": load.prompt}], greedy, use_tqdm=False)[0].outputs[0].text
    elif has_tokenizer:
        answer = llm.generate([load.prompt], greedy, use_tqdm=False)[0].outputs[0].text
    return {
        "output_tokens_per_s": generated / seconds,
        "resident_bytes": sum(llm.apply_model(resident_bytes)),
        "load_seconds": load_seconds,
        "batch": load.batch,
        "model": folder.resolve().name,
        "answer": answer.strip(),
    }


def bench_serve(
    folder: Path, slices: Sequence[Slice], load: Load, reference: Path | None = None
) -> Iterator[dict[str, Any]]:
    """Rows of ``bench serve``, each from an engine in a process of its own; that of the reference comes first."""
    models: list[tuple[Path, Slice | None, dict[str, Any]]] = []
    if reference:
        models.append((reference, None, {"bits": UNQUANTIZED_BITS}))
    for model, part, named in [*models, *((folder, part, part.label) for part in slices)]:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            yield named | pool.submit(serve_one, model, part, load).result()


def bench_llama_cpp(python: Path, folder: Path, output_tokens: int, threads: int) -> list[dict[str, Any]]:
    """Rows {"type", "output_tokens_per_s", "bits_per_weight"} of llama.cpp on random weights of the same shape.

    Raises:
        ValueError: the interpreter fails at it; what it wrote last is shown.
    """
    command = [str(python), str(Path(__file__).with_name("peer_llama_cpp.py")), str(folder / CONFIG_FILE)]
    command += ["--threads", str(threads), "--output-tokens", str(output_tokens)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise ValueError(f"--llama-cpp: {python} failed:\n{result.stderr[-2000:]}")
    return [json.loads(line) for line in result.stdout.splitlines()]


def require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as cause:
        needed = "found no package matplotlib, expected it (pip install 'vllm_matquant[plot]')"
        raise ValueError(f"--plot: {needed}") from cause


def plot_serving(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Tokens per second and resident megabytes against the width (needs matplotlib)."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.get("bits") in WIDTHS and "recipe" not in row]  # neither reference nor peers
    figure = Figure(figsize=(6, 4), layout="constrained")
    speed = figure.subplots()
    bits = [row["bits"] for row in rows]
    speed.plot(bits, [row["output_tokens_per_s"] for row in rows], "o-", color="tab:blue")
    speed.set(xlabel="bits", ylabel="output tokens per second", title=f"{rows[0]['model']}, batch {rows[0]['batch']}")
    speed.set_ylim(bottom=0)
    memory = speed.twinx()
    memory.plot(bits, [row["resident_bytes"] / 1e6 for row in rows], "s--", color="tab:gray")
    memory.set_ylabel("resident MB of quantized layers (dashed)")
    memory.set_ylim(bottom=0)
    figure.savefig(file, dpi=150, format=file.suffix.removeprefix(".") or "png")


def shape_list(text: str) -> tuple[tuple[int, int], ...]:
    """Parse ``llama-3-8b,4096x11008``: names of models and out_features x in_features."""
    shapes: list[tuple[int, int]] = []
    for part in text.split(","):
        sizes = part.split("x")
        if part in SHAPES:
            shapes += SHAPES[part]
        elif len(sizes) == 2 and all(size.isdigit() and int(size) > 0 for size in sizes) and int(sizes[1]) % 8 == 0:
            shapes.append((int(sizes[0]), int(sizes[1])))
        else:
            expected = f"some of {', '.join(SHAPES)} or N x K with K a multiple of 8, such as 4096x11008"
            raise argparse.ArgumentTypeError(f"found {part!r}, expected {expected}")
    return tuple(dict.fromkeys(shapes))


def peer_list(text: str) -> tuple[str, ...]:
    """Parse ``torch-bf16,vllm-int4`` or ``none``."""
    names = () if text == "none" else tuple(text.split(","))
    if not set(names) <= set(PEERS):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected some of {', '.join(PEERS)}, or none")
    return names


def add_kernel(commands: Any) -> None:
    kernel = commands.add_parser(
        "kernel",
        help="time of one linear layer at each width, beside a plain read of memory and other libraries",
        description="Time of one linear layer on the CPU at each width, beside a plain read of the same bytes and "
        "other libraries' layers of the same shape; weights are out of the caches.",
    )
    kernel.add_argument("--bits", type=width_list, default=WIDTHS, help="widths to measure (default: 2 to 8)")
    kernel.add_argument(
        "--batch",
        type=positive_list,
        default=BATCHES,
        metavar="LIST",
        help=f"tokens multiplied at once (default: {','.join(map(str, BATCHES))})",
    )
    kernel.add_argument(
        "--shapes",
        type=shape_list,
        default=tuple(dict.fromkeys(shape for shapes in SHAPES.values() for shape in shapes)),
        metavar="LIST",
        help=f"out_features x in_features, such as 4096x11008, or layers of {', '.join(SHAPES)} (default: all these)",
    )
    kernel.add_argument(
        "--threads", type=positive_list, default=(1, 2), metavar="LIST", help="numbers of threads (default: 1,2)"
    )
    kernel.add_argument("--group-size", type=positive, default=128, help="columns of a group (default: %(default)s)")
    kernel.add_argument(
        "--activation-bits",
        type=int,
        choices=(8, 16, 24),
        default=16,
        help="bits to which activations are rounded (default: %(default)s)",
    )
    kernel.add_argument(
        "--peers",
        type=peer_list,
        default=tuple(PEERS),
        metavar="LIST",
        help=f"other libraries to time: some of {', '.join(PEERS)}, or none (default: all)",
    )
    kernel.add_argument("--json", type=output_file, metavar="OUT", help="write the rows there (JSON)")
    kernel.add_argument("--plot", type=output_file, metavar="OUT.png", help="draw time against bits (needs matplotlib)")


def run_kernel(options: argparse.Namespace) -> int:
    settings = Settings(
        options.shapes,
        options.batch,
        options.bits,
        options.threads,
        options.group_size,
        options.activation_bits,
        options.peers,
    )
    print(headings((*KERNEL_COLUMNS, *options.peers)), flush=True)
    rows = []
    for row in bench_kernel(settings):
        rows.append(row)
        peers = dict.fromkeys(options.peers, math.nan) | row["peer_seconds"]
        print(figures(row | peers, (*KERNEL_COLUMNS, *options.peers)), flush=True)
    if options.json:
        publish_json(options.json, rows)
    if options.plot:
        plot_kernel(rows, options.plot)
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add_kernel(commands)
    serve = commands.add_parser(
        "serve",
        help="tokens per second and memory of each width, served by vLLM",
    )
    serve.add_argument("folder", metavar="DIR", type=Path, help="folder of the nested checkpoint")
    serve.add_argument("--bits", type=width_list, help="widths to measure; default: all that the folder can serve")
    add_recipes_argument(serve, "measure")
    serve.add_argument("--batch", type=positive, default=1, help="requests at a time (default: %(default)s)")
    serve.add_argument(
        "--output-tokens", type=positive, default=64, help="tokens to generate for each request (default: %(default)s)"
    )
    serve.add_argument("--prompt", default=PROMPT, help="what to ask (default: %(default)s)")
    serve.add_argument("--activation-bits", type=int, choices=ACTIVATION_BITS, help="as that of vllm serve")
    serve.add_argument(
        "--reference", type=Path, metavar="MODEL", help="folder of a model that is not quantized, measured first"
    )
    serve.add_argument(
        "--llama-cpp",
        type=Path,
        metavar="PYTHON",
        help="an interpreter that has the extra bench-peers: measure llama.cpp too, on random weights of this shape",
    )
    serve.add_argument("--json", type=output_file, metavar="OUT", help="write the rows there (JSON)")
    serve.add_argument("--plot", type=output_file, metavar="OUT.png", help="draw them there (needs matplotlib)")
    return parser


def run_serve(options: argparse.Namespace) -> int:
    checkpoint = open_checkpoint(options.folder, check_values=False)
    slices = chosen_slices(checkpoint, options)
    print(headings(COLUMNS))
    rows = []
    load = Load(options.batch, options.output_tokens, options.prompt, options.activation_bits)
    for row in bench_serve(options.folder, slices, load, options.reference):
        rows.append(row)
        print(figures(row, COLUMNS), row.get("recipe", ""), flush=True)
    if options.llama_cpp:
        import torch

        for peer in bench_llama_cpp(options.llama_cpp, options.folder, options.output_tokens, torch.get_num_threads()):
            print(f"llama.cpp {peer['type']}: {peer['output_tokens_per_s']:.4g} tokens per second, batch 1", flush=True)
            rows.append({"model": f"llama.cpp {peer.pop('type')}", "batch": 1} | peer)
    if options.json:
        publish_json(options.json, rows)
    if options.plot:
        plot_serving(rows, options.plot)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        if options.plot:
            require_matplotlib()
        return run_kernel(options) if options.command == "kernel" else run_serve(options)
    except (ValueError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    raise SystemExit(main())
