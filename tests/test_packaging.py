"""The package as strangers meet it: what an import does, which way imports run, and the built wheel."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import venv
import zipfile
from pathlib import Path

import pytest

import vllm_matquant
from tests.quantize.tiny_sources import write_source

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "vllm_matquant"
# What the files of each part may not import; what data passes later never serves what it passes earlier.
DOORS = {"bench", "jobs", "cli", "plugin", "transformers"}
FORBIDDEN = {
    "checkpoint": {"kernels", "measure", "quantize", "train", "search", "research", "serve", *DOORS},
    "kernels": {"measure", "quantize", "train", "search", "research", "serve", *DOORS},
    "measure": {"quantize", "train", "search", "research", "serve", *DOORS},
    "quantize": {"train", "search", "research", "serve", *DOORS},
    "train": {"search", "research", "serve", *DOORS},
    "search": {"quantize", "train", "research", "serve", *DOORS},
    "research": {"serve", *DOORS},
    "serve": {"measure", "quantize", "train", "search", "research", *DOORS},
    "transformers": {"measure", "quantize", "train", "search", "research", "serve", "bench", "jobs", "cli", "plugin"},
    "bench": {"measure", "quantize", "train", "search", "research", "jobs", "cli", "plugin", "transformers"},
    "jobs": {"cli", "plugin", "transformers"},
    "cli": {"serve", "plugin", "transformers"},
}
# The distribution that brings a module of another name.
DISTRIBUTIONS = {
    "yaml": "pyyaml",
    "cupy": "cupy-cuda13x",
    "cupy_backends": "cupy-cuda13x",
    "humming": "humming-kernels",
}
PEER_MODULE = PACKAGE / "bench" / "llama_cpp.py"  # needs a package that only benchmarks need
ONLY_IN_A_CLONE = re.compile(r"\b(?:tools|docs|tests)/\S*|\bsetup\.py\b|\bMakefile\b|`make \w+")
COMMANDS = ("quantize", "import", "train", "search", "evaluate", "verify", "bench", "plot")

# Of every command, by one process: to start one takes seconds.
PRINT_HELP = f"""
from vllm_matquant.cli import main
for command in {[*((name,) for name in COMMANDS), ("bench", "serve")]}:
    try:
        main([*command, "--help"])
    except SystemExit as end:
        assert not end.code
"""


def run_python(code: str, *, python: str = sys.executable, cwd: Path) -> str:
    """Standard output of a fresh interpreter that runs ``code`` without the repository on its path."""
    done = subprocess.run(
        [python, "-I", "-c", textwrap.dedent(code)], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def statement_imports(statement: ast.stmt) -> set[str]:
    """Dotted names that a statement at the top of a file imports, those of ``from a import b`` as ``a.b``."""
    if isinstance(statement, ast.Import):
        return {alias.name for alias in statement.names}
    if isinstance(statement, ast.ImportFrom):
        return {f"{statement.module}.{alias.name}" for alias in statement.names}
    return set()


def imported_modules(source: Path) -> set[str]:
    """Dotted names that a file imports anywhere, those of ``from a import b`` as ``a.b``."""
    nodes = ast.walk(ast.parse(source.read_text()))
    return {name for node in nodes if isinstance(node, ast.stmt) for name in statement_imports(node)}


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
        for part in "checkpoint kernels measure quantize train search research transformers bench jobs cli".split():
            folder = importlib.import_module(f"vllm_matquant.{part}").__path__
            for module in pkgutil.iter_modules(folder, f"vllm_matquant.{part}."):
                if module.name != "vllm_matquant.bench.llama_cpp":
                    importlib.import_module(module.name)
        print(*sys.modules)
        """,
        cwd=tmp_path,
    ).split()
    assert "vllm_matquant.quantize" in loaded
    assert "vllm" not in loaded


def test_the_package_imports_nothing_until_it_is_asked(tmp_path: Path) -> None:
    output = run_python(
        """
        import sys
        import vllm_matquant
        print(not {"torch", "numpy", "transformers", "vllm"} & set(sys.modules))
        import vllm_matquant.quantize.methods, vllm_matquant.search.budget, vllm_matquant.serve.request
        import inspect
        exported = {name: getattr(vllm_matquant, name) for name in vllm_matquant.__all__}
        print(set(exported) <= set(dir(vllm_matquant)), "vllm" in sys.modules)
        for name in "quantize search evaluate verify plot bench_kernel bench_serve serve train".split():
            print(name, callable(exported[name]), *inspect.signature(exported[name]).parameters)
        print(inspect.ismodule(vllm_matquant.quantize), vllm_matquant.quantize.methods.__name__)
        try:
            vllm_matquant.nonesuch
        except AttributeError as error:
            print(error)
        """,
        cwd=tmp_path,
    ).splitlines()
    assert output[:2] == ["True", "True False"]
    assert output[2].startswith("quantize True model output overwrite resume bits ")
    assert output[3].startswith("search True folder budget reference ")
    assert output[4].startswith("evaluate True folder reference text bits ")
    assert all(" True " in line for line in output[2:11])
    assert output[10].startswith("train True parent source output overwrite resume text ")
    assert output[11:] == [
        "True vllm_matquant.quantize.methods",
        "module 'vllm_matquant' has no attribute 'nonesuch'",
    ]


def test_threads_are_told_how_to_wait_before_torch_is_imported(tmp_path: Path) -> None:
    for command, spins in (("quantize", "2000"), ("bench", "300000")):
        output = run_python(
            f"""
            import os, sys
            for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
                os.environ.pop(name, None)

            def tell(event, arguments):
                if event == "import" and arguments[0] == "torch":
                    print("torch", os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT"))

            sys.addaudithook(tell)
            from vllm_matquant import cli
            try:
                cli.main(["{command}", *["kernel"][:"{command}" == "bench"], "--help"])
            except SystemExit:
                pass
            """,
            cwd=tmp_path,
        )
        assert next(line for line in output.splitlines() if line.startswith("torch")) == f"torch passive {spins}"


def third_party(names: set[str]) -> set[str]:
    """The distributions that these imports need."""
    roots = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"vllm_matquant"}
    return {DISTRIBUTIONS.get(root, root) for root in roots}


def declared(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=\[;! ]", requirement, maxsplit=1)[0] for requirement in requirements}


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    """What a module cannot be imported without is a dependency; what a function asks for may be of an extra."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required, extras = declared(project["dependencies"]), project["optional-dependencies"]
    # torch brings triton wherever it has kernels for it, vLLM what its server is made of.
    of_vllm = {"vllm", "fastapi", "prometheus_client"}
    optional = set().union(*map(declared, extras.values()), {"triton"}, of_vllm)
    everywhere: set[str] = set()
    for source in set(PACKAGE.rglob("*.py")) - {PEER_MODULE}:
        module = ast.parse(source.read_text())
        at_once = {name for statement in module.body for name in statement_imports(statement)}
        part = source.relative_to(PACKAGE).parts[0]
        needed = third_party(at_once) - (of_vllm if part == "serve" else set())
        # Imported where the support table has found theirs.
        if source.name != "cuda_jit.py" and not source.name.startswith("triton_"):
            assert needed <= required, source
        everywhere |= third_party(imported_modules(source))
    assert everywhere <= required | optional
    assert required <= everywhere
    assert {"vllm>=0.32"} <= set(extras["cuda"])


@pytest.mark.slow  # imports vLLM
def test_import_opens_no_connection(tmp_path: Path) -> None:
    files = set(PACKAGE.rglob("*.py")) - {PEER_MODULE, PACKAGE / "__main__.py"}
    modules = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in sorted(files)]
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
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution of a clean copy of the sources: nothing built earlier can get into it."""
    folder = tmp_path_factory.mktemp("sdist")
    tree = folder / "sources"
    built = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "__pycache__")
    shutil.copytree(ROOT, tree, ignore=built, symlinks=True)
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    build = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, check=False)
    assert build.returncode == 0, build.stdout + build.stderr
    (file,) = folder.glob("*.tar.gz")
    return file


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """The wheel that pip builds from the source distribution, without the CUDA kernels, which take long, and by a
    compiler that does not optimize. It then warns of what it otherwise sees to be right."""
    scripts = sysconfig.get_path("scripts")  # cmake
    folder = sdist.parent
    launcher = folder / "launcher"
    launcher.write_text('#!/bin/sh\nexec "$@" -O0 -Wno-error\n')
    launcher.chmod(0o755)
    settings = {"MATQUANT_CUDA": "OFF", "CMAKE_CXX_COMPILER_LAUNCHER": str(launcher)}
    # pip would take a wheel that it has once built of a file in this place.
    pip = [sys.executable, "-m", "pip", "wheel", "--no-cache-dir", "--no-build-isolation", "--no-deps"]
    build = subprocess.run(
        [*pip, f"--wheel-dir={folder}", str(sdist)],
        env=os.environ | settings | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert build.returncode == 0, build.stdout + build.stderr
    (file,) = folder.glob("*.whl")
    return file


@pytest.mark.slow
def test_sdist_content(sdist: Path) -> None:
    """All that building needs, and what a reader of the package's texts looks for."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2]: archive.getmember(name) for name in archive.getnames()}
        assert not [name for name, member in names.items() if member.issym() or member.islnk()]
        copies = {name: archive.extractfile(member).read() for name, member in names.items() if "csrc/cuda/" in name}
    sources = {str(file.relative_to(ROOT)) for file in (ROOT / "csrc").rglob("*") if file.is_file()}
    modules = {str(file.relative_to(ROOT)) for file in PACKAGE.rglob("*.py")}
    documents = {str(file.relative_to(ROOT)) for file in (ROOT / "docs").rglob("*.md")}
    wanted = {"CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE", *sources, *modules, *documents}
    assert wanted <= set(names)
    assert not [name for name in names if name.endswith((".so", ".pyc"))]
    for name in sources:
        if name.startswith("csrc/cuda/"):
            assert copies[f"vllm_matquant/{name}"] == copies[name]


@pytest.mark.slow
def test_wheel_content(wheel: Path) -> None:
    """One wheel for every Python from 3.10 on, with the library, the licence and the entry point, and nothing else."""
    assert re.fullmatch(r"vllm_matquant-[\d.]+-cp310-abi3-linux_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
        entries = archive.read(entry_points).decode()
    assert "matquant = vllm_matquant.plugin:register" in entries
    assert "matquant = vllm_matquant.cli:main" in entries
    assert "vllm_matquant/_C.abi3.so" in names
    assert any(name.endswith("/LICENSE") for name in names)
    modules = {str(file.relative_to(ROOT)) for file in PACKAGE.rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    assert {f"vllm_matquant/quantize/report/{name}" for name in ("card.md", "page.html", "page.js")} <= set(names)
    assert {f"vllm_matquant/{file.relative_to(ROOT)}" for file in (ROOT / "csrc/cuda").iterdir()} <= set(names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"vllm_matquant"}


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel and, borrowed, its dependencies, but without the editable install beside these."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(folder, with_pip=False)
    python = str(folder / "bin" / "python")
    (site_packages,) = folder.glob("lib/python*/site-packages")
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run(install, check=True)
    # A path file shows their folder, but what path files in that folder show it does not.
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


@pytest.mark.slow
def test_wheel_works_in_an_environment_of_its_own(environment: Path, tmp_path: Path) -> None:
    python = str(environment / "bin" / "python")
    (site_packages,) = environment.glob("lib/python*/site-packages")
    output = run_python(
        """
        import torch
        import vllm_matquant
        from importlib.metadata import entry_points
        from vllm_matquant.kernels import cpu_layout, ops

        base = torch.tensor([[0b11100100, 0b00011011]], dtype=torch.uint8)
        print(vllm_matquant.__file__)
        print(ops.__file__)
        print([entry.value for entry in entry_points(group="vllm.general_plugins", name="matquant")][0])
        print(list(cpu_layout.PAIRS.pack_planes(base, [], [1]).shape))
        """,
        python=python,
        cwd=tmp_path,
    )
    package, door, entry, shape = output.splitlines()
    assert package == str(site_packages / "vllm_matquant" / "__init__.py")
    assert Path(door).is_relative_to(site_packages)
    assert entry == "vllm_matquant.plugin:register"
    assert shape == "[2, 1, 1, 64]"  # two planes of one tile of 16 rows and 32 columns


@pytest.mark.slow
def test_commands_of_an_environment_of_its_own(environment: Path, text_file: Path, tmp_path: Path) -> None:
    """Each command does its work in another folder than the sources', and speaks of nothing that only a clone has."""
    write_source(tmp_path / "model")
    shutil.copy(text_file, tmp_path / "text.txt")
    said = []

    def matquant(*arguments: str) -> str:
        done = subprocess.run(
            [str(environment / "bin" / "matquant"), *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout + done.stderr)
        return done.stdout

    assert matquant("--version") == f"matquant {vllm_matquant.__version__}\n"
    small = ("--samples", "4", "--sequence-length", "24")
    matquant("quantize", "model", "--output", "nested", "--bits", "2,8", "--method", "rtn", *small)
    matquant("search", "nested", "--budget", "4", "--sensitivity-samples", "4", "--steps", "1", *small)
    quality = ("evaluate", "nested", "--reference", "model", "--text", "text.txt", "--recipes", "all", *small)
    matquant(*quality, "--json", "quality.json")
    assert matquant("verify", "nested").endswith("nested: sound\n")
    kernel = ("--shapes", "64x96", "--bits", "2", "--batch", "1", "--threads", "1", "--peers", "none")
    matquant("bench", "kernel", *kernel, "--plot", "kernel.png")
    matquant("plot", "quality.json", "--output", "trade.png")
    assert {row["bits"] for row in json.loads((tmp_path / "quality.json").read_text())} > {2, 8}
    said.append(run_python(PRINT_HELP, python=str(environment / "bin" / "python"), cwd=tmp_path))
    assert said[-1].count("usage: matquant ") == len(COMMANDS) + 1
    texts = [*said, *((tmp_path / "nested" / name).read_text() for name in ("README.md", "report/index.html"))]
    assert "matquant quantize model --output nested --bits 2,8" in texts[-2]
    assert "matquant quantize model --output nested --bits 2,8" in texts[-1]
    for text in texts:
        assert not ONLY_IN_A_CLONE.search(text)


def test_texts_of_the_package_name_nothing_that_only_a_clone_has() -> None:
    """What is printed or written: every string but docstrings, and the templates."""
    found = []
    for source in PACKAGE.rglob("*.py"):
        module = ast.parse(source.read_text())
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
        docstrings = {id(node.body[0].value) for node in ast.walk(module)
                      if isinstance(node, documented) and ast.get_docstring(node) is not None}  # fmt: skip
        for node in ast.walk(module):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                found += [f"{source.name}: {match}" for match in ONLY_IN_A_CLONE.findall(node.value)]
    for template in (*PACKAGE.rglob("*.md"), *PACKAGE.rglob("*.html")):
        found += [f"{template.name}: {match}" for match in ONLY_IN_A_CLONE.findall(template.read_text())]
    assert not found
