"""The rows of MatQuant's tables and its Mix'n'Match, made of a tiny model by commands that run in this process."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import figure_tables
import matquant_figures
import mix_n_match
import paper_rows
import pytest
import results_folder
import slice_figures
from matplotlib.figure import Figure

from vllm_matquant.checkpoint.reader import open_checkpoint
from vllm_matquant.checkpoint.recipe import Recipe
from vllm_matquant.checkpoint.recipe_store import add_recipes
from vllm_matquant.checkpoint.spec import WIDTHS
from vllm_matquant.cli import build_parser, main
from vllm_matquant.quantize.methods import METHODS, with_settings
from vllm_matquant.research.shapes import SHAPES
from vllm_matquant.train.settings import TrainingSettings

EFFORT = ["--group-size", "32", "--samples", "3", "--sequence-length", "20", "--setting", "clipping.iterations=2"]
EFFORT += ["--steps", "2", "--batch", "2", "--training-length", "24", "--alone", "2,4"]
HELD_OUT = ["--held-out-samples", "4", "--held-out-length", "24"]
MADE = "omniquant,matquant-omni-from-8,qat,nested"


def run_here(command: Sequence[str], stdout: Any, **_: object) -> subprocess.CompletedProcess[str]:
    """Run a command of matquant in this process."""
    assert command[1:3] == ["-m", "vllm_matquant"]
    try:
        status = main(command[3:])
    except SystemExit as stop:
        status = int(stop.code or 0)
    return subprocess.CompletedProcess(command, status)


@pytest.fixture(scope="module")
def in_process() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results_folder.subprocess, "run", run_here)
        yield


@pytest.fixture(scope="module")
def made(in_process: None, source: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a few rows, measured on one text; not to be changed."""
    folder = tmp_path_factory.mktemp("figures") / "results"
    assert run(source, text_file, folder, "--rows", MADE, "--mix", "nested", "--mix-bits", "3,3.5,5,6") == 0
    return folder


def run(source: Path, text: Path, folder: Path, *arguments: object) -> int:
    given = [source, "--text", text, "--output", folder, *EFFORT, *HELD_OUT, *arguments]
    return matquant_figures.main([*map(str, given)])


def effort(**changes: Any) -> paper_rows.Effort:
    options = matquant_figures.build_parser().parse_args(["m", "--text", "t", "--output", "o", *EFFORT])
    return paper_rows.Effort(**vars(matquant_figures.effort_of(options, Path("m"))) | changes)


def test_rows(made: Path, source: Path, text_file: Path, tmp_path: Path) -> None:
    rows = json.loads((made / "figures.json").read_text())["rows"]
    assert [(row["row"], row["bits"]) for row in rows] == [
        *(("omniquant", bits) for bits in (2, 4)),
        *(("matquant-omni-from-8", bits) for bits in WIDTHS),
        *(("qat", bits) for bits in (2, 4)),
        *(("nested", bits) for bits in WIDTHS),
    ]
    for row in rows:
        assert row["text"] == "text.txt"
        assert row["tokens"] == 4 * 23
        assert row["gap"] == pytest.approx(math.log(row["perplexity"] / row["reference_perplexity"]))
        assert row["trained"] == (row["row"] != "matquant-omni-from-8" or row["bits"] in (2, 4, 8))
    learned = {row["row"]: row["learned_tokens"] for row in rows}
    # Two models of three windows; one; two of two steps of two windows each, whose parents read no text; one.
    assert learned == {"omniquant": 120, "matquant-omni-from-8": 60, "qat": 2 * 2 * 2 * 24, "nested": 60}
    seconds = {name: json.loads((made / name / "record.json").read_text())["seconds"] for name in ("qat-2", "rtn-2")}
    seconds |= {name: json.loads((made / name / "record.json").read_text())["seconds"] for name in ("qat-4", "rtn-4")}
    assert next(row["seconds"] for row in rows if row["row"] == "qat") == pytest.approx(sum(seconds.values()))
    evaluated = tmp_path / "rows.json"
    arguments = ["--reference", str(source), "--text", str(text_file), "--json", str(evaluated)]
    main(["evaluate", str(made / "nested"), *arguments, "--samples", "4", "--sequence-length", "24"])
    of_nested = [row for row in rows if row["row"] == "nested"]
    for expected, found in zip(json.loads(evaluated.read_text()), of_nested, strict=True):
        for name in ("bits", "perplexity", "reference_perplexity", "kl", "tokens"):
            assert found[name] == expected[name]


def test_mixes(made: Path) -> None:
    found = json.loads((made / "figures.json").read_text())
    mixes = found["mixes"]
    assert [mix["average_bits"] for mix in mixes if mix["shape"] == "uniform"] == list(WIDTHS)
    uniform = {mix["average_bits"]: mix["kl"] for mix in mixes if mix["shape"] == "uniform"}
    assert uniform == {row["bits"]: row["kl"] for row in found["rows"] if row["row"] == "nested"}
    assert {mix["shape"] for mix in mixes} == {"uniform", *SHAPES}
    # Two blocks of 2, 4 or 8 bits each; 3.5 bits allow no other widths than 3 do.
    assert [mix["average_bits"] for mix in mixes if mix["shape"] == "increasing"] == [3.0, 5.0, 6.0]
    assert (made / "mix-n-match.png").read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.parametrize("blocks", [1, 3, 7, 30])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: str, blocks: int) -> None:
    layers = {
        f"model.layers.{block}.{name}": (8, size) for block in range(blocks) for name, size in (("a", 4), ("b", 9))
    }
    for most in (2, 2.5, 3, 4.7, 6, 8):
        widths = mix_n_match.block_widths(shape, layers, most)
        assert list(widths) == list(layers)
        chosen = [widths[f"model.layers.{block}.a"] for block in range(blocks)]
        assert chosen == [widths[f"model.layers.{block}.b"] for block in range(blocks)]
        assert set(chosen) <= {2, 4, 8}
        assert most - (6 * 2 / blocks) < sum(chosen) / blocks <= most
        middle = blocks // 2
        if shape in ("pyramid", "reverse-pyramid"):
            first, last = chosen[: middle + 1], chosen[middle:]
            rising = shape == "pyramid"
            assert first == sorted(first, reverse=not rising)
            assert last == sorted(last, reverse=rising)
        else:
            assert chosen == sorted(chosen, reverse=shape == "decreasing")


def test_recipes_of_a_search_are_shown(
    made: Path, source: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "results"
    shutil.copytree(made, folder)
    checkpoint = open_checkpoint(folder / "nested")
    widths = {layer: 3 + index % 2 for index, layer in enumerate(checkpoint.layers)}
    hand_made = Recipe("pyramid-3.5-bits", widths | {next(iter(widths)): 8})
    add_recipes(checkpoint, [Recipe("3.5-bits", widths, origin={"budget": "3.5"}), hand_made])
    measured: list[str] = []
    compare = slice_figures.compare

    def noted(reference: Path, tokens: Any, layers: Any, candidates: Any) -> Iterator[dict[str, Any]]:
        return compare(reference, tokens, layers, ((measured.append(name) or name, each) for name, each in candidates))

    monkeypatch.setattr(slice_figures, "compare", noted)
    source, text = source, text_file
    moved = ["--rows", "nested", "--mix", "nested", "--mix-bits", "3,5,6"]
    assert run(source, text, folder, *moved) == 0
    mixes = json.loads((folder / "figures.json").read_text())["mixes"]
    assert [mix["average_bits"] for mix in mixes if mix["shape"] == "searched"] == [
        pytest.approx(checkpoint.slice(widths=widths).average_bits)
    ]
    assert len(measured) == 1


def test_another_run_makes_and_measures_what_is_missing(
    made: Path, source: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "results"
    shutil.copytree(made, folder)
    (folder / "omniquant-4").rename(folder / ".omniquant-4.unfinished")  # of a run that was killed
    told: list[str] = []
    fill = results_folder.fill
    monkeypatch.setattr(matquant_figures, "fill", lambda name, *rest: told.append(name) or fill(name, *rest))
    assert run(source, text_file, folder, "--rows", "omniquant,nested", "--bits", "2,4") == 0
    assert told == ["omniquant-4"]
    rows = json.loads((folder / "figures.json").read_text())["rows"]
    before = json.loads((made / "figures.json").read_text())["rows"]
    for row in rows:
        expected = next(each for each in before if (each["row"], each["bits"]) == (row["row"], row["bits"]))
        assert {**row, "seconds": 0} == {**expected, "seconds": 0}
    asked: list[list[str]] = []

    def noted(reference: Path, tokens: Any, layers: Any, candidates: Any) -> Iterator[dict[str, Any]]:
        asked.append(names := [name for name, _ in candidates])
        return iter([{"perplexity": 3.0, "reference_perplexity": 2.0, "kl": 0.5, "tokens": 92}] * len(names))

    monkeypatch.setattr(slice_figures, "compare", noted)
    assert run(source, text_file, folder, "--rows", "omniquant,nested") == 0
    assert (told, asked) == (["omniquant-4"], [])
    shutil.rmtree(folder / "omniquant-2")  # to be made anew, maybe by other code
    assert run(source, text_file, folder, "--rows", "omniquant,nested") == 0
    assert (told, asked) == (["omniquant-4", "omniquant-2"], [["omniquant, 2 bits"]])
    assert run(source, text_file, folder, "--rows", "omniquant", "--bits", "2", "--held-out-samples", "3") == 0
    assert asked[1:] == [["omniquant, 2 bits"]]


def test_dry_run(made: Path, source: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(source, text_file, tmp_path / "none", "--rows", "nested-trained-and-8", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "nested: to make, learns from 60 tokens" in said
    assert "nested-trained-and-8: to make, learns from 96 tokens" in said
    assert "--terms 8,4,2,8-\\>2" in said or "--terms '8,4,2,8->2' --weights 0.1,0.1,1,1 --steps 2" in said
    assert not (tmp_path / "none").exists()
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    assert run(source, text_file, made, "--rows", "omniquant", "--mix-bits", "3", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "omniquant-2: there already" in said
    assert "omniquant: measured at 2, 4 bits" in said
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before


@pytest.mark.parametrize("name", paper_rows.ROWS)
def test_commands_of_every_row(name: str) -> None:
    """Each can be parsed, and says what its row promises."""
    row = paper_rows.ROWS[name](effort(calibration="hf:x", texts=["a.txt", "b.txt"]))
    assert row.name == name
    assert set(row.trained) <= set(row.models)
    for model in row.lineages:
        command = model.command(Path("/out"), Path("/out/folder"))[3:]
        options = vars(build_parser("", command).parse_args(command))
        assert str(options["output"]) == "/out/folder"
        if model.parent:
            assert options["parent"] == Path("/out") / model.parent.name
            assert options["text"] == ["a.txt", "b.txt"]
            assert (options["form"] == "native") == name.startswith("nested")
            settings = TrainingSettings(options["terms"], options["weights"], options["steps"], options["batch"])
            assert settings.windows * settings.steps * options["sequence_length"] == model.tokens == 96
        else:
            method = with_settings(METHODS[options["method"]](options["bits"]), options["setting"] or ())
            assert model.tokens == (60 if method.needs_calibration else 0)
    if len(row.models) == len(WIDTHS) and name not in METHODS:
        words = row.models[2].options
        settings = dict(part.split("=") for part in words if part.startswith("terms="))
        loss = settings.get("terms") or words[words.index("--terms") + 1]
        expected = {"sliced": "8", "from-8": "8,4,8->2", "and-8": "8,4,2,8->2", "single": "2"}
        ending = next((text for part, text in expected.items() if name.endswith(part)), "8,4,2")
        assert loss == ending


def test_the_papers_loss_of_a_training_is_the_texts() -> None:
    (*_, model) = paper_rows.ROWS["matquant-qat-and-8"](effort(learn_text=True, wide_weight=0.25)).lineages
    options = dict(zip(model.options[::2], model.options[1::2], strict=True))
    assert options["--terms"] == "8:text,4:text,2:text,8->2"
    assert options["--weights"] == "0.25,0.25,1,1"


def test_a_model_that_could_not_be_made(
    made: Path, source: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def failing(command: Sequence[str], stdout: Any, **_: object) -> subprocess.CompletedProcess[str]:
        stdout.write(b"no room\n")
        return subprocess.CompletedProcess(command, 1)

    folder = tmp_path / "results"
    shutil.copytree(made, folder)
    monkeypatch.setattr(results_folder.subprocess, "run", failing)
    assert run(source, text_file, folder, "--rows", "qat-sliced,nested", "--bits", "2") == 1
    said = capsys.readouterr().err
    assert f"the end of {folder / 'rtn.log'}:\nno room" in said
    assert "qat-sliced: found no rtn, expected it to train" in said
    assert [row["row"] for row in json.loads((folder / "figures.json").read_text())["rows"]] == ["nested"]
    with pytest.raises(SystemExit) as stop:
        run(source, text_file, tmp_path / "none", "--rows", "matquant-omni")
    assert stop.value.code == 1
    assert capsys.readouterr().err.endswith("no row could be made\n")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--rows", "nested,magic"], 2, "argument --rows: found 'magic', expected some of omniquant, "),
        (["--mix", "magic"], 2, "argument --mix: found 'magic'"),
        (["--rows", "nested", "--mix", "matquant-omni"], 1, "--mix: found matquant-omni, expected one of --rows (nes"),
        (["--rows", "omniquant", "--mix", "omniquant"], 1, "--mix: found omniquant, expected a row with one parent of"),
        (["--rows", "nested", "--mix-bits", "1.5"], 1, "--mix-bits: found 1.5, expected 2 to 8"),
        (["--rows", "nested", "--setting", "x=1"], 1, "--setting: found x=1, expected NAME=VALUE with one"),
        (["--rows", "omniquant", "--setting", "terms=2"], 1, "--setting: found terms=2, expected NAME=VALUE with one"),
        (["--rows", "omniquant", "--setting", "clipping.rate=x"], 1, "setting clipping.rate: found 'x'"),
        (["--rows", "qat", "--code-rate", "-1"], 1, "code_rate: found -1.0, expected a number from 0 up"),
        (["--rows", "omniquant", "--wide-weight", "0"], 1, "--wide-weight: found 0.0, expected a positive number"),
        (["--rows", "omniquant", "--samples", "4"], 1, "omniquant-2/record.json: made_by: found quantize"),
        (["--rows", "omniquant", "--calibration", "TEXT"], 1, "omniquant-2/record.json: made_by: found quantize"),
        (["--rows", "omniquant", "--calibration", "nowhere.txt"], 1, "nowhere.txt: found no such file"),
        (["--rows", "qat", "--training-text", "nowhere.txt"], 1, "nowhere.txt: found no such file"),
        (["--rows", "qat", "--steps", "3"], 1, "; remove "),
    ],
)  # fmt: skip
def test_refusals_before_any_work(
    made: Path,
    source: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    message: str,
) -> None:
    monkeypatch.setattr(matquant_figures, "make", None)
    before = {path: path.read_bytes() for path in made.glob("*.*")}
    with pytest.raises(SystemExit) as stop:
        run(source, text_file, made, *(str(text_file) if each == "TEXT" else each for each in arguments))
    assert stop.value.code == status
    assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in made.glob("*.*")} == before


def test_a_text_that_has_changed(
    in_process: None, source: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "calibration.txt"
    text.write_text("The cat sat on the mat and the other cat thought that it had. " * 20)
    arguments = ["--rows", "omniquant", "--alone", "2", "--calibration", text]
    assert run(source, text_file, tmp_path / "out", *arguments) == 0
    text.write_text("A house of hats. " * 80)
    with pytest.raises(SystemExit):
        run(source, text_file, tmp_path / "out", *arguments)
    assert "record.json: tokens_sha256: found" in capsys.readouterr().err


def test_texts_of_the_same_name(source: Path, text_file: Path, tmp_path: Path, capsys: Any) -> None:
    other = tmp_path / text_file.name
    other.write_text("x")
    with pytest.raises(SystemExit):
        matquant_figures.main([str(source), "--text", str(text_file), str(other), "--output", str(tmp_path / "out")])
    assert "argument --text: found" in capsys.readouterr().err


QUALITY = {"text": "t.txt", "tokens": 1234, "reference_perplexity": math.e, "perplexity": 3.0, "bits_per_weight": 2.5}
ROWS = [
    {"row": "qat", "bits": 2, "trained": True, "learned_tokens": 9000, "seconds": 7, "kl": 0.5, "gap": 0.25} | QUALITY,
    {"row": "own", "bits": 2, "trained": True, "learned_tokens": 60, "seconds": 3, "kl": 0.25, "gap": 0.125} | QUALITY,
    {"row": "own", "bits": 3, "trained": False, "learned_tokens": 60, "seconds": 3, "kl": 0.125, "gap": -0.1} | QUALITY,
]  # fmt: skip
MIXES = [
    {"row": "own", "shape": "uniform", "average_bits": 4, "kl": 0.0625, "gap": 0.03} | QUALITY,
    {"row": "own", "shape": "pyramid", "average_bits": 3.5, "kl": 0.09, "gap": 0.04} | QUALITY,
    {"row": "own", "shape": "uniform", "average_bits": 2, "kl": 0.25, "gap": 0.125} | QUALITY,
]


def test_tables() -> None:
    measured = (
        "t.txt, 1,234 tokens: KL divergence from the source model, in parentheses log-perplexity above its 1.0000, in "
        "nats."
    )
    assert figure_tables.row_tables(ROWS) == (
        f"{measured} *: the row's loss does not name this width.\n"
        """
| | 2 bits | 3 bits | tokens learned from | seconds |
|---|---|---|---|---|
| qat | 0.5 (0.2500) |  | 9,000 | 7 |
| own | 0.25 (0.1250) | 0.125 (-0.1000)* | 60 | 3 |
"""
    )
    assert figure_tables.mix_tables(MIXES[:2]) == (
        f"Mix'n'Match of own. {measured}\n"
        """
| shape | average bits | bits per weight as stored | |
|---|---|---|---|
| uniform | 4.000 | 2.500 | 0.0625 (0.0300) |
| pyramid | 3.500 | 2.500 | 0.09 (0.0400) |
"""
    )


def test_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *rest, **more: saved.append(self) or save(self, *rest, **more))
    figure_tables.draw_rows([*ROWS, ROWS[0] | {"text": "u.txt"}], tmp_path / "rows.png")
    figure_tables.draw_mixes(MIXES, tmp_path / "mixes.png")
    for name in ("rows", "mixes"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n")
    (first, second), (mixed,) = (figure.axes for figure in saved)
    assert [panel.get_title() for panel in (first, second, mixed)] == ["t.txt", "u.txt", "own, t.txt"]

    def lines(panel: Any) -> dict[str, list[list[float]]]:
        return {line.get_label(): line.get_xydata().tolist() for line in panel.lines if line.get_label()[0] != "_"}

    assert lines(first) == {"qat": [[2, 0.5]], "own": [[2, 0.25], [3, 0.125]]}
    assert lines(mixed) == {"uniform": [[2, 0.25], [4, 0.0625]], "pyramid": [[3.5, 0.09]]}
    hollow = [line.get_xydata().tolist() for line in first.lines if line.get_markerfacecolor() == "white"]
    assert hollow == [[[3, 0.125]]]
    assert first.get_yscale() == mixed.get_yscale() == "log"
