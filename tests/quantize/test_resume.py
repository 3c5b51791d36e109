"""A run that is cut off at any moment and then resumed writes the very bytes of an uninterrupted run."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from tests.quantize.tiny_sources import write_source
from vllm_matquant.checkpoint.decoder import AFFINE_INT8, Affine
from vllm_matquant.checkpoint.errors import OutputError, ShardError, WriteError
from vllm_matquant.checkpoint.names import CONFIG_FILE
from vllm_matquant.quantize import origin
from vllm_matquant.quantize.activations import Activations
from vllm_matquant.quantize.nested import Nested
from vllm_matquant.quantize.nested_vq import NestedVQ
from vllm_matquant.quantize.pipeline import CalibrationSettings, plan_format, quantize
from vllm_matquant.quantize.resume import WORK_FOLDER, ResumeError, WorkFolder
from vllm_matquant.quantize.run import Run
from vllm_matquant.quantize.source import SourceModel

BLOCKS = 4
WIDTHS = (2, 3, 8)


@dataclass(frozen=True)
class FollowingMethod(Nested):
    """A method whose result depends on what a slice's own blocks computed."""

    name: ClassVar[str] = "following"
    followed_widths: ClassVar[tuple[int, ...]] = (2, 8)  # type: ignore[misc]

    def quantize_block(self, task: Any) -> Any:
        states = task.activations.slices
        assert list(states) == [2, 8]
        for name, layer in super().quantize_block(task):
            distance = {width: float((task.activations.reference - hidden).norm()) for width, hidden in states.items()}
            yield name, type(layer)(layer.codes, layer.decoders, distance)


def run(source: Path, output: Path, text: Path, **options: Any) -> dict[str, dict[int, float]]:
    """Quantize a tiny model."""
    method = options.pop("method", Nested(WIDTHS))
    samples = options.pop("samples", 4)
    model = SourceModel(source)
    settings = CalibrationSettings(str(text), samples=samples, sequence_length=32)
    rules = options.pop("ignore", []), [], options.pop("bits_for", [])
    format_ = plan_format(model, method, options.pop("group_size", "auto"), *rules)
    return quantize(model, output, method, format_, settings, command=["quantize.py"], **options).errors


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of four blocks; not to be changed."""
    return write_source(tmp_path_factory.mktemp("deep") / "llama", num_hidden_layers=BLOCKS)


@pytest.fixture
def cut_off(deep: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Function that runs until some blocks are finished and is then interrupted."""

    def start(output: Path, blocks: int = 2, error: type[BaseException] = KeyboardInterrupt, **options: Any) -> None:
        quantize_block = Run._quantize
        calls: list[Any] = []

        def limited(*arguments: Any) -> None:
            if len(calls) == blocks:
                raise error
            calls.append(arguments)
            quantize_block(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(Run, "_quantize", limited)
            with pytest.raises(error):
                run(deep, output, text_file, **options)

    return start


# Runs in a process of its own, for it forks once for each run: torch's threads do not survive a fork.
KILLS = '''
import os, random, shutil, signal, sys
from pathlib import Path

import torch

torch.set_num_threads(1)

from tests.quantize.test_resume import content, run
from vllm_matquant.checkpoint.names import CONFIG_FILE
from vllm_matquant.quantize.resume import WORK_FOLDER, WorkFolder

source, out, whole, text = map(Path, sys.argv[1:5])
os.fsync = lambda descriptor: None  # the machine itself does not die here
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")


def run_until(moment, **options):
    """Run in a child that is killed before its ``moment``-th change of the disk; returns how many it made, or None."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        changes = 0

        def audit(event, arguments):
            nonlocal changes
            opened = event == "open" and isinstance(arguments[1], str) and arguments[1] not in ("r", "rb")
            if (opened or event in CHANGES) and str(out) in str(arguments[0]):
                changes += 1
                if changes == moment:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.stderr = open(os.devnull, "w")
        sys.addaudithook(audit)
        run(source, out, text, **options)
        os.write(writer, str(changes).encode())
        os._exit(0)
    os.close(writer)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with os.fdopen(reader) as pipe:
        made = pipe.read()
    assert code == (0 if made else -signal.SIGKILL), f"moment {moment}: exit code {code}"
    return int(made) if made else None


def finish(**options):
    """Resume as often as it takes, unless the run was cut off after its last word."""
    if WorkFolder(out).exists or not (out / CONFIG_FILE).exists():
        run_until(options.pop("moment", None), resume=True, **options)


moments = run_until(None)
assert content(out) == content(whole)
points = random.Random(int(sys.argv[5])).sample(range(1, moments + 1), 10)
stages = set()
for point in points:
    shutil.rmtree(out)
    assert run_until(point) is None
    finish(moment=point // 2 + 1)
    work = WorkFolder(out)
    stages.add((work.exists, work.publishing, (out / CONFIG_FILE).exists()))
    finish()
    found = {name: data for name, data in content(out).items() if not name.startswith(WORK_FOLDER)}
    assert found == content(whole), f"killed at moment {point} of {moments}"
print(moments, len(stages))
'''


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_killed_at_ten_random_moments(
    deep: Path, text_file: Path, tmp_path: Path, request: pytest.FixtureRequest, seed: int
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run(deep, tmp_path / "whole", text_file)
    finally:
        torch.set_num_threads(threads)
    process = subprocess.run(
        [sys.executable, "-c", KILLS, deep, tmp_path / "out", tmp_path / "whole", text_file, str(seed)],
        env=os.environ | {"PYTHONPATH": str(request.config.rootpath)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    moments, stages = map(int, process.stdout.split())
    assert moments > 20
    assert stages > 1


@pytest.mark.parametrize("blocks", [1, 3, 4])
@pytest.mark.parametrize("on_disk", [False, True])
def test_resumed_run_writes_the_same_bytes(
    deep: Path, text_file: Path, tmp_path: Path, cut_off: Callable[..., None], blocks: int, on_disk: bool
) -> None:
    whole = run(deep, tmp_path / "whole", text_file)
    if blocks < BLOCKS:
        cut_off(tmp_path / "out", blocks)
    assert run(deep, tmp_path / "out", text_file, resume=True, activations_on_disk=on_disk) == whole
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize("blocks", [1, 3])
def test_codebooks_are_resumed(
    deep: Path, text_file: Path, tmp_path: Path, cut_off: Callable[..., None], blocks: int
) -> None:
    own = {"method": NestedVQ(WIDTHS), "bits_for": [("down_proj", (4, 8))]}
    whole = run(deep, tmp_path / "whole", text_file, **own)
    cut_off(tmp_path / "out", blocks, **own)
    with pytest.raises(ResumeError, match=r"settings\.json: "):
        run(deep, tmp_path / "out", text_file, resume=True, bits_for=own["bits_for"])
    assert run(deep, tmp_path / "out", text_file, resume=True, **own) == whole
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_layers_with_widths_of_their_own_are_replayed(
    deep: Path, text_file: Path, tmp_path: Path, cut_off: Callable[..., None]
) -> None:
    own = {"bits_for": [("down_proj", (4, 8)), ("v_proj", (3,))]}
    whole = run(deep, tmp_path / "whole", text_file, **own)
    cut_off(tmp_path / "out", **own)
    with pytest.raises(ResumeError, match="layer_widths"):
        run(deep, tmp_path / "out", text_file, resume=True)
    assert run(deep, tmp_path / "out", text_file, resume=True, **own) == whole
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_followed_slices_are_replayed(
    deep: Path, text_file: Path, tmp_path: Path, cut_off: Callable[..., None]
) -> None:
    method = FollowingMethod(WIDTHS)
    whole = run(deep, tmp_path / "whole", text_file, method=method)
    distances = [list(errors.values()) for errors in whole.values()]
    assert distances[0] == [0, 0]
    assert distances[-1][0] > 2 * distances[-1][1] > 0
    cut_off(tmp_path / "out", method=method)
    assert run(deep, tmp_path / "out", text_file, method=method, resume=True) == whole
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_finished_blocks_are_not_made_again(
    deep: Path, text_file: Path, tmp_path: Path, cut_off: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_off(tmp_path / "out", 3)
    made: list[str] = []
    quantize_block = Run._quantize

    def recorded(self: Run, task: Any, *arguments: Any) -> None:
        made.append(task.name)
        quantize_block(self, task, *arguments)

    monkeypatch.setattr(Run, "_quantize", recorded)
    run(deep, tmp_path / "out", text_file, resume=True)
    assert made == ["model.layers.3"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, MemoryError])
def test_finished_blocks_are_kept(
    tmp_path: Path, cut_off: Callable[..., None], caplog: pytest.LogCaptureFixture, error: type[BaseException]
) -> None:
    cut_off(tmp_path / "out", 2, error)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [WORK_FOLDER]
    kept = sorted(path.name for path in (tmp_path / "out" / WORK_FOLDER).iterdir())
    assert kept == ["model.layers.0.safetensors", "model.layers.1.safetensors", "settings.json"]
    assert "2 of 4 blocks are finished and kept, for --resume" in caplog.text


def test_nothing_is_kept_before_the_first_block(
    tmp_path: Path, cut_off: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    cut_off(tmp_path / "out", 0)
    assert not (tmp_path / "out").exists()
    assert "resume" not in caplog.text


def test_unfinished_work_is_not_thrown_away(
    deep: Path, text_file: Path, tmp_path: Path, cut_off: Callable[..., None]
) -> None:
    cut_off(tmp_path / "out")
    before = content(tmp_path / "out")
    message = r"found unfinished work, 2 of 4 blocks, expected none.*--resume to go on, or --overwrite to start again"
    with pytest.raises(ResumeError, match=message):
        run(deep, tmp_path / "out", text_file)
    assert content(tmp_path / "out") == before
    run(deep, tmp_path / "out", text_file, overwrite=True, group_size=32)  # other settings: begun anew
    run(deep, tmp_path / "whole", text_file, group_size=32)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_resume_without_unfinished_work_begins(deep: Path, text_file: Path, tmp_path: Path) -> None:
    run(deep, tmp_path / "out", text_file, resume=True)
    run(deep, tmp_path / "whole", text_file)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    with pytest.raises(OutputError, match=r"expected no files of a checkpoint\. Use --overwrite to replace it"):
        run(deep, tmp_path / "out", text_file, resume=True)


def test_interrupted_while_publishing(
    deep: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    replace = os.replace

    def interrupted(old: Path, new: Path) -> None:
        if Path(new) == out / CONFIG_FILE:
            raise OSError("pulled the plug")
        replace(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(OSError, match="plug"):
            run(deep, out, text_file)
    assert list(out.glob("*.safetensors"))
    assert not (out / CONFIG_FILE).exists()
    with pytest.raises(ResumeError, match="4 of 4 blocks"):
        run(deep, out, text_file)
    run(deep, out, text_file, resume=True)
    run(deep, tmp_path / "whole", text_file)
    assert content(out) == content(tmp_path / "whole")


def test_another_checkpoint_is_not_overwritten(
    deep: Path, text_file: Path, tmp_path: Path, cut_off: Callable[..., None]
) -> None:
    run(deep, tmp_path / "out", text_file, method=Nested((4,)))
    cut_off(tmp_path / "out", overwrite=True)
    with pytest.raises(OutputError, match="expected no files of a checkpoint"):
        run(deep, tmp_path / "out", text_file, resume=True)
    run(deep, tmp_path / "out", text_file, resume=True, overwrite=True)
    run(deep, tmp_path / "whole", text_file)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_damaged_block(deep: Path, text_file: Path, tmp_path: Path, cut_off: Callable[..., None]) -> None:
    cut_off(tmp_path / "out")
    path = tmp_path / "out" / WORK_FOLDER / "model.layers.1.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ShardError, match=r"model\.layers\.1\.safetensors"):
        run(deep, tmp_path / "out", text_file, resume=True)


class TestRefusals:
    """What was changed in between is named, with what was found and expected; the work stays as it was."""

    @pytest.fixture
    def refused(self, deep: Path, text_file: Path, tmp_path: Path, cut_off: Callable[..., None]) -> Callable[..., None]:
        cut_off(tmp_path / "out")
        before = content(tmp_path / "out")

        def check(message: str, source: Path = deep, text: Path = text_file, **options: Any) -> None:
            with pytest.raises(ResumeError, match=r"settings\.json: " + message):
                run(source, tmp_path / "out", text, resume=True, **options)
            assert content(tmp_path / "out") == before

        return check

    def test_model(self, refused: Callable[..., None], tmp_path: Path) -> None:
        other = write_source(tmp_path / "other", seed=1, num_hidden_layers=BLOCKS)
        refused(r"source\.model\.safetensors\.sha256: found '?[0-9a-f]{64}.*, expected '?[0-9a-f]{64}", source=other)

    def test_shards(self, refused: Callable[..., None], tmp_path: Path) -> None:
        other = write_source(tmp_path / "other", num_hidden_layers=BLOCKS, shard_size="300KB")
        refused(r"source\.model-00001-of-0000\d\.safetensors\.bytes: found \d+, expected None", source=other)

    def test_configuration(self, refused: Callable[..., None], tmp_path: Path) -> None:
        other = write_source(tmp_path / "other", num_hidden_layers=BLOCKS)
        config = json.loads((other / CONFIG_FILE).read_text())
        (other / CONFIG_FILE).write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
        refused(r"source\.config\.json\.", source=other)

    def test_copied_file(self, refused: Callable[..., None], tmp_path: Path) -> None:
        other = write_source(tmp_path / "other", num_hidden_layers=BLOCKS)
        (other / "LICENSE").write_text("mine")
        refused(r"copied\.LICENSE\.bytes: found 4, expected None", source=other)

    def test_text(self, refused: Callable[..., None], text_file: Path, tmp_path: Path) -> None:
        other = tmp_path / text_file.name
        other.write_text(text_file.read_text() + ".")
        refused(r"calibration\.sha256: found", text=other)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"samples": 5}, r"calibration\.samples: found 5, expected 4"),
            ({"group_size": 32}, r"format\.group_size: found 32, expected auto"),
            ({"ignore": ["k_proj"]}, r"format\.ignored_layers: found \['lm_head', 'model"),
            ({"method": Nested((2, 3))}, r"format\.widths: found \[2, 3\], expected \[2, 3, 8\]"),
            ({"method": Nested(WIDTHS, damping=0.02)}, r"method\.damping: found 0\.02, expected 0\.01"),
            ({"method": Nested(WIDTHS, sweeps=1)}, r"method\.sweeps: found 1, expected 2"),
        ],
    )
    def test_setting(self, refused: Callable[..., None], options: dict[str, Any], message: str) -> None:
        refused(message, **options)

    def test_version(self, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
        versions = origin.versions()
        monkeypatch.setattr(origin, "versions", lambda: versions | {"vllm_matquant": "99.0"})
        refused(r"versions\.vllm_matquant: found 99\.0, expected ")

    def test_threads(self, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
        machine = origin.describe_machine()
        monkeypatch.setattr(origin, "describe_machine", lambda: machine | {"threads": 99})
        refused(r"machine\.threads: found 99, expected ")


def test_activations_on_disk_are_the_same(deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = SourceModel(deep)
    tokens = torch.randint(300, (3, 16), generator=torch.Generator().manual_seed(0))
    in_memory, on_disk = Activations(source.runner, tokens, (2,)), Activations(source.runner, tokens, (2,), tmp_path)
    assert list(tmp_path.iterdir()) == []  # their files have no names
    for index in range(2):
        block = source.runner.load_block(index)
        for activations in (in_memory, on_disk):
            with torch.no_grad():
                activations.advance(block, lambda width: {"mlp.down_proj.weight": torch.zeros(64, 128)})
    assert torch.equal(in_memory.reference, on_disk.reference)
    assert torch.equal(in_memory.slices[2], on_disk.slices[2])
    assert not torch.equal(in_memory.reference, in_memory.slices[2])


def test_finished_blocks_have_the_permissions_that_the_umask_gives(
    cut_off: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = os.umask(0o027)
    try:
        cut_off(tmp_path / "out")
        decoder = AFFINE_INT8.encode(Affine(torch.ones(3, 2), torch.zeros(3, 2)), 2)
        WorkFolder(tmp_path / "out").save_trained(2, {"block": {"block.layer": decoder}})
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) == 4
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}


def test_a_full_disk_is_an_error(deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(WriteError, match=r"No space left on device, .* bytes free.* Leave out --activations-on-disk"):
        Activations(SourceModel(deep).runner, torch.zeros(1, 8, dtype=torch.int64), folder=tmp_path)
    assert list(tmp_path.iterdir()) == []
