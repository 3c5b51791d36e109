"""Engines in a process of their own: jobs in, results out. The modules ``*_runs.py`` are what runs there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

ROOT = Path(__file__).parents[2]
BEGINNING = "====== a job begins"  # what a runner writes stands between this and the next one

_Name = TypeVar("_Name")


def run_jobs(
    runner: str, jobs: Mapping[_Name, Any], folder: Path, **environment: str
) -> tuple[dict[_Name, dict[str, Any]], dict[_Name, str]]:
    """The result of each job, and what was written meanwhile. Fails, showing what was written, unless all end.

    Args:
        runner: a module ``*_runs``, by its name among the tests.
        jobs: as that module takes them.
        folder: an empty one, for files of the run, and caches that no other run has filled.
        environment: of the process, on top of this one's.
    """
    jobs_path, results_path = folder / "jobs.json", folder / "results.pt"
    jobs_path.write_text(json.dumps(list(jobs.values())))
    whole = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CACHE_ROOT": str(folder / "cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache/inductor"),
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # of functions that look into the processes of an engine
        **environment,
    }
    command = [sys.executable, "-m", f"tests.serve.{runner}", str(jobs_path), str(results_path)]
    done = subprocess.run(
        command, cwd=ROOT, env=whole, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1500
    )
    if done.returncode:
        pytest.fail(f"{' '.join(command)}: exit status {done.returncode}\n{done.stdout[-6000:]}")
    logs = done.stdout.split(BEGINNING)[1:]
    results = torch.load(results_path, weights_only=True)
    return dict(zip(jobs, results, strict=True)), dict(zip(jobs, logs, strict=True))
