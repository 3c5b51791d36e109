"""The header of a safetensors file, checked with plain integers before anything of its size is allocated."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from vllm_matquant.checkpoint.decoder import TensorSpec
from vllm_matquant.checkpoint.errors import ShardError, TensorDtypeError
from vllm_matquant.checkpoint.files import JSON_LIMIT, POINTER_BYTES, check_beginning, parse_json

_LENGTH_BYTES = 8  # the header's length, little-endian
_MAX_RANK = 8
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


def read_header(path: Path) -> dict[str, TensorSpec]:
    """The tensors of a shard, by name.

    Raises:
        PointerFileError: Git has not fetched the file's content.
        ShardError: the file is not a sound safetensors file: its tensors must fill it without hole or overlap.
        TensorDtypeError: a tensor of an unknown dtype.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        check_beginning(file.read(POINTER_BYTES), path)
        file.seek(0)
        prefix = file.read(_LENGTH_BYTES)
        if len(prefix) < _LENGTH_BYTES:
            raise ShardError(path, "size", f"{size} bytes", f"at least {_LENGTH_BYTES}")
        length = int.from_bytes(prefix, "little")
        room = min(JSON_LIMIT, size - _LENGTH_BYTES)
        if length > room:
            raise ShardError(path, "header length", length, f"at most {room} in a file of {size} bytes")
        header = parse_json(file.read(length), path, "header", ShardError)

    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ShardError(path, "__metadata__", metadata, "an object of strings")
    ranges: list[tuple[int, int, str]] = []
    tensors: dict[str, TensorSpec] = {}
    for name, entry in header.items():
        tensors[name], begin, end = _parse_entry(path, name, entry)
        ranges.append((begin, end, name))
    _check_ranges(path, sorted(ranges), size - _LENGTH_BYTES - length)
    return tensors


def _parse_entry(path: Path, name: str, entry: Any) -> tuple[TensorSpec, int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ShardError(path, name, entry, "an object with dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise TensorDtypeError(path, f"dtype of {name}", dtype, f"one of {list(_DTYPES)}")
    if not _are_sizes(shape) or len(shape) > _MAX_RANK:
        raise ShardError(path, f"shape of {name}", shape, f"up to {_MAX_RANK} integers in 0..2^63-1")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ShardError(path, f"data_offsets of {name}", offsets, "two integers in 0..2^63-1")
    begin, end = offsets
    expected = math.prod(shape) * _DTYPES[dtype].itemsize  # in Python's integers, which cannot overflow
    if end - begin != expected:
        raise ShardError(path, f"bytes of {name}", end - begin, f"{expected} for {dtype} {shape}")
    return TensorSpec(_DTYPES[dtype], tuple(shape)), begin, end


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _check_ranges(path: Path, ranges: list[tuple[int, int, str]], data_bytes: int) -> None:
    filled = 0
    for begin, end, name in ranges:
        if begin != filled:
            fault = "an overlap" if begin < filled else "a hole"
            raise ShardError(path, f"data_offsets of {name}", f"{fault}: begin {begin}", f"begin {filled}")
        filled = end
    if filled != data_bytes:
        raise ShardError(path, "bytes of all tensors", f"{data_bytes} in the file", f"{filled} by the header")
