"""What a plan foresees, against what a training does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.quantize.tiny_sources import write_source
from tests.train.conftest import SMALL, make_parent
from vllm_matquant.checkpoint.errors import OutputError
from vllm_matquant.cli import main
from vllm_matquant.jobs.train import Train
from vllm_matquant.measure.peak import PeakBytes
from vllm_matquant.quantize.terms import trained_widths
from vllm_matquant.train import pipeline
from vllm_matquant.train import plan as plan_module
from vllm_matquant.train.loop import Training
from vllm_matquant.train.model import load_model
from vllm_matquant.train.optimizer import Optimizer
from vllm_matquant.train.pipeline import run_widths, state_bytes, train
from vllm_matquant.train.state import TrainingFolder


def job_of(parent: Path, source: Path, text: Path, output: Path, **options: Any) -> Train:
    return Train(parent, source, output, text=text, **SMALL | options)


def measured_bytes(job: Train) -> int:
    """The most that tensors take while a model is trained for two steps."""
    work = job._work()
    settings = work.settings
    model = load_model(
        work.source, work.parent, trained_widths(settings.terms), run_widths(work), settings.dtype, settings.form
    )
    if settings.gradient_checkpointing:
        model.keep_no_activations()
    kept = sum(tensor.nbytes for tensor in (*model.model.parameters(), *model.model.buffers()))
    with PeakBytes() as peak:
        optimizer = Optimizer(model.parameters(), settings)
        list(Training(model, optimizer, work.tokens, replace(settings, steps=2)).steps())
    return kept + peak.peak


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("llama", {"terms": "8,4,2,8->2"}),
        ("llama", {"terms": "2", "precision": "bf16", "batch": 4}),
        ("llama", {"terms": "8,2", "gradient_checkpointing": True, "sequence_length": 64}),
        ("qwen3", {"terms": "8:text,2", "accumulate": 3}),
        ("gemma2", {"terms": "4->2", "batch": 1}),
        ("llama", {"terms": "8,2", "form": "rounded"}),
    ],
)
def test_memory(model_type: str, options: dict[str, Any], text_file: Path, tmp_path: Path) -> None:
    """Of a model in which no part of the memory is so small that it would not show."""
    source = write_source(tmp_path / "source", model_type, hidden_size=128, intermediate_size=256)
    parent = make_parent(source, tmp_path / "parent", "--bits", "2,4,8", "--group-size", "32")
    job = job_of(parent, source, text_file, tmp_path / "out", **options)
    plan = job.plan()
    assert not (tmp_path / "out").exists()
    assert sum(plan.memory.values()) == pytest.approx(measured_bytes(job), rel=0.15)
    assert state_bytes(job._work().parent, job._settings()) == 12 * plan.trained
    assert plan.memory["gradients"] == plan.memory["positions"] == 4 * plan.trained


def test_disk_and_counts(parent: Path, source: Path, short_text: Path, tmp_path: Path) -> None:
    job = job_of(parent, source, short_text, tmp_path / "out", checkpoint_every=3)
    plan, states = job.plan(), []
    save = TrainingFolder.save

    def measured(self: TrainingFolder, *given: Any) -> None:
        save(self, *given)
        states.append(sum(path.stat().st_size for path in self.path.rglob("*.safetensors")))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(TrainingFolder, "save", measured)
        train(job._work())
    state = state_bytes(job._work().parent, job._settings())
    assert states == [pytest.approx(state, rel=0.03)] * 2
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert plan.output == pytest.approx(written, rel=0.01)
    assert plan.disk == state + max(state, plan.output)
    assert (plan.steps, plan.tokens) == (6, 6 * 2 * 32)
    assert plan.weights == 73_728
    assert plan.trained == plan.weights + 3 * 2 * plan.weights // 32


def test_the_command(parent: Path, source: Path, short_text: Path, tmp_path: Path, capsys: Any) -> None:
    given = [str(parent), "--source", str(source), "--output", str(tmp_path / "out"), "--text", str(short_text)]
    options = ["--sequence-length", "32", "--batch", "2", "--steps", "20", "--dry-run"]
    assert main(["train", *given, *options]) == 0
    said = capsys.readouterr().out
    assert "positions of 73,728 weights" in said
    assert "20, of 1,280 tokens in all" in said
    assert "activations and work" in said
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_too_small(
    parent: Path, source: Path, short_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (plan_module, pipeline):
        monkeypatch.setattr(module, "free_bytes", lambda *_: 1000)
    job = job_of(parent, source, short_text, tmp_path / "out")
    plan = job.plan()
    assert "NOT ENOUGH" in str(plan)
    for attempt in (lambda: job.check_plan(plan), job.run):
        with pytest.raises(
            OutputError, match=r"disk: found 1,000 bytes free, expected at least .*Write to another disk"
        ):
            attempt()
    assert not (tmp_path / "out").exists()


def test_refuses_what_the_run_refuses(parent: Path, source: Path, short_text: Path) -> None:
    with pytest.raises(OutputError, match="no files of a checkpoint"):
        job_of(parent, source, short_text, parent).plan()
