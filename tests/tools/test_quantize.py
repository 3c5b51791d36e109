"""The command line of the quantizer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import quantize

from tests.quantize.tiny_sources import write_source
from vllm_matquant.checkpoint.manifest import read_manifest
from vllm_matquant.checkpoint.reader import open_checkpoint
from vllm_matquant.checkpoint.spec import WIDTHS

TOOL = Path(quantize.__file__)
FEW = ["--samples", "4", "--sequence-length", "32"]


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Exit status and the last line of what the tool says when it refuses."""
    with pytest.raises(SystemExit) as stop:
        quantize.main(list(map(str, arguments)))
    return stop.value.code, capsys.readouterr().err.strip().splitlines()[-1]


def test_defaults(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quantize.main([str(source), "--output", str(tmp_path / "nested"), *FEW]) == 0
    output = capsys.readouterr()
    assert f"{tmp_path / 'nested'} offers 2, 3, 4, 5, 6, 7, 8 bits: vllm serve" in output.out
    assert "14/14" in output.err  # layers on the progress bar
    checkpoint = open_checkpoint(tmp_path / "nested")
    assert checkpoint.format.widths == WIDTHS
    assert checkpoint.format.group_size == "auto"
    manifest = json.loads((tmp_path / "nested" / "MANIFEST.json").read_text())
    assert manifest["command"] == ["quantize.py", "llama", "--output", "nested", *FEW]
    assert manifest["calibration"]["name"] == "built-in text"
    assert read_manifest(tmp_path / "nested")


def test_options(source: Path, text_file: Path, tmp_path: Path) -> None:
    output, errors = tmp_path / "nested", tmp_path / "errors.json"
    options = ["--bits", "4,2", "--group-size", "32", "--method", "matgptq", "--ignore", "k_proj", "--ignore", "v_proj"]
    options += ["--calibration", str(text_file), "--seed", "7", "--errors", str(errors), *FEW]
    assert quantize.main([str(source), "--output", str(output), *options]) == 0
    checkpoint = open_checkpoint(output)
    assert (checkpoint.format.widths, checkpoint.format.group_size) == ((2, 4), 32)
    assert checkpoint.format.slicing == "round"
    assert not any("k_proj" in layer or "v_proj" in layer for layer in checkpoint.layers)
    written = json.loads(errors.read_text())
    assert set(written) == set(checkpoint.layers)
    assert all(0 < error["4"] < error["2"] for error in written.values())
    assert json.loads((output / "MANIFEST.json").read_text())["calibration"]["seed"] == 7


def test_overwrite(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(source), "--output", str(tmp_path / "nested"), "--method", "rtn"]
    assert quantize.main(arguments) == 0
    status, message = refusal(capsys, *arguments, "--bits", 4)
    assert status == 1
    assert "expected no files of a checkpoint, or leave to overwrite" in message
    assert open_checkpoint(tmp_path / "nested").format.widths == WIDTHS
    assert quantize.main([*arguments, "--bits", "4", "--overwrite"]) == 0
    assert open_checkpoint(tmp_path / "nested").format.widths == (4,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", "1,4"], "argument --bits: found '1,4', expected distinct widths from 2 to 8"),
        (["--group-size", "30"], "argument --group-size: found '30', expected a multiple of 8, auto or channel"),
        (["--group-size", "row"], "argument --group-size: found 'row'"),
        (["--samples", "0"], "argument --samples: found '0', expected a positive integer"),
        (["--sequence-length", "x"], "argument --sequence-length: found 'x'"),
        (["--method", "best"], "argument --method: invalid choice: 'best'"),
        (["--errors", "/no/such/folder/errors.json"], "argument --errors: found no folder /no/such/folder"),
    ],
)
def test_bad_arguments(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    status, said = refusal(capsys, source, "--output", tmp_path / "nested", *options)
    assert status == 2
    assert message in said
    assert not (tmp_path / "nested").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--group-size", "48"],
            "group_size for model.layers.0.self_attn.q_proj: found 48, expected a divisor of its 64",
        ),
        (["--method", "gptq"], "method gptq: found widths [2, 3, 4, 5, 6, 7, 8], expected one width"),
        (["--ignore", "nonesuch"], "ignore: 'nonesuch' matches none of the model's 15 linear layers"),
        (["--ignore", "["], "ignore: found '[', expected a regular expression"),
        (["--calibration", "nowhere.txt"], "nowhere.txt: found no such file"),
        (["--samples", "1000000"], "built-in text: found"),
    ],
)
def test_refusals(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    status, said = refusal(capsys, source, "--output", tmp_path / "nested", *options)
    assert status == 1
    assert message in said
    assert not (tmp_path / "nested").exists()


def test_no_such_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = refusal(capsys, tmp_path / "nowhere", "--output", tmp_path / "nested")
    assert status == 1
    assert f"{tmp_path / 'nowhere'}: model: found no such folder, nor a model of the hub" in said


def test_quantized_already(nested: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = refusal(capsys, nested, "--output", tmp_path / "twice")
    assert status == 1
    assert "quantization_config: found matquant, expected a model that is not quantized" in said


def test_no_tokenizer(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        (model / name).symlink_to(source / name)
    status, said = refusal(capsys, model, "--output", tmp_path / "nested", *FEW)
    assert status == 1
    assert f"{model}: tokenizer: found none" in said
    # Without calibration, no tokenizer is needed.
    assert quantize.main([str(model), "--output", str(tmp_path / "nested"), "--method", "rtn"]) == 0


def test_the_output_may_not_be_the_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_source(tmp_path / "model")
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    for options in ([], ["--overwrite"]):
        status, said = refusal(capsys, model, "--output", model, *options)
        assert status == 1
        assert "output folder: found" in said
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        quantize.main(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert "example: python tools/quantize.py" in said
    assert "(default: None)" not in said


@pytest.mark.slow
def test_interrupt(tmp_path: Path) -> None:
    """Ctrl-C ends a run with one line, and without a trace in the file system."""
    model = write_source(tmp_path / "model", num_hidden_layers=200)
    command = [sys.executable, str(TOOL), str(model), "--output", str(tmp_path / "nested"), *FEW]
    options: dict[str, Any] = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, env=os.environ | {"PYTHONUNBUFFERED": "1"}, **options) as process:
        said = ""
        while "/1400" not in said or " 0/1400" in said[-60:]:  # until the bar has moved
            said += process.stderr.read(20)
        process.send_signal(signal.SIGINT)
        said += process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "Traceback" not in said
    assert said.strip().splitlines()[-1] == f"quantize.py: interrupted; nothing was written to {tmp_path / 'nested'}"
    assert not (tmp_path / "nested").exists()
