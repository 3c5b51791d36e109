"""The writer refuses what the format has no place for, and never touches a folder before all is complete."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tests.checkpoint.samples import random_codebook, random_decoder, same_decoder
from vllm_matquant.checkpoint.decoder import (
    AFFINE_FLOAT16,
    AFFINE_INT8,
    AFFINE_KINDS,
    CODEBOOK,
    Affine,
    Decoder,
    DecoderKind,
)
from vllm_matquant.checkpoint.errors import (
    CheckpointError,
    ConfigError,
    DecoderValueError,
    MissingTensorError,
    OutputError,
    TensorDtypeError,
    TensorShapeError,
    UnexpectedTensorError,
    WriteError,
)
from vllm_matquant.checkpoint.files import read_json
from vllm_matquant.checkpoint.names import (
    CONFIG_FILE,
    DOCUMENT_FILES,
    INDEX_FILE,
    MANIFEST_FILE,
    MODEL_CARD_FILE,
    REPORT_FOLDER,
    shard_name,
    shard_width,
)
from vllm_matquant.checkpoint.quantization_config import format_to_config
from vllm_matquant.checkpoint.reader import open_checkpoint
from vllm_matquant.checkpoint.recipe import Recipe
from vllm_matquant.checkpoint.recipe_store import add_recipes
from vllm_matquant.checkpoint.spec import Format
from vllm_matquant.checkpoint.staging import STAGING_FOLDER
from vllm_matquant.checkpoint.verify import verify
from vllm_matquant.checkpoint.writer import CheckpointWriter

COPIED = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "LICENSE.txt"}
FORMAT = Format(widths=(2, 4), group_size=32)
CODES = torch.zeros(3, 64, dtype=torch.uint8)
FLOAT16 = dataclasses.replace(FORMAT, decoder_kind=AFFINE_FLOAT16)
CODEBOOKS = dataclasses.replace(FORMAT, widths=(2, 5), decoder_kind=CODEBOOK)


def decoders(*widths: int, kind: DecoderKind = AFFINE_INT8, rows: int = 3) -> dict[int, Decoder]:
    values = Affine(torch.ones(rows, 2), torch.zeros(rows, 2))
    return {width: kind.encode(values, width) for width in widths}


def decoders_with(part: str, value: Any, kind: DecoderKind = AFFINE_INT8) -> dict[int, Decoder]:
    """Decoders of widths 2 and 4, of which the latter has a value, or a tensor, in place of a part's."""
    spoilt = decoders(2, 4, kind=kind)
    parts = dict(spoilt[4].parts)
    if isinstance(value, torch.Tensor):
        parts[part] = value
    else:
        parts[part][1, 0] = value
    return spoilt | {4: Decoder(kind.form(4), 4, parts)}


def values_with(name: str, value: float, kind: DecoderKind) -> dict[int, Decoder]:
    """Decoders of widths 2 and 4, of which the latter encodes a value that no decoder may have."""
    values = {"scale": torch.ones(3, 2), "offset": torch.zeros(3, 2)}
    values[name][1, 0] = value
    return decoders(2, kind=kind) | {4: kind.encode(Affine(**values), 4)}


def codebooks(**parts: Any) -> dict[int, Decoder]:
    """Codebooks of widths 2 and 5, of which the latter has other parts, or its own as functions change them."""
    generator = torch.Generator().manual_seed(0)
    of_two, of_five = (random_decoder(CODEBOOK, width, 3, 2, generator) for width in (2, 5))
    changed = {part: value(of_five.parts[part].clone()) if callable(value) else value for part, value in parts.items()}
    return {2: of_two, 5: Decoder(of_five.form, 5, {**of_five.parts, **changed})}


def codebook_with_scale(value: float) -> dict[int, Decoder]:
    """Codebooks of widths 2 and 5, of which the latter encodes a scale that no decoder may have."""
    scale = torch.ones(3, 2)
    scale[1, 0] = value
    values = random_codebook(5, scale, torch.Generator().manual_seed(0))
    return codebooks() | {5: CODEBOOK.encode(values, 5)}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_files_of_a_checkpoint(shared_sample: Any, source: Path) -> None:
    names = {path.name for path in shared_sample.folder.iterdir()}
    shards = {name for name in names if shard_width(name)}
    assert names - shards == {CONFIG_FILE, INDEX_FILE, MANIFEST_FILE, *COPIED}
    for name in COPIED:
        assert (shared_sample.folder / name).read_bytes() == (source / name).read_bytes()
    for width in range(2, 9):
        of_width = sorted(name for name in shards if shard_width(name) == width)
        assert len(of_width) > 1
        assert of_width == [shard_name(width, number + 1, len(of_width)) for number in range(len(of_width))]


def test_all_that_a_tokenizer_and_a_processor_need_is_copied(
    write: Callable[..., Any], source: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(source, tmp_path / "model"))
    names = ["merges.txt", "tokenizer.model", "preprocessor_config.json", "processor_config.json"]
    names += ["additional_chat_templates/tool_use.jinja", "additional_chat_templates/rag.jinja"]
    (model / "additional_chat_templates").mkdir()
    for name in (*names, "additional_chat_templates/evil.py"):
        (model / name).write_text(name)
    output = tmp_path / "out"
    write(output, FORMAT, model=model)
    copied = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    assert set(names) <= copied
    assert "additional_chat_templates/evil.py" not in copied
    assert all((output / name).read_text() == name for name in names)
    assert all(result.passed for result in verify(output))
    (output / names[-1]).write_text("another")
    assert not all(result.passed for result in verify(output))
    write(output, FORMAT, overwrite=True)
    assert not list((output / "additional_chat_templates").glob("*"))


def test_index_and_config(shared_sample: Any, source: Path) -> None:
    index = read_json(shared_sample.folder / INDEX_FILE)
    sizes = 0
    for file in set(index["weight_map"].values()):
        with safe_open(shared_sample.folder / file, framework="pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            assert {name for name, of in index["weight_map"].items() if of == file} == set(shard.keys())
            sizes += sum(
                shard.get_tensor(name).nbytes for name in index["weight_map"] if index["weight_map"][name] == file
            )
    assert index["metadata"]["total_size"] == sizes
    config = read_json(shared_sample.folder / CONFIG_FILE)
    assert config.pop("quantization_config") == format_to_config(shared_sample.format)
    assert config == read_json(source / CONFIG_FILE)


def test_same_input_gives_the_same_bytes(write: Callable[..., Any], tmp_path: Path) -> None:
    write(tmp_path / "one", FORMAT)
    write(tmp_path / "two", FORMAT)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_shard_bytes_bound_the_shards(write: Callable[..., Any], tmp_path: Path) -> None:
    write(tmp_path / "out", shard_bytes=12_000)
    headers = 4_000
    assert all(path.stat().st_size < 12_000 + headers for path in (tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("codes", "layer_decoders", "error", "message"),
    [
        (CODES.int(), decoders(2, 4), TensorDtypeError, "codes of layer: found torch.int32, expected torch.uint8"),
        (CODES[0], decoders(2, 4), TensorShapeError, r"codes of layer: found \[64\]"),
        (CODES[:, :60], decoders(2, 4), ConfigError, "in_features of layer: found 60, expected a multiple of 8"),
        (
            CODES[:, :48],
            decoders(2, 4),
            ConfigError,
            'group_size for layer: found 32, .* 48 .*: 8, 16, 24, "channel"',
        ),
        (CODES, decoders(2), MissingTensorError, r"decoders of layer: found widths \[2\], expected \[2, 4\]"),
        (CODES, decoders(2, 3, 4), UnexpectedTensorError, r"found widths \[2, 3, 4\], expected \[2, 4\]"),
        (CODES[:2], decoders(2, 4), TensorShapeError, r"layer.weight_scale2: found \[3, 2\], expected \[2, 2\]"),
        (
            CODES,
            decoders_with("centre", torch.zeros(3, 2, dtype=torch.int64)),
            TensorDtypeError,
            "layer.weight_centre4: found torch.int64, expected torch.int8",
        ),
        (
            CODES,
            decoders_with("step", torch.zeros(3, dtype=torch.bfloat16)),
            TensorShapeError,
            r"layer.weight_step4: found \[3\], expected \[3, 2\]",
        ),
        (CODES, decoders_with("step", math.nan), DecoderValueError, "layer.weight_step4: found nan in row 1, column 0"),
        (CODES, decoders_with("step", -1e-3), DecoderValueError, "layer.weight_step4: found -0.00.* from 0 up"),
        (
            CODES,
            values_with("scale", math.nan, AFFINE_INT8),
            DecoderValueError,
            "layer.weight_step4: found nan in row 1",
        ),
        (CODES, values_with("scale", -1e-3, AFFINE_INT8), DecoderValueError, "layer.weight_step4: found -"),
        (CODES, values_with("offset", math.inf, AFFINE_INT8), DecoderValueError, "layer.weight_step4: found inf"),
        (
            CODES,
            decoders(2, 4, kind=AFFINE_FLOAT16),
            ValueError,
            "found float16 of width 2, expected int8",
        ),
        (CODES, decoders(4) | {2: decoders(4)[4]}, ValueError, "of width 4, expected int8 of width 2"),
    ],
)
def test_bad_layer(
    tmp_path: Path, codes: torch.Tensor, layer_decoders: dict[int, Decoder], error: type[ValueError], message: str
) -> None:
    with CheckpointWriter(tmp_path / "out", FORMAT) as writer, pytest.raises(error, match=message):
        writer.add_layer("layer", codes, layer_decoders)


@pytest.mark.parametrize(
    ("layer_decoders", "error", "message"),
    [
        (
            decoders_with("offset", torch.ones(3, 2, dtype=torch.int64), AFFINE_FLOAT16),
            TensorDtypeError,
            "layer.weight_offset4: found torch.int64",
        ),
        (
            decoders_with("scale", math.nan, AFFINE_FLOAT16),
            DecoderValueError,
            "layer.weight_scale4: found nan in row 1, column 0",
        ),
        (
            values_with("scale", -1e-3, AFFINE_FLOAT16),
            DecoderValueError,
            "layer.weight_scale4: found -0.001.* from 0 up",
        ),
        (
            values_with("scale", 1e6, AFFINE_FLOAT16),
            DecoderValueError,
            r"layer.weight_scale4: found inf .* \(as torch.float16\)",
        ),
        (values_with("offset", -1e6, AFFINE_FLOAT16), DecoderValueError, "layer.weight_offset4: found -inf"),
    ],
)
def test_bad_layer_in_float16(
    tmp_path: Path, layer_decoders: dict[int, Decoder], error: type[CheckpointError], message: str
) -> None:
    with CheckpointWriter(tmp_path / "out", FLOAT16) as writer, pytest.raises(error, match=message):
        writer.add_layer("layer", CODES, layer_decoders)


@pytest.mark.parametrize(
    ("layer_decoders", "error", "message"),
    [
        (
            codebooks(codebook=lambda codebook: codebook.view(torch.int8)),
            TensorDtypeError,
            "layer.weight_codebook5: found torch.int8, expected torch.uint8",
        ),
        (
            codebooks(codebook=lambda codebook: codebook[:3]),
            TensorShapeError,
            r"layer.weight_codebook5: found \[3, 64, 4\], expected \[8, 64, 4\]",
        ),
        (
            codebooks(step=torch.ones(3, 2, dtype=torch.bfloat16)),
            TensorShapeError,
            r"layer.weight_step5: found \[3, 2\], expected \[3, 1\]",
        ),
        (
            codebooks(step=torch.tensor([[1.0], [math.nan], [1.0]], dtype=torch.bfloat16)),
            DecoderValueError,
            "layer.weight_step5: found nan in row 1, column 0",
        ),
        (
            codebooks(codebook=lambda codebook: codebook.fill_(63)),  # 8 times 63 is more than 255, 4 times is not
            None,
            "",
        ),
        (
            codebooks(codebook=lambda codebook: codebook.fill_(64)),
            DecoderValueError,
            "layer.weight_codebook5: found 64 in plane 0, entry 0, place 0 .* at most 255",
        ),
        (codebook_with_scale(math.nan), DecoderValueError, "layer.weight_step5: found .* in row 1, column 0"),
        (codebook_with_scale(math.inf), DecoderValueError, "layer.weight_step5: found inf in row 1, column 0"),
        (codebook_with_scale(-1e-3), DecoderValueError, "layer.weight_step5: found -1.0 in row 1.* from 0 up to 2"),
        (codebooks() | {5: decoders(5)[5]}, ValueError, "found float16 of width 5, expected codebook of width 5"),
        (codebooks() | {2: codebooks()[5]}, ValueError, "found codebook of width 5, expected codebook of width 2"),
    ],
)
def test_bad_layer_of_codebooks(
    tmp_path: Path, layer_decoders: dict[int, Decoder], error: type[ValueError] | None, message: str
) -> None:
    with (
        CheckpointWriter(tmp_path / "out", CODEBOOKS) as writer,
        pytest.raises(error, match=message) if error else contextlib.nullcontext(),
    ):
        writer.add_layer("layer", CODES, layer_decoders)


def test_rounded_slices_of_codebooks_are_not_published(write: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="slicing: found 'round', expected 'truncate'"):
        write(tmp_path / "out", dataclasses.replace(CODEBOOKS, slicing="round"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", AFFINE_KINDS, ids=lambda kind: kind.name)
def test_negative_offsets_are_sound(tmp_path: Path, kind: DecoderKind) -> None:
    with CheckpointWriter(tmp_path / "out", dataclasses.replace(FORMAT, decoder_kind=kind)) as writer:
        writer.add_layer("layer", CODES, values_with("offset", -3.0, kind))


@pytest.mark.parametrize("shard_bytes", [1, 2**20])
def test_nothing_twice(tmp_path: Path, shard_bytes: int) -> None:
    with CheckpointWriter(tmp_path / "out", FORMAT, shard_bytes=shard_bytes) as writer:
        writer.add_layer("layer", CODES, decoders(2, 4))
        writer.add_tensor("norm", torch.ones(3))
        with pytest.raises(UnexpectedTensorError, match=r"layer\.weight_base: found a tensor for the second time"):
            writer.add_layer("layer", CODES, decoders(2, 4))
        with pytest.raises(UnexpectedTensorError, match="norm: found a tensor for the second time"):
            writer.add_tensor("norm", torch.ones(3))


def test_bad_tensor(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", FORMAT) as writer:
        with pytest.raises(TensorDtypeError, match=r"norm: found torch\.int64, expected torch\.bfloat16 or"):
            writer.add_tensor("norm", torch.ones(3, dtype=torch.int64))
        with pytest.raises(UnexpectedTensorError, match=r"layer\.weight_plane3: found the name of a quantized layer"):
            writer.add_tensor("layer.weight_plane3", torch.ones(3))


def test_incomplete_model_is_not_published(source: Path, tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", FORMAT) as writer:
        writer.add_layer(
            "model.layers.0.self_attn.q_proj",
            torch.zeros(64, 64, dtype=torch.uint8),
            decoders(2, 4, rows=64),
        )
        with pytest.raises(MissingTensorError, match="found nothing, expected a tensor of shape"):
            writer.finish(read_json(source / CONFIG_FILE))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("there_before", [False, True])
def test_error_leaves_nothing_behind(tmp_path: Path, there_before: bool) -> None:
    class Stop(Exception):
        pass

    def write() -> None:
        with CheckpointWriter(tmp_path / "out", FORMAT, shard_bytes=1) as writer:
            writer.add_layer("layer", CODES, decoders(2, 4))
            assert list((tmp_path / "out" / STAGING_FOLDER).iterdir())
            raise Stop

    if there_before:
        (tmp_path / "out").mkdir()
    with pytest.raises(Stop):
        write()
    assert list(tmp_path.rglob("*")) == ([tmp_path / "out"] if there_before else [])


def test_caller_may_reuse_its_memory(tmp_path: Path, kind: DecoderKind) -> None:
    norm, decoder = torch.ones(3), random_decoder(kind, 2, 3, 2, torch.Generator().manual_seed(0))
    expected = decoder.map(torch.clone)
    with CheckpointWriter(tmp_path / "out", Format(widths=(2,), group_size=32, decoder_kind=kind)) as writer:
        writer.add_tensor("norm", norm)
        writer.add_layer("layer", CODES, {2: decoder})
        norm.zero_()
        decoder.map(torch.zero_)
        with pytest.raises(CheckpointError):  # it is not the model, but its shards are written by then
            writer.finish({"model_type": "llama"})
        with safe_open(tmp_path / "out" / STAGING_FOLDER / shard_name(2, 1, 1), framework="pt") as shard:
            assert shard.get_tensor("norm").all()
            found = kind.form(2).from_tensors(lambda name: shard.get_tensor(f"layer.{name}"), 2)
            assert same_decoder(found, expected)


@pytest.mark.parametrize(
    "name", [CONFIG_FILE, INDEX_FILE, MANIFEST_FILE, shard_name(3, 1, 1), "tokenizer.json", *DOCUMENT_FILES]
)
def test_folder_with_a_file_of_a_checkpoint_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(OutputError, match=f"{tmp_path}: output folder: found {name}, .* Use --overwrite to replace it"):
        CheckpointWriter(tmp_path, FORMAT)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / name]
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", [REPORT_FOLDER, "recipes", "additional_chat_templates", "1_Pooling"])
def test_folder_without_a_place_for_a_sub_folder_is_refused(tmp_path: Path, name: str, overwrite: bool) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(OutputError, match=f"{tmp_path}: {name}: found a file, expected a folder"):
        CheckpointWriter(tmp_path, FORMAT, overwrite=overwrite)
    assert contents(tmp_path) == {name: b"mine"}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["LICENSES", CONFIG_FILE, MODEL_CARD_FILE, shard_name(3, 1, 1)])
def test_folder_in_the_place_of_a_file_is_refused(tmp_path: Path, name: str, overwrite: bool) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=f"{tmp_path}: {name}: found a folder, expected a file, or nothing"):
        CheckpointWriter(tmp_path, FORMAT, overwrite=overwrite)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / name / "notes.txt"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin"])
def test_folder_with_other_weights_is_always_refused(tmp_path: Path, name: str, overwrite: bool) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(OutputError, match=f"found {name}, expected no weights but .* Move it away"):
        CheckpointWriter(tmp_path, FORMAT, overwrite=overwrite)
    assert contents(tmp_path) == {name: b"mine"}


def test_output_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="output folder: found a file, expected a folder"):
        CheckpointWriter(tmp_path / "out", FORMAT, overwrite=True)
    with pytest.raises(OutputError, match=r"found a file in its place, .*/out, expected a folder, or nothing"):
        CheckpointWriter(tmp_path / "out" / "deep" / "below", FORMAT)


def test_output_that_is_a_link_to_nothing(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for folder in (tmp_path / "link", tmp_path / "link" / "below"):
        with pytest.raises(
            OutputError, match=r"found a link to nothing.*, expected .*\. Name another folder, or remove"
        ):
            CheckpointWriter(folder, FORMAT)
    (tmp_path / "nowhere").mkdir()
    CheckpointWriter(tmp_path / "link", FORMAT).__exit__(None, None, None)


def test_output_that_nobody_may_write_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write anywhere
    with pytest.raises(OutputError, match=rf"found no permission to write to {tmp_path}, or a file system"):
        CheckpointWriter(tmp_path / "deep" / "out", FORMAT)
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize(
    "name",
    ["recipes/mine.json", "recipes/mine.safetensors", "additional_chat_templates/a.jinja", "1_Pooling/config.json"],
)
def test_files_of_the_users_own_stay(write: Callable[..., Any], tmp_path: Path, name: str) -> None:
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(OutputError, match=rf"found {name}, expected no files of a checkpoint\. Use --overwrite"):
        write(tmp_path / "out", FORMAT)
    assert file.read_text() == "mine"


def test_two_writers_at_a_time(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, FORMAT), pytest.raises(OutputError, match="another process writing to it"):
        CheckpointWriter(tmp_path, FORMAT)
    with CheckpointWriter(tmp_path, FORMAT) as writer:
        lock = os.open(tmp_path / STAGING_FOLDER, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(lock)
        assert writer.folder == tmp_path


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    output = tmp_path / "out"
    with CheckpointWriter(output, FORMAT):
        said = rf"{output}: {STAGING_FOLDER}: found the files of another process.* Remove {output}/{STAGING_FOLDER} if "
        with pytest.raises(OutputError, match=said):
            CheckpointWriter(output, FORMAT)
        assert (output / STAGING_FOLDER).is_dir()  # the other's
    assert contents(tmp_path) == {}


def test_a_lock_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(WriteError, match=rf"^{tmp_path}/out/{STAGING_FOLDER}: writing: found Input/output error, "):
        CheckpointWriter(tmp_path / "out", FORMAT)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_that_knows_neither_fsync_nor_renames_across_mounts(
    write: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    write(tmp_path / "plain")
    replace = os.replace

    def fsync(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    def replace_in_a_folder(old: Path, new: Path) -> None:
        if Path(old).parent != Path(new).parent:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace_in_a_folder)
    write(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")


def test_a_disk_that_fails_is_no_file_system_without_fsync(
    write: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(WriteError, match="writing: found Input/output error"):
        write(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    (tmp_path / STAGING_FOLDER).mkdir()
    (tmp_path / STAGING_FOLDER / "3-0").write_text("half a shard")
    with CheckpointWriter(tmp_path, FORMAT):
        assert list((tmp_path / STAGING_FOLDER).iterdir()) == []


def test_overwriting_leaves_no_file_of_the_old(write: Callable[..., Any], sample: Any) -> None:
    (sample.folder / "tokenizer.model").write_text("of the old model")
    (sample.folder / "notes.txt").write_text("mine")
    (sample.folder / REPORT_FOLDER).mkdir()
    for name in DOCUMENT_FILES:
        (sample.folder / name).write_text("of the old model")
    with pytest.raises(OutputError):
        write(sample.folder, FORMAT, seed=1)
    new = write(sample.folder, FORMAT, seed=1, overwrite=True)
    checkpoint = open_checkpoint(sample.folder)
    assert checkpoint.format == FORMAT
    assert all(torch.equal(checkpoint.codes(layer, 4), codes >> 4) for layer, codes in new.codes.items())
    names = {path.name for path in sample.folder.rglob("*") if path.is_file()}
    assert names == {CONFIG_FILE, INDEX_FILE, MANIFEST_FILE, "notes.txt", *COPIED, *checkpoint.weight_map.values()}


def test_failed_overwriting_leaves_the_old(write: Callable[..., Any], sample: Any, source: Path) -> None:
    before = contents(sample.folder)
    with CheckpointWriter(sample.folder, FORMAT, overwrite=True) as writer:
        for number in range(2):
            writer.add_tensor(f"tensor{number}", torch.ones(1))
        with pytest.raises(MissingTensorError):
            writer.finish(json.loads((source / CONFIG_FILE).read_text()))
    assert contents(sample.folder) == before


def test_read_only_folder(shared_sample: Any) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o555)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)  # permissions do not bind root
        try:
            with pytest.raises(PermissionError, match=str(folder)):
                CheckpointWriter(folder, FORMAT)
            with pytest.raises(PermissionError, match=str(folder)):
                CheckpointWriter(folder / "new", FORMAT)
        finally:
            os.seteuid(user)
        assert contents(folder) == {}


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077, 0o027])
def test_files_have_the_permissions_that_the_umask_gives(
    write: Callable[..., Any], tmp_path: Path, kind: DecoderKind, umask: int
) -> None:
    before = os.umask(umask)
    try:
        write(tmp_path / "out", dataclasses.replace(FORMAT, decoder_kind=kind))
        checkpoint = open_checkpoint(tmp_path / "out")
        widths = dict.fromkeys(checkpoint.layers, 4)
        decoders = {layer: checkpoint.decoder(layer, 4) for layer in checkpoint.layers}
        add_recipes(checkpoint, [Recipe("mine", widths, own_decoders=True)], {"mine": decoders})
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {"mine.json", "mine.safetensors", CONFIG_FILE, MANIFEST_FILE} <= {path.name for path in files}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~umask}
