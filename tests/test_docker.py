"""The images' descriptions, as far as they can be checked without building them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_matquant.plugin import register

register()

ROOT = Path(__file__).parents[1]
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
COMPOSE = ROOT / "docker" / "compose.yaml"


def compose() -> dict[str, dict[str, object]]:
    """The services of the example, with every variable at a value of its own or its default."""
    text = re.sub(r"\$\{(\w+)(?::-([^}]*)|:\?[^}]*)\}", lambda found: found[2] or f"a-{found[1]}", COMPOSE.read_text())
    assert "${" not in text
    services: dict[str, dict[str, object]] = yaml.safe_load(text)["services"]
    return services


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.stem)
def test_hadolint(file: Path) -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("no hadolint, which PyPI has for x86-64 alone")
    done = subprocess.run([hadolint, file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.stem)
def test_what_is_copied_is_there(file: Path) -> None:
    copied = re.findall(r"^COPY (?!--from)(\S+) ", file.read_text(), re.MULTILINE)
    assert "." in copied
    wanted = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for name in [*wanted, *copied]:
        assert (ROOT / name).exists(), name
        assert name in (".", *wanted), f".dockerignore leaves out {name}"
    needed = ["setup.py", "pyproject.toml", "CMakeLists.txt", "csrc", "vllm_matquant", "README.md", "LICENSE"]
    assert all(any(fnmatch(name, pattern) for pattern in wanted) for name in needed)


def test_versions_are_those_of_the_package() -> None:
    project, tested = (ROOT / "pyproject.toml").read_text(), (ROOT / "docs/guide/install.md").read_text()
    cpu, cuda = (file.read_text() for file in DOCKERFILES)
    for requirement in re.findall(r"'([\w-]+>=[\d.]+)'", cpu + cuda):
        assert f'"{requirement}"' in project, requirement
    [version] = re.findall(r"^ARG VLLM=(\S+)$", cuda, re.MULTILINE)
    assert f"| vLLM | {version}," in tested


def test_the_example_starts_a_server_that_there_is() -> None:
    services = compose()
    server, command = services["server"], services["server"]["command"]
    assert isinstance(command, list)
    entry = (ROOT / "docker" / "cpu.Dockerfile").read_text().rstrip().splitlines()[-1]
    assert entry == 'ENTRYPOINT ["vllm", "serve"]'
    options = make_arg_parser(FlexibleArgumentParser()).parse_args(command)
    assert options.served_model_name == ["model"]
    assert options.additional_config == {"matquant": {"elastic": [2, 3, 4, 5, 6, 7, 8]}}
    assert {"VLLM_API_KEY", "VLLM_CPU_KVCACHE_SPACE"} == set(server["environment"])  # type: ignore[call-overload]
    assert services["prometheus"]["depends_on"] == {"server": {"condition": "service_healthy"}}
