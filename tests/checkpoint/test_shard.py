"""Our header check accepts what safetensors writes, refuses what is unsound, and survives any bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from vllm_matquant.checkpoint.decoder import TensorSpec
from vllm_matquant.checkpoint.errors import CheckpointError, ShardError, TensorDtypeError
from vllm_matquant.checkpoint.shard import read_header

Header = dict[str, Any]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def write(path: Path, header: bytes, data: bytes, length: int | None = None) -> None:
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)


def entry(begin: int, end: int, shape: list[int], dtype: str = "U8") -> Header:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_headers_that_safetensors_writes(path: Path) -> None:
    tensors = {
        "a": torch.zeros(3, 5, dtype=torch.uint8),
        "b": torch.zeros(2, dtype=torch.float16),
        "scalar": torch.zeros((), dtype=torch.bfloat16),
        "empty": torch.zeros(0, 4),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    expected = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    assert read_header(path) == expected


FAULTS: dict[str, tuple[Callable[[Header], Any], str]] = {
    "overlap": (lambda h: h["b"].update(data_offsets=[3, 7]), "data_offsets of b: found an overlap: begin 3"),
    "hole": (lambda h: h["b"].update(data_offsets=[5, 9]), "data_offsets of b: found a hole: begin 5"),
    "first byte unused": (lambda h: h.pop("a"), "data_offsets of b: found a hole: begin 4, expected begin 0"),
    "last byte unused": (lambda h: h.pop("b"), "bytes of all tensors: found 8 in the file, expected 4"),
    "backwards": (lambda h: h["a"].update(data_offsets=[4, 0]), "bytes of a: found -4"),
    "past the end": (lambda h: h["b"].update(entry(4, 12, [8])), "bytes of all tensors: found 8 in the file"),
    "shape too large": (lambda h: h["a"].update(shape=[5]), "bytes of a: found 4, expected 5"),
    "size overflow": (
        lambda h: h["a"].update(shape=[2**32, 2**32, 4]),
        f"bytes of a: found 4, expected {2**66} for U8",
    ),
    "size past 63 bits": (lambda h: h["a"].update(shape=[2**64]), "shape of a"),
    "too many dimensions": (lambda h: h["a"].update(shape=[1] * 9), "shape of a"),
    "negative shape": (lambda h: h["a"].update(shape=[-2, -2]), "shape of a"),
    "fractional shape": (lambda h: h["a"].update(shape=[4.0]), "shape of a"),
    "boolean shape": (lambda h: h["a"].update(shape=[4, True]), "shape of a"),
    "one offset": (lambda h: h["a"].update(data_offsets=[0]), "data_offsets of a"),
    "offset as text": (lambda h: h["a"].update(data_offsets=["0", "4"]), "data_offsets of a"),
    "no shape": (lambda h: h["a"].pop("shape"), "a: found"),
    "a field more": (lambda h: h["a"].update(strides=[1]), "a: found"),
    "entry is a list": (lambda h: h.update(a=[0, 4]), "a: found"),
    "metadata is a number": (lambda h: h.update(__metadata__=1), "__metadata__: found 1"),
    "metadata of numbers": (lambda h: h.update(__metadata__={"a": 1}), "__metadata__: found"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_unsound_header(path: Path, fault: str) -> None:
    spoil, message = FAULTS[fault]
    header = {"a": entry(0, 4, [4]), "b": entry(4, 8, [2, 2])}
    write(path, json.dumps(header).encode(), bytes(8))
    assert len(read_header(path)) == 2
    spoil(header)
    write(path, json.dumps(header).encode(), bytes(8))
    with pytest.raises(ShardError) as error:
        read_header(path)
    assert f"{path}: {message}" in str(error.value)


@pytest.mark.parametrize("dtype", ["Q4", "uint8", 8, None, []])
def test_unknown_dtype(path: Path, dtype: Any) -> None:
    write(path, json.dumps({"a": entry(0, 4, [4]) | {"dtype": dtype}}).encode(), bytes(4))
    with pytest.raises(TensorDtypeError, match="dtype of a: found"):
        read_header(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "no valid JSON"),
        (b"[]", "found list, expected a JSON object"),
        (b"\xff\xfe{}", "no valid JSON"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b"[" * 100_000, "no valid JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "no valid JSON"),
        (b'{"a": 1, "a": 2}', "the key 'a' twice"),
    ],
    ids=["cut", "list", "not UTF-8", "NaN", "deep", "long number", "key twice"],
)
def test_header_that_is_not_json(path: Path, header: bytes, message: str) -> None:
    write(path, header, b"")
    with pytest.raises(ShardError, match=f"header: found .*{message}|{message}"):
        read_header(path)


@pytest.mark.parametrize("length", [3, 2**31, 2**63, 2**64 - 1])
def test_header_length_past_the_file(path: Path, length: int) -> None:
    write(path, b"{}", b"", length)
    with pytest.raises(ShardError, match=f"header length: found {length}, expected at most 2 in a file of 10 bytes"):
        read_header(path)


def test_header_length_past_the_limit(path: Path) -> None:
    write(path, b"{}", b"", 2**30)
    with path.open("r+b") as file:
        file.truncate(2**31)  # sparse: room enough for such a header
    with pytest.raises(ShardError, match=f"header length: found {2**30}, expected at most {100 * 2**20}"):
        read_header(path)


@pytest.mark.parametrize("size", [0, 7])
def test_file_too_short_for_a_length(path: Path, size: int) -> None:
    path.write_bytes(bytes(size))
    with pytest.raises(ShardError, match=f"size: found {size} bytes"):
        read_header(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300, deadline=None)
@given(data=st.data())
def test_any_spoilt_file_is_refused_or_sound(path: Path, data: st.DataObject) -> None:
    tensors = {"layer.weight_base": torch.zeros(2, 3, dtype=torch.uint8), "norm.weight": torch.zeros(4)}
    save_file(tensors, path, metadata={"format": "pt"})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(
            st.integers(0, 255) | st.sampled_from(list(b'0123456789,[]{}:" '))
        )
    path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))]))
    try:
        header = read_header(path)
    except CheckpointError:
        return
    with safe_open(path, framework="pt") as shard:  # a second opinion
        assert set(shard.keys()) == set(header)
        assert all(tuple(shard.get_tensor(name).shape) == spec.shape for name, spec in header.items())
