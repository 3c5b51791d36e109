"""Whole trainings of a tiny model."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.train.conftest import SMALL, Run, make_parent
from vllm_matquant.checkpoint.files import read_json
from vllm_matquant.checkpoint.reader import Checkpoint, open_checkpoint
from vllm_matquant.checkpoint.verify import verify
from vllm_matquant.cli import main
from vllm_matquant.jobs.evaluate import Evaluate
from vllm_matquant.quantize.terms import parse_terms
from vllm_matquant.quantize.training import epochs
from vllm_matquant.train import loop, pipeline
from vllm_matquant.train.latent import NestedWeight
from vllm_matquant.train.optimizer import Optimizer
from vllm_matquant.train.settings import TrainingSettings

LONG = {"steps": 40, "batch": 4, "decoder_rate": 0.01}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    assert files
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_same_files(left: Path, right: Path) -> None:
    first, second = tensors(left), tensors(right)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def distance(left: Path, right: Path, width: int) -> float:
    """Between the weights of two checkpoints at a width, relative to their norm; the largest of all layers."""
    one, other = (open_checkpoint(folder) for folder in (left, right))
    pairs = zip(one.weights(one.slice(width)), other.weights(other.slice(width)), strict=True)
    return max(float((mine - theirs).norm() / theirs.norm()) for (_, mine), (_, theirs) in pairs)


def codes(checkpoint: Checkpoint) -> Iterator[torch.Tensor]:
    return (checkpoint.stored_codes(layer, 8).int() for layer in checkpoint.layers)


@pytest.mark.parametrize("terms", ["2", "2:text", "8->2", "8,4,2", "8,4,8->2", "8,4,2,8->2", "4:text,2"])
def test_the_loss_falls(terms: str, train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, float]] = []
    step = loop.Training._step
    monkeypatch.setattr(
        loop.Training,
        "_step",
        lambda *given: seen.append((found := step(*given)).losses) or found,  # type: ignore
    )
    outcome = train(tmp_path, terms=terms, schedule="linear", **LONG)
    assert outcome.steps == len(seen) == 40
    assert outcome.losses == seen[-1]
    narrow = [str(term) for term in parse_terms(terms) if term.width == 2]
    for name in narrow:
        first, last = (sum(losses[name] for losses in part) for part in (seen[:4], seen[-4:]))
        assert last < (0.97 if "text" in name else 0.8) * first, name
    assert 0 < outcome.changed[2] < 0.5
    assert all(result.passed for result in verify(tmp_path))


def test_codes_nest_and_stay_codes_at_every_step(train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project, steps = NestedWeight.project, []

    def checked(self: NestedWeight, rows: slice = slice(None)) -> None:
        project(self, rows)
        weights = {}
        for width in (2, 4, 8):
            scale, centre = self.decoder(width)
            self.switch.width = width
            decoded = self(torch.zeros(self.codes.shape)).detach()
            expanded = [each.repeat_interleave(32, 1) for each in (scale, centre)]
            weights[width] = ((decoded - expanded[1]) / expanded[0] + (2**width - 1) / 2).round().int()
        assert torch.equal(weights[8], self.parent_codes().int())
        assert torch.equal(weights[8] >> 4, weights[4])
        assert torch.equal(weights[8] >> 6, weights[2])
        steps.append(self)

    monkeypatch.setattr(NestedWeight, "project", checked)
    train(tmp_path, code_rate=20.0)
    assert len(steps) == SMALL["steps"] * 14


def test_widths_that_no_term_names(train: Run, parent: Path, tmp_path: Path) -> None:
    """Their decoders stay, and bits below the widest trained width stay as near to what they were as can be."""
    outcome = train(tmp_path, terms="2", steps=20, code_rate=4.0)
    before, after = open_checkpoint(parent), open_checkpoint(tmp_path)
    assert outcome.changed.keys() == {2}
    moved = 0
    for layer, old, new in zip(before.layers, codes(before), codes(after), strict=True):
        for width in (3, 4, 8):
            for name, part in before.decoder(layer, width).parts.items():
                assert torch.equal(part, after.decoder(layer, width).parts[name])
        lowest = new >> 6 << 6
        assert torch.equal(new, old.clamp(lowest, lowest + 63))
        moved += int((new != old).sum())
    assert moved / sum(each.numel() for each in codes(before)) == pytest.approx(outcome.changed[2])


def test_a_wide_slice_pays_for_changed_leading_bits_alone(train: Run, parent: Path, tmp_path: Path) -> None:
    train(tmp_path / "narrow", terms="2", steps=20)
    train(tmp_path / "all", terms="8,2", steps=20)
    assert 0 < distance(tmp_path / "narrow", parent, 8) < distance(tmp_path / "all", parent, 8)


@pytest.mark.parametrize("kind", ["affine-int8", "affine-float16"])
def test_nothing_moves_without_a_rate(kind: str, train: Run, source: Path, tmp_path: Path) -> None:
    parent = make_parent(source, tmp_path / "parent", "--bits", "2,8", "--group-size", "32", "--decoder", kind)
    outcome = train(tmp_path / "out", parent=parent, terms="8,2", code_rate=0, decoder_rate=0)
    assert outcome.changed == {2: 0, 8: 0}
    for width in (2, 8):
        assert distance(tmp_path / "out", parent, width) < 1e-2  # to encode what is decoded may round once more
    for old, new in zip(codes(open_checkpoint(parent)), codes(open_checkpoint(tmp_path / "out")), strict=True):
        assert torch.equal(old, new)


def test_decay_pulls_back_to_the_parent(train: Run, parent: Path, tmp_path: Path) -> None:
    for name, decay in (("free", 0.0), ("held", 0.5)):
        train(tmp_path / name, terms="8,2", steps=20, weight_decay=decay, schedule="constant")
    assert distance(tmp_path / "held", parent, 8) < 0.8 * distance(tmp_path / "free", parent, 8)


def test_the_same_bytes_twice(train: Run, tmp_path: Path) -> None:
    for name in ("one", "two"):
        train(tmp_path / name, seed=3)
    assert_same_files(tmp_path / "one", tmp_path / "two")
    train(tmp_path / "other", seed=4)
    assert distance(tmp_path / "other", tmp_path / "one", 8) > 0


def test_accumulated_batches_are_one_larger_batch(train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first: dict[str, list[torch.Tensor]] = {}
    step = Optimizer.step

    def recorded(self: Optimizer, number: int) -> torch.Tensor:
        if number == 0:
            first[name] = [parameter.grad.clone() for parameter in self.trained]
        return step(self, number)

    monkeypatch.setattr(Optimizer, "step", recorded)
    for name, sizes in (("one", (4, 1)), ("two", (2, 2)), ("four", (1, 4))):
        train(tmp_path / name, batch=sizes[0], accumulate=sizes[1], terms="8,4,2,8->2", weights=(0.1, 0.1, 1, 1))
    for name in ("two", "four"):
        for one, other in zip(first["one"], first[name], strict=True):
            torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-4 * float(one.abs().max()))
        for width in (2, 4, 8):  # a position whose derivative is next to nothing may go either way
            assert distance(tmp_path / name, tmp_path / "one", width) < 0.05, (name, width)


class Cut(KeyboardInterrupt):
    """The process was asked to end."""


@pytest.fixture
def cut_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A function that lets the next trainings end in the step after so many; -1: never."""
    step = Optimizer.step

    def set_end(steps: int) -> None:
        def limited(self: Optimizer, number: int) -> torch.Tensor:
            if number == steps:
                raise Cut
            return step(self, number)

        monkeypatch.setattr(Optimizer, "step", limited)

    return set_end


def test_resumed_training_writes_the_same_bytes(
    train: Run, tmp_path: Path, cut_after: Callable[[int], None], caplog: pytest.LogCaptureFixture
) -> None:
    """Cut in the middle of the schedule and of an epoch, twice, once between two kept states."""
    options: dict[str, Any] = {"steps": 12, "terms": "8,4,2,8->2", "checkpoint_every": 3, "weight_decay": 0.1}
    train(tmp_path / "whole", **options)
    output, caplog_level = tmp_path / "cut", caplog.set_level(logging.WARNING)
    assert caplog_level is None
    for steps in (5, 9):
        cut_after(steps)
        with pytest.raises(
            KeyboardInterrupt, match=rf"step {steps // 3 * 3} of 12 is kept in .*: the same command with --"
        ):
            train(output, **options, resume=True)
        states = [path.name for path in (output / ".matquant-training").iterdir()]
        assert sorted(states) == ["settings.json", f"step-{steps // 3 * 3}"]
        assert not list(output.glob("*.safetensors"))
    assert "the state after step 9 is kept, for --resume" in caplog.text
    cut_after(-1)
    outcome = train(output, **options, resume=True)
    assert outcome.steps == 12
    assert_same_files(output, tmp_path / "whole")
    assert not (output / ".matquant-training").exists()


def test_resumed_after_the_last_step(train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path / "whole")
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "publish", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
        with pytest.raises(OSError, match="the disk is full"):
            train(tmp_path / "cut")
    assert train(tmp_path / "cut", resume=True).losses == {}
    assert_same_files(tmp_path / "cut", tmp_path / "whole")


def test_an_end_before_the_first_state_leaves_nothing(
    train: Run, tmp_path: Path, cut_after: Callable[[int], None]
) -> None:
    cut_after(2)
    with pytest.raises(KeyboardInterrupt, match="no step was kept, and no checkpoint was written"):
        train(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_state_that_was_not_finished_is_none(
    train: Run, tmp_path: Path, cut_after: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The former state goes only when the new one is whole."""
    options: dict[str, Any] = {"steps": 6, "checkpoint_every": 2}
    train(tmp_path / "whole", **options)
    tensors_of, calls = Optimizer.tensors, []

    def failing(self: Optimizer, name: str) -> dict[str, torch.Tensor]:
        calls.append(name)
        if len(calls) > 70:  # of the second state
            raise OSError("the disk is full")
        return tensors_of(self, name)

    with monkeypatch.context() as patched:
        patched.setattr(Optimizer, "tensors", failing)
        with pytest.raises(OSError, match="the disk is full"):
            train(tmp_path / "cut", **options)
    folder = tmp_path / "cut" / ".matquant-training"
    assert sorted(path.name for path in folder.iterdir()) == ["settings.json", "step-2", "step-4.tmp"]
    train(tmp_path / "cut", **options, resume=True)
    assert_same_files(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"code_rate": 2.0}, "training.code_rate: found 2.0, expected 1.0"),
        ({"terms": "8,2"}, r"training.terms.4: found None, expected 1.0"),
        ({"weights": (2, 1, 1)}, "training.terms.8: found 2.0, expected 1.0"),
        ({"seed": 1}, "training.seed: found 1, expected 0"),
        ({"steps": 9}, "training.steps: found 9, expected 6"),
        ({"batch": 1, "accumulate": 2}, "training.accumulate: found 2, expected 1"),
        ({"text": None}, "tokens: found"),
        ({"parent": None}, r"parent\..*found"),
    ],
)
def test_resume_refuses_other_work(
    change: dict[str, Any],
    field: str,
    train: Run,
    source: Path,
    tmp_path: Path,
    cut_after: Callable[[int], None],
) -> None:
    cut_after(4)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "out", checkpoint_every=2)
    if "text" in change:
        (tmp_path / "text.txt").write_text("the mat sat on the cat " * 200)
        change = {"text": tmp_path / "text.txt"}
    if "parent" in change:
        other = make_parent(source, tmp_path / "other", "--bits", "2,3,4,8", "--group-size", "64")
        change = {"parent": other}
    with pytest.raises(ValueError, match=field):
        train(tmp_path / "out", checkpoint_every=2, resume=True, **change)
    with pytest.raises(ValueError, match=r"an unfinished training, 4 of \d+ steps.*Use --resume to go on"):
        train(tmp_path / "out", **change)
    assert (tmp_path / "out" / ".matquant-training" / "step-4").is_dir()


def test_what_it_writes(
    train: Run, source: Path, parent: Path, short_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint of the parent's format, of which every command makes use."""
    shutil.copytree(parent, tmp_path / "parent")
    (tmp_path / "parent" / "README.md").write_text("quality of the parent")
    options = ["--sequence-length", "32", "--batch", "2", "--steps", "4", "--warmup", "1", "--terms", "8,4,8->2"]
    output = tmp_path / "out"
    given = [str(tmp_path / "parent"), "--source", str(source), "--output", str(output), "--text", str(short_text)]
    assert main(["train", *given, *options, "--weights", "0.1,0.1,1"]) == 0
    said = capsys.readouterr().out
    assert "changed codes: 2 bits " in said
    assert f"not carried over from {tmp_path / 'parent'}, as it is true of that one alone: README.md" in said
    assert f"matquant evaluate {output} --reference" in said
    before, after = open_checkpoint(parent), open_checkpoint(output)
    assert (before.format, before.layers, before.config) == (after.format, after.layers, after.config)
    assert not (output / "README.md").exists()
    assert (output / "tokenizer.json").read_bytes() == (parent / "tokenizer.json").read_bytes()
    for (name, one), (_, other) in zip(before.unquantized(), after.unquantized(), strict=True):
        assert torch.equal(one, other), name
    manifest = read_json(output / "MANIFEST.json")
    assert manifest["command"][:2] == ["matquant", "train"]
    assert manifest["command"][-2:] == ["--warmup", "1"]
    assert manifest["training"]["terms"] == {"8": 0.1, "4": 0.1, "8->2": 1.0}
    assert manifest["training"]["texts"][0]["name"] == short_text.name
    assert manifest["parent"]["config.json"]["bytes"] == (parent / "config.json").stat().st_size
    assert "model.safetensors" in manifest["source"]
    assert all(result.passed for result in verify(output))
    rows = Evaluate(output, source, short_text, samples=2, sequence_length=32).run()
    assert [row["bits"] for row in rows] == [2, 3, 4, 8]


def test_trained_further(train: Run, parent: Path, tmp_path: Path) -> None:
    """What was trained is a parent too."""
    train(tmp_path / "one", terms="8")
    train(tmp_path / "two", terms="2", parent=tmp_path / "one")
    assert distance(tmp_path / "two", tmp_path / "one", 2) > 0
    train(tmp_path / "two", terms="4", overwrite=True)
    assert distance(tmp_path / "two", parent, 4) > 0


def test_in_its_own_folder(train: Run, parent: Path, tmp_path: Path) -> None:
    """The parent is replaced once all of it has been read."""
    folder = shutil.copytree(parent, tmp_path / "parent")
    (folder / "README.md").write_text("quality of the parent")
    outcome = train(folder, parent=folder, overwrite=True)
    train(tmp_path / "other")
    assert_same_files(folder, tmp_path / "other")
    assert outcome.left_behind == ["README.md"]
    assert not (folder / "README.md").exists()


def test_held_out_text(train: Run, short_text: Path, tmp_path: Path, source: Path) -> None:
    """What is measured meanwhile is what evaluate measures on the same windows."""
    outcome = train(tmp_path, held_out=short_text, held_out_samples=3, evaluate_every=4, **LONG | {"steps": 10})
    assert [steps for steps, _ in outcome.held_out] == [0, 4, 8, 10]
    rows = Evaluate(tmp_path, source, short_text, samples=3, sequence_length=32).run()
    for row in rows:
        assert outcome.held_out[-1][1][row["bits"]] == pytest.approx(row["kl"], rel=0.05, abs=1e-4)
    assert outcome.held_out[-1][1][2] < outcome.held_out[0][1][2]


def test_in_bfloat16(train: Run, tmp_path: Path) -> None:
    outcome = train(tmp_path, precision="bf16", gradient_checkpointing=True, terms="2", **LONG)
    assert outcome.losses["2"] < 0.15
    assert all(result.passed for result in verify(tmp_path))


def test_a_loss_that_is_not_finite(train: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the term \d is (nan|inf) in step \d+, expected a finite loss; a smaller"):
        train(tmp_path, decoder_rate=1e30, steps=20)


@pytest.mark.parametrize(("steps", "expected"), [(1, 0), (4, 0), (50, 10), (100, 20), (5000, 20)])
def test_warm_up_where_none_is_given(steps: int, expected: int) -> None:
    assert TrainingSettings(parse_terms("2"), steps=steps).warmup == expected


def test_rates() -> None:
    settings = TrainingSettings(parse_terms("2"), steps=10, warmup=2, schedule="linear")
    assert [settings.factor(step) for step in range(10)] == [0.5, 1.0, 1.0, *(1 - each / 8 for each in range(1, 8))]
    constant = TrainingSettings(parse_terms("2"), steps=3, warmup=0, schedule="constant")
    assert [constant.factor(step) for step in range(3)] == [1, 1, 1]
    cosine = TrainingSettings(parse_terms("2"), steps=5, warmup=1)
    assert cosine.factor(3) == pytest.approx(0.5)
    parameters = [(f"layer.{name}", torch.nn.Parameter(torch.zeros(2))) for name in ("shift", "changes.2", "changes.4")]
    rates = Optimizer(parameters, TrainingSettings(parse_terms("2"), warmup=0, code_rate=0.5, decoder_rate=0.1)).rates(
        0
    )
    assert rates == {"codes": 0.5, "2": 0.1, "4": pytest.approx(0.05)}


def test_the_order_of_windows_covers_an_epoch() -> None:
    order = list(epochs(10, 7, 3, seed=0))
    assert all(len(set(batch)) == 3 for batch in order)
    assert len({window for batch in order[:3] for window in batch}) == 9
    assert order == list(epochs(10, 7, 3, seed=0)) != list(epochs(10, 7, 3, seed=1))
