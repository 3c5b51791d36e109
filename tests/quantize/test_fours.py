"""The solver of codebooks against plain float64 re-implementations."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch

from tests.quantize.conftest import Layer
from vllm_matquant.checkpoint.codebook import Codebook
from vllm_matquant.kernels import ops
from vllm_matquant.quantize import columns
from vllm_matquant.quantize.columns import damp, inverse_factor
from vllm_matquant.quantize.fours import FourSolver, blocks_of, order_of_fours, upper_factor

DAMPING = 0.01
GROUP = 16
WIDTHS = [(2, 3, 4, 5, 6, 7, 8), (2,), (3,), (8,), (2, 4, 8), (3, 6)]
CANDIDATES = 8  # entries whose further bits are tried


@pytest.fixture(autouse=True)
def _keep_thread_count() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def random_books(weight: torch.Tensor, widths: Sequence[int], seed: int) -> list[Codebook]:
    """Codebooks about as large as the weights, each width's its own, and scales of which one is zero."""
    generator = torch.Generator().manual_seed(seed)
    entries = torch.randn(64, 4, generator=generator)
    books = []
    for width in widths:
        scale = 0.1 * (0.8 + 0.4 * torch.rand(len(weight), weight.shape[1] // GROUP, generator=generator))
        scale[-1, 0] = 0
        varied = entries + 0.05 * torch.randn(64, 4, generator=generator)
        halves = 0.5 ** torch.arange(width - 2).view(-1, 1, 1)
        increments = (0.5 + torch.rand(width - 2, 64, 4, generator=generator)) * halves
        books.append(Codebook(varied, increments, scale))
    return books


def signs_of(index: int) -> np.ndarray:
    """Of the four places: the eighth bit is of the first two, the seventh of the last two."""
    first, last = 1 - 2 * (index >> 7 & 1), 1 - 2 * (index >> 6 & 1)
    return np.array([first, first, last, last], dtype=np.float64)


class Reference:
    """What codes decode to and what they cost, in float64."""

    def __init__(self, books: Sequence[Codebook], lambdas: Sequence[float]) -> None:
        self.books, self.lambdas = books, np.array(lambdas, dtype=np.float64)
        self.most = max(book.width for book in books) - 2

    def levels(self, entry: int, row: int, group: int) -> np.ndarray:
        """What an entry decodes to, by width, place and the further bits of the widest: [widths, 4, codes]."""
        codes, found = np.arange(2**self.most), []
        for book in self.books:
            level = np.repeat(book.levels[entry % 64].double().numpy()[:, None], len(codes), axis=1)
            for bit in range(book.width - 2):
                is_set = codes >> (self.most - 1 - bit) & 1
                level += book.increments[bit, entry % 64].double().numpy()[:, None] * is_set
            level *= signs_of(entry)[:, None]
            found.append(float(book.scale[row, group]) * level)
        return np.stack(found)

    def four(self, row: int, group: int, parents: Sequence[int]) -> np.ndarray:
        """What four parent codes decode to: [widths, 4]."""
        entry = sum((parent >> 6) << 2 * place for place, parent in enumerate(parents))
        further = [(parent & 63) >> (6 - self.most) for parent in parents]
        return self.levels(entry, row, group)[:, range(4), further]

    def refined(self, entry: int, wanted: np.ndarray, factor: np.ndarray, row: int, group: int) -> float:
        """The cost of an entry with the best further bits, place after place."""
        levels, values, total = self.levels(entry, row, group), np.zeros((len(self.books), 4)), 0.0
        for place in range(4):
            target = wanted[:, place] - values[:, :place] @ factor[:place, place]
            costs = self.lambdas @ (target[:, None] - levels[:, place] * factor[place, place]) ** 2
            best = int(costs.argmin())
            total += float(costs[best])
            values[:, place] = levels[:, place, best]
        return total

    def promise(self, wanted: np.ndarray, weight: np.ndarray, factor: np.ndarray, row: int, group: int) -> np.ndarray:
        """By which entries are chosen whose further bits are tried: [256]."""
        total = np.zeros(256)
        diagonal = np.diagonal(factor) ** 2
        for index, book in enumerate(self.books):
            scale, further = float(book.scale[row, group]), book.width - 2
            signs = np.stack([signs_of(entry) for entry in range(256)])
            first = signs * np.tile(book.levels.double().numpy(), (4, 1))
            last = first + signs * np.tile(book.increments.double().numpy().sum(0), (4, 1))
            low, high = np.minimum(first, last), np.maximum(first, last)
            if further == 0:
                error = ((wanted[index] - scale * (low @ factor)) ** 2).sum(1)
            elif further == 1:
                nearest = np.minimum((weight[index] - scale * low) ** 2, (weight[index] - scale * high) ** 2)
                error = nearest @ diagonal
            else:
                step = (high - low) / (2**further - 1)
                below = scale * (low - step / 2) - weight[index]
                above = weight[index] - scale * (high + step / 2)
                outside = np.maximum(np.maximum(below, above), 0) ** 2
                error = (outside + scale**2 * step**2 / 12) @ diagonal
            total += self.lambdas[index] * error
        return total


def check_pass(
    books: Sequence[Codebook], lambdas: np.ndarray, targets: np.ndarray, factors: np.ndarray, coupling: np.ndarray,
    order: list[int], codes: torch.Tensor, current: torch.Tensor | None,
) -> None:  # fmt: skip
    """Follow a pass along the codes that were chosen, and check each choice."""
    reference = Reference(books, lambdas)
    copies = targets.copy()  # [widths, rows, columns], in order
    for four, factor in enumerate(factors):
        columns = slice(4 * four, 4 * four + 4)
        group = order[columns.start] // GROUP
        errors = np.zeros((len(books), codes.shape[0], 4))
        for row in range(codes.shape[0]):
            weight = copies[:, row, columns]
            wanted = weight @ factor
            parents = [int(codes[row, column]) for column in order[columns]]
            decoded = reference.four(row, group, parents)
            found = float(lambdas @ (((weight - decoded) @ factor) ** 2).sum(1))
            promise = reference.promise(wanted, weight, factor, row, group)
            # What is almost a tie for the last candidate may have been taken for either.
            sure = np.argsort(promise)[:CANDIDATES]
            sure = sure[promise[sure] < 0.9999 * np.sort(promise)[CANDIDATES]]
            for entry in sure:  # none where the scale is zero
                assert found <= 1.001 * reference.refined(int(entry), wanted, factor, row, group) + 1e-8
            if current is None:
                errors[:, row] = (weight - decoded) @ factor
            else:
                before = reference.four(row, group, [int(current[row, column]) for column in order[columns]])
                kept = float(lambdas @ (((weight - before) @ factor) ** 2).sum(1))
                assert found <= 1.0001 * kept + 1e-8
                errors[:, row] = decoded - before
        copies[:, :, columns.stop :] -= errors @ coupling[columns, columns.stop :]


def lambdas_of(widths: Sequence[int]) -> list[float]:
    return [3.0**place for place in range(len(widths))]


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("rows", [1, 17])
def test_gptq(random_layer: Callable[..., Layer], rows: int, widths: tuple[int, ...]) -> None:
    weight, hessian = random_layer(rows, 48, seed=rows)
    damped, lambdas = damp(hessian, DAMPING), lambdas_of(widths)
    books = random_books(weight, widths, seed=rows)
    codes = FourSolver(widths, lambdas).gptq(weight, damped, books)
    order = order_of_fours(damped)
    factor = inverse_factor(damped[order][:, order]).double().numpy()
    factors = np.stack([np.linalg.inv(factor[at : at + 4, at : at + 4]) for at in range(0, 48, 4)])
    targets = np.stack([weight[:, order].double().numpy()] * len(widths))
    check_pass(books, np.array(lambdas), targets, factors, factor, order.tolist(), codes, None)


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("rows", [1, 17])
def test_descent(random_layer: Callable[..., Layer], rows: int, widths: tuple[int, ...]) -> None:
    weight, hessian = random_layer(rows, 48, seed=rows)
    damped, lambdas = damp(hessian, DAMPING), lambdas_of(widths)
    books = random_books(weight, widths, seed=rows)
    before = torch.randint(0, 256, weight.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(rows))
    if widths[-1] < 8:
        before &= 0xFF << (8 - widths[-1]) & 0xFF
    codes = FourSolver(widths, lambdas).descend(weight, damped, books, before)
    order = order_of_fours(damped)
    ordered = damped[order][:, order].double().numpy()
    coupling, factors = ordered.copy(), []
    for at in range(0, 48, 4):
        block = ordered[at : at + 4, at : at + 4]
        coupling[:, at : at + 4] = ordered[:, at : at + 4] @ np.linalg.inv(block)
        factors.append(np.linalg.cholesky(block[::-1, ::-1])[::-1, ::-1])
        np.testing.assert_allclose(factors[-1] @ factors[-1].T, block, rtol=1e-9)
    targets = []
    for book in books:
        decoded = book.decode(before >> (8 - book.width))[:, order].double().numpy()
        targets.append(decoded + (weight[:, order].double().numpy() - decoded) @ coupling)
    check_pass(books, np.array(lambdas), np.stack(targets), np.stack(factors), coupling, order.tolist(), codes, before)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("widths", [(2, 3, 4, 8), (2,), (4, 6)])
def test_a_sweep_is_never_worse(random_layer: Callable[..., Layer], widths: tuple[int, ...], seed: int) -> None:
    """The objective falls until nothing changes, columns of more than one block of the loop among them."""
    weight, hessian = random_layer(21, 144, seed)
    damped, lambdas = damp(hessian, DAMPING), lambdas_of(widths)
    books, solver = random_books(weight, widths, seed), FourSolver(widths, lambdas)

    def objective(codes: torch.Tensor) -> float:
        total = 0.0
        for book, weight_of_width in zip(books, lambdas, strict=True):
            error = (weight - book.decode(codes >> (8 - book.width))).double()
            total += weight_of_width * float(((error @ damped.double()) * error).sum())
        return total

    codes = solver.gptq(weight, damped, books)
    objectives = [objective(codes)]
    for _ in range(4):
        codes = solver.descend(weight, damped, books, codes)
        objectives.append(objective(codes))
    assert objectives[1] < objectives[0]
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(objectives))


def test_two_bits_alone_are_gptq_over_vectors(random_layer: Callable[..., Layer]) -> None:
    """Of one width no entry is better than the chosen ones, and later columns make up for what the errors were."""
    weight, hessian = random_layer(33, 96, seed=4)
    damped = damp(hessian, DAMPING)
    [book] = books = random_books(weight, (2,), seed=4)
    codes = FourSolver((2,), [1.0]).gptq(weight, damped, books)
    order = order_of_fours(damped)
    factor = inverse_factor(damped[order][:, order]).double()
    copies = weight[:, order].double()
    for at in range(0, 96, 4):
        scale = book.scale[:, order[at] // GROUP].double()[:, None, None]
        signs = torch.from_numpy(np.stack([signs_of(entry) for entry in range(256)]))
        errors = (copies[:, None, at : at + 4] - scale * signs * book.levels.double().repeat(4, 1)) @ torch.linalg.inv(
            factor[at : at + 4, at : at + 4]
        )
        costs = errors.square().sum(-1)
        entry = ((codes[:, order[at : at + 4]].long() >> 6) << torch.arange(0, 8, 2)).sum(1)
        rows = torch.arange(len(weight))
        assert (costs[rows, entry] <= 1.0001 * costs.amin(1) + 1e-8).all()
        copies[:, at + 4 :] -= errors[rows, entry] @ factor[at : at + 4, at + 4 :]


@pytest.mark.parametrize("widths", [(2, 3, 8), (4,)])
def test_codes_depend_neither_on_threads_nor_on_chunks_of_rows(
    random_layer: Callable[..., Layer], widths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, hessian = random_layer(70, 144, seed=1)
    damped, books = damp(hessian, DAMPING), random_books(weight, widths, seed=1)
    solver = FourSolver(widths, lambdas_of(widths))
    results = []
    for threads, scratch in ((1, 2**29), (2, 2**29), (2, 1)):
        torch.set_num_threads(threads)
        monkeypatch.setattr(columns, "_SCRATCH_BYTES", scratch)
        codes = solver.gptq(weight, damped, books)
        results.append((codes, solver.descend(weight, damped, books, codes)))
    # Products of other shapes round otherwise: what is almost a tie may fall to either side.
    for gptq, descended in results[1:]:
        assert (gptq != results[0][0]).float().mean() < 0.01
        assert (descended != results[0][1]).float().mean() < 0.01
    assert torch.equal(results[0][0], results[1][0])


def test_factors_and_blocks() -> None:
    matrix = torch.randn(5, 12, 30, generator=torch.Generator().manual_seed(0))
    positive = matrix @ matrix.transpose(1, 2)
    factor = upper_factor(positive)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor @ factor.transpose(1, 2), positive, rtol=1e-4, atol=1e-4)
    blocks = blocks_of(positive[0])
    assert torch.equal(blocks, torch.stack([positive[0, at : at + 4, at : at + 4] for at in (0, 4, 8)]))


def test_fours_stay_together_in_the_order() -> None:
    diagonal = torch.zeros(32)
    diagonal[[7, 18, 30, 1]] = torch.tensor([9.0, 4, 4, 2])
    order = order_of_fours(torch.diag(diagonal)).view(-1, 4).tolist()
    assert order[:3] == [[3, 7, 11, 15], [18, 22, 26, 30], [1, 5, 9, 13]]
    assert order[3:] == [[each, each + 4, each + 8, each + 12] for each in (0, 2, 16, 17, 19)]


def test_faulty_arguments_are_refused() -> None:
    given = {
        "copies": torch.zeros(8, 2, 16), "scales": torch.zeros(2, 1, 16),
        "group_of_column": torch.zeros(8, dtype=torch.int32), "factors": torch.zeros(1, 4, 4),
        "coupling": torch.zeros(4, 4), "current": None, "books": torch.zeros(3, 256, 4), "widths": [2, 3],
        "lambdas": torch.ones(2), "begin": 0, "end": 4,
    }  # fmt: skip
    ops.solve_fours(**given)
    faults = {
        "copies": torch.zeros(8, 2, 15),
        "scales": torch.zeros(2, 16),
        "group_of_column": torch.ones(8, dtype=torch.int32),
        "factors": torch.zeros(2, 4, 4),
        "coupling": torch.zeros(8, 8),
        "current": torch.zeros(8, 17, dtype=torch.uint8),
        "books": torch.zeros(4, 256, 4),
        "widths": [3, 2],
        "lambdas": torch.ones(3),
        "end": 6,
    }
    for name, fault in faults.items():
        expected = "block" if name == "end" else name
        with pytest.raises(RuntimeError, match=f"{expected}: found .*expected"):
            ops.solve_fours(**given | {name: fault})
