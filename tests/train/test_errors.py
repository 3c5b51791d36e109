"""What cannot be trained is refused by name, before anything is allocated."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.quantize.tiny_sources import write_source
from tests.serve.tiny_models import requantize
from tests.train.conftest import Run
from vllm_matquant.checkpoint.decoder import CODEBOOK
from vllm_matquant.checkpoint.reader import open_checkpoint
from vllm_matquant.cli import main
from vllm_matquant.jobs.train import Train
from vllm_matquant.train import pipeline


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(pipeline, "load_model", refuse)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"terms": "8,5"}, r"terms: found 5, expected one of the offered widths \[2, 3, 4, 8\]"),
        ({"terms": "6->2"}, "terms: found 6, expected one of the offered widths"),
        ({"terms": "9"}, 'terms: found .9., expected terms separated by commas: "4"'),
        ({"terms": "2->8"}, "terms: found '2->8', expected a teacher that is wider"),
        ({"terms": "8,4,2", "weights": "1,1,1,1"}, "weights: found 4, expected 3, one for each term of 8,4,2"),
        ({"weights": "0,1,1"}, "weights: found '0,1,1', expected positive numbers"),
        ({"sequence_length": 5000}, "sequence_length: found 5000, expected at most the model's 1024 positions"),
        ({"sequence_length": 1}, "sequence_length: found 1, expected at least 2"),
        ({"sequence_length": 1000}, r"short.txt: found \d+ tokens, expected at least 1,000, one window"),
        ({"batch": 64}, r"text: found \d+ windows of 32 tokens, expected at least 64, those of one step"),
        ({"text": "nonesuch.txt"}, "nonesuch.txt: found no such file"),
        ({"code_rate": -1}, "code_rate: found '-1', expected a number from 0 up"),
        ({"clip_norm": 0}, "clip_norm: found 0.0, expected a positive number"),
        ({"warmup": 99}, "warmup: found 99, expected 0 to 6, the number of steps"),
        ({"schedule": "step"}, "schedule: found 'step', expected one of cosine, linear, constant"),
        ({"precision": "fp16"}, "precision: found 'fp16', expected one of bf16, fp32"),
        ({"device": "tpu"}, "device: found 'tpu'"),
        ({"held_out": "nonesuch.txt"}, "nonesuch.txt: found no such file"),
        ({"source": "/nonesuch"}, "/nonesuch: model: found no such folder"),
    ],
)
def test_options(options: dict[str, Any], message: str, train: Run, tmp_path: Path) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        train(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_another_source(train: Run, tmp_path: Path) -> None:
    other = write_source(tmp_path / "other", intermediate_size=160)
    with pytest.raises(ValueError, match=r"shape of model.layers.0.mlp.down_proj.weight: found \[64, 160\]"):
        train(tmp_path / "out", source=other)


def test_codebooks(train: Run, parent: Path, tmp_path: Path) -> None:
    folder = requantize(open_checkpoint(parent), CODEBOOK, tmp_path / "codebooks")
    with pytest.raises(ValueError, match=r"decoder_kind: found codebook-4d, expected affine-int8 .* matquant quantize"):
        train(tmp_path / "out", parent=folder)


def test_rounded_slices(train: Run, source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "rounded"
    command = ["quantize", str(source), "--output", str(folder), "--method", "matgptq", "--no-report", "--bits", "2,8"]
    assert main([*command, "--samples", "2", "--sequence-length", "16"]) == 0
    with pytest.raises(ValueError, match=r"slicing: found round, expected truncate.*by another --method than matgptq"):
        train(tmp_path / "out", parent=folder)


def test_missing_planes(train: Run, parent: Path, tmp_path: Path) -> None:
    shutil.copytree(parent, tmp_path / "partial", ignore=shutil.ignore_patterns("model-width[5-8]-*"))
    with pytest.raises(ValueError, match=r"model-width5-.*: found no such file, expected the files of all widths"):
        train(tmp_path / "out", parent=tmp_path / "partial")


def test_no_parent(train: Run, source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="this is no matquant checkpoint"):
        train(tmp_path / "out", parent=source)


def test_output_that_is_not_empty(train: Run, source: Path, parent: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no files of a checkpoint\. Use --overwrite to replace it"):
        train(shutil.copytree(parent, tmp_path / "full"))
    with pytest.raises(ValueError, match="no weights but those of a matquant checkpoint"):
        train(shutil.copytree(source, tmp_path / "model"), overwrite=True)


def test_logs_need_their_package(train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"found no package tensorboard.*pip install 'vllm_matquant\[train\]'"):
        train(tmp_path / "out", log_folder=tmp_path / "log")


def test_the_command_says_it_in_a_line(source: Path, parent: Path, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", str(parent), "--source", str(source), "--output", str(tmp_path / "out"), "--terms", "2,7"])
    assert stop.value.code == 1
    assert "terms: found 7, expected one of the offered widths" in capsys.readouterr().err


def test_help_tells_the_grammar(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert '"4:text" (4 bits learn the text\'s next tokens) or "8->2"' in said


def test_terms_from_python(parent: Path, source: Path) -> None:
    job: Callable[..., Train] = Train
    assert job(parent, source, "out", terms="8, 4").terms == job(parent, source, "out", terms="8,4").terms
