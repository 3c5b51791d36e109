"""The command line of the quantizer."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.quantize.tiny_sources import write_source, write_tokenizer
from vllm_matquant import cli
from vllm_matquant.checkpoint import files
from vllm_matquant.checkpoint.manifest import read_manifest
from vllm_matquant.checkpoint.names import MANIFEST_FILE
from vllm_matquant.checkpoint.reader import open_checkpoint
from vllm_matquant.checkpoint.spec import WIDTHS
from vllm_matquant.checkpoint.verify import verify
from vllm_matquant.jobs import quantize as quantize_job
from vllm_matquant.quantize.resume import WORK_FOLDER, WorkFolder

run_quantize = cli.tool("quantize")
FEW = ["--samples", "4", "--sequence-length", "32", "--no-report"]


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Exit status and the last line of what the tool says when it refuses."""
    with pytest.raises(SystemExit) as stop:
        run_quantize(list(map(str, arguments)))
    return stop.value.code, capsys.readouterr().err.strip().splitlines()[-1]


def test_defaults(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_quantize([str(source), "--output", str(tmp_path / "nested"), *FEW]) == 0
    output = capsys.readouterr()
    assert f"{tmp_path / 'nested'} offers 2, 3, 4, 5, 6, 7, 8 bits: vllm serve" in output.out
    assert "14/14" in output.err  # layers on the progress bar
    checkpoint = open_checkpoint(tmp_path / "nested")
    assert checkpoint.format.widths == WIDTHS
    assert checkpoint.format.group_size == "auto"
    manifest = json.loads((tmp_path / "nested" / "MANIFEST.json").read_text())
    assert manifest["command"] == ["matquant", "quantize", "llama", "--output", "nested", *FEW]
    assert manifest["calibration"]["name"] == "built-in text"
    assert read_manifest(tmp_path / "nested")


def test_options(source: Path, text_file: Path, tmp_path: Path) -> None:
    output, errors = tmp_path / "nested", tmp_path / "errors.json"
    options = [
        "--bits",
        "4,2",
        "--group-size",
        "32",
        "--method",
        "matgptq",
        "--ignore",
        "[qk]_proj",
        "--ignore",
        "v_proj",
    ]
    options += ["--ignore", "v_proj", "--calibration", str(text_file), "--seed", "7", "--errors", str(errors), *FEW]
    assert run_quantize([str(source), "--output", str(output), *options]) == 0
    checkpoint = open_checkpoint(output)
    assert (checkpoint.format.widths, checkpoint.format.group_size) == ((2, 4), 32)
    assert checkpoint.format.slicing == "round"
    assert not any(part in layer for part in ("q_proj", "k_proj", "v_proj") for layer in checkpoint.layers)
    written = json.loads(errors.read_text())
    assert set(written) == set(checkpoint.layers)
    assert all(0 < error["4"] < error["2"] for error in written.values())
    assert json.loads((output / "MANIFEST.json").read_text())["calibration"]["seed"] == 7


def test_last_line_can_be_pasted(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "my out"
    assert run_quantize([str(source), "--output", str(output), "--method", "rtn", "--no-report", "--bits", "4"]) == 0
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.startswith("tensor parallelism will be refused on ")
    assert last == f"{output} offers 4 bits: vllm serve '{output}' --bits 4"


@pytest.mark.parametrize("options", [[], ["--bits", "4", "--method", "gptq"], ["--method", "rtn"]])
def test_dry_run(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    assert run_quantize([str(source), "--output", str(tmp_path / "deep" / "nested"), "--dry-run", *FEW, *options]) == 0
    said = capsys.readouterr().out
    widths = "4" if "gptq" in options else "2"
    assert said.startswith(f"files to serve  {widths} bits ")
    assert [line.split()[0] for line in said.splitlines()] == ["files", "disk", "memory", "time", "tensor"]
    assert list(tmp_path.iterdir()) == []


def test_dry_run_refuses_what_the_run_would(nested: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.read_bytes() for path in nested.iterdir()}
    for options in ([], ["--samples", "100000", "--overwrite"], ["--ignore", "nonesuch"], ["--group-size", "48"]):
        errors = [refusal(capsys, source, "--output", nested, *FEW, *options, *dry) for dry in (["--dry-run"], [])]
        assert errors[0] == errors[1]
    assert {path.name: path.read_bytes() for path in nested.iterdir()} == before


def test_a_full_disk_is_refused_before_the_work(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output, work = tmp_path / "nested", tmp_path / "nested" / WORK_FOLDER
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**9, free=70_000))
    said = r"nested: disk: found 70,000 bytes free, expected at least [\d,]+ until the end of the work. .*\(--output\)"
    for options in ([], ["--dry-run"]):
        status, error = refusal(capsys, source, "--output", output, *FEW, *options)
        assert status == 1
        assert re.search(said, error)
        assert "--activations-on-disk" not in error
        assert not output.exists()
    assert "--activations-on-disk" in refusal(capsys, source, "--output", output, "--activations-on-disk", *FEW)[1]
    work.mkdir(parents=True)  # what unfinished work takes is a part of what is needed
    with (work / "block.safetensors").open("wb") as file:
        file.truncate(10**9)
    assert run_quantize([str(source), "--output", str(output), *FEW]) == 0


def test_a_file_system_that_tells_no_size_is_not_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=0, free=0))
    assert run_quantize([str(source), "--output", str(tmp_path / "nested"), "--dry-run", *FEW]) == 0
    assert "NOT ENOUGH" not in capsys.readouterr().out


def test_a_disk_that_fills_up_is_said_in_one_sentence(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output, real, calls = tmp_path / "nested", files.save_file, iter(range(100))

    def full(*arguments: Any, **options: Any) -> None:
        if next(calls):
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(files, "save_file", full)
        status, error = refusal(capsys, source, "--output", output, *FEW)
    assert status == 1
    assert re.search(rf"{WORK_FOLDER}/model.layers.1.safetensors: writing: found No space left on device, ", error)
    kept = sorted(path.name for path in (output / WORK_FOLDER).iterdir())
    assert kept == ["model.layers.0.safetensors", "settings.json"]
    assert [path.name for path in output.iterdir()] == [WORK_FOLDER]
    assert run_quantize([str(source), "--output", str(output), "--resume", *FEW]) == 0


def test_report(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "nested"
    arguments = [str(source), "--output", str(output), "--bits", "2,8", "--samples", "4", "--sequence-length", "32"]
    assert run_quantize(arguments) == 0
    said = capsys.readouterr().out
    report = json.loads((output / "report" / "report.json").read_text())
    assert [row["bits"] for row in report["quality"]] == [2, 8]
    for row in report["quality"]:
        assert row["tokens"] == 8 * 31
        assert f"{row['bits']} bits: perplexity {row['perplexity']:.2f}" in said
    assert report["quality_text"]["name"] == "built-in text"
    assert [layer["name"] for layer in report["layers"]] == list(open_checkpoint(output).layers)
    assert all(set(layer["errors"]) == {"2", "8"} for layer in report["layers"])
    assert report["seconds"]["total"] == pytest.approx(sum(report["seconds"].values()) / 2)
    assert report["bytes"]["2"] < report["bytes"]["8"]
    assert (output / "report" / "index.html").is_file()
    card = (output / "README.md").read_text()
    assert str(tmp_path) not in card + json.dumps(report)
    assert all(result.passed for result in verify(output))


def test_held_out_text(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, output = tmp_path / "mine.txt", tmp_path / "nested"
    text.write_text("the other cat sat on a mat and thought " * 40)
    arguments = [str(source), "--output", str(output), "--bits", "8", "--method", "rtn", "--sequence-length", "32"]
    assert run_quantize([*arguments, "--held-out", str(text), "--held-out-samples", "3"]) == 0
    described = json.loads((output / "report" / "report.json").read_text())["quality_text"]
    assert (described["name"], described["samples"], described["sequence_length"]) == ("mine.txt", 3, 32)
    refused = tmp_path / "refused"
    text.write_text("short")
    assert "expected at least" in refusal(capsys, *arguments[:2], refused, "--held-out", text)[1]
    text.write_bytes(b"\xff\xfe\xfa")
    assert "not UTF-8" in refusal(capsys, *arguments[:2], refused, "--held-out", text)[1]
    assert not refused.exists()


def test_texts_begin_with_the_token_wherever_they_are_measured(tmp_path: Path, text_file: Path) -> None:
    """Calibration, report, evaluation and search of a model whose tokenizer begins each text with a token."""
    model, output = write_source(tmp_path / "model"), tmp_path / "nested"
    write_tokenizer(model, "<s> $A </s>")
    sizes = ["--samples", "4", "--sequence-length", "24"]
    text = ["--held-out", str(text_file), "--held-out-samples", "4"]
    assert cli.main(["quantize", str(model), "--output", str(output), "--bits", "2,8", *sizes, *text]) == 0
    report = json.loads((output / "report" / "report.json").read_text())
    assert report["calibration"]["beginning_of_text"] is report["quality_text"]["beginning_of_text"] is True
    assert json.loads((output / MANIFEST_FILE).read_text())["calibration"] == report["calibration"]
    assert "4 × 24 tokens, each window begun with the beginning-of-text token, SHA-256" in (
        output / "README.md"
    ).read_text().replace("\n", " ")

    rows_file = tmp_path / "rows.json"
    arguments = ["--reference", str(model), "--text", str(text_file), *sizes, "--json", str(rows_file)]
    assert cli.main(["evaluate", str(output), *arguments]) == 0
    rows = json.loads(rows_file.read_text())
    for row, reported in zip(rows, report["quality"], strict=True):
        assert row.pop("beginning_of_text") is True
        assert row == pytest.approx(reported, rel=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(text_file.read_text())["input_ids"][1:-1]
    places = [(len(ids) - 23) * place // 3 for place in range(4)]
    windows = torch.tensor([[tokenizer.bos_token_id, *ids[place : place + 23]] for place in places])
    expected = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)(windows, labels=windows).loss
    assert math.log(rows[0]["reference_perplexity"]) == pytest.approx(expected.item(), rel=1e-4)

    search_options = ["--reference", str(model), "--decoder-samples", "2", "--sensitivity-samples", "2", "--steps", "1"]
    assert cli.main(["search", str(output), "--budget", "3", *sizes, *search_options]) == 0
    [recipe] = [each for each in open_checkpoint(output).recipes if each.name == "3-bits"]
    assert recipe.origin["calibration"]["beginning_of_text"] is True


def test_quantize_embeddings(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "nested"
    arguments = [str(source), "--output", str(output), "--bits", "2,8", "--samples", "4", "--sequence-length", "32"]
    arguments.append("--quantize-embeddings")
    for refused, message in (
        (["--group-size-for", "lm_head=48"], "group_size for lm_head: found 48, expected a divisor of its 64"),
        (["--ignore", "embed", "--ignore", "lm_head"], "quantize-embeddings: found model.embed_tokens and lm_head, of"),
        (["--ignore", "nonesuch"], "matches none of the model's 16 linear layers and embeddings"),
    ):
        status, said = refusal(capsys, *arguments, *refused)
        assert status == 1
        assert message in said
        assert not output.exists()
    assert run_quantize([*arguments, "--dry-run"]) == 0
    assert not output.exists()
    assert run_quantize(arguments) == 0
    assert "640/640" in capsys.readouterr().err  # rows on the progress bar
    checkpoint = open_checkpoint(output)
    assert checkpoint.format.quantized_embeddings == ("model.embed_tokens",)
    assert checkpoint.format.ignored_layers == ()
    report = json.loads((output / "report" / "report.json").read_text())
    assert [layer["name"] for layer in report["layers"]] == list(checkpoint.layers)
    assert all(set(layer["errors"]) == {"2", "8"} for layer in report["layers"])
    card = (output / "README.md").read_text()
    assert "no linear layer is left out" in card
    assert "embeddings: `model.embed_tokens`" in card
    assert run_quantize([*arguments, "--overwrite", "--ignore", "lm_head", "--no-report"]) == 0
    assert open_checkpoint(output).format.ignored_layers == ("lm_head",)
    assert "lm_head" not in open_checkpoint(output).layers
    assert "model.embed_tokens" in open_checkpoint(output).layers


def test_text_column(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"content": f"The {number} cats sat there."}) + "\n" for number in range(200)))
    arguments = [str(source), "--output", str(tmp_path / "nested"), "--calibration", str(text), *FEW]
    status, said = refusal(capsys, *arguments)
    assert status == 1
    assert "text.jsonl:1: found" in said
    assert 'expected {"text": "..."}' in said
    assert not (tmp_path / "nested").exists()
    assert run_quantize([*arguments, "--text-column", "content", "--bits", "4"]) == 0


def test_interrupt_while_the_report_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(quantize_job, "write_report", interrupted)
    output = tmp_path / "nested"
    status, said = refusal(capsys, source, *FEW[:-1], "--bits", "4", "--output", output)
    assert status == 130
    assert said.endswith(f": interrupted; the report is missing, the checkpoint whole in {output}")
    assert open_checkpoint(output).format.widths == (4,)


@contextmanager
def interrupted_after_a_block(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In it a quantization is interrupted, as by Ctrl-C, once its first block is kept."""
    save = WorkFolder.save

    def interrupted(self: WorkFolder, *arguments: Any) -> None:
        save(self, *arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "save", interrupted)
        yield


def test_resume(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(source), *FEW, "--output"]
    assert run_quantize([*arguments, str(tmp_path / "whole" / "nested")]) == 0
    output = tmp_path / "resumed" / "nested"
    with interrupted_after_a_block(monkeypatch):
        status, said = refusal(capsys, *arguments, output)
    assert status == 130
    assert said.endswith(f": interrupted; no checkpoint was written to {output}")
    status, said = refusal(capsys, *arguments, output)
    assert "work folder: found unfinished work, 1 of 2 blocks, expected none. Use --resume to go on" in said
    status, said = refusal(capsys, *arguments, output, "--resume", "--seed", 1)
    assert "calibration.seed: found 1, expected 0. Run with what the unfinished work began with" in said
    assert run_quantize([*arguments, str(output), "--resume"]) == 0
    files = {path.name: path.read_bytes() for path in output.iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "whole" / "nested").iterdir()}


def test_resume_beside_a_finished_checkpoint(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "nested"
    arguments = [str(source), *FEW, "--bits", "4", "--output", str(output)]
    assert run_quantize([*arguments, "--method", "rtn"]) == 0
    with interrupted_after_a_block(monkeypatch):
        assert refusal(capsys, *arguments, "--overwrite")[0] == 130
    for dry in ([], ["--dry-run"]):
        said = refusal(capsys, *arguments, *dry)[1]
        assert "Use --resume --overwrite to go on, or --overwrite to start again" in said
        said = refusal(capsys, *arguments, "--resume", *dry)[1]
        assert "expected no files of a checkpoint. Use --resume --overwrite to go on with the unfinished work" in said
    other = output / "pytorch_model.bin"
    other.touch()
    assert "Move it away" in refusal(capsys, *arguments, "--resume")[1]  # no --overwrite would help
    other.unlink()
    assert run_quantize([*arguments, "--resume", "--overwrite"]) == 0
    assert read_manifest(output)
    assert not (output / WORK_FOLDER).exists()


def test_overwrite(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(source), "--output", str(tmp_path / "nested"), "--method", "rtn"]
    assert run_quantize(arguments) == 0
    status, message = refusal(capsys, *arguments, "--bits", 4)
    assert status == 1
    assert "expected no files of a checkpoint. Use --overwrite to replace it" in message
    assert open_checkpoint(tmp_path / "nested").format.widths == WIDTHS
    assert run_quantize([*arguments, "--bits", "4", "--overwrite"]) == 0
    assert open_checkpoint(tmp_path / "nested").format.widths == (4,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", "1,4"], "argument --bits: found '1,4', expected distinct widths from 2 to 8"),
        (["--group-size", "30"], "argument --group-size: found '30', expected a multiple of 8, auto or channel"),
        (["--group-size", "row"], "argument --group-size: found 'row'"),
        (["--group-size-for", "k_proj"], "argument --group-size-for: found 'k_proj', expected REGEX=SIZE"),
        (["--group-size-for", "k_proj=30"], "argument --group-size-for: found '30', expected a multiple of 8"),
        (["--bits-for", "k_proj"], "argument --bits-for: found 'k_proj', expected REGEX=WIDTHS"),
        (["--bits-for", "k_proj=4,9"], "argument --bits-for: found '4,9', expected distinct widths from 2 to 8"),
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
        (["--calibration", __file__, "--samples", "9999"], "test_quantize.py: found"),
        (["--calibration", sys.executable], "found bytes that are not UTF-8"),
        (["--samples", "1000000"], "built-in text: found"),
        (
            ["--method", "rtn", "--calibration", "mine.txt"],
            "calibration: found mine.txt, expected none with method rtn, which reads no text. Leave out --calibration",
        ),
        (
            ["--no-report", "--held-out", "mine.txt"],
            "held_out: found mine.txt, expected none with --no-report, which measures no quality. Leave out one of",
        ),
    ],
)
def test_refusals(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    status, said = refusal(capsys, source, "--output", tmp_path / "nested", *options)
    assert status == 1
    assert message in said
    assert not (tmp_path / "nested").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--ignore", "q_proj"],
            "ignore: found for model.layers.0.self_attn q_proj ignored, k_proj quantized, v_proj quantized, expected "
            "the same for q_proj and k_proj and v_proj, which vLLM computes as one layer. Give --ignore an expression",
        ),
        (
            ["--group-size-for", "1.*up_proj=32"],
            "group-size-for: found for model.layers.1.mlp gate_proj auto, up_proj 32, expected the same",
        ),
        (
            ["--bits-for", "gate_proj=4,8"],
            "bits-for: found for model.layers.0.mlp gate_proj 4,8, up_proj 2,3,4,5,6,7",
        ),
    ],
)
def test_settings_for_one_part_of_what_vllm_fuses(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    for dry in ([], ["--dry-run"]):
        status, said = refusal(capsys, source, "--output", tmp_path / "nested", *options, *dry)
        assert status == 1
        assert message in said
        assert not (tmp_path / "nested").exists()


def test_a_dry_run_reads_the_weights(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Path(shutil.copytree(source, tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    for value, message in ((1e5, "found weights of up to 1e+05, expected up to 32752"), (float("nan"), "found NaN")):
        tensors[name][0, 0] = value
        save_file(tensors, model / "model.safetensors")
        for dry in (["--dry-run"], []):
            status, said = refusal(capsys, model, "--output", tmp_path / "nested", *FEW, *dry)
            assert status == 1
            assert f"{name}: {message}" in said
            assert not (tmp_path / "nested").exists()


def test_settings_for_all_of_what_vllm_fuses(source: Path, tmp_path: Path) -> None:
    options = ["--ignore", "1.*[qkv]_proj", "--group-size-for", "gate_proj|up_proj=32", "--bits-for", "down_proj=8"]
    assert run_quantize([str(source), "--output", str(tmp_path / "nested"), "--dry-run", *options, *FEW]) == 0


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
    assert run_quantize([str(model), "--output", str(tmp_path / "nested"), "--method", "rtn", "--no-report"]) == 0


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
        run_quantize(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert "example: matquant quantize" in said
    assert "(default: None)" not in said


@pytest.mark.slow
def test_interrupt(tmp_path: Path) -> None:
    """Ctrl-C ends a run with a line and without a trace in the file system, but for the finished blocks."""
    model = write_source(tmp_path / "model", num_hidden_layers=200)
    command = [
        sys.executable,
        "-m",
        "vllm_matquant",
        "quantize",
        str(model),
        "--output",
        str(tmp_path / "nested"),
        *FEW,
    ]
    options: dict[str, Any] = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
    # Shells let what they start in the background ignore Ctrl-C, and that is inherited: these tests may be such.
    options["preexec_fn"] = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, env=os.environ | {"PYTHONUNBUFFERED": "1"}, **options) as process:
        said = ""
        while not re.search(r" [1-9]\d/1400", said[-60:]):  # until the bar says that a block is finished
            more = process.stderr.read(20)
            assert more, said
            said += more
        process.send_signal(signal.SIGINT)
        said += process.communicate(timeout=300)[1]  # a machine that is busy with other things
    assert process.returncode == 130
    assert "Traceback" not in said
    assert "blocks are finished and kept, for --resume" in said
    assert (
        said.strip().splitlines()[-1]
        == f"matquant quantize: interrupted; no checkpoint was written to {tmp_path / 'nested'}"
    )
    assert [path.name for path in (tmp_path / "nested").iterdir()] == [WORK_FOLDER]


def test_setting(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "nested"
    arguments = [str(source), "--output", str(output), "--bits", "2,8", *FEW]
    refused = refusal(capsys, *arguments, "--setting", "growht=3")
    assert refused[0] == 1
    assert "growht=3" in refused[1]
    assert not output.exists()
    assert run_quantize([*arguments, "--setting", "sequential_up_to=0", "--setting", "sweeps=0"]) == 0
    plain = (output / "model-width2-00001-of-00001.safetensors").read_bytes()
    assert run_quantize([*arguments, "--overwrite"]) == 0
    assert (output / "model-width2-00001-of-00001.safetensors").read_bytes() != plain
