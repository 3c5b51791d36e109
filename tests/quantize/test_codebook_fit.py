"""Where codebooks start from and how they are fitted to codes, against plain least squares in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tests.quantize.conftest import Layer
from vllm_matquant.checkpoint.codebook import Codebook, entry_index, with_signs
from vllm_matquant.checkpoint.decoder import CODEBOOK
from vllm_matquant.checkpoint.spec import WIDTHS
from vllm_matquant.kernels import ops
from vllm_matquant.quantize import codebook_fit
from vllm_matquant.quantize.codebook_fit import CodebookFit, LinearCodebook, find_entries, group_scales, start_books
from vllm_matquant.quantize.codebook_sums import gathered_levels, gathered_sums
from vllm_matquant.quantize.fours import FourSolver

GROUP = 16


def error_of(weight: torch.Tensor, hessian: torch.Tensor, decoded: torch.Tensor) -> float:
    error = (weight - decoded).double()
    return float(((error @ hessian.double()) * error).sum())


def some_codes(rows: int, columns: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**width, (rows, columns), dtype=torch.uint8, generator=generator)


def book_of(weight: torch.Tensor, hessian: torch.Tensor, width: int) -> Codebook:
    [book] = start_books(weight, hessian, GROUP, (width,))
    return book


def test_scales_are_root_mean_squares() -> None:
    weight = torch.arange(1.0, 17).view(2, 8)
    expected = [[7.5**0.5, (174 / 4) ** 0.5], [(446 / 4) ** 0.5, (846 / 4) ** 0.5]]
    torch.testing.assert_close(group_scales(weight, 4), torch.tensor(expected))


@pytest.mark.parametrize("seed", range(3))
def test_entries_are_better_than_a_grid_and_the_means_of_their_fours(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    fours = torch.randn(6000, 4, generator=generator)
    importance = torch.rand(6000, 4, generator=generator)
    entries = find_entries(fours, importance)
    indexed = with_signs(entries)
    costs = (importance[:, None] * (fours[:, None] - indexed).square()).sum(-1)
    nearest = costs.argmin(1)
    assert len(nearest.unique()) == 256
    levels = torch.tensor([-1.51, -0.453, 0.453, 1.51])  # the best four levels of a normal number (Max, 1960)
    grid = torch.cartesian_prod(levels, levels, levels, levels)
    on_grid = (importance[:, None] * (fours[:, None] - grid).square()).sum(-1).amin(1)
    assert costs.amin(1).sum() < 0.85 * on_grid.sum()
    # After a last round they are means almost everywhere.
    sums = torch.zeros(2, 64, 4)
    sums[0].index_add_(0, nearest % 64, importance * fours * indexed.sign()[nearest] * entries.sign()[nearest % 64])
    sums[1].index_add_(0, nearest % 64, importance)
    assert ((sums[0] / sums[1]) - entries).abs().median() < 0.02


def test_entries_of_few_or_equal_fours() -> None:
    few = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    entries = find_entries(few, torch.ones(10, 4))
    assert torch.cdist(few, with_signs(entries)).amin(1).max() < 1e-3
    assert find_entries(torch.zeros(300, 4), torch.ones(300, 4)).abs().max() == 0
    assert find_entries(few, torch.zeros(10, 4)).isfinite().all()


@pytest.mark.parametrize("width", WIDTHS)
def test_books_to_start_from_nest(random_layer: Callable[..., Layer], width: int) -> None:
    """The middle of what a code's further bits reach is where the narrower code's level is."""
    weight, hessian = random_layer(24, 96, seed=0)
    narrow, wide = start_books(weight, hessian, GROUP, (3, width)) if width > 3 else 2 * [book_of(weight, hessian, 3)]
    further = wide.width - 3
    both = wide.increments[1:].sum(0) / 2
    torch.testing.assert_close(wide.levels + both, narrow.levels, rtol=0, atol=1e-5)
    torch.testing.assert_close(wide.increments[0], narrow.increments[0])
    for bit in range(further):
        torch.testing.assert_close(wide.increments[bit + 1], wide.increments[bit] / 2)


def least_squares(weight: torch.Tensor, hessian: torch.Tensor, codes: torch.Tensor, book: Codebook) -> float:
    """The least error over levels and increments, from the normal equations."""
    count = (book.width - 1) * 256
    index = entry_index(codes, book.width)
    scale = book.scale.double().repeat_interleave(codes.shape[1] // book.groups, 1)
    design = torch.zeros(*codes.shape, count, dtype=torch.float64)
    for row in range(codes.shape[0]):
        for column in range(codes.shape[1]):
            four, place = int(index[row, column // 16 * 4 + column % 4]), column % 16 // 4
            at = four % 64 * 4 + place
            signed = scale[row, column] * (-1 if four & (128 if place < 2 else 64) else 1)
            design[row, column, at] = signed
            for bit in range(book.width - 2):
                if codes[row, column] >> (book.width - 3 - bit) & 1:
                    design[row, column, (bit + 1) * 256 + at] = signed
    used = design.flatten(0, 1).abs().sum(0) > 0
    design = design[:, :, used]
    normal = torch.einsum("rcp,cd,rdq->pq", design, hessian.double(), design)
    right = torch.einsum("rcp,cd,rd->p", design, hessian.double(), weight.double())
    solution = torch.linalg.lstsq(normal, right, driver="gelsd").solution
    return error_of(weight, hessian, torch.einsum("rcp,p->rc", design, solution).float())


@pytest.mark.parametrize("width", [2, 3, 5])
@pytest.mark.parametrize("seed", range(2))
def test_levels_and_increments_are_least_squares(
    random_layer: Callable[..., Layer], width: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, hessian = random_layer(40, 32, seed)
    hessian = hessian + 0.1 * hessian.diagonal().mean() * torch.eye(32)
    book = book_of(weight, hessian, width)
    codes = some_codes(40, 32, width, seed)
    # Few entries, so that the data determines most of what they are.
    codes.unflatten(1, (-1, 4, 4))[:, :, 2:] &= 2 ** (width - 2) - 1
    monkeypatch.setattr(codebook_fit, "_ROUNDS_OF_SIGNS", 1)
    monkeypatch.setattr(torch, "where", lambda condition, kept, found: found)  # increments may be negative too
    least = least_squares(weight, hessian, codes, book)
    errors = [error_of(weight, hessian, book.decode(codes))]
    for steps in (1, 8, 300):
        monkeypatch.setattr(codebook_fit, "_STEPS", steps)
        fitted = CodebookFit(weight, hessian, CODEBOOK).fit_levels(codes, book)
        errors.append(error_of(weight, hessian, fitted.decode(codes)))
    assert errors[0] > errors[1] > errors[2] > errors[3] * (1 - 1e-6)
    assert errors[3] <= least + 1e-4 * errors[0]
    assert errors[2] <= least + 0.1 * errors[0]


@pytest.mark.parametrize("width", WIDTHS)
def test_increments_are_not_negative_and_the_error_never_rises(random_layer: Callable[..., Layer], width: int) -> None:
    """Codes that have nothing to do with the weights ask for increments of any sign."""
    weight, hessian = random_layer(64, 64, seed=width)
    book = book_of(weight, hessian, width)
    codes = some_codes(64, 64, width, seed=width)
    fitted = CodebookFit(weight, hessian, CODEBOOK).fit_levels(codes, book)
    assert (fitted.increments >= 0).all()
    assert error_of(weight, hessian, fitted.decode(codes)) < error_of(weight, hessian, book.decode(codes))


@pytest.mark.parametrize("width", WIDTHS)
def test_perturbing_a_refitted_codebook_never_lowers_the_error(
    random_layer: Callable[..., Layer], width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codebook_fit, "_STEPS", 300)
    monkeypatch.setattr(codebook_fit, "_ROUNDS_OF_SIGNS", 100)
    weight, hessian = random_layer(64, 64, seed=width)
    hessian = hessian + 0.1 * hessian.diagonal().mean() * torch.eye(64)
    start = book_of(weight, hessian, width)
    codes = FourSolver((width,), [1.0]).gptq(weight, hessian, [start]) >> (8 - width)
    fit = CodebookFit(weight, hessian, CODEBOOK)
    fitted = fit.fit_levels(codes, start)
    least = error_of(weight, hessian, fitted.decode(codes))
    assert least < error_of(weight, hessian, start.decode(codes))
    generator = torch.Generator().manual_seed(0)
    for size in (0.1, 0.01, 0.001):
        moved = replace(fitted, levels=fitted.levels + size * torch.randn(64, 4, generator=generator))
        assert error_of(weight, hessian, moved.decode(codes)) > least
    scaled = fit.fit_scales(codes, fitted)
    best = error_of(weight, hessian, scaled.decode(codes))
    assert best < least
    for size in (0.1, 0.01, 0.001):
        change = 1 + size * torch.randn(scaled.scale.shape, generator=generator)
        assert error_of(weight, hessian, replace(scaled, scale=scaled.scale * change).decode(codes)) > best


@pytest.mark.parametrize("seed", range(3))
def test_scales_are_least_squares_and_never_negative(random_layer: Callable[..., Layer], seed: int) -> None:
    weight, hessian = random_layer(60, 48, seed)
    codes = some_codes(60, 48, 4, seed)  # nothing to do with the weights: some scales had better be negative
    book = book_of(weight, hessian, 4)
    fitted = CodebookFit(weight, hessian, CODEBOOK).fit_scales(codes, book)
    assert (fitted.scale > 0).all()
    unscaled = book.unscaled(codes).double().unflatten(1, (3, GROUP))
    kept = 0
    for row in range(60):
        design = torch.zeros(48, 3, dtype=torch.float64)
        for group in range(3):
            design[group * GROUP : (group + 1) * GROUP, group] = unscaled[row, group]
        normal = design.T @ hessian.double() @ design
        solution = torch.linalg.solve(normal, design.T @ hessian.double() @ weight[row].double())
        expected = torch.where(solution > 0, solution, book.scale[row].double())
        kept += int((solution <= 0).sum())
        torch.testing.assert_close(fitted.scale[row].double(), expected, rtol=1e-3, atol=1e-5)
    assert kept > 0


def test_scales_depend_on_no_other_rows(random_layer: Callable[..., Layer], monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = random_layer(23, 48, seed=2)
    codes, book = some_codes(23, 48, 3, seed=2), book_of(weight, hessian, 3)
    whole = CodebookFit(weight, hessian, CODEBOOK).fit_scales(codes, book)
    monkeypatch.setattr(codebook_fit, "_SCRATCH_BYTES", 5 * (8 * 9 + 12 * 48))  # five rows at a time
    parts = CodebookFit(weight, hessian, CODEBOOK).fit_scales(codes, book)
    assert parts.scale.shape == whole.scale.shape
    torch.testing.assert_close(parts.scale, whole.scale, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("rows", [1, 7, 300])  # of one chunk, and of several
@pytest.mark.parametrize("width", WIDTHS)
def test_the_transpose(width: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(width)
    codes = some_codes(rows, 48, width, seed=width)
    values = torch.randn(width - 1, 64, 4, generator=generator)
    book = Codebook(values[0], values[1:], torch.rand(rows, 3, generator=generator))
    linear, weights = LinearCodebook(codes, book), torch.randn(rows, 48, generator=generator)
    assert torch.equal(linear.values(), values)
    torch.testing.assert_close(linear.expand(values), book.decode(codes), rtol=1e-5, atol=1e-6)
    forwards = (linear.expand(values).double() * weights).sum()
    torch.testing.assert_close((linear.collect(weights).double() * values).sum(), forwards, rtol=1e-5, atol=1e-5)
    ones = torch.ones_like(weights)
    diagonal = (linear.scale.double().square() * torch.arange(48.0)).sum()  # of the levels: every weight has one
    torch.testing.assert_close(linear.diagonal(torch.arange(48.0).diag())[0].double().sum(), diagonal)
    assert int(ops.codebook_sums(codes, ones, width)[0].sum()) == codes.numel()


@pytest.mark.parametrize("width", WIDTHS)
def test_what_the_cpu_does_is_what_other_devices_do(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    codes, planes = some_codes(40, 64, width, seed=1), torch.randn(width - 1, 256, 4, generator=generator)
    weights = torch.randn(40, 64, generator=generator)
    torch.testing.assert_close(ops.codebook_levels(codes, planes), gathered_levels(codes, planes))
    torch.testing.assert_close(ops.codebook_sums(codes, weights, width), gathered_sums(codes, weights, width))


def test_sums_do_not_depend_on_the_number_of_threads() -> None:
    codes, weights = some_codes(500, 64, 4, seed=0), torch.randn(500, 64)
    threads = torch.get_num_threads()
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(ops.codebook_sums(codes, weights, 4))
    torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize(
    ("codes", "planes", "message"),
    [
        (torch.zeros(2, 24, dtype=torch.uint8), torch.zeros(1, 256, 4), "codes: found 24 columns, expected a multiple"),
        (torch.zeros(2, 16), torch.zeros(1, 256, 4), "codes: found dtype Float, expected Byte"),
        (torch.zeros(2, 16, dtype=torch.uint8), torch.zeros(1, 64, 4), r"planes: found shape \[1, 64, 4\]"),
        (torch.zeros(2, 16, dtype=torch.uint8), torch.zeros(8, 256, 4), "width: found 9, expected 2 to 8"),
    ],
)
def test_refuses(codes: torch.Tensor, planes: torch.Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        ops.codebook_levels(codes, planes)
    if "planes" not in message:
        with pytest.raises(RuntimeError, match=message):
            ops.codebook_sums(codes, torch.zeros(codes.shape), len(planes) + 1)
