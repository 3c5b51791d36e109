"""The column solver against plain float64 re-implementations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch

from tests.quantize.conftest import Layer
from vllm_matquant.checkpoint.decoder import Affine
from vllm_matquant.checkpoint.spec import Slicing
from vllm_matquant.kernels import ops
from vllm_matquant.quantize import columns
from vllm_matquant.quantize.columns import ColumnSolver, damp, inverse_factor
from vllm_matquant.quantize.decoders import cell_centres, parent_grid, rounded_levels

DAMPING = 0.01
WIDTHS = [(2, 3, 4, 5, 6, 7, 8), (8,), (2,), (3, 8), (2, 4, 6)]


@pytest.fixture(autouse=True)
def _keep_thread_count() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def code_slice(parent: int, width: int, slicing: Slicing) -> int:
    drop = 8 - width
    return parent >> drop if slicing == "truncate" else min((parent + (1 << drop >> 1)) >> drop, 2**width - 1)


def random_decoders(weight: torch.Tensor, widths: Sequence[int], group_size: int, slicing: Slicing) -> list[Affine]:
    grid = parent_grid(weight, group_size)
    levels = cell_centres if slicing == "truncate" else rounded_levels
    generator = torch.Generator().manual_seed(len(widths))

    def vary(values: torch.Tensor) -> torch.Tensor:  # no two widths share a grid, as after a refit
        return values * (0.9 + 0.2 * torch.rand(values.shape, generator=generator))

    decoders = [levels(grid, width) for width in widths]
    return [Affine(vary(decoder.scale), vary(decoder.offset)) for decoder in decoders]


def every(tensor: torch.Tensor, widths: Sequence[int]) -> list[torch.Tensor]:
    return [tensor] * len(widths)


class Reference:
    """What each parent decodes to, and how far a choice is from the best one, in float64."""

    def __init__(self, widths: Sequence[int], lambdas: Sequence[float], slicing: Slicing, decoders: Sequence[Affine]):
        self.table = np.array([[code_slice(parent, width, slicing) for parent in range(256)] for width in widths])
        self.lambdas = np.array(lambdas, dtype=np.float64)
        self.scales = np.stack([decoder.scale.double().numpy() for decoder in decoders])
        self.offsets = np.stack([decoder.offset.double().numpy() for decoder in decoders])

    def levels(self, group: int) -> np.ndarray:
        """[widths, rows, 256]"""
        return self.scales[:, :, group, None] * self.table[:, None, :] + self.offsets[:, :, group, None]

    def check_choice(self, wanted: np.ndarray, group: int, chosen: np.ndarray) -> np.ndarray:
        """Check that no parent is better than the chosen ones; returns what these decode to, [widths, rows]."""
        levels = self.levels(group)
        costs = (self.lambdas[:, None, None] * (wanted[:, :, None] - levels) ** 2).sum(axis=0)
        rows = np.arange(len(chosen))
        # Rounding of float32 sums may settle what is almost a tie.
        np.testing.assert_array_less(costs[rows, chosen], 1.0001 * costs.min(axis=1) + 1e-8)
        return levels[:, rows, chosen]

    def decode(self, codes: np.ndarray, group_size: int) -> np.ndarray:
        """[widths, rows, columns]"""
        slices = np.stack([table[codes] for table in self.table])
        return np.repeat(self.scales, group_size, axis=2) * slices + np.repeat(self.offsets, group_size, axis=2)


def check_gptq(
    reference: Reference, weights: Sequence[torch.Tensor], factors: Sequence[torch.Tensor], codes: torch.Tensor,
    order: list[int], group_size: int, mean_error: bool,
) -> None:  # fmt: skip
    """Follow GPTQ, algorithm 1, along the codes that were chosen and check each choice."""
    upper = np.stack([factor.double().numpy() for factor in factors])
    copies = np.stack([weight.double().numpy() for weight in weights])
    for place, column in enumerate(order):
        wanted = copies[:, :, column]
        decoded = reference.check_choice(wanted, column // group_size, codes.numpy()[:, column])
        errors = (wanted - decoded) / upper[:, place, place, None]
        if mean_error:
            errors = np.broadcast_to(errors.mean(axis=0), errors.shape)
        copies[:, :, order[place + 1 :]] -= errors[:, :, None] * upper[:, place, None, place + 1 :]


@pytest.mark.parametrize("damping", [0.001, 0.1])
def test_inverse_factor(random_layer: Callable[..., Layer], damping: float) -> None:
    _, hessian = random_layer(1, 40, seed=0)
    factor = inverse_factor(damp(hessian, damping)).double()
    assert torch.equal(factor, factor.triu())
    damped = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(40)
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(40).double(), rtol=0, atol=1e-4)


def test_inverse_factor_of_a_singular_hessian() -> None:
    direction = torch.randn(24, 1, generator=torch.Generator().manual_seed(0))
    for hessian in (torch.zeros(24, 24), direction @ direction.T, torch.diag(torch.arange(24.0) % 2)):
        factor = inverse_factor(damp(hessian, DAMPING))
        assert torch.isfinite(factor).all()
        assert (factor.diagonal() > 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damping_a_hessian_that_is_not_finite(value: float) -> None:
    hessian = torch.eye(8)
    hessian[3, 2] = value
    with pytest.raises(ValueError, match="not finite"):
        damp(hessian, DAMPING)


@pytest.mark.parametrize("mean_error", [False, True])
@pytest.mark.parametrize("slicing", ["truncate", "round"])
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("rows", [1, 15, 17, 33])
def test_gptq(
    random_layer: Callable[..., Layer], rows: int, widths: tuple[int, ...], slicing: Slicing, mean_error: bool
) -> None:
    weight, hessian = random_layer(rows, 48, seed=rows)
    decoders = random_decoders(weight, widths, 16, slicing)
    lambdas = [1.7**place for place in range(len(widths))]
    factor = inverse_factor(damp(hessian, DAMPING))
    codes = ColumnSolver(widths, lambdas, slicing, mean_error).gptq(
        every(weight, widths), every(factor, widths), decoders
    )
    assert codes.shape == weight.shape
    assert codes.dtype == torch.uint8
    reference = Reference(widths, lambdas, slicing, decoders)
    check_gptq(reference, every(weight, widths), every(factor, widths), codes, list(range(48)), 16, mean_error)


@pytest.mark.parametrize("seed", range(3))
def test_gptq_in_another_order_over_several_blocks(random_layer: Callable[..., Layer], seed: int) -> None:
    widths, size = (2, 3, 4, 8), 288  # two blocks and a part
    weight, hessian = random_layer(5, size, seed)
    decoders = random_decoders(weight, widths, 32, "truncate")
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    factor = inverse_factor(damp(hessian, DAMPING)[order][:, order])
    codes = ColumnSolver(widths, [1.0] * 4).gptq(every(weight, widths), every(factor, widths), decoders, order)
    reference = Reference(widths, [1.0] * 4, "truncate", decoders)
    check_gptq(reference, every(weight, widths), every(factor, widths), codes, order.tolist(), 32, mean_error=False)


@pytest.mark.parametrize("seed", range(3))
def test_a_weight_and_a_hessian_of_its_own_for_each_width(random_layer: Callable[..., Layer], seed: int) -> None:
    widths, size = (2, 3, 5, 8), 288
    layers = [random_layer(5, size, seed + 10 * place) for place in (0, 1, 1, 1)]  # the wider three share one
    weights = [layers[0][0] + 0.02 * place * layers[1][0] for place in range(4)]
    hessians = [layers[0][1], *[layers[1][1]] * 3]
    decoders = random_decoders(weights[0], widths, 32, "truncate")
    lambdas = [1.0, 2.0, 3.0, 10.0]
    solver, reference = ColumnSolver(widths, lambdas), Reference(widths, lambdas, "truncate", decoders)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    factors = [inverse_factor(damp(hessian, DAMPING)[order][:, order]) for hessian in hessians]
    codes = solver.gptq(weights, factors, decoders, order)
    check_gptq(reference, weights, factors, codes, order.tolist(), 32, mean_error=False)

    after = solver.descend(weights, hessians, decoders, codes, order)
    decoded = reference.decode(codes.numpy(), 32)
    matrices = np.stack([hessian.double().numpy() for hessian in hessians])
    wanted = np.stack([weight.double().numpy() for weight in weights])
    for column in order.tolist():
        gradient = np.einsum("rnk,rk->rn", wanted - decoded, matrices[:, :, column])
        best = decoded[:, :, column] + gradient / matrices[:, column, column, None]
        decoded[:, :, column] = reference.check_choice(best, column // 32, after.numpy()[:, column])
    np.testing.assert_allclose(decoded, reference.decode(after.numpy(), 32))


def test_work_that_tensors_share_is_done_once() -> None:
    first, second = torch.ones(2), torch.ones(2)
    calls: list[torch.Tensor] = []

    def make(tensor: torch.Tensor) -> torch.Tensor:
        calls.append(tensor)
        return tensor + 1

    made = columns.shared(make, [first, first, second, first])
    assert len(calls) == 2
    assert made[0] is made[1] is made[3]
    assert made[2] is not made[0]


@pytest.mark.parametrize("width", range(2, 9))
def test_one_width_is_textbook_gptq(random_layer: Callable[..., Layer], width: int) -> None:
    """Optimal brain surgery on the explicit inverse, with rounding to the nearest level."""
    weight, hessian = random_layer(21, 64, seed=width)
    [decoder] = random_decoders(weight, (width,), 16, "truncate")
    codes = ColumnSolver((width,), [1.0]).gptq([weight], [inverse_factor(damp(hessian, DAMPING))], [decoder])
    damped = hessian.double().numpy() + DAMPING * float(hessian.diagonal().mean()) * np.eye(64)
    left = weight.double().numpy().copy()
    scale, offset = decoder.scale.double().numpy(), decoder.offset.double().numpy()
    for column in range(64):
        inverse = np.linalg.inv(damped[column:, column:])
        group = column // 16
        exact = (left[:, column] - offset[:, group]) / scale[:, group]
        level = codes[:, column].numpy() >> (8 - width)
        # The nearest level, unless the value lies half-way between two within float32's accuracy.
        assert (np.abs(level - exact.clip(0, 2**width - 1)) <= 0.5 + 1e-3).all()
        error = left[:, column] - (scale[:, group] * level + offset[:, group])
        left[:, column:] -= error[:, None] * inverse[0] / inverse[0, 0]


def objective(weight: torch.Tensor, hessian: torch.Tensor, decoded: np.ndarray, lambdas: Sequence[float]) -> np.ndarray:
    """sum_r lambda_r e_r H e_r^T of each row, float64 [rows]."""
    errors = weight.double().numpy() - decoded
    energy = ((errors @ hessian.double().numpy()) * errors).sum(axis=2)
    return (np.array(lambdas)[:, None] * energy).sum(axis=0)


@pytest.mark.parametrize("slicing", ["truncate", "round"])
@pytest.mark.parametrize(("rows", "size"), [(1, 48), (17, 48), (5, 288)])
def test_descend(random_layer: Callable[..., Layer], rows: int, size: int, slicing: Slicing) -> None:
    """A sweep takes in each column the parent that is best while all other codes stay as they are."""
    widths, lambdas = (2, 4, 8), [1.0, 3.0, 20.0]
    weight, hessian = random_layer(rows, size, seed=size)
    decoders = random_decoders(weight, widths, 16, slicing)
    generator = torch.Generator().manual_seed(rows)
    codes = torch.randint(256, weight.shape, dtype=torch.uint8, generator=generator)
    order = torch.randperm(size, generator=generator)
    solver = ColumnSolver(widths, lambdas, slicing)
    after = solver.descend(every(weight, widths), every(hessian, widths), decoders, codes, order)

    reference = Reference(widths, lambdas, slicing, decoders)
    decoded = reference.decode(codes.numpy(), 16)
    matrix = hessian.double().numpy()
    for column in order.tolist():
        gradient = (weight.double().numpy() - decoded) @ matrix[:, column]
        best = decoded[:, :, column] + gradient / matrix[column, column]
        decoded[:, :, column] = reference.check_choice(best, column // 16, after.numpy()[:, column])
    np.testing.assert_allclose(decoded, reference.decode(after.numpy(), 16))


@pytest.mark.parametrize("fixed_bits", range(1, 8))
def test_descend_with_fixed_bits(random_layer: Callable[..., Layer], fixed_bits: int) -> None:
    """The leading bits stay, and the best parent among those that have them is taken."""
    widths, lambdas = (2, 4, 8), [1.0, 3.0, 20.0]
    weight, hessian = random_layer(17, 48, seed=fixed_bits)
    decoders = random_decoders(weight, widths, 16, "truncate")
    codes = torch.randint(256, weight.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(fixed_bits))
    order = torch.arange(48)
    after = ColumnSolver(widths, lambdas).descend(
        every(weight, widths), every(hessian, widths), decoders, codes, order, fixed_bits
    )
    assert torch.equal(after >> (8 - fixed_bits), codes >> (8 - fixed_bits))

    reference = Reference(widths, lambdas, "truncate", decoders)
    decoded, matrix = reference.decode(codes.numpy(), 16), hessian.double().numpy()
    for column in range(48):
        gradient = (weight.double().numpy() - decoded) @ matrix[:, column]
        best = decoded[:, :, column] + gradient / matrix[column, column]
        levels = reference.levels(column // 16)
        costs = (np.array(lambdas)[:, None, None] * (best[:, :, None] - levels) ** 2).sum(axis=0)
        prefixes = codes.numpy()[:, column, None] >> (8 - fixed_bits)
        costs[np.arange(256)[None] >> (8 - fixed_bits) != prefixes] = np.inf
        chosen, rows = after.numpy()[:, column], np.arange(17)
        np.testing.assert_array_less(costs[rows, chosen], 1.0001 * costs.min(axis=1) + 1e-8)
        decoded[:, :, column] = levels[:, rows, chosen]


@pytest.mark.parametrize("seed", range(3))
def test_sweeps_never_lose(random_layer: Callable[..., Layer], seed: int) -> None:
    widths, lambdas = (2, 3, 4, 5, 6, 7, 8), [2.0**place for place in range(7)]
    weight, hessian = random_layer(9, 160, seed)
    decoders = random_decoders(weight, widths, 32, "truncate")
    solver, reference = ColumnSolver(widths, lambdas), Reference(widths, lambdas, "truncate", decoders)
    order = hessian.diagonal().argsort(descending=True)
    factor = inverse_factor(damp(hessian, DAMPING)[order][:, order])
    codes = solver.gptq(every(weight, widths), every(factor, widths), decoders, order)
    before = objective(weight, hessian, reference.decode(codes.numpy(), 32), lambdas)
    first = before
    for _ in range(4):
        codes = solver.descend(every(weight, widths), every(hessian, widths), decoders, codes, order)
        after = objective(weight, hessian, reference.decode(codes.numpy(), 32), lambdas)
        assert (after <= before * (1 + 1e-4)).all()
        before = after
    assert after.sum() < first.sum()


@pytest.mark.parametrize("threads", [1, 2])
def test_codes_do_not_depend_on_chunks_of_rows_or_threads(
    random_layer: Callable[..., Layer], monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    widths = (2, 4, 8)
    weight, hessian = random_layer(100, 288, seed=0)
    decoders = random_decoders(weight, widths, 32, "truncate")
    factor, order = inverse_factor(damp(hessian, DAMPING)), torch.arange(288)
    solver = ColumnSolver(widths, [1.0, 1.0, 1.0])

    def solve() -> tuple[torch.Tensor, torch.Tensor]:
        codes = solver.gptq(every(weight, widths), every(factor, widths), decoders)
        return codes, solver.descend(every(weight, widths), every(hessian, widths), decoders, codes, order)

    torch.set_num_threads(1)
    expected = solve()
    torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for pair in zip(solve(), expected, strict=True))
    monkeypatch.setattr(columns, "_SCRATCH_BYTES", 48 * len(widths) * 288 * 4)  # 48 rows at a time
    assert all(torch.equal(*pair) for pair in zip(solve(), expected, strict=True))
    monkeypatch.setattr(columns, "_SCRATCH_BYTES", 1)  # the least: one lane for each row
    assert all(torch.equal(*pair) for pair in zip(solve(), expected, strict=True))


def operands(**changes: object) -> list[object]:
    arguments: dict[str, object] = {
        "copies": torch.zeros(8, 2, 16),
        "scales": torch.ones(2, 2, 16),
        "offsets": torch.zeros(2, 2, 16),
        "group_of_column": torch.tensor([0, 0, 0, 0, 1, 1, 1, 1], dtype=torch.int32),
        "coupling": torch.eye(8)[None],
        "current": None,
        "fixed_bits": 0,
        "slices": torch.zeros(2, 256, dtype=torch.uint8),
        "lambdas": torch.ones(2),
        "mean_error": False,
        "begin": 0,
        "end": 8,
    }
    return list((arguments | changes).values())


def test_op() -> None:
    codes, errors = ops.solve_columns(*operands(begin=2, end=5, coupling=torch.eye(3)[None]))
    assert (codes.shape, codes.dtype) == ((3, 16), torch.uint8)
    assert (errors.shape, errors.dtype) == ((3, 2, 16), torch.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"copies": torch.zeros(8, 16)}, "copies: found 2 dimensions, expected 3"),
        ({"copies": torch.zeros(8, 8, 16)}, "copies: found 8 widths, expected 1 to 7"),
        ({"copies": torch.zeros(8, 0, 16)}, "copies: found 0 widths, expected 1 to 7"),
        ({"copies": torch.zeros(8, 2, 15)}, "copies: found 15 rows, expected a multiple of 16"),
        ({"copies": torch.zeros(8, 2, 16).double()}, "copies: found dtype Double, expected Float"),
        ({"copies": torch.zeros(8, 16, 2).transpose(1, 2)}, "copies: found strides"),
        ({"scales": torch.ones(2, 16)}, "scales: found 2 dimensions, expected 3"),
        ({"scales": torch.ones(3, 2, 16)}, r"scales: found shape \[3, 2, 16\], expected \[2, 2, 16\]"),
        ({"offsets": torch.ones(2, 1, 16)}, r"offsets: found shape \[2, 1, 16\], expected \[2, 2, 16\]"),
        ({"group_of_column": torch.zeros(8, dtype=torch.int64)}, "group_of_column: found dtype Long, expected Int"),
        ({"group_of_column": torch.full((8,), 2, dtype=torch.int32)}, "group_of_column: found 2, expected 0 to 1"),
        ({"group_of_column": torch.full((8,), -1, dtype=torch.int32)}, "group_of_column: found -1, expected 0 to 1"),
        ({"coupling": torch.eye(8)}, "coupling: found 2 dimensions, expected 3"),
        ({"coupling": torch.eye(7)[None]}, r"coupling: found shape \[1, 7, 7\], expected \[1, 8, 8\]"),
        ({"coupling": torch.eye(8).repeat(3, 1, 1)}, "coupling: found 3 matrices, expected 1 or 2"),
        ({"current": torch.zeros(16, 8, dtype=torch.uint8)}, r"current: found shape \[16, 8\], expected \[8, 16\]"),
        ({"fixed_bits": 8}, "fixed_bits: found 8, expected 0 to 7"),
        ({"fixed_bits": 3}, "fixed_bits: found 3 without current codes"),
        ({"slices": torch.zeros(2, 255, dtype=torch.uint8)}, r"slices: found shape \[2, 255\], expected \[2, 256\]"),
        ({"lambdas": torch.ones(3)}, r"lambdas: found shape \[3\], expected \[2\]"),
        ({"begin": -1}, "block: found columns -1 to 8, expected a range within 8"),
        ({"begin": 4, "end": 4}, "block: found columns 4 to 4"),
        ({"end": 9}, "block: found columns 0 to 9, expected a range within 8"),
    ],
)
def test_op_refuses(changes: dict[str, object], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        ops.solve_columns(*operands(**changes))
