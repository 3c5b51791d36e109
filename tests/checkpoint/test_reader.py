"""What was written is what is read, for every kind of format; a reader opens what its width needs and no more."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoint.samples import decoder_bytes, decoder_names, open_slice, same_decoder
from vllm_matquant.checkpoint import tensor_files
from vllm_matquant.checkpoint.decoder import KINDS, DecoderKind
from vllm_matquant.checkpoint.errors import MissingFileError, ShardError, WidthError
from vllm_matquant.checkpoint.names import shard_width
from vllm_matquant.checkpoint.reader import open_checkpoint
from vllm_matquant.checkpoint.spec import Format
from vllm_matquant.checkpoint.verify import verify

FORMATS = [
    Format(),
    Format(widths=(2,)),
    Format(widths=(8,)),
    Format(widths=(3, 5)),
    Format(widths=(2, 4, 8), group_size=32),
    Format(group_size="channel"),
    Format(group_size=16),
    Format(slicing="round"),
    Format(widths=(2, 3, 6), slicing="round"),
    Format(ignored_layers=("lm_head", "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")),
]


def served_codes(parent: torch.Tensor, width: int, slicing: str) -> torch.Tensor:
    step = 2.0 ** (8 - width)
    if slicing == "truncate":
        return torch.floor(parent.double() / step)
    return torch.floor(parent.double() / step + 0.5).clamp(max=2**width - 1)


def leave_out(folder: Path, from_width: int) -> list[str]:
    """Remove the shards of all widths from ``from_width`` up, like a downloader that never fetched them."""
    gone = sorted(path.name for path in folder.glob("*.safetensors") if (shard_width(path.name) or 0) >= from_width)
    for name in gone:
        (folder / name).unlink()
    return gone


@pytest.mark.parametrize(
    ("format", "kind"),
    [(each, kind) for kind in KINDS.values() for each in FORMATS if kind.affine or each.slicing == "truncate"],
    ids=lambda each: f"{each.widths}-{each.group_size}-{each.slicing}" if isinstance(each, Format) else each.name,
)
def test_round_trip(write: Callable[..., Any], tmp_path: Path, format: Format, kind: DecoderKind) -> None:
    format = replace(format, decoder_kind=kind)
    sample = write(tmp_path / "out", format)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.format == format
    assert checkpoint.servable_widths == format.widths
    assert checkpoint.layers == {layer: tuple(codes.shape) for layer, codes in sample.codes.items()}
    for layer, parent in sample.codes.items():
        for width in format.widths:
            assert torch.equal(checkpoint.codes(layer, width).double(), served_codes(parent, width, format.slicing))
            assert same_decoder(checkpoint.decoder(layer, width), sample.decoders[layer][width])
    unquantized = dict(checkpoint.unquantized())
    assert unquantized.keys() == sample.unquantized.keys()
    for name, tensor in unquantized.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, sample.unquantized[name])


@pytest.mark.parametrize(
    ("tied", "head", "embedding"), [(True, True, True), (False, True, True), (False, True, False), (False, False, True)]
)
def test_round_trip_of_embedding_and_head(
    write: Callable[..., Any], make_source: Callable[..., Path], tmp_path: Path, tied: bool, head: bool, embedding: bool
) -> None:
    embeddings = ("model.embed_tokens",) if embedding else ()
    checkpoint_format = Format(ignored_layers=() if head else ("lm_head",), quantized_embeddings=embeddings)
    sample = write(tmp_path / "out", checkpoint_format, model=make_source(tied=tied))
    assert [result.text for result in verify(tmp_path / "out") if not result.passed] == []
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.format == checkpoint_format
    outside = {layer for layer in checkpoint.layers if ".layers." not in layer}
    assert outside == set(embeddings) | ({"lm_head"} if head and not tied else set())
    assert not {f"{layer}.weight" for layer in outside} & dict(checkpoint.unquantized()).keys()
    for layer in outside:
        assert checkpoint.layers[layer] == (40, 64)
        for width in checkpoint.format.widths:
            assert torch.equal(checkpoint.codes(layer, width), sample.codes[layer] >> (8 - width))
            assert same_decoder(checkpoint.decoder(layer, width), sample.decoders[layer][width])
    for width in (2, 5):
        served = checkpoint.slice(width)
        quantized = [
            tensor
            for name, tensor in checkpoint.tensors(served)
            if name.rpartition(".")[0] in checkpoint.layers and ".weight_" in name
        ]
        assert served.resident_bytes == sum(tensor.nbytes for tensor in quantized)


@pytest.mark.parametrize("group_size", [128, 64, "auto"])
def test_round_trip_at_group_size_128(
    write: Callable[..., Any], make_source: Callable[..., Path], tmp_path: Path, group_size: Any
) -> None:
    sample = write(tmp_path / "out", Format(group_size=group_size), model=make_source(128, 256, tied=False))
    checkpoint = open_checkpoint(tmp_path / "out")
    groups = {"auto": 1, 128: 1, 64: 2}[group_size]
    layer = "model.layers.0.self_attn.q_proj"
    assert checkpoint.decoder(layer, 3).parts["scale"].shape == (128, groups)
    assert torch.equal(checkpoint.codes(layer, 5), sample.codes[layer] >> 3)
    assert "lm_head.weight" in dict(checkpoint.unquantized())


@pytest.mark.parametrize("width", [2, 3, 5, 8])
def test_tensors_are_those_that_serving_needs(shared_sample: Any, width: int) -> None:
    checkpoint = open_slice(shared_sample.folder, width)
    tensors = dict(checkpoint.tensors(checkpoint.slice(width)))
    planes = [f"weight_plane{r}" for r in range(3, width + 1)]
    suffixes = ["weight_base", *planes, *decoder_names(shared_sample.format.decoder_kind, width)]
    quantized = {f"{layer}.{suffix}" for layer in shared_sample.codes for suffix in suffixes}
    assert tensors.keys() == quantized | shared_sample.unquantized.keys()
    assert checkpoint.slice(width).resident_bytes == sum(tensors[name].nbytes for name in quantized)


def test_tensors_of_a_rounded_slice_hold_one_plane_more(write: Callable[..., Any], tmp_path: Path) -> None:
    write(tmp_path / "out", Format(widths=(2, 4, 8), slicing="round"))
    checkpoint = open_slice(tmp_path / "out", 4)
    tensors = dict(checkpoint.tensors(checkpoint.slice(4)))
    layer = "model.layers.0.mlp.up_proj"
    assert f"{layer}.weight_plane5" in tensors
    assert f"{layer}.weight_plane6" not in tensors


def test_resident_bytes_count_codes_and_one_decoder(shared_sample: Any) -> None:
    checkpoint = open_checkpoint(shared_sample.folder)
    for width in shared_sample.format.widths:
        weights = sum(math.prod(shape) for shape in checkpoint.layers.values())
        decoders = sum(
            decoder_bytes(shared_sample.format.decoder_kind.form(width), rows, columns // (64 if columns == 64 else 32))
            for rows, columns in checkpoint.layers.values()
        )
        assert checkpoint.slice(width).resident_bytes == weights * width // 8 + decoders


@pytest.mark.parametrize("first_absent", range(3, 9))
def test_partial_folder_serves_what_is_left(sample: Any, first_absent: int) -> None:
    gone = leave_out(sample.folder, first_absent)
    checkpoint = open_checkpoint(sample.folder)
    assert checkpoint.servable_widths == tuple(range(2, first_absent))
    for width in checkpoint.servable_widths:
        checkpoint = open_slice(sample.folder, width)
        for layer, parent in sample.codes.items():
            assert torch.equal(checkpoint.codes(layer, width), parent >> (8 - width))
    with pytest.raises(MissingFileError) as error:
        open_slice(sample.folder, first_absent)
    needed = [name for name in gone if shard_width(name) == first_absent]
    assert all(name in str(error.value) for name in needed)
    assert not any(name in str(error.value) for name in set(gone) - set(needed))
    assert f"The folder serves {', '.join(map(str, range(2, first_absent)))} bits" in str(error.value)


def test_partial_folder_of_rounded_slices_needs_the_next_plane(write: Callable[..., Any], tmp_path: Path) -> None:
    write(tmp_path / "out", Format(slicing="round"))
    leave_out(tmp_path / "out", 5)
    assert open_checkpoint(tmp_path / "out").servable_widths == (2, 3)
    with pytest.raises(MissingFileError, match="model-width5-00001"):
        open_slice(tmp_path / "out", 4)


def test_a_gap_ends_what_is_servable(sample: Any) -> None:
    for path in sample.folder.glob("model-width4-*"):
        path.unlink()
    assert open_checkpoint(sample.folder).servable_widths == (2, 3)
    with pytest.raises(MissingFileError, match="model-width4-00001"):
        open_slice(sample.folder, 8)


def test_folder_without_the_base_is_refused(sample: Any) -> None:
    base = min(sample.folder.glob("model-width2-*"))
    base.unlink()
    with pytest.raises(MissingFileError, match=rf"no {base.name}.*The folder serves no width"):
        open_checkpoint(sample.folder)


def test_narrow_width_opens_no_file_of_a_wider_one(sample: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in sample.folder.glob("model-width[4-8]-*"):
        path.write_bytes(b"not a safetensors file")
    opened = []
    real = tensor_files.safe_open
    monkeypatch.setattr(tensor_files, "safe_open", lambda path, **options: opened.append(path) or real(path, **options))
    checkpoint = open_slice(sample.folder, 3)
    served = checkpoint.slice(3)
    assert dict(checkpoint.tensors(served))
    assert {shard_width(path.name) for path in opened} == {2, 3}
    assert set(checkpoint.files_for(served)) == set(opened)
    with pytest.raises(ShardError):
        open_slice(sample.folder, 4)
    with pytest.raises(ShardError):
        open_checkpoint(sample.folder)


def test_width_that_is_not_offered(write: Callable[..., Any], tmp_path: Path) -> None:
    write(tmp_path / "out", Format(widths=(2, 4)))
    with pytest.raises(WidthError, match=r"bits: found 3, expected one of the offered widths \[2, 4\]"):
        open_slice(tmp_path / "out", 3)
    with pytest.raises(WidthError, match="found 8"):
        open_checkpoint(tmp_path / "out").slice(8)


def test_planes_past_the_widest_slice_are_not_stored(write: Callable[..., Any], tmp_path: Path) -> None:
    write(tmp_path / "out", Format(widths=(2, 4)))
    widths = {shard_width(path.name) for path in (tmp_path / "out").glob("*.safetensors")}
    assert widths == {2, 3, 4}


def test_hub_cache_of_symbolic_links(sample: Any, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123abcd"
    shutil.move(sample.folder, blobs)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(blobs.iterdir())):
        path.rename(blobs / f"blob{number}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"blob{number}")
    assert open_checkpoint(snapshot).servable_widths == (2, 3, 4, 5, 6, 7, 8)
    os.unlink((snapshot / max(path.name for path in snapshot.glob("model-width8-*"))).resolve())
    assert open_checkpoint(snapshot).servable_widths == (2, 3, 4, 5, 6, 7)  # a link to nothing is a missing file


def test_tied_head_may_be_stored_too(write: Callable[..., Any], source: Path, tmp_path: Path) -> None:
    untied = tmp_path / "source"
    shutil.copytree(source, untied)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, untied / "model.safetensors")
    write(tmp_path / "out", model=untied)
    assert "lm_head.weight" in dict(open_checkpoint(tmp_path / "out").unquantized())
