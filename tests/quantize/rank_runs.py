"""Runs of ``matquant quantize`` on several ranks; a script, for torch's threads do not survive a fork.

It imports everything once and then forks the ranks of each run, with the environment that torchrun would give them.
Usage: ``python -m tests.quantize.rank_runs FOLDER TEXT``. Each run writes FOLDER/<name>, its ranks' words go to
FOLDER/<name>.<rank>.txt, and FOLDER/results.json holds their exit codes.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.quantize.tiny_sources import random_model, write_source
from vllm_matquant import cli
from vllm_matquant.jobs import quantize as quantize_job
from vllm_matquant.quantize import nested_tuned, ranks
from vllm_matquant.quantize.methods import METHODS
from vllm_matquant.quantize.run import Run
from vllm_matquant.quantize.tuning import TunedLayer

PATIENCE = 120.0  # seconds after which a run counts as hung, on a busy machine too
BLOCKS = 2
WINDOWS = 5  # not a multiple of 2, nor of 3

Hook = Callable[[int], object]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


class ThePlan:
    """A plan that nothing stands in the way of."""

    disk = 0

    def __str__(self) -> str:
        return "the plan"


def launch(count: int, arguments: list[str], words: Path, hook: Hook, command: str = "quantize") -> list[int | None]:
    """Exit codes of the ranks; None of one that had to be killed since it hung."""
    port, children = free_port(), []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            code = 70
            try:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
                os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
                output = os.open(f"{words}.{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(output, 1)
                os.dup2(output, 2)
                hook(rank)
                code = cli.main([command, *arguments])
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else 1
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(code)
        children.append(child)
    deadline, codes = time.monotonic() + PATIENCE, {}
    while len(codes) < count and time.monotonic() < deadline:
        for child in set(children) - set(codes):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    for child in set(children) - set(codes):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return [codes.get(child) for child in children]


def die_in_second_block(rank: int) -> None:
    """Let the last of two ranks be killed once a block is finished."""
    quantize_block, calls = Run._quantize, []

    def limited(*arguments: object) -> None:
        calls.append(arguments)
        if rank == 1 and len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        quantize_block(*arguments)  # type: ignore[arg-type]

    Run._quantize = limited  # type: ignore[method-assign]


def tell_what_was_trained(rank: int) -> None:
    """Print a checksum of each layer's codes and scales as this rank has trained them."""
    tune_block = nested_tuned.tune_block

    def told(*arguments: Any) -> dict[str, TunedLayer]:
        tuned = tune_block(*arguments)
        for name, layer in tuned.items():
            codes, decoders = layer.finish()
            content = [
                codes.numpy().tobytes(),
                *(decoder.affine.scale.numpy().tobytes() for decoder in decoders.values()),
            ]
            print("trained", name, hashlib.sha256(b"".join(content)).hexdigest())
        return tuned

    nested_tuned.tune_block = told


def gather_two_rows(rank: int) -> None:
    with ranks.started():
        print(ranks.gather_rows(torch.tensor([[1, 2], [3, 4]])[ranks.own_rows(2)], 2).tolist())
    sys.exit(0)


def plan_nothing(rank: int) -> None:
    quantize_job.dry_run = lambda *_, **__: ThePlan()


def change_method(rank: int) -> None:
    """Let the ranks differ, as they would where machines hold different texts."""
    quantize_job.METHODS = METHODS | {"nested": METHODS[("nested", "matgptq")[rank]]}


def main(folder: Path, text: Path) -> None:
    torch.set_num_threads(1)
    source = write_source(folder / "source", num_hidden_layers=BLOCKS)
    model = random_model("llama", num_hidden_layers=BLOCKS)
    model.model.norm.weight.data[0] = float("nan")
    without_biases = {"attention_bias": False, "mlp_bias": False, "num_hidden_layers": BLOCKS}
    scalable = write_source(folder / "scalable", **without_biases)
    damaged = write_source(folder / "damaged", num_hidden_layers=BLOCKS)
    model.save_pretrained(damaged)
    results = {}

    def run(name: str, count: int, *arguments: str, output: str = "", hook: Hook = lambda rank: None) -> None:
        common = ["--output", str(folder / (output or name)), "--sequence-length", "32"]
        common += ["--bits", "2,3,8", "--samples", str(WINDOWS)]
        common += [] if "rtn" in arguments else ["--calibration", str(text)]
        began = time.monotonic()
        which = damaged if name == "damaged_source" else scalable if name.startswith("scaled") else source
        chosen = [str(which), *common, *arguments]
        results[name] = launch(count, chosen, folder / name, hook)
        print(f"{name}: {results[name]}, {time.monotonic() - began:.1f} s")

    measured = ("--held-out", str(text), "--held-out-samples", "3")
    # Of fewer windows, what training makes is too random to compare.
    tuned = (*measured, "--method", "nested-tuned", "--samples", "24", "--setting", "tuning.iterations=20")
    # Ranks that train see windows in another order than one process does.
    solved = ("--setting", "end_to_end.up_to=0")
    run("one", 1, *measured, *solved)
    run("two", 2, *measured, *solved)
    run("again", 2, "--no-report", *solved)
    run("three", 3, *measured, *solved)
    run("tuned_one", 1, *tuned)
    run("tuned_two", 2, *tuned)
    run("tuned_again", 2, *tuned, hook=tell_what_was_trained)
    scaled = ("--method", "matquant-omni", "--samples", "24", "--setting", "transformations.rate=0.05")
    scaled = (*measured, *scaled, "--setting", "clipping.iterations=20")
    run("scaled_one", 1, *scaled)
    run("scaled_two", 2, *scaled)
    run("scaled_again", 2, *scaled)
    for method in ("rtn", "matgptq"):
        run(f"{method}_one", 1, "--no-report", "--method", method)
        run(f"{method}_three", 3, "--no-report", "--method", method)
    run("codebooks_one", 1, *measured, *solved, "--method", "nested-vq")
    run("codebooks_two", 2, *measured, *solved, "--method", "nested-vq")
    run("codebooks_again", 2, "--no-report", *solved, "--method", "nested-vq")
    for count, name in ((1, "embeddings_one"), (3, "embeddings_three")):
        run(name, count, *measured, *solved, "--quantize-embeddings")
    run("killed", 2, "--no-report", *solved, hook=die_in_second_block)
    run("other_count", 1, "--no-report", *solved, "--resume", output="killed")
    run("resumed", 2, "--no-report", *solved, "--resume", output="killed")
    run("few_windows", 3, "--no-report", "--samples", "2")
    run("damaged_source", 2, "--no-report")
    run("few_rows", 3, hook=gather_two_rows)
    run("other_method", 2, "--no-report", hook=change_method)
    run("dry", 2, "--no-report", "--dry-run", hook=plan_nothing)
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
