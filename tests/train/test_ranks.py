"""Several processes that share a training make what one makes, but for the rounding of sums."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.quantize.test_ranks import Runs, run_ranks
from tests.train.test_training import assert_same_files, distance
from vllm_matquant.checkpoint.verify import verify

LIMIT = 0.05  # a position whose derivative is next to nothing may go either way


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, text_file: Path, request: pytest.FixtureRequest) -> Runs:
    return run_ranks("tests.train.rank_runs", tmp_path_factory.mktemp("ranks"), text_file, request.config.rootpath)


@pytest.mark.parametrize(
    ("name", "alone", "parent"),
    [
        ("two", "one", "parent"),
        ("three", "one", "parent"),
        ("embedded_two", "embedded_one", "embedded"),
        ("rounded_two", "rounded_one", "parent"),
    ],
)
def test_close_to_one_process(runs: Runs, name: str, alone: str, parent: str) -> None:
    assert runs.codes[name] == [0] * len(runs.codes[name]), runs.words(name)
    assert all(result.passed for result in verify(runs.folder / name))
    for width in (2, 8):
        apart = distance(runs.folder / name, runs.folder / alone, width)
        assert apart < LIMIT, width
        assert apart < 0.3 * distance(runs.folder / name, runs.folder / parent, width), width


def test_measured_as_in_one_process(runs: Runs) -> None:
    """Windows that are no multiple of the ranks are each measured once, and every rank's codes are counted."""
    one, two = ([line for line in runs.words(name).splitlines() if " KL " in line] for name in ("one", "two"))
    assert len(one) == 3
    assert [line.split(": ")[0] for line in one] == [line.split(": ")[0] for line in two]
    for mine, theirs in zip(one, two, strict=True):
        figures = [[float(part.split()[-1]) for part in line.split(": ")[1].split(",")] for line in (mine, theirs)]
        assert figures[1] == pytest.approx(figures[0], rel=0.1, abs=2e-3)
    shares = [
        float(line.rsplit(" ", 1)[1].rstrip("%"))
        for name in ("one", "two")
        for line in runs.words(name).splitlines()
        if line.startswith("changed codes")
    ]
    assert shares[1] == pytest.approx(shares[0], rel=0.02)


def test_resumed(runs: Runs) -> None:
    assert runs.codes["cut"] == [130, 130], runs.words("cut")
    assert "step 3 of 8 is kept" in runs.words("cut")
    assert runs.codes["other_count"] == [1]
    assert "ranks: found 1, expected 2" in runs.words("other_count")
    assert runs.codes["resumed"] == [0, 0], runs.words("resumed")
    assert_same_files(runs.folder / "cut", runs.folder / "two")
    assert not (runs.folder / "cut" / ".matquant-training").exists()


def test_only_the_first_rank_speaks(runs: Runs) -> None:
    assert "changed codes: " in runs.words("two")
    assert runs.words("two", 1) == ""


def test_a_batch_that_cannot_be_shared_out(runs: Runs) -> None:
    assert runs.codes["odd"] == [1, 1]
    for rank in (0, 1):
        assert "batch: found 3, expected a multiple of the 2 processes" in runs.words("odd", rank)
    assert not (runs.folder / "odd").exists()
