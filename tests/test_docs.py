"""The README and the pages of docs/: links, paths and command lines that a reader can rely on."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vllm_matquant import cli
from vllm_matquant.jobs.job import PlannedJob, arguments_of, is_required
from vllm_matquant.quantize.methods import METHODS, settings_of, with_settings

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
SHOWS_COMMANDS = [
    name for name in NAMES if name.split("/")[:2] in (["README.md"], ["docs", "guide"], ["docs", "reference"])
]
FOLDERS = ("csrc", "docs", "tests", "tools", "vllm_matquant")

_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"`([^`\n]+)`")
_PATH = re.compile(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./*-]*\w")
_SOURCE = re.compile(r"[\w/-]+\.(?:py|cpp|h|cuh|cu|sh|toml)")


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str) -> Iterator[tuple[bool, str]]:
    """(whether it is shown as code, line) of each line: code is indented by four or lies between fences."""
    fenced = shown = False
    after_blank = True
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
            continue
        shown = fenced or (line.startswith("    ") and (after_blank or shown))
        after_blank = not line.strip()
        yield shown, line


def prose(text: str) -> str:
    return "\n".join(line for shown, line in blocks(text) if not shown)


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ +(.*)$", prose(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """The relative links of a page whose file, or heading in it, is not there."""
    broken = []
    for target in _LINK.findall(prose(page.read_text(encoding="utf-8"))):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.is_file() or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
            broken.append(target)
    return broken


def repository_files() -> list[str]:
    built = {"__pycache__", "build", "dist"}
    files = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*") if file.is_file()]
    files += [file for file in ROOT.iterdir() if file.is_file()]
    return [file.relative_to(ROOT).as_posix() for file in files if not built & set(file.parts)]


FILES = repository_files()


def exists(path: str) -> bool:
    """Whether a path, or the end of one, is of the repository; NAME in capitals and * stand for anything."""
    pattern = re.escape(path).replace(r"\*", "[^/]*")
    pattern = re.sub(r"(?<![a-z])[A-Z]{3,}(?![a-z])", "[^/]*", pattern)
    whole = re.compile(rf"(?:.*/)?{pattern}(?:/.*)?")
    return any(whole.fullmatch(file) for file in FILES)


def mentioned_paths(text: str) -> Iterator[str]:
    """What a page names as a file or folder of the repository."""
    yield from _PATH.findall(_LINK.sub("", text))
    for code in _CODE.findall(prose(text)):
        if _SOURCE.fullmatch(code):
            yield code


def command_lines(text: str) -> Iterator[list[str]]:
    """The words of each command line shown that begins with ``matquant`` or ``python tools/``, or runs it by torchrun.

    Brackets around what is optional are taken away, and a lone N is a number.
    """
    code = re.sub(r"\\\n *", "", "\n".join(line for shown, line in blocks(text) if shown))
    for line in code.splitlines():
        line = line.strip()
        if re.match(r"(\w+=\S+ )*torchrun ", line):
            words = shlex.split(line, comments=True)
            words = words[words.index("torchrun") + 3 :]
            words = ["matquant", *words[2:]] if words[:2] == ["-m", "vllm_matquant"] else ["python", *words]
        elif line.startswith(("matquant ", "python tools/")):
            optional = re.sub(r"(?<!\S)\[|\](?=\s|$)", " ", line)
            words = shlex.split(optional, comments=True)
        else:
            continue
        yield ["2" if word == "N" else word for word in words if word != "..."]


class Parsed(Exception):
    """The command line was parsed; carries what was found."""


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[list[str]], argparse.Namespace]:
    """A function that lets the program of a command line parse it, in an empty folder, and do nothing more."""
    monkeypatch.chdir(tmp_path)
    original = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> argparse.Namespace:
        raise Parsed(original(self, args, namespace))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)

    def run(words: list[str]) -> argparse.Namespace:
        program, *arguments = words
        if program == "matquant":
            main = cli.main
        else:
            program, *arguments = arguments
            main = importlib.import_module(Path(program).stem).main
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        with pytest.raises(Parsed) as parsed:
            main()
        return parsed.value.args[0]

    return run


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    assert not broken_links(ROOT / name)


def test_broken_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "there.md").write_text("# One thing, `two`\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](there.md) [b](there.md#one-thing-two) [c](gone.md) [d](there.md#gone) [e](#gone)\n\n    [f](no)\n"
    )
    assert broken_links(page) == ["gone.md", "there.md#gone", "#gone"]


@pytest.mark.parametrize("name", NAMES)
def test_paths_exist(name: str) -> None:
    missing = sorted({path for path in mentioned_paths(text_of(name)) if not exists(path)})
    assert not missing


def test_missing_paths_are_found() -> None:
    text = "`tools/gone.py`, `checkpoint/decoder.py`, `gone.cuh`, csrc/cpu/gemm_NAME.cpp, csrc/*.cpp, `tests/gone`\n"
    assert [path for path in mentioned_paths(text) if not exists(path)] == [
        "tools/gone.py",
        "tests/gone",
        "tools/gone.py",
        "gone.cuh",
    ]


def test_every_page_is_on_the_map() -> None:
    listed = {(ROOT / "docs" / target).resolve() for target in _LINK.findall(text_of("docs/README.md"))}
    assert not set(PAGES[2:]) - listed - {ROOT / "docs" / "README.md"}


@pytest.mark.parametrize("name", SHOWS_COMMANDS)
def test_command_lines_can_be_parsed(name: str, parse: Callable[[list[str]], argparse.Namespace]) -> None:
    for words in command_lines(text_of(name)):
        try:
            options = vars(parse(words))
        except SystemExit:
            pytest.fail(f"cannot be parsed: {shlex.join(words)}")
        if options.get("setting"):
            with_settings(METHODS[options["method"]](options["bits"]), options["setting"])


def test_command_lines_are_found(parse: Callable[[list[str]], argparse.Namespace]) -> None:
    text = """
matquant in prose

    matquant verify DIR   # [a comment]
    matquant evaluate DIR --reference MODEL \\
        --text FILE [--samples N] [--bits 2,4]
    OMP_NUM_THREADS=8 torchrun --nproc-per-node 2 -m vllm_matquant quantize MODEL --output DIR ...
    matquant verify DIR --colour
"""
    *sound, wrong = command_lines(text)
    assert [words[1] for words in sound] == ["verify", "evaluate", "quantize"]
    assert [parse(words).samples for words in sound[1:2]] == [2]
    with pytest.raises(SystemExit):
        parse(wrong)


def sections(text: str) -> dict[str, list[list[str]]]:
    """The rows of the tables below each heading."""
    found: dict[str, list[list[str]]] = {}
    for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        title, _, body = part.partition("\n")
        rows = [line.split("|")[1:-1] for line in body.splitlines() if line.startswith("| `")]
        found[title.strip()] = [[cell.strip() for cell in row] for row in rows]
    return found


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_the_reference_has_every_option(command: str) -> None:
    job = cli.COMMANDS[command].load()
    expected = {
        ("" if its.positional else "--") + field.name.replace("_", "-"): field for field, its in arguments_of(job)
    }
    rows = sections(text_of("docs/reference/commands.md"))[f"matquant {command}"]
    described = {re.split(r"[ `]", row[0].lstrip("`"))[0]: row[1] for row in rows}
    planned = {"--dry-run"} if issubclass(job, PlannedJob) else set()
    assert described.keys() - planned == set(expected)
    assert planned <= described.keys()
    required = {option for option, field in expected.items() if is_required(field)}
    assert {option for option, default in described.items() if default == "required"} == required
    numbers = {option: field.default for option, field in expected.items() if type(field.default) in (int, float)}
    assert {option: described[option] for option in numbers} == {
        option: str(value) for option, value in numbers.items()
    }


@pytest.mark.parametrize(
    ("section", "methods"),
    [
        ("Settings of a method", ("nested", "nested-tuned", "nested-vq", "gptvq")),
        ("Settings of `matquant-omni` and `omniquant`", ("matquant-omni", "omniquant")),
    ],
)
def test_the_reference_has_every_setting_of_a_method(section: str, methods: tuple[str, ...]) -> None:
    rows = sections(text_of("docs/reference/settings.md"))[section]
    for column, name in enumerate(methods, start=1):
        described = {row[0].strip("`"): row[column].replace("empty", "") for row in rows if row[column]}
        expected = dict(settings_of(METHODS[name]((2,) if name in ("gptvq", "omniquant") else (2, 8))))
        assert described == {setting: str(value).lower() for setting, value in expected.items()}


def docstrings(source: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""


def test_docstrings_can_be_read_alone() -> None:
    leaning = re.compile(r"\blikewise\b|\bas said\b|\b(?:as|see) above\b", re.IGNORECASE)
    sources = list((ROOT / "vllm_matquant").rglob("*.py"))
    assert len(sources) > 50
    found = [str(source.relative_to(ROOT)) for source in sources if any(map(leaning.search, docstrings(source)))]
    assert not found
