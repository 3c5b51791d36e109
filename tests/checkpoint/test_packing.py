"""Codes to disk form and back, on ragged shapes, against arithmetic on Python's integers."""

from __future__ import annotations

from itertools import combinations_with_replacement

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from vllm_matquant.checkpoint import packing
from vllm_matquant.checkpoint.packing import pack_codes, pack_field, slice_codes, unpack_codes, unpack_field
from vllm_matquant.checkpoint.spec import WIDTHS

CODES = arrays.arrays(np.uint8, st.tuples(st.integers(1, 5), st.integers(1, 41)))


@given(CODES, st.sampled_from([1, 2]))
def test_field_round_trip(values: np.ndarray, bits: int) -> None:
    fields = torch.from_numpy(values & (2**bits - 1))
    packed = pack_field(fields, bits)
    assert packed.shape == (values.shape[0], -(-values.shape[1] * bits // 8))
    assert torch.equal(unpack_field(packed, bits, values.shape[1]), fields)


def packed_row(values: list[int], bits: int) -> list[int]:
    """The bytes of the one large integer whose digits, to the base 2^bits, are the values."""
    number = sum(value << (bits * column) for column, value in enumerate(values))
    return list(number.to_bytes(-(-len(values) * bits // 8), "little"))


@given(CODES)
def test_planes_and_base_on_disk(values: np.ndarray) -> None:
    base, planes = pack_codes(torch.from_numpy(values))
    assert base.tolist() == [packed_row([code // 64 for code in row], 2) for row in values.tolist()]
    for width, plane in zip(WIDTHS[1:], planes, strict=True):
        bit = 2 ** (8 - width)
        assert plane.tolist() == [packed_row([code // bit % 2 for code in row], 1) for row in values.tolist()]


@pytest.mark.parametrize("at_a_time", [1, 40, 100])
def test_parts_of_the_rows_make_the_whole(at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(256, (7, 19), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    base, planes = pack_codes(codes)
    monkeypatch.setattr(packing, "PACKED_CODES", at_a_time)
    found_base, found_planes = pack_codes(codes)
    assert torch.equal(found_base, base)
    assert all(torch.equal(found, plane) for found, plane in zip(found_planes, planes, strict=True))
    assert torch.equal(unpack_codes(found_base, found_planes, 19), codes)


@given(CODES, st.sampled_from(WIDTHS))
def test_reading_fewer_planes_gives_the_truncated_code(values: np.ndarray, width: int) -> None:
    base, planes = pack_codes(torch.from_numpy(values))
    codes = unpack_codes(base, planes[: width - 2], values.shape[1])
    np.testing.assert_array_equal(codes.numpy(), values >> (8 - width))


@given(CODES, st.sampled_from(WIDTHS))
def test_storing_fewer_planes_stores_the_same_ones(values: np.ndarray, stored_width: int) -> None:
    base, planes = pack_codes(torch.from_numpy(values))
    short_base, short_planes = pack_codes(torch.from_numpy(values), stored_width)
    assert torch.equal(base, short_base)
    assert len(short_planes) == stored_width - 2
    assert all(torch.equal(a, b) for a, b in zip(planes, short_planes, strict=False))


@pytest.mark.parametrize(("width", "stored_width"), list(combinations_with_replacement(WIDTHS, 2)))
def test_slices_of_every_code(width: int, stored_width: int) -> None:
    parents = torch.arange(256, dtype=torch.uint8)
    stored = parents >> (8 - stored_width)
    expected = [parent // 2 ** (8 - width) for parent in range(256)]
    assert slice_codes(stored, stored_width, width).tolist() == expected
    if stored_width > width or width == 8:
        # MatQuant, eq. 6, in exact arithmetic: clamp(floor(q / 2^(8-r) + 1/2), 0, 2^r - 1).
        step = 2 ** (8 - width)
        exact = [(2 * parent + step) // (2 * step) for parent in range(256)]
        rounded = [min(code, 2**width - 1) for code in exact]
        assert slice_codes(stored, stored_width, width, "round").tolist() == rounded
        assert slice_codes(stored, stored_width, width, "round-extra").tolist() == exact
