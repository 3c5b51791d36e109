"""Benchmarks of a nested checkpoint."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from arguments import chosen_widths, figures, headings, output_file, positive, width_list

from vllm_matquant.checkpoint.files import publish_json
from vllm_matquant.checkpoint.reader import open_checkpoint

PROMPT = "What is the capital of France, and what is it known for?"
ANSWER_TOKENS = 48
COLUMNS = ("bits", "output_tokens_per_s", "resident_bytes", "load_seconds", "batch")


def serve_one_width(folder: Path, bits: int, batch: int, output_tokens: int, prompt: str) -> dict[str, Any]:
    """Serve one width in this process and measure it.

    Returns:
        A row of ``bench serve``, with the greedy ``answer`` to ``prompt`` beside it.
    """
    # The engine in this process: its model can be asked for its size, and nothing outlives the process.
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams

    from vllm_matquant.serve.linear import resident_bytes

    start = time.perf_counter()
    settings = {"matquant": {"bits": bits}}
    llm = LLM(str(folder), additional_config=settings, max_model_len=1024, max_num_seqs=batch)
    load_seconds = time.perf_counter() - start

    fixed_length = SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True)
    llm.generate([prompt] * batch, fixed_length, use_tqdm=False)  # warms up
    start = time.perf_counter()
    outputs = llm.generate([prompt] * batch, fixed_length, use_tqdm=False)
    seconds = time.perf_counter() - start
    generated = sum(len(output.outputs[0].token_ids) for output in outputs)

    greedy = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS)
    if llm.get_tokenizer().chat_template:
        answer = llm.chat([{"role": "user", "content": prompt}], greedy, use_tqdm=False)
    else:
        answer = llm.generate([prompt], greedy, use_tqdm=False)
    return {
        "bits": bits,
        "output_tokens_per_s": generated / seconds,
        "resident_bytes": sum(llm.apply_model(resident_bytes)),
        "load_seconds": load_seconds,
        "batch": batch,
        "model": folder.resolve().name,
        "answer": answer[0].outputs[0].text.strip(),
    }


def bench_serve(
    folder: Path, widths: Sequence[int], *, batch: int = 1, output_tokens: int = 64, prompt: str = PROMPT
) -> Iterator[dict[str, Any]]:
    """Rows of ``bench serve``, each from an engine in a process of its own."""
    for bits in widths:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            yield pool.submit(serve_one_width, folder, bits, batch, output_tokens, prompt).result()


def require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as cause:
        needed = "found no package matplotlib, expected it (pip install 'vllm_matquant[plot]')"
        raise ValueError(f"--plot: {needed}") from cause


def plot_serving(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Tokens per second and resident megabytes against the width (needs matplotlib)."""
    from matplotlib.figure import Figure

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


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser(
        "serve",
        help="tokens per second and memory of each width, served by vLLM",
    )
    serve.add_argument("folder", metavar="DIR", type=Path, help="folder of the nested checkpoint")
    serve.add_argument("--bits", type=width_list, help="widths to measure; default: all that the folder can serve")
    serve.add_argument("--batch", type=positive, default=1, help="requests at a time (default: %(default)s)")
    serve.add_argument(
        "--output-tokens", type=positive, default=64, help="tokens to generate for each request (default: %(default)s)"
    )
    serve.add_argument("--prompt", default=PROMPT, help="what to ask (default: %(default)s)")
    serve.add_argument("--json", type=output_file, metavar="OUT", help="write the rows there (JSON)")
    serve.add_argument("--plot", type=output_file, metavar="OUT.png", help="draw them there (needs matplotlib)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        checkpoint = open_checkpoint(options.folder, check_values=False)
        widths = chosen_widths(checkpoint, options.bits)
        if options.plot:
            require_matplotlib()
    except (ValueError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    print(headings(COLUMNS))
    rows = []
    for row in bench_serve(
        options.folder, widths, batch=options.batch, output_tokens=options.output_tokens, prompt=options.prompt
    ):
        rows.append(row)
        print(figures(row, COLUMNS), flush=True)
    if options.json:
        publish_json(options.json, rows)
    if options.plot:
        plot_serving(rows, options.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
