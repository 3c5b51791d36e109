"""The command line of the verifier."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from vllm_matquant.cli import main


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """Function that runs the command: (exit status, what it prints)."""

    def run_command(*arguments: object) -> tuple[int, str]:
        try:
            status = main(["verify", *map(str, arguments)])
        except SystemExit as stop:
            status = stop.code
        said = capsys.readouterr()
        return status, said.out + said.err

    return run_command


@pytest.mark.parametrize("decoders", ["nested", "codebooks"])
def test_sound(decoders: str, run, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(decoders)
    status, said = run(folder)
    assert status == 0
    assert "FAILED" not in said
    assert f"{folder}: sound" in said


def test_a_codebook_that_adds_up_to_too_much(codebooks: Path, tmp_path: Path, run) -> None:
    shutil.copytree(codebooks, tmp_path / "spoiled")
    path = tmp_path / "spoiled" / "model-width4-00001-of-00001.safetensors"
    tensors = load_file(path)
    name = min(name for name in tensors if ".weight_codebook4" in name)
    tensors[name][:2, 5, 1] = 200
    save_file(tensors, path)
    status, said = run(tmp_path / "spoiled")
    assert status == 1
    assert f"{path}: {name}: found 200 in plane 0, entry 5, place 1" in said
    assert "expected levels from 1 up that with all increments add up to at most 255" in said


def test_folder_without_its_last_shards(nested: Path, tmp_path: Path, run) -> None:
    shutil.copytree(nested, tmp_path / "partial", ignore=shutil.ignore_patterns("model-width[5-8]-*"))
    status, said = run(tmp_path / "partial")
    assert status == 0
    assert "the folder serves 2, 4 bits" in said


def test_changed_byte(nested: Path, tmp_path: Path, run) -> None:
    shutil.copytree(nested, tmp_path / "spoiled")
    path = tmp_path / "spoiled" / "model-width4-00001-of-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    status, said = run(tmp_path / "spoiled")
    assert status == 1
    assert "FAILED" in said
    assert f"{path}: SHA-256: found" in said
    assert "spoiled: failed checks: 1" in said


def test_no_such_folder(tmp_path: Path, run) -> None:
    status, said = run(tmp_path / "nowhere")
    assert status == 1
    assert "nowhere" in said


def test_no_argument(run) -> None:
    status, said = run()
    assert status == 2
    assert "DIR" in said
