from __future__ import annotations

import os

import pytest

from vllm_matquant.serve import compiled

NAME = "VLLM_USE_AOT_COMPILE"


@pytest.mark.parametrize("given", [None, "0", "1"])
@pytest.mark.parametrize("on_cpu", [True, False])
def test_a_cpu_compiles_by_way_of_torchs_cache_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, on_cpu: bool, given: str | None
) -> None:
    monkeypatch.setattr(compiled.current_platform, "is_cpu", lambda: on_cpu)
    monkeypatch.setenv(NAME, given or "")
    if given is None:
        monkeypatch.delenv(NAME)
    compiled.reuse_compiled_code()
    assert os.environ.get(NAME) == (given or ("0" if on_cpu else None))
