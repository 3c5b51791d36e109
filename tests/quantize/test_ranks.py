"""Several processes that share the work make the model that one makes, but for the rounding of sums."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.quantize.rank_runs import BLOCKS
from vllm_matquant.checkpoint.decoder import AFFINE_INT8
from vllm_matquant.checkpoint.reader import open_checkpoint
from vllm_matquant.checkpoint.verify import verify
from vllm_matquant.quantize.nested import Nested
from vllm_matquant.quantize.ranks import own_device, own_rows, spread

WIDTHS = (2, 3, 8)
# Of the distance between the weights of several processes and of one, relative to their norm: three of a layer's codes
# moved made 0.03 at 2 bits. Hessians of a part of the text move weights further.
LIMIT = 0.05
# Another entry of a codebook moves all the fours that have it; at 2 bits 0.06, of an error of 0.4.
CODEBOOK_LIMIT = 0.12


@dataclass(frozen=True)
class Runs:
    """What a module such as :mod:`tests.quantize.rank_runs` left."""

    folder: Path
    codes: dict[str, list[int | None]]

    def words(self, name: str, rank: int = 0) -> str:
        return (self.folder / f"{name}.{rank}.txt").read_text()

    def report(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / name / "report" / "report.json").read_text())

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        files = sorted((self.folder / name).glob("*.safetensors"))
        assert files
        return {key: tensor for file in files for key, tensor in load_file(file).items()}


def run_ranks(module: str, folder: Path, text_file: Path, root: Path) -> Runs:
    """Run a module that leaves what :class:`Runs` reads."""
    process = subprocess.run(
        [sys.executable, "-m", module, folder, text_file],
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return Runs(folder, json.loads((folder / "results.json").read_text()))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, text_file: Path, request: pytest.FixtureRequest) -> Runs:
    return run_ranks("tests.quantize.rank_runs", tmp_path_factory.mktemp("ranks"), text_file, request.config.rootpath)


def assert_same_files(runs: Runs, left: str, right: str) -> None:
    first, second = runs.tensors(left), runs.tensors(right)
    assert list(first) == list(second)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize(
    ("name", "alone"),
    [
        ("two", "one"),
        ("three", "one"),
        ("rtn_three", "rtn_one"),
        ("matgptq_three", "matgptq_one"),
        ("embeddings_three", "embeddings_one"),
        ("codebooks_two", "codebooks_one"),
    ],
)
def test_close_to_one_process(runs: Runs, name: str, alone: str) -> None:
    """Weights are nearly all the same: another rounding of a sum moves few codes."""
    assert runs.codes[name] == [0] * len(runs.codes[name]), runs.words(name)
    assert all(result.passed for result in verify(runs.folder / name))
    for width in WIDTHS:
        together, expected = (
            dict(checkpoint.weights(checkpoint.slice(width)))
            for checkpoint in (open_checkpoint(runs.folder / which) for which in (name, alone))
        )
        assert list(together) == list(expected)
        for layer, weight in expected.items():
            distance = (together[layer].float() - weight.float()).norm() / weight.float().norm()
            assert distance < (CODEBOOK_LIMIT if "codebooks" in name else LIMIT), (layer, width, float(distance))


@pytest.mark.parametrize(
    ("name", "alone"),
    [("two", "one"), ("three", "one"), ("embeddings_three", "embeddings_one"), ("codebooks_two", "codebooks_one")],
)
def test_measured_as_in_one_process(runs: Runs, name: str, alone: str) -> None:
    """Perplexity and divergence come from all held-out windows, layers' errors from all rows."""
    one, other = runs.report(alone), runs.report(name)
    slack, floor = (10, 2e-6) if "codebooks" in name else (1, 1e-12)
    for row, expected in zip(other["quality"], one["quality"], strict=True):
        assert row == pytest.approx(expected, rel=0.01 * slack)
    for layer, expected in zip(other["layers"], one["layers"], strict=True):
        assert layer["errors"] == pytest.approx(expected["errors"], rel=0.02 * slack, abs=floor)


def test_ranks_train_the_same_weights(runs: Runs) -> None:
    """They see other windows, but take the same steps."""
    first, second = (re.findall(r"trained \S+ \w+", runs.words("tuned_again", rank)) for rank in (0, 1))
    assert len(first) == 7 * BLOCKS
    assert first == second


@pytest.mark.parametrize("name", ["tuned", "scaled"])
def test_training_is_about_as_good_as_in_one_process(runs: Runs, name: str) -> None:
    assert runs.codes[f"{name}_two"] == [0, 0], runs.words(f"{name}_two")
    assert all(result.passed for result in verify(runs.folder / f"{name}_two"))
    one, two = runs.report(f"{name}_one")["quality"], runs.report(f"{name}_two")["quality"]
    for row, expected in zip(two, one, strict=True):
        assert row["kl"] < 1.5 * expected["kl"], row["bits"]


@pytest.mark.parametrize(
    ("name", "again"),
    [
        ("two", "again"),
        ("tuned_two", "tuned_again"),
        ("scaled_two", "scaled_again"),
        ("codebooks_two", "codebooks_again"),
    ],
)
def test_same_bytes_twice(runs: Runs, name: str, again: str) -> None:
    assert_same_files(runs, name, again)


def test_resumed_after_a_rank_was_killed(runs: Runs) -> None:
    assert runs.codes["killed"] == [1, -signal.SIGKILL]
    assert "rank 0 lost another" in runs.words("killed")
    assert f"1 of {BLOCKS} blocks are finished and kept, for --resume" in runs.words("killed")
    assert runs.codes["other_count"] == [1]
    assert "ranks: found 1, expected 2" in runs.words("other_count")
    assert runs.codes["resumed"] == [0, 0]
    assert_same_files(runs, "killed", "two")


def test_fewer_windows_than_ranks(runs: Runs) -> None:
    assert runs.codes["few_windows"] == [1, 1, 1]
    for rank in range(3):
        assert "samples: found 2, expected at least one for each of 3 ranks" in runs.words("few_windows", rank)
    assert not (runs.folder / "few_windows").exists()


def test_error_of_one_rank_ends_all(runs: Runs) -> None:
    assert runs.codes["damaged_source"] == [1, 1]
    assert "found NaN or infinity, expected finite weights" in runs.words("damaged_source")
    assert "(rank 1): rank 1 lost another" in runs.words("damaged_source", 1)
    assert not (runs.folder / "damaged_source").exists()


def test_only_the_first_rank_speaks(runs: Runs) -> None:
    assert "offers 2, 3, 8 bits" in runs.words("two")
    assert "quantizing" in runs.words("two")
    assert runs.words("dry").splitlines()[-1] == "the plan"  # after what is said of the source
    for name in ("two", "dry"):
        assert runs.words(name, 1) == ""


def test_rank_without_rows() -> None:
    """Of a layer with fewer rows than there are ranks."""
    layer = Nested(WIDTHS).quantize(torch.empty(0, 64), torch.eye(64), 32, AFFINE_INT8)
    assert layer.codes.shape == (0, 64)
    assert layer.decoders[2].parts["centre"].shape == (0, 2)


def test_fewer_rows_than_ranks(runs: Runs) -> None:
    for rank in range(3):
        assert runs.words("few_rows", rank) == "[[1, 2], [3, 4]]\n"


def test_ranks_with_different_work(runs: Runs) -> None:
    assert runs.codes["other_method"] == [1, 1]
    assert any("the ranks have other settings or texts" in runs.words("other_method", rank) for rank in (0, 1))
    assert not (runs.folder / "other_method").exists()


def test_one_rank_has_everything() -> None:
    windows = torch.arange(5)
    assert torch.equal(spread(windows), windows)
    assert own_rows(7) == slice(0, 7)
    assert own_device("cuda") == "cuda"
