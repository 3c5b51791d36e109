"""The command line of the search, on a tiny model."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from vllm_matquant.bench import kernel
from vllm_matquant.checkpoint.reader import open_checkpoint
from vllm_matquant.checkpoint.recipe import average_bits
from vllm_matquant.checkpoint.verify import verify
from vllm_matquant.cli import main
from vllm_matquant.jobs import search as search_job
from vllm_matquant.jobs import search_run
from vllm_matquant.jobs.search import STATE_FOLDER
from vllm_matquant.jobs.search_inputs import DECODER_SAMPLES
from vllm_matquant.measure.evaluate import evaluate
from vllm_matquant.measure.sliced import SlicedModel
from vllm_matquant.measure.windows import load_tokenizer, split_windows
from vllm_matquant.research.law import Observation, fit_law
from vllm_matquant.search.divergence import Divergence

SMALL = ["--samples", "3", "--sequence-length", "24", "--sensitivity-samples", "9", "--steps", "1"]


@pytest.fixture
def folder(nested: Path, tmp_path: Path) -> Path:
    """A checkpoint of 2, 4 and 8 bits to change."""
    return Path(shutil.copytree(nested, tmp_path / "nested"))


def run(folder: Path, *options: object) -> int:
    return main(["search", str(folder), *SMALL, *map(str, options)])


def refusal(capsys: pytest.CaptureFixture[str], folder: Path, *options: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        run(folder, *options)
    return stop.value.code, capsys.readouterr().err.strip().splitlines()[-1]


def recipe_files(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in (folder / "recipes").iterdir()}  # none has decoders of its own


def test_recipes_come_into_the_checkpoint(
    folder: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = open_checkpoint(folder)
    size = plain.slice(2).resident_bytes + plain.unquantized_bytes() + 2000
    steps = tmp_path / "steps.json"
    budgets = f"2.5,3.0,{size}B"
    options = ["--budget", budgets, "--reference", source, "--shapes", "pyramid", "--method", "both"]
    assert run(folder, *options, "--generations", "1", "--offspring", "2", "--json", steps) == 0
    checkpoint = open_checkpoint(folder)
    recipes = {recipe.name: recipe for recipe in checkpoint.recipes}
    uniform = {f"uniform-{width}" for width in (2, 4, 8)}
    found = {"2.5-bits", "3.0-bits", f"{size}B"}
    assert set(recipes) == uniform | found | {f"pyramid-{name}" for name in found}
    for name, limit in (("2.5-bits", 2.5), ("3.0-bits", 3.0), ("pyramid-3.0-bits", 3.0)):
        assert average_bits(recipes[name].widths, checkpoint.layers) <= limit
    assert checkpoint.slice(f"{size}B").resident_bytes + checkpoint.unquantized_bytes() <= size
    assert all(recipe.kl is not None and recipe.kl >= 0 for recipe in recipes.values())
    assert recipes["2.5-bits"].origin["budget"] == "2.5"
    assert recipes["2.5-bits"].origin["reference"] == source.name
    assert all(result.passed for result in verify(folder))
    assert not (folder / STATE_FOLDER / "journal.jsonl").exists()
    said = capsys.readouterr().out
    for name in ("uniform-4", "2.5-bits first program", "3.0-bits program 1/1", "generation 1/1", "pyramid-2.5-bits"):
        assert name in said
    rows = json.loads(steps.read_text())
    assert rows[-1]["passes"] > rows[0]["passes"] > 0
    assert {"name", "what", "average_bits", "resident_bytes", "kl", "passes", "evaluations"} <= set(rows[0])


@pytest.mark.parametrize("method", ["program", "evolution"])
def test_the_same_search_gives_the_same_bytes_also_after_a_crash(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    options = ["--budget", "3", "--method", method, "--generations", "2", "--offspring", "2"]
    assert run(folder, *options) == 0

    def crash(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(search_job, "add_recipes", crash)
    with pytest.raises(SystemExit, match="130"):
        run(other, *options)
    monkeypatch.undo()
    journal = other / STATE_FOLDER / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[: len(lines) // 2]))
    assert open_checkpoint(other).recipes == []
    assert run(other, *options, "--resume") == 0
    assert recipe_files(other) == recipe_files(folder)
    assert (other / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_codebooks(codebooks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(codebooks, tmp_path / "codebooks"))
    checkpoint = open_checkpoint(folder)
    memory = checkpoint.slice(2).resident_bytes + checkpoint.unquantized_bytes() + 20_000  # a codebook has 2 to 8 KiB
    assert run(folder, "--budget", f"3.0,{memory}B") == 0
    checkpoint = open_checkpoint(folder)
    of_bits, of_bytes = checkpoint.slice("3.0-bits"), checkpoint.slice(f"{memory}B")
    assert of_bits.average_bits <= 3.0
    assert of_bytes.resident_bytes + checkpoint.unquantized_bytes() <= memory
    assert of_bytes.resident_bytes > checkpoint.slice(2).resident_bytes
    assert len(set(of_bits.widths.values())) > 1
    assert all(result.passed for result in verify(folder))


def test_decoders_of_a_recipe_are_those_that_were_measured(
    folder: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after a crash in the training, and in one search of the same widths that keeps the plain decoders."""
    options = ["--budget", "3,4.5", "--reference", source]
    other, plain = (Path(shutil.copytree(folder, tmp_path / name)) for name in ("other", "plain"))
    assert run(folder, *options) == 0
    assert run(plain, *options, "--decoder-samples", "0") == 0
    trained, without = open_checkpoint(folder), open_checkpoint(plain)
    parts = {"samples": (3, DECODER_SAMPLES), "sequence_length": 24, "seed": 0}
    tokens = split_windows(None, load_tokenizer(source), **parts)[0].tokens
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    for name in ("3-bits", "4.5-bits"):
        [recipe] = [recipe for recipe in trained.recipes if recipe.name == name]
        [untrained] = [recipe for recipe in without.recipes if recipe.name == name]
        assert recipe.widths == untrained.widths
        assert (recipe.own_decoders, untrained.own_decoders) == (True, False)
        assert recipe.kl < untrained.kl
        assert recipe.origin["training"]["samples"] == DECODER_SAMPLES
        [row] = evaluate(trained, source, tokens, [trained.slice(recipe)])
        assert row["kl"] == pytest.approx(recipe.kl, rel=0.03)  # the search computes in bfloat16
    sliced = SlicedModel(trained, model)
    assert Divergence(sliced, tokens).of(recipe.widths) == pytest.approx(untrained.kl, rel=1e-4)
    assert all(result.passed for result in verify(folder))

    train, calls = search_run.train_recipe, []

    def crash(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train(*arguments)

    monkeypatch.setattr(search_run, "train_recipe", crash)
    with pytest.raises(SystemExit, match="130"):
        run(other, *options)
    assert run(other, *options, "--resume") == 0
    assert len(calls) == 3
    assert not (other / STATE_FOLDER).exists()
    for path in filter(Path.is_file, folder.rglob("*")):
        assert path.read_bytes() == (other / path.relative_to(folder)).read_bytes(), path


def test_milliseconds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(settings: Any) -> Any:
        [(rows, columns)] = settings.shapes
        for width in settings.widths:
            yield {"bits": width, "seconds": 1e-9 * rows * columns * width}

    monkeypatch.setattr(kernel, "bench_kernel", measure)
    checkpoint = open_checkpoint(folder)
    weights = sum(rows * columns for rows, columns in checkpoint.layers.values())
    limit = 1e-6 * weights * 3
    assert run(folder, "--budget", f"{limit:.6f}ms") == 0
    [recipe] = [recipe for recipe in open_checkpoint(folder).recipes if recipe.name.endswith("ms")]
    assert 2.5 < average_bits(recipe.widths, checkpoint.layers) <= 3.001


def test_a_law_stands_beside_what_was_measured(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    observations = [Observation("m", 10**6, ratio / 10, 64, (0.1 * 2.7**ratio,)) for ratio in range(1, 11)]
    law = tmp_path / "law.json"
    law.write_text(json.dumps({"law": fit_law(observations, 2, 8).to_dict()}))
    assert run(folder, "--budget", "3", "--law", law) == 0
    assert "3: the scaling law predicts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--budget", "1.5"], 2, "found 1.5 bits, expected 2 to 8"),
        (["--budget", "3,3"], 2, "expected each budget once"),
        (["--budget", "3 apples"], 2, "expected bits such as 2.5, a size such as 90MiB"),
        (["--budget", "1kB"], 1, "budget 1kB: found less than the narrowest widths cost, expected at least"),
        (["--budget", "3", "--shapes", "cube"], 2, "expected some of pyramid"),
        (["--budget", "3", "--calibration", "/no/such.txt"], 1, "/no/such.txt"),
        (["--budget", "3", "--reference", "/no/such"], 1, "/no/such"),
        (["--budget", "3", "--law", "/no/such.json"], 1, "such.json"),
        (["--budget", "3", "--decoder-samples", "4"], 1, "--decoder-samples: found 4, expected --reference"),
        (["--budget", "3", "--json", "/no/such/x.json"], 2, "found no folder /no/such"),
    ],
)
def test_refusals(
    folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], status: int, message: str
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != STATE_FOLDER}
    found, said = refusal(capsys, folder, *options)
    assert found == status
    assert message in said
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != STATE_FOLDER}
    assert before == after


def test_a_folder_without_some_planes_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in folder.glob("model-width[5-8]-*"):
        file.unlink()
    status, said = refusal(capsys, folder, "--budget", "3")
    assert status == 1
    assert "found no files of [8] bits" in said


def test_a_dry_run_changes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(folder.rglob("*"))
    assert run(folder, "--budget", "2.5,1MB", "--dry-run") == 0
    assert sorted(folder.rglob("*")) == before
    said = capsys.readouterr().out
    assert "2.5" in said
    assert "1MB" in said


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_what_stops_a_search_is_said_before_it(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, dry: list[str]
) -> None:
    status, said = refusal(capsys, folder, "--budget", "3", "--device", "gpu", *dry)
    assert status == 1
    assert "device: found 'gpu'" in said
    status, said = refusal(capsys, folder, "--budget", "3", "--reference", folder, *dry)
    assert status == 1
    assert "quantization_config: found matquant, expected a model that is not quantized" in said
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder)  # root may write anywhere
    status, said = refusal(capsys, folder, "--budget", "3", *dry)
    assert status == 1
    assert f"found no permission to write to {folder}" in said
    assert not (folder / STATE_FOLDER).exists()
