"""Logs for TensorBoard, where its package is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.train.conftest import Run
from vllm_matquant.train.optimizer import Optimizer


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events: Any = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_what_is_logged(train: Run, short_text: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    options: dict[str, Any] = {"terms": "8,2:text", "held_out": short_text, "held_out_samples": 2, "evaluate_every": 4}
    outcome = train(tmp_path / "out", log_folder=tmp_path / "log", **options)
    found = scalars(tmp_path / "log")
    for term in ("8", "2:text"):
        assert [step for step, _ in found[f"loss/{term}"]] == [1, 2, 3, 4, 5, 6]
        assert found[f"loss/{term}"][-1][1] == pytest.approx(outcome.losses[term])
    assert found["rate/codes"][1][1] == pytest.approx(1.0)
    assert found["rate/2"][1][1] == pytest.approx(1e-3)
    assert found["changed codes/2"] == [(6, pytest.approx(outcome.changed[2]))]
    for width in (2, 3, 4, 8):
        assert [step for step, _ in found[f"held-out KL/{width}"]] == [0, 4, 6]
    assert len(found["gradient/norm"]) == 6


def test_a_training_that_goes_on(train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps after the kept state are logged anew; those of the cut training are shown no more."""
    pytest.importorskip("tensorboard")
    step = Optimizer.step

    def limited(self: Optimizer, number: int) -> Any:
        if number == 4:
            raise KeyboardInterrupt
        return step(self, number)

    options: dict[str, Any] = {"log_folder": tmp_path / "log", "checkpoint_every": 3}
    with monkeypatch.context() as patched:
        patched.setattr(Optimizer, "step", limited)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "out", **options)
    train(tmp_path / "out", resume=True, **options)
    assert [number for number, _ in scalars(tmp_path / "log")["loss/2"]] == [1, 2, 3, 4, 5, 6]
