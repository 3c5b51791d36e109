"""The manifest says what the files are; tools/verify.py finds what was changed since."""

from __future__ import annotations

import hashlib
import json
import platform
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_matquant.checkpoint import manifest
from vllm_matquant.checkpoint.files import read_json
from vllm_matquant.checkpoint.names import CONFIG_FILE, DOCUMENT_FILES, INDEX_FILE, MANIFEST_FILE
from vllm_matquant.checkpoint.reader import Checkpoint, open_checkpoint
from vllm_matquant.checkpoint.spec import Format
from vllm_matquant.checkpoint.verify import verify

TOOL = Path(__file__).resolve().parents[2] / "tools" / "verify.py"


def failures(folder: Path) -> list[str]:
    return [result.text for result in verify(folder) if not result.passed]


def flip_last_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def run_tool(folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("sys.argv", ["verify.py", str(folder)])
    return runpy.run_path(str(TOOL))["main"]()


def test_manifest_describes_every_other_file(shared_sample: Any) -> None:
    content = read_json(shared_sample.folder / MANIFEST_FILE)
    files = {path.name: path.read_bytes() for path in shared_sample.folder.iterdir() if path.name != MANIFEST_FILE}
    assert content["files"] == {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for name, data in files.items()
    }
    assert content["command"] == ["quantize.py"]
    assert content["versions"]["torch"] == torch.__version__
    assert content["versions"]["python"] == platform.python_version()
    assert content["versions"].keys() >= {"vllm_matquant", "safetensors", "transformers"}
    assert str(shared_sample.folder.parent) not in (shared_sample.folder / MANIFEST_FILE).read_text()


def test_command_line_without_the_folders_of_a_machine() -> None:
    arguments = [
        "/home/me/quantize.py",
        "org/model",
        "--output",
        "/data/out",
        "--calibration=/data/a=b.txt",
        "--bits=2,3",
    ]
    shortened = ["quantize.py", "org/model", "--output", "out", "--calibration=a=b.txt", "--bits=2,3"]
    assert manifest.command_line(arguments) == shortened


def test_sound_checkpoint(
    shared_sample: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tool(shared_sample.folder, monkeypatch) == 0
    lines = capsys.readouterr().out.splitlines()
    for path in shared_sample.folder.iterdir():
        if path.name != MANIFEST_FILE:
            assert f"ok     {path.name}: SHA-256 as in MANIFEST.json" in lines
    assert any("the folder serves 2, 3, 4, 5, 6, 7, 8 bits" in line for line in lines)
    assert "ok     nesting: 14 layers, 2, 3, 4, 5, 6, 7, 8 bits are slices of the same codes" in lines
    assert lines[-1] == f"{shared_sample.folder}: sound"


def test_rounded_slices_nest(write: Callable[..., Any], tmp_path: Path) -> None:
    write(tmp_path / "out", Format(widths=(2, 3, 5), slicing="round"))
    assert failures(tmp_path / "out") == []


def test_model_card_and_report_may_lie_beside_the_checkpoint(sample: Any) -> None:
    (sample.folder / "report").mkdir()
    for name in DOCUMENT_FILES:
        (sample.folder / name).write_text("edited by hand")
    assert failures(sample.folder) == []


def test_partial_folder(sample: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    gone = sorted(sample.folder.glob("model-width[5-8]-*"))
    for path in gone:
        path.unlink()
    assert run_tool(sample.folder, monkeypatch) == 0
    lines = capsys.readouterr().out
    assert all(f"{path.name}: absent, left out" in lines for path in gone)
    assert "the folder serves 2, 3, 4 bits" in lines
    assert "nesting: 14 layers, 2, 3, 4 bits" in lines


@pytest.mark.parametrize("pattern", ["model-width2-00001-*", "model-width8-*", "tokenizer.json", "chat_template.jinja"])
def test_one_bit_changed(
    sample: Any, pattern: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = next(sample.folder.glob(pattern))
    flip_last_bit(path)
    assert run_tool(sample.folder, monkeypatch) == 1
    lines = capsys.readouterr().out
    assert f"FAILED {path}: SHA-256: found {hashlib.sha256(path.read_bytes()).hexdigest()}, expected" in lines
    assert f"{sample.folder}: failed checks:" in lines


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = read_json(folder / MANIFEST_FILE)
    change(content)
    (folder / MANIFEST_FILE).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / CONFIG_FILE).open("a").write(" "), "config.json: size: found"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json: found no such file"),
        (lambda folder: (folder / "vocab.json").write_text("{}"), "vocab.json: not in MANIFEST.json"),
        (lambda folder: (folder / MANIFEST_FILE).unlink(), "MANIFEST.json: found no such file"),
        (lambda folder: (folder / MANIFEST_FILE).write_text("{"), "MANIFEST.json: content: found no valid JSON"),
        (
            lambda folder: change_manifest(folder, lambda content: content.pop("files")),
            "MANIFEST.json: files: found NoneType",
        ),
        (
            lambda folder: change_manifest(folder, lambda content: content["files"].update({"../secret": {}})),
            "MANIFEST.json: files: found '../secret', expected a file name without a folder",
        ),
        (
            lambda folder: change_manifest(folder, lambda content: content["files"].update({"a": 1})),
            "MANIFEST.json: files.a: found 1",
        ),
        (
            lambda folder: change_manifest(folder, lambda content: content["files"].pop("config.json")),
            "config.json: not in MANIFEST.json",
        ),
    ],
)
def test_one_failure(sample: Any, spoil: Callable[[Path], Any], message: str) -> None:
    spoil(sample.folder)
    (found,) = failures(sample.folder)
    assert message in found


def test_unsound_format(sample: Any) -> None:
    (sample.folder / INDEX_FILE).write_text("{}")
    found = failures(sample.folder)
    assert len(found) == 2
    assert "model.safetensors.index.json: size" in found[0]
    assert "weight_map: found None" in found[1]


def test_folder_that_serves_nothing(sample: Any) -> None:
    for path in sample.folder.glob("model-width2-*"):
        path.unlink()
    (found,) = failures(sample.folder)
    assert "The folder serves no width" in found


def test_slice_that_is_no_prefix(shared_sample: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Checkpoint.codes

    def spoilt(self: Checkpoint, layer: str, width: int) -> torch.Tensor:
        codes = real(self, layer, width)
        if width == 3 and layer == "model.layers.1.mlp.up_proj":
            codes[2, 1] ^= 1
        return codes

    monkeypatch.setattr(Checkpoint, "codes", spoilt)
    (found,) = failures(shared_sample.folder)
    assert "3-bit codes of model.layers.1.mlp.up_proj: found 1 others, expected those of 8 bits, sliced" in found
    assert open_checkpoint(shared_sample.folder).layers
