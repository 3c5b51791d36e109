"""The guide to Python: its snippets, run one after the other."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.quantize.tiny_sources import write_source

ROOT = Path(__file__).resolve().parent.parent
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "docs/guide/python.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.slow  # imports vLLM
def test_snippets(tmp_path: Path, text_file: Path) -> None:
    assert len(SNIPPETS) > 10
    write_source(tmp_path / "MODEL", head_dim=32)  # the least that vLLM attends with on a CPU
    (tmp_path / "text.txt").write_text(text_file.read_text())
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(SNIPPETS)],
        cwd=tmp_path,
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "trade.png").read_bytes().startswith(b"\x89PNG\r\n")
