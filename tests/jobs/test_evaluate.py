"""The command line of the evaluation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from vllm_matquant import cli
from vllm_matquant.checkpoint.reader import open_checkpoint
from vllm_matquant.checkpoint.recipe import Recipe, average_bits
from vllm_matquant.checkpoint.recipe_store import add_recipes
from vllm_matquant.jobs.evaluate import COLUMNS

run_evaluate = cli.tool("evaluate")
SMALL = ["--samples", "4", "--sequence-length", "24"]


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        run_evaluate(list(map(str, arguments)))
    return stop.value.code, capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("decoders", ["nested", "codebooks"])
def test_table(
    decoders: str,
    source: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    rows_file, folder = tmp_path / "rows.json", request.getfixturevalue(decoders)
    arguments = [str(folder), "--reference", str(source), "--text", str(text_file), "--json", str(rows_file), *SMALL]
    capsys.readouterr()  # of the fixture
    assert run_evaluate(arguments) == 0
    titles, *lines = capsys.readouterr().out.splitlines()
    assert titles.split() == list(COLUMNS)
    assert [line.split()[0] for line in lines] == ["2", "4", "8"]
    rows = json.loads(rows_file.read_text())
    assert [row["bits"] for row in rows] == [2, 4, 8]
    for row, line in zip(rows, lines, strict=True):
        assert set(row) == {"bits", "perplexity", "reference_perplexity", "kl", "tokens", "bits_per_weight",
                            "beginning_of_text"}  # fmt: skip
        assert row["tokens"] == 4 * 23
        assert [float(cell) for cell in line.split()] == pytest.approx([row[name] for name in COLUMNS], rel=1e-3)
    assert rows[0]["kl"] > rows[1]["kl"] > rows[2]["kl"] > 0


def test_recipes_beside_widths(
    nested: Path, source: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(nested, tmp_path / "nested"))
    checkpoint = open_checkpoint(folder)
    mixed = dict.fromkeys(checkpoint.layers, 2) | dict.fromkeys(list(checkpoint.layers)[:7], 4)
    uniform = dict.fromkeys(checkpoint.layers, 4)
    add_recipes(checkpoint, [Recipe("mixed", mixed), Recipe("uniform-4", uniform)])
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"recipe_version": 1, "name": "own", "widths": {}, "default": 4}))
    rows_file = tmp_path / "rows.json"
    arguments = [str(folder), "--reference", str(source), "--text", str(text_file), "--json", str(rows_file), *SMALL]
    assert run_evaluate([*arguments, "--bits", "2,4", "--recipes", f"mixed,{own}"]) == 0
    two, four, of_mixed, of_own = json.loads(rows_file.read_text())
    assert two["kl"] > of_mixed["kl"] > four["kl"]
    assert of_own == {**four, "recipe": "own", "bits": 4.0}
    assert of_mixed["recipe"] == "mixed"
    assert of_mixed["bits"] == average_bits(mixed, checkpoint.layers)
    assert two["bits_per_weight"] < of_mixed["bits_per_weight"] < four["bits_per_weight"]
    assert capsys.readouterr().out.splitlines()[3].split()[-1] == "mixed"
    assert run_evaluate([*arguments, "--bits", "4", "--recipes", "all"]) == 0
    assert [row.get("recipe") for row in json.loads(rows_file.read_text())] == [None, "mixed"]
    status, said = refusal(capsys, *arguments, "--recipes", "none-such")
    assert status == 1
    assert "--recipes: found 'none-such', expected a file or one of mixed, uniform-4" in said


def test_text_column(
    nested: Path, source: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"content": text_file.read_text()}) + "\n")
    arguments = [str(nested), "--reference", str(source), "--text", str(text), "--bits", "8", *SMALL]
    assert "text.jsonl:1: found" in refusal(capsys, *arguments)[1]
    assert run_evaluate([*arguments, "--text-column", "content"]) == 0


def test_widths_in_the_folder(nested: Path, source: Path, text_file: Path, tmp_path: Path) -> None:
    partial = tmp_path / "partial"
    shutil.copytree(nested, partial, ignore=shutil.ignore_patterns("model-width[5-8]-*"))
    rows_file = tmp_path / "rows.json"
    arguments = [str(partial), "--reference", str(source), "--text", str(text_file), "--json", str(rows_file), *SMALL]
    assert run_evaluate(arguments) == 0
    assert [row["bits"] for row in json.loads(rows_file.read_text())] == [2, 4]
    assert run_evaluate([*arguments, "--bits", "4"]) == 0
    assert [row["bits"] for row in json.loads(rows_file.read_text())] == [4]


def test_width_that_is_not_in_the_folder(
    nested: Path, source: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    partial = tmp_path / "partial"
    shutil.copytree(nested, partial, ignore=shutil.ignore_patterns("model-width[5-8]-*"))
    status, said = refusal(capsys, partial, "--reference", source, "--text", text_file, "--bits", "8")
    assert status == 1
    assert "files of uniform-8: found no model-width5-00001-of-00001.safetensors" in said
    assert "The folder serves 2, 4 bits" in said
    status, said = refusal(capsys, nested, "--reference", source, "--text", text_file, "--bits", "3")
    assert status == 1
    assert "bits: found 3, expected one of the offered widths [2, 4, 8]" in said


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"--samples": "1000"}, 1, "text.txt: found"),
        ({"--sequence-length": "1"}, 1, "sequence_length: found 1, expected at least 2"),
        ({"--text": "nowhere.txt"}, 1, "nowhere.txt: found no such file, expected a .txt, "),
        ({"--reference": "/no such model"}, 1, "/no such model: model: found no such folder"),
        ({"--bits": "1"}, 2, "argument --bits: found '1'"),
        ({"--json": "/no/such/folder/x.json"}, 2, "argument --json: found no folder /no/such/folder"),
    ],
)
def test_refusals(
    nested: Path,
    source: Path,
    text_file: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, str],
    status: int,
    message: str,
) -> None:
    options = {"--reference": str(source), "--text": str(text_file), "--sequence-length": "24"} | changes
    found, said = refusal(capsys, nested, *(part for option in options.items() for part in option))
    assert found == status
    assert message in said


def test_a_reference_that_is_not_the_whole_source(
    nested: Path, source: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lacking, deeper = (Path(shutil.copytree(source, tmp_path / name)) for name in ("lacking", "deeper"))
    tensors = load_file(lacking / "model.safetensors")
    config = json.loads((deeper / "config.json").read_text())
    last = f"layers.{config['num_hidden_layers']}"
    more = {name.replace("layers.0", last): each.clone() for name, each in tensors.items()}
    save_file(tensors | more, deeper / "model.safetensors")
    config["num_hidden_layers"] += 1
    config.pop("layer_types", None)
    (deeper / "config.json").write_text(json.dumps(config))
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, lacking / "model.safetensors")
    for reference, message in (
        (nested, "quantization_config: found matquant, expected a model that is not quantized"),
        (lacking, "model.layers.1.mlp.up_proj.weight: found in no file"),
        (deeper, f"expected no such parameter as in {nested}"),
    ):
        status, said = refusal(capsys, nested, "--reference", reference, "--text", text_file)
        assert status == 1
        assert message in said


def test_folder_that_is_no_checkpoint(source: Path, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = refusal(capsys, source, "--reference", source, "--text", text_file)
    assert status == 1
    assert "quantization_config: found nothing" in said


def test_text_that_is_no_text(nested: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "image.txt"
    image.write_bytes(b"\xff\xd8\xff")
    status, said = refusal(capsys, nested, "--reference", source, "--text", image, *SMALL)
    assert status == 1
    assert f"{image}: found bytes that are not UTF-8" in said
