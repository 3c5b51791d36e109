"""What another version of vLLM lacks, found in two small ones; and that nothing is missing in the installed one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import check_vllm
import pytest

TESTED = {
    "__init__.py": "if TYPE_CHECKING:\n    from vllm.engine.llm import LLM\n",
    "config/__init__.py": "from vllm.config.main import VllmConfig\nfrom .models import *\n",
    "config/main.py": """
        from .models import ModelConfig

        class VllmConfig:
            model_config: ModelConfig = None
            draft: "ModelConfig | None" = None
    """,
    "config/models.py": """
        class Base:
            dtype: str

        class ModelConfig(Base):
            def __init__(self, name, size=1):
                self.name = name

            @property
            def heads(self) -> int: ...

        def build(config: ModelConfig, *, device) -> ModelConfig: ...
    """,
    "engine/__init__.py": "",
    "engine/llm.py": """
        class Engine:
            def step(self, count, /, *rest, wait=False, **others): ...
            def stop(self): ...

        class LLM(Engine):
            def __init__(self, model): ...
    """,
}
PACKAGE = """
    from __future__ import annotations
    from typing import Any
    import torch
    from vllm import LLM
    from vllm.config import VllmConfig, build
    from vllm.config import models

    class Ours(LLM):
        def __init__(self, model: str) -> None:
            super().__init__(model)

        def step(self, *args: Any) -> None:
            self.stop()

        def own(self) -> None: ...

    def read(vllm_config: Any, config: models.ModelConfig | None, other: Any) -> None:
        model, draft = vllm_config.model_config, vllm_config.draft
        print(model.dtype, draft.heads, config.name, other.model_config, torch.bfloat16)
        if isinstance(other, LLM):
            other.stop()
        models.ModelConfig("a")
        LLM.step = build(config, device=None).name
"""
NAMES = {
    "vllm.LLM": 5,
    "vllm.config.VllmConfig": 6,
    "vllm.config.build": 6,
    "vllm.config.main.VllmConfig.draft": 19,
    "vllm.config.main.VllmConfig.model_config": 19,
    "vllm.config.models": 7,
    "vllm.config.models.ModelConfig": 18,
    "vllm.config.models.ModelConfig()": 23,
    "vllm.config.models.ModelConfig.dtype": 20,
    "vllm.config.models.ModelConfig.heads": 20,
    "vllm.config.models.ModelConfig.name": 20,
    "vllm.engine.llm.LLM.__init__": 10,
    "vllm.engine.llm.LLM.step": 13,
    "vllm.engine.llm.LLM.stop": 14,
}


def written(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(dedent(text))
    return folder


@pytest.fixture
def names(tmp_path: Path) -> Callable[[dict[str, str]], list[str]]:
    """What differs in a version in which some files are others."""
    package = written(tmp_path / "ours", {"module.py": PACKAGE})
    tested = check_vllm.Sources(written(tmp_path / "tested" / "vllm", TESTED).parent)
    used = check_vllm.used_names(package, tested)
    assert {name: int(line.rpartition(":")[2]) for name, line in used.items()} == NAMES

    def differing(changed: dict[str, str]) -> list[str]:
        other = check_vllm.Sources(written(tmp_path / "other" / "vllm", TESTED | changed).parent)
        return list(check_vllm.differences(used, tested, other))

    return differing


def test_the_same_version_lacks_nothing(names: Callable[[dict[str, str]], list[str]]) -> None:
    assert names({}) == []


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        (
            "config/models.py",
            "dtype: str",
            "pass",
            ["vllm.config.models.ModelConfig.dtype (ours/module.py:20): missing"],
        ),
        (
            "config/models.py",
            "self.name =",
            "self.title =",
            ["vllm.config.models.ModelConfig.name (ours/module.py:20): missing"],
        ),
        ("engine/llm.py", "def stop", "def end", ["vllm.engine.llm.LLM.stop (ours/module.py:14): missing"]),
        (
            "engine/llm.py",
            "wait=False",
            "wait",
            [
                "vllm.engine.llm.LLM.step (ours/module.py:13): takes (self, count, /, *rest, wait=, **others), "
                "in the other version (self, count, /, *rest, wait, **others)"
            ],
        ),
        (
            "config/models.py",
            "*, device",
            "device",
            ["vllm.config.build (ours/module.py:6): takes (config, *, device), in the other version (config, device)"],
        ),
        (
            "config/models.py",
            "name, size=1",
            "name, size",
            [
                "vllm.config.models.ModelConfig() (ours/module.py:23): takes (self, name, size=), "
                "in the other version (self, name, size)"
            ],
        ),
        ("config/models.py", "def heads(self) -> int: ...", "def heads(self) -> float: ...", []),
    ],
)
def test_what_differs_is_named(
    names: Callable[[dict[str, str]], list[str]], file: str, old: str, new: str, expected: list[str]
) -> None:
    assert old in TESTED[file]
    assert names({file: TESTED[file].replace(old, new)}) == expected


def test_a_class_that_moved_is_found_where_it_is_imported_from(names: Callable[[dict[str, str]], list[str]]) -> None:
    moved = {"engine/llm.py": "from vllm.engine.core import LLM", "engine/core.py": TESTED["engine/llm.py"]}
    assert names(moved) == []


def test_a_folder_without_sources_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        check_vllm.main([str(tmp_path)])
    assert f"folder: found no vllm/__init__.py in {tmp_path}, expected unpacked sources" in capsys.readouterr().err


def test_the_installed_version_has_all_that_the_package_uses(capsys: pytest.CaptureFixture[str]) -> None:
    vllm = pytest.importorskip("importlib.util").find_spec("vllm")
    assert vllm is not None
    assert check_vllm.main([str(Path(vllm.origin).parents[1])]) == 0
    said = capsys.readouterr().out
    assert int(said.split()[0]) > 200
    assert "0 missing or with other parameters" in said
