"""A writer that is killed at any moment leaves a folder that opens completely, or one without config.json."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from vllm_matquant.checkpoint import files, staging
from vllm_matquant.checkpoint.errors import WriteError
from vllm_matquant.checkpoint.names import CONFIG_FILE, DOCUMENT_FILES, INDEX_FILE, MANIFEST_FILE, REPORT_FOLDER
from vllm_matquant.checkpoint.reader import open_checkpoint
from vllm_matquant.checkpoint.spec import Format

# Runs in a process of its own, for it forks once for each moment: torch's threads do not survive a fork.
KILLS = '''
import os, shutil, sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from vllm_matquant.checkpoint import files, writer
from vllm_matquant.checkpoint.decoder import Affine
from vllm_matquant.checkpoint.errors import MissingFileError
from vllm_matquant.checkpoint.files import read_json
from vllm_matquant.checkpoint.reader import open_checkpoint
from vllm_matquant.checkpoint.skeleton import build_skeleton
from vllm_matquant.checkpoint.names import CONFIG_FILE, DOCUMENT_FILES, INDEX_FILE, MANIFEST_FILE
from vllm_matquant.checkpoint.spec import Format
from vllm_matquant.checkpoint.staging import STAGING_FOLDER

torch.set_num_threads(1)
os.fsync = lambda descriptor: None  # the machine itself does not die here
source, out, old = map(Path, sys.argv[1:4])
new_format = Format(widths=(2, 3), group_size="channel")
config = read_json(source / CONFIG_FILE)
tensors = load_file(source / "model.safetensors")
layers = build_skeleton(config).quantized_layers(new_format)


def write_new():
    with writer.CheckpointWriter(out, new_format, shard_bytes=30_000, overwrite=True) as new:
        for name, tensor in tensors.items():
            shape = layers.get(name.removesuffix(".weight"))
            if shape is None:
                new.add_tensor(name, tensor)
            else:
                values = Affine(torch.ones(shape[0], 1), torch.zeros(shape[0], 1))
                decoders = {width: new_format.decoder_kind.encode(values, width) for width in (2, 3)}
                new.add_layer(name.removesuffix(".weight"), torch.zeros(shape, dtype=torch.uint8), decoders)
        new.finish(config, copy_from=source)


def write_killed(moment):
    """Die at the given change of the output: before each but save_file, in the middle of which it dies."""
    changes = 0

    def change(middle=lambda: None):
        nonlocal changes
        changes += 1
        if changes == moment:
            middle()
            os._exit(9)

    def audit(event, arguments):
        inside = bool(arguments) and isinstance(arguments[0], (str, os.PathLike)) and str(out) in str(arguments[0])
        written = event != "open" or (isinstance(arguments[1], str) and arguments[1] not in ("r", "rb"))
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") and inside and written:
            change()

    def save(values, path, metadata, real=files.save_file):
        real(values, path, metadata)
        change(lambda: os.truncate(path, path.stat().st_size // 2))

    os.fsync = lambda descriptor: change()
    files.save_file = save
    sys.addaudithook(audit)
    write_new()


def state():
    """What the folder opens as."""
    if not (out / CONFIG_FILE).exists():
        try:
            open_checkpoint(out)
        except MissingFileError:
            return "nothing"
    checkpoint = open_checkpoint(out)
    stored = set(checkpoint.weight_map.values())
    assert {path.name for path in out.glob("*.safetensors")} == stored
    if checkpoint.format == new_format:
        assert not any((out / name).exists() for name in DOCUMENT_FILES)  # those of the old one
        assert not any(checkpoint.codes(layer, 3).any() for layer in checkpoint.layers)
        return "new"
    for path in old.rglob("*"):
        assert path.is_dir() or (out / path.relative_to(old)).read_bytes() == path.read_bytes()
    return "old"


def kill_at_every_moment(overwrite):
    moment, alive, states = 0, False, []
    while not alive:
        moment += 1
        shutil.rmtree(out, ignore_errors=True)
        if overwrite:
            shutil.copytree(old, out)
        child = os.fork()
        if child == 0:
            write_killed(moment)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, 9), f"moment {moment}: exit code {code}"
        alive = code == 0
        states.append(state())
        if overwrite and states[-1] == "nothing":  # the old one is given up only when the new one is complete
            files = {path.name for folder in (out, out / STAGING_FOLDER) for path in folder.glob("*")}
            assert {CONFIG_FILE, INDEX_FILE, MANIFEST_FILE} <= files, f"moment {moment}: neither old nor new"
        if moment % 5 == 0:
            write_new()  # a later run, over what the killed one left
            assert state() == "new"
            assert not (out / STAGING_FOLDER).exists()
    print(moment, *dict.fromkeys(states))


kill_at_every_moment(overwrite=False)
kill_at_every_moment(overwrite=True)
'''


def test_killed_at_every_moment(
    write: Callable[..., Any], source: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    write(tmp_path / "old", Format(widths=(2, 4, 5)), shard_bytes=2**31)
    (tmp_path / "old" / REPORT_FOLDER).mkdir()
    for name in DOCUMENT_FILES:
        (tmp_path / "old" / name).write_text("of the old checkpoint")
    process = subprocess.run(
        [sys.executable, "-c", KILLS, source, tmp_path / "out", tmp_path / "old"],
        env=os.environ | {"PYTHONPATH": str(request.config.rootpath)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    new, overwritten = (line.split() for line in process.stdout.splitlines())
    assert int(overwritten[0]) > int(new[0]) > 30
    assert new[1:] == ["nothing", "new"]
    assert overwritten[1:] == ["old", "nothing", "new"]


def test_every_file_is_on_the_disk_before_it_is_published(
    write: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    synced: set[int] = set()
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        if out.exists() and os.path.samestat(os.fstat(descriptor), out.stat()):
            events.append("sync")
        fsync(descriptor)

    def recorded_replace(old: Path, new: Path) -> None:
        if Path(new).parent == out:
            assert Path(old).stat().st_ino in synced, f"{old} was not synced"
            events.append(Path(new).name)
        replace(old, new)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    write(out, Format(widths=(2, 3)))
    assert events[-7:] == ["sync", MANIFEST_FILE, "sync", INDEX_FILE, "sync", CONFIG_FILE, "sync"]
    assert {path.name for path in out.iterdir()} == set(events) - {"sync"}


def test_full_disk_while_overwriting_leaves_the_old(
    write: Callable[..., Any], sample: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in sample.folder.iterdir()}
    said = rf"^{sample.folder}/.*: writing: found No space left on device, [\d,]+ bytes free, expected .*another disk$"

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    def full_in_rust(*arguments: Any, **options: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    faults = (
        (files, "save_file", full),
        (files, "save_file", full_in_rust),
        (Path, "write_text", full),
        (staging.shutil, "copyfile", full),
    )
    for module, name, fault in faults:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fault)
            with pytest.raises(WriteError, match=said):
                write(sample.folder, seed=1, overwrite=True)
        assert {path.name: path.read_bytes() for path in sample.folder.iterdir()} == before
        assert open_checkpoint(sample.folder).layers
