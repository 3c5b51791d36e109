"""torchvision for vLLM's CPU build: what the package index has is compiled for CUDA and fails where torch is not.

vLLM's classes of multimodal models import it. What they and transformers' processors of pictures use of it is Python.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "torchvision"


def environment() -> dict[str, str]:
    """Variables of a process that can import torchvision; skips the test where there is none to be had."""
    if find_spec("torchvision") is not None:
        return {}
    folder = CACHE / torch.__version__
    if not folder.exists():
        _fetch(folder)
    return {"PYTHONPATH": str(folder)}


def _fetch(folder: Path) -> None:
    """Make ``folder``; it appears when complete."""
    numbers = re.match(r"2\.(\d+)\.", torch.__version__)
    if numbers is None:
        pytest.skip(f"torchvision is not installed, and which one belongs to torch {torch.__version__} is not known")
    wanted = f"torchvision==0.{int(numbers[1]) + 15}.*"
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix=".fetch-") as scratch:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:", wanted]
        done = subprocess.run([*command, "--target", scratch], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"torchvision is not installed, and pip finds no {wanted}: {done.stderr[-300:]}")
        package = Path(scratch) / "torchvision"
        for library in package.rglob("*.so"):
            library.unlink()
        shutil.rmtree(Path(scratch) / "torchvision.libs", ignore_errors=True)
        # It describes the operators of the library that is gone.
        (package / "_meta_registrations.py").write_text("")
        if not folder.exists():
            Path(scratch).rename(folder)
            Path(scratch).mkdir()  # for the context to remove
