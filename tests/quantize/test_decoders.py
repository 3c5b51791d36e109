"""Decoders: the grids they start from, and their fit under the full Hessian."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.quantize.conftest import Layer
from tests.quantize.exact_decoders import EXACT
from vllm_matquant.checkpoint.decoder import AFFINE_KINDS, Affine, Decoder, DecoderKind
from vllm_matquant.checkpoint.packing import slice_codes
from vllm_matquant.quantize import decoders
from vllm_matquant.quantize.decoders import (
    DecoderFit,
    cell_centres,
    parent_grid,
    rounded_levels,
    slice_table,
)


def rounded_to_nearest(weight: torch.Tensor, group_size: int, width: int) -> tuple[torch.Tensor, Affine]:
    """r-bit codes on the min-max grid, and the decoder of their cells' centres."""
    grid = parent_grid(weight, group_size)
    scale, offset = (part.repeat_interleave(group_size, dim=1) for part in (grid.scale, grid.offset))
    codes = ((weight - offset) / scale.clamp(min=1e-20)).round().clamp(0, 255).to(torch.uint8)
    return slice_codes(codes, 8, width), cell_centres(grid, width)


def refit(
    weight: torch.Tensor,
    codes: torch.Tensor,
    hessian: torch.Tensor,
    previous: Affine | Decoder,
    width: int,
    kind: DecoderKind = EXACT,
) -> Decoder:
    """The best decoder of a width's codes, with groups as large as the previous one's."""
    values = previous.affine if isinstance(previous, Decoder) else previous
    return DecoderFit(weight, hessian, weight.shape[1] // values.scale.shape[1], kind)(codes, previous, width)


def objective(weight: torch.Tensor, hessian: torch.Tensor, decoded: torch.Tensor) -> torch.Tensor:
    """(w - d) H (w - d)^T of each row, float64 [rows]."""
    errors = weight.double() - decoded.double()
    return ((errors @ hessian.double()) * errors).sum(dim=1)


def least_squares(weight: torch.Tensor, codes: torch.Tensor, hessian: torch.Tensor, groups: int) -> np.ndarray:
    """numpy's solution, row by row: float64 [rows, 2 * groups], scales then offsets."""
    root = np.linalg.cholesky(hessian.double().numpy())
    members = np.kron(np.eye(groups), np.ones((weight.shape[1] // groups, 1)))  # [columns, groups]
    rows = []
    for row, code in zip(weight.double().numpy(), codes.double().numpy(), strict=True):
        design = np.concatenate([code[:, None] * members, members], axis=1)
        rows.append(np.linalg.lstsq(root.T @ design, root.T @ row, rcond=None)[0])
    return np.stack(rows)


def test_grids() -> None:
    weight = torch.tensor([[-1.0, 0.0, 1.55, 0.5], [3.0, 3.0, 3.0, 3.0]])
    grid = parent_grid(weight, 4)
    torch.testing.assert_close(grid.scale, torch.tensor([[2.55 / 255], [0.0]]))
    torch.testing.assert_close(grid.offset, torch.tensor([[-1.0], [3.0]]))
    assert parent_grid(weight, 2).scale.shape == (2, 2)
    # At 2 bits, code 1 stands for the parents 64 to 127, or when slices are rounded for 32 to 95.
    code = torch.ones(2, 4, dtype=torch.uint8)
    torch.testing.assert_close(cell_centres(grid, 2).decode(code)[0, 0], torch.tensor(-1 + 0.01 * (64 + 127) / 2))
    torch.testing.assert_close(rounded_levels(grid, 2).decode(code)[0, 0], torch.tensor(-1 + 0.01 * 64))
    assert torch.equal(cell_centres(grid, 8).scale, grid.scale)
    assert torch.equal(cell_centres(grid, 8).offset, grid.offset)


@pytest.mark.parametrize("slicing", ["truncate", "round"])
def test_slice_table(slicing: str) -> None:
    table = slice_table((2, 5, 8), slicing)
    assert (table.shape, table.dtype) == ((3, 256), torch.uint8)
    for parent in range(256):
        half = {"truncate": (0, 0), "round": (32, 4)}[slicing]
        expected = [min((parent + half[0]) // 64, 3), min((parent + half[1]) // 8, 31), parent]
        assert table[:, parent].tolist() == expected


@pytest.mark.parametrize("group_size", [8, 32, 96])
@pytest.mark.parametrize("width", range(2, 9))
def test_refit_is_least_squares(random_layer: Callable[..., Layer], width: int, group_size: int) -> None:
    weight, hessian = random_layer(6, 96, seed=width)
    codes, previous = rounded_to_nearest(weight, group_size, width)
    expected = least_squares(weight, codes, hessian, 96 // group_size)
    exact = refit(weight, codes, hessian, previous, width).affine
    groups = 96 // group_size
    np.testing.assert_allclose(exact.scale, expected[:, :groups], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(exact.offset, expected[:, groups:], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", AFFINE_KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("width", range(2, 9))
def test_refit_is_no_worse_than_what_it_starts_from(
    random_layer: Callable[..., Layer], width: int, seed: int, kind: DecoderKind
) -> None:
    weight, hessian = random_layer(33, 96, seed)
    codes, previous = rounded_to_nearest(weight, 32, width)
    fitted = refit(weight, codes, hessian, previous, width, kind)
    assert (fitted.form, fitted.width) == (kind.form(width), width)
    before = objective(weight, hessian, kind.encode(previous, width).decode(codes))
    after = objective(weight, hessian, fitted.decode(codes))
    assert (after <= before * 1.001).all()
    assert after.sum() < before.sum()
    assert (fitted.affine.scale >= 0).all()


@pytest.mark.parametrize("kind", AFFINE_KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("width", range(2, 9))
@pytest.mark.parametrize("seed", range(3))
def test_offsets_make_up_for_the_rounding_of_scales(
    random_layer: Callable[..., Layer], width: int, seed: int, kind: DecoderKind
) -> None:
    weight, hessian = random_layer(64, 96, seed)
    codes, previous = rounded_to_nearest(weight, 32, width)
    both = kind.encode(refit(weight, codes, hessian, previous, width).affine, width)  # each rounded by itself
    fitted = refit(weight, codes, hessian, previous, width, kind)
    after, before = (objective(weight, hessian, decoder.decode(codes)).sum() for decoder in (fitted, both))
    assert after < before * 1.02


@pytest.mark.parametrize("kind", AFFINE_KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("width", [2, 8])
def test_groups_that_hold_one_value(random_layer: Callable[..., Layer], width: int, kind: DecoderKind) -> None:
    weight, hessian = random_layer(5, 64, seed=0)
    weight[0], weight[1], weight[2, :32], weight[3, 32:] = 0, 0.25, -0.5, 0
    codes, previous = rounded_to_nearest(weight, 32, width)
    fitted = refit(weight, codes, hessian, previous, width, kind)
    decoded = fitted.decode(codes)
    assert torch.isfinite(decoded).all()
    assert (fitted.affine.scale >= 0).all()
    assert (fitted.affine.scale[:2] == 0).all()  # as before: the data does not say what it is
    torch.testing.assert_close(decoded[0], weight[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(decoded[1], weight[1], rtol=1e-3, atol=0)
    before = objective(weight, hessian, kind.encode(previous, width).decode(codes))
    assert (objective(weight, hessian, decoded) <= 1.5 * before + 1e-6).all()


@pytest.mark.parametrize("tokens", [1, 8, 40])
@pytest.mark.parametrize("width", [2, 5, 8])
def test_hessians_of_few_tokens(random_layer: Callable[..., Layer], width: int, tokens: int) -> None:
    weight, hessian = random_layer(17, 256, seed=tokens, tokens=tokens)
    codes, previous = rounded_to_nearest(weight, 32, width)
    fitted = refit(weight, codes, hessian, previous, width)
    assert torch.isfinite(fitted.decode(codes)).all()
    before = objective(weight, hessian, previous.decode(codes))
    assert objective(weight, hessian, fitted.decode(codes)).sum() < before.sum()


@pytest.mark.parametrize("group_size", [8, 32])
@pytest.mark.parametrize("seed", range(40, 50))
def test_hessian_of_one_token(random_layer: Callable[..., Layer], seed: int, group_size: int) -> None:
    """Most parameters are undetermined, and float32's rounding leaves some rows' equations indefinite."""
    weight, hessian = random_layer(17, 256, seed, tokens=1)
    codes, previous = rounded_to_nearest(weight, group_size, 8)
    decoded = refit(weight, codes, hessian, previous, 8).decode(codes)
    before, after = (objective(weight, hessian, part).sum() for part in (previous.decode(codes), decoded))
    assert after < before + 1e-4 * objective(weight, hessian, torch.zeros_like(weight)).sum()


def test_what_no_token_saw_stays_as_it_was(random_layer: Callable[..., Layer]) -> None:
    weight, hessian = random_layer(4, 64, seed=0)
    hessian[32:], hessian[:, 32:] = 0, 0
    codes, previous = rounded_to_nearest(weight, 32, 3)
    fitted = refit(weight, codes, hessian, previous, 3)
    torch.testing.assert_close(fitted.affine.scale[:, 1], previous.scale[:, 1], rtol=1e-3, atol=0)
    torch.testing.assert_close(fitted.affine.offset[:, 1], previous.offset[:, 1], rtol=1e-3, atol=1e-4)
    nothing = refit(weight, codes, torch.zeros(64, 64), previous, 3)
    torch.testing.assert_close(nothing.affine.scale, previous.scale, rtol=1e-3, atol=0)


def test_scales_stay_positive(random_layer: Callable[..., Layer]) -> None:
    weight, hessian = random_layer(4, 64, seed=0)
    codes, previous = rounded_to_nearest(-weight, 32, 4)  # codes that fall where weights rise
    fitted = refit(weight, codes, hessian, previous, 4)
    assert torch.equal(fitted.affine.scale, previous.scale)


def test_chunks_of_rows(random_layer: Callable[..., Layer], monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = random_layer(23, 64, seed=0)
    codes, previous = rounded_to_nearest(weight, 32, 4)
    whole = refit(weight, codes, hessian, previous, 4).affine
    monkeypatch.setattr(decoders, "_SCRATCH_BYTES", 64 * 2 * 4 * 5)  # five rows at a time
    parts = refit(weight, codes, hessian, previous, 4).affine
    torch.testing.assert_close(parts.scale, whole.scale, rtol=1e-3, atol=0)
    torch.testing.assert_close(parts.offset, whole.offset, rtol=1e-3, atol=1e-4)
