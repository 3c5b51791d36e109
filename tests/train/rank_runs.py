"""Runs of ``matquant train`` on several ranks; a script, for torch's threads do not survive a fork.

Usage: ``python -m tests.train.rank_runs FOLDER TEXT``, see :mod:`tests.quantize.rank_runs`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from tests.quantize.rank_runs import Hook, launch
from tests.quantize.tiny_sources import write_source
from tests.train.conftest import make_parent
from vllm_matquant.train.optimizer import Optimizer

COMMON = "--sequence-length 32 --batch 6 --steps 8 --warmup 2 --precision fp32 --code-rate 1 --checkpoint-every 3"
TERMS = ("--terms", "8,4,2,8->2")


def end_in_step(number: int) -> Hook:
    """Let all ranks end in a step that counts from 0."""

    def hook(rank: int) -> None:
        step = Optimizer.step

        def limited(self: Optimizer, now: int) -> torch.Tensor:
            if now == number:
                raise KeyboardInterrupt
            return step(self, now)

        Optimizer.step = limited  # type: ignore[method-assign]

    return hook


def main(folder: Path, text: Path) -> None:
    torch.set_num_threads(1)
    source, tied = write_source(folder / "source"), write_source(folder / "tied", tie_word_embeddings=True)
    parent = make_parent(source, folder / "parent", "--bits", "2,4,8", "--group-size", "32")
    embedded = make_parent(tied, folder / "embedded", "--bits", "2,8", "--quantize-embeddings")
    results = {}

    def run(name: str, count: int, *arguments: str, output: str = "", hook: Hook = lambda rank: None) -> None:
        chosen = [str(parent), "--source", str(source), *TERMS]
        if "embedded" in name:
            chosen = [str(embedded), "--source", str(tied), "--terms", "8->2,2:text"]
        chosen += ["--output", str(folder / (output or name)), "--text", str(text), *COMMON.split(), *arguments]
        results[name] = launch(count, chosen, folder / name, hook, "train")
        print(f"{name}: {results[name]}")

    held_out = ("--held-out", str(text), "--held-out-samples", "3", "--evaluate-every", "4")
    run("one", 1, *held_out)
    run("two", 2, *held_out)
    run("three", 3, "--gradient-checkpointing")  # whose parts of 64 and of 32 rows differ
    run("embedded_one", 1)
    run("embedded_two", 2)
    run("rounded_one", 1, "--form", "rounded")
    run("rounded_two", 2, "--form", "rounded")
    run("cut", 2, hook=end_in_step(5))
    run("other_count", 1, "--resume", output="cut")
    run("resumed", 2, "--resume", output="cut")
    run("odd", 2, "--batch", "3")
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
