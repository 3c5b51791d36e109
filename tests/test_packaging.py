"""The package as strangers meet it: what an import does, which way imports run, and the built wheel."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "vllm_matquant"
# What the files of each part may not import; what data passes later never serves what it passes earlier.
FORBIDDEN = {
    "checkpoint": {"kernels", "measure", "quantize", "search", "research", "serve", "plugin"},
    "kernels": {"measure", "quantize", "search", "research", "serve", "plugin"},
    "measure": {"quantize", "search", "research", "serve", "plugin"},
    "quantize": {"search", "research", "serve", "plugin"},
    "search": {"quantize", "research", "serve", "plugin"},
    "research": {"serve", "plugin"},
    "serve": {"measure", "quantize", "search", "research"},
}


def run_python(code: str, *, python: str = sys.executable, cwd: Path) -> str:
    """Standard output of a fresh interpreter that runs ``code`` without the repository on its path."""
    done = subprocess.run(
        [python, "-I", "-c", textwrap.dedent(code)], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported_modules(source: Path) -> set[str]:
    """Dotted names that a file imports anywhere, those of ``from a import b`` as ``a.b``."""
    names = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("part", FORBIDDEN)
def test_imports_never_run_backwards(part: str) -> None:
    sources = list((PACKAGE / part).rglob("*.py"))
    assert len(sources) > 1
    for source in sources:
        parts = {name.split(".")[1] for name in imported_modules(source) if name.startswith("vllm_matquant.")}
        assert not parts & FORBIDDEN[part], source


def test_only_serving_needs_vllm(tmp_path: Path) -> None:
    loaded = run_python(
        """
        import importlib, pkgutil, sys
        import vllm_matquant
        for part in ("checkpoint", "kernels", "measure", "quantize", "search", "research"):
            folder = importlib.import_module(f"vllm_matquant.{part}").__path__
            for module in pkgutil.iter_modules(folder, f"vllm_matquant.{part}."):
                importlib.import_module(module.name)
        print(*sys.modules)
        """,
        cwd=tmp_path,
    ).split()
    assert "vllm_matquant.quantize" in loaded
    assert "vllm" not in loaded


@pytest.mark.slow  # imports vLLM
def test_import_opens_no_connection(tmp_path: Path) -> None:
    modules = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in PACKAGE.rglob("*.py")]
    output = run_python(
        f"""
        import importlib, sys

        def report(event, arguments):
            if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
                print(event, arguments)

        sys.addaudithook(report)
        for module in {modules}:
            importlib.import_module(module.removesuffix(".__init__"))
        """,
        cwd=tmp_path,
    )
    assert "socket." not in output


def test_names_nothing_outside_the_repository() -> None:
    """The sources refer neither to folders beside the repository nor to package indexes."""
    outside = re.compile(r"\.\./shared|--(?:extra-)?index-url|(?:^|[\s\"'=(])/(?:home|root|work)/")
    folders = [PACKAGE, ROOT / "csrc", ROOT / "tools", ROOT / "docs"]
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    files += [ROOT / name for name in ("setup.py", "CMakeLists.txt", "pyproject.toml", "Makefile", "README.md")]
    sources = [file for file in files if file.suffix not in {".so", ".pyc", ".png"}]
    found = [str(file.relative_to(ROOT)) for file in sources if outside.search(file.read_text())]
    assert not found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that pip builds from a clean copy of the sources: nothing built earlier can get into it."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "sources"
    built = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "__pycache__")
    shutil.copytree(ROOT, tree, ignore=built)
    scripts = sysconfig.get_path("scripts")  # cmake
    build = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", f"--wheel-dir={folder}", str(tree)],
        env=os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert build.returncode == 0, build.stdout + build.stderr
    (file,) = folder.glob("*.whl")
    return file


@pytest.mark.slow
def test_wheel_content(wheel: Path) -> None:
    """One wheel for every Python from 3.10 on, with the library, the licence and the entry point, and nothing else."""
    assert re.fullmatch(r"vllm_matquant-[\d.]+-cp310-abi3-linux_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
        assert "matquant = vllm_matquant.plugin:register" in archive.read(entry_points).decode()
    assert "vllm_matquant/_C.abi3.so" in names
    assert any(name.endswith("/LICENSE") for name in names)
    modules = {str(file.relative_to(ROOT)) for file in PACKAGE.rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    assert {f"vllm_matquant/quantize/report/{name}" for name in ("card.md", "page.html", "page.js")} <= set(names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"vllm_matquant"}


@pytest.mark.slow
def test_wheel_works_in_an_environment_of_its_own(wheel: Path, tmp_path: Path) -> None:
    """It borrows the dependencies: a path file shows their folder, but not the editable install that lies there too."""
    folder = tmp_path / "venv"
    venv.create(folder, with_pip=False)
    python = str(folder / "bin" / "python")
    (site_packages,) = folder.glob("lib/python*/site-packages")
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run(install, check=True)
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    output = run_python(
        """
        import torch
        import vllm_matquant
        from importlib.metadata import entry_points
        from vllm_matquant.kernels import ops

        base = torch.tensor([[0b11100100, 0b00011011]], dtype=torch.uint8)
        print(vllm_matquant.__file__)
        print(ops.__file__)
        print([entry.value for entry in entry_points(group="vllm.general_plugins", name="matquant")][0])
        print(list(ops.repack_codes(base, [], [1], [2]).shape))
        """,
        python=python,
        cwd=tmp_path,
    )
    package, door, entry, shape = output.splitlines()
    assert package == str(site_packages / "vllm_matquant" / "__init__.py")
    assert Path(door).is_relative_to(site_packages)
    assert entry == "vllm_matquant.plugin:register"
    assert shape == "[2, 1, 1, 64]"  # two planes of one tile of 16 rows and 32 columns
