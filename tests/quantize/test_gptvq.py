"""GPTVQ against plain re-implementations, and from a source to what is measured of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.quantize.conftest import Layer
from vllm_matquant.checkpoint.decoder import VECTOR_KINDS, VECTORS_1D, VECTORS_2D, VECTORS_4D, Affine, DecoderKind
from vllm_matquant.checkpoint.errors import ConfigError
from vllm_matquant.checkpoint.reader import Checkpoint, open_checkpoint
from vllm_matquant.checkpoint.vectors import VectorBooks, VectorForm, vector_codes, vector_index
from vllm_matquant.checkpoint.verify import verify
from vllm_matquant.jobs.evaluate import Evaluate
from vllm_matquant.jobs.quantize import Quantize
from vllm_matquant.jobs.search import Search
from vllm_matquant.quantize import probe
from vllm_matquant.quantize.baselines import GPTQ
from vllm_matquant.quantize.columns import ColumnSolver, damp, inverse_factor
from vllm_matquant.quantize.decoders import parent_grid
from vllm_matquant.quantize.gptvq import GPTVQ
from vllm_matquant.quantize.layer import QuantizedLayer, relative_error
from vllm_matquant.quantize.pipeline import plan_format
from vllm_matquant.quantize.source import SourceModel
from vllm_matquant.quantize.vector_entries import find_entries
from vllm_matquant.quantize.vector_fit import VectorFit
from vllm_matquant.quantize.vector_solver import VectorSolver, choose_entries

DAMPING = 0.01
# width, places, rows, columns, columns of a group
LAYERS = [(2, 1, 9, 48, 16), (3, 1, 21, 32, 32), (2, 2, 37, 48, 24), (3, 2, 45, 24, 8), (2, 4, 70, 48, 24)]


def slow_seeds(vectors: np.ndarray, count: int) -> np.ndarray:
    """Vectors in the middles of equal parts of their order by Mahalanobis distance; by value if of one place."""
    centred = vectors - vectors.mean(0)
    inverse = np.linalg.inv(centred.T @ centred / len(vectors))
    distances = [float(x[0] if len(x) == 1 else x @ inverse @ x) for x in centred]
    order = np.argsort(distances, kind="stable")
    return vectors[[order[int((part + 0.5) / count * len(vectors))] for part in range(count)]]


def slow_entries(vectors: np.ndarray, importance: np.ndarray, count: int, iterations: int) -> np.ndarray:
    """k-means with importance, entry after entry, in float64."""
    entries = slow_seeds(vectors, count)
    for _ in range(iterations):
        costs = np.stack([(importance * (vectors - entry) ** 2).sum(1) for entry in entries], axis=1)
        nearest, worst = np.argmin(costs, axis=1), iter(np.argsort(-np.min(costs, axis=1), kind="stable"))
        for entry in range(count):
            own = nearest == entry
            if own.any():
                entries[entry] = (importance[own] * vectors[own]).sum(0) / importance[own].sum(0)
            else:
                entries[entry] = vectors[next(worst)]
    return entries


def slow_solve(weight: torch.Tensor, hessian: torch.Tensor, index: torch.Tensor, books: VectorBooks, size: int) -> None:
    """Follow a pass along the entries that were chosen, by inverse Hessians of the columns that are left, in float64.

    Each group's codebooks must be those of its weights when the pass comes to it, each choice the best there is.
    """
    left, inverse = weight.double().numpy().copy(), np.linalg.inv(hessian.double().numpy())
    places, width = books.places, books.width
    bands, levels = books.rows(len(weight)).tolist(), books.levels.double().numpy()
    for first in range(0, weight.shape[1], places):
        if first % size == 0:
            importance = slow_importance(inverse[:size, :size])
            for band in range(len(levels)):
                own = np.array([row for row in range(len(weight)) if bands[row] == band])
                vectors = left[own, :size].reshape(-1, places)
                tiled = np.tile(importance.reshape(-1, places), (len(own), 1))
                expected = slow_entries(vectors, tiled, books.entries, 5)
                found = levels[band, first // size]
                if places == 1:
                    expected = np.sort(expected, axis=0)
                np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
        block = np.linalg.inv(inverse[:places, :places])
        for row in range(len(weight)):
            entries = levels[bands[row], first // size]
            errors = left[row, :places] - entries
            costs = ((errors @ block) * errors).sum(1)
            chosen = int(index[row, first // places])
            assert costs[chosen] <= 1.001 * min(costs) + 1e-7
            left[row] -= (left[row, :places] - entries[chosen]) @ block @ inverse[:places]
        # What is left of the inverse when the columns are done with.
        inverse = (inverse - inverse[:, :places] @ block @ inverse[:places])[places:, places:]
        left = left[:, places:]
    assert width * places == (books.entries - 1).bit_length()


def slow_importance(inverse: np.ndarray) -> np.ndarray:
    """What an error in each column costs when it is the first of those that are left: 1 / [H^-1]_00, in turn."""
    costs = []
    while len(inverse):
        costs.append(1 / inverse[0, 0])
        inverse = (inverse - np.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:]
    return np.array(costs)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("width", "places", "rows", "columns", "group_size"), LAYERS)
def test_solver(
    random_layer: Callable[..., Layer], width: int, places: int, rows: int, columns: int, group_size: int, seed: int
) -> None:
    weight, hessian = random_layer(rows, columns, seed)
    damped = damp(hessian, DAMPING)
    index, books = VectorSolver(width, places, group_size, iterations=5).solve(weight, damped)
    assert tuple(index.shape) == (rows, columns // places)
    slow_solve(weight, damped, index, books, group_size)


@pytest.mark.parametrize(("count", "places"), [(4, 1), (16, 2), (8, 4)])
def test_entries_improve(count: int, places: int) -> None:
    """Also with fewer vectors than entries, and with vectors that do not count."""
    generator = torch.Generator().manual_seed(places)
    vectors = torch.randn(3, 100, places, generator=generator)
    importance = torch.rand(1, 100, places, generator=generator).expand(3, -1, -1).clone()
    vectors[2, 60:], importance[2, 60:] = 1e6, 0

    def cost(iterations: int) -> float:
        entries = find_entries(vectors, importance, count, iterations)
        distances = (importance.unsqueeze(2) * (vectors.unsqueeze(2) - entries.unsqueeze(1)).square()).sum(3)
        return float(distances.amin(2).sum())

    costs = [cost(iterations) for iterations in (0, 1, 3, 20)]
    assert costs[3] <= costs[2] < costs[1] < costs[0]
    few = find_entries(vectors[:, :3], importance[:, :3], count, 3)
    assert few.isfinite().all()
    counting = find_entries(vectors[2:, :60], importance[2:, :60], count, 9)
    np.testing.assert_allclose(find_entries(vectors[2:], importance[2:], count, 9), counting, rtol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_levels_at_equal_distances_are_gptq(random_layer: Callable[..., Layer], seed: int) -> None:
    weight, hessian = random_layer(23, 64, seed)
    factor = inverse_factor(damp(hessian, DAMPING))
    grid = parent_grid(weight, 64)
    # The levels of each row, which is a band of its own here.
    levels = grid.offset.unsqueeze(1) + grid.scale.unsqueeze(1) * 85 * torch.arange(4).view(1, 4, 1)
    index, _ = choose_entries(weight, factor, levels)
    affine = Affine(grid.scale * 85, grid.offset)
    codes = ColumnSolver((2,), [1.0]).gptq([weight], [factor], [affine])
    assert torch.equal(index.to(torch.uint8), codes >> 6)


def error_of(weight: torch.Tensor, hessian: torch.Tensor, decoded: torch.Tensor) -> float:
    error = (weight - decoded).double()
    return float(((error @ hessian.double()) * error).sum())


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("width", "places", "rows", "columns", "group_size"), LAYERS)
def test_no_change_of_a_fitted_level_lowers_the_error(
    random_layer: Callable[..., Layer], width: int, places: int, rows: int, columns: int, group_size: int, seed: int
) -> None:
    weight, hessian = random_layer(rows, columns, seed)
    index, books = VectorSolver(width, places, group_size, 10).solve(weight, damp(hessian, DAMPING))
    codes = vector_codes(index, width, places)
    fit = VectorFit(weight, hessian, index, group_size)
    before, few = error_of(weight, hessian, books.decode(codes)), fit(books, 3)
    fitted = fit(books, 200)
    least = error_of(weight, hessian, fitted.decode(codes))
    assert least <= error_of(weight, hessian, few.decode(codes)) < before
    generator = torch.Generator().manual_seed(seed)
    for step in (0.003, 0.03, -0.03):
        for _ in range(10):
            levels = fitted.levels.clone()
            place = torch.randint(levels.numel(), (1,), generator=generator)
            levels.view(-1)[place] += step
            assert error_of(weight, hessian, VectorBooks(levels).decode(codes)) >= least * (1 - 1e-5)


def quantized(layer: Layer, kind: DecoderKind, width: int, group_size: int = 64) -> QuantizedLayer:
    return GPTVQ((width,), iterations=30).quantize(*layer, group_size, kind)


def relative(layer: Layer, result: QuantizedLayer, width: int) -> float:
    return relative_error([layer[0]], result, [result.codes >> (8 - width)], [layer[1]])[width]


@pytest.mark.parametrize("seed", range(2))
def test_more_places_are_better(random_layer: Callable[..., Layer], seed: int) -> None:
    """The paper's order at 2 bits; each codebook of vectors of four has a quarter of the rows that it asks for."""
    layer = random_layer(256, 128, seed)
    found = [relative(layer, quantized(layer, kind, 2), 2) for kind in (VECTORS_4D, VECTORS_2D, VECTORS_1D)]
    found.append(relative(layer, GPTQ((2,)).quantize(*layer, 64, GPTQ.decoder_kinds[-1]), 2))
    assert found == sorted(found)
    assert found[1] < 0.8 * found[3]


@pytest.mark.parametrize("kind", [VECTORS_1D, VECTORS_2D], ids=lambda kind: kind.name)
def test_wider_codes_are_better(random_layer: Callable[..., Layer], kind: DecoderKind) -> None:
    layer = random_layer(64, 128, seed=0)
    errors = [relative(layer, quantized(layer, kind, width), width) for width in (2, 3, 4)]
    assert errors[1] < 0.5 * errors[0]
    assert errors[2] < 0.5 * errors[1]


@pytest.mark.parametrize("kind", VECTOR_KINDS.values(), ids=lambda kind: kind.name)
def test_the_same_again(random_layer: Callable[..., Layer], kind: DecoderKind) -> None:
    layer = random_layer(48, 64, seed=3)
    first, second = (quantized(layer, kind, 2) for _ in range(2))
    assert torch.equal(first.codes, second.codes)
    assert not (first.codes & 63).any()
    for name, part in first.decoders[2].parts.items():
        assert torch.equal(part, second.decoders[2].parts[name])
    form = kind.form(2)
    assert isinstance(form, VectorForm)
    index = vector_index(first.codes >> 6, 2, form.places)
    assert index.unique().numel() > form.entries // 2


@pytest.mark.parametrize("widths", [(2, 3), (5,), (8,)])
def test_widths_that_the_method_cannot_do(widths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"method gptvq: found widths \[.*\], expected one of \[2, 3, 4\] \(--bits\)"):
        GPTVQ(widths)


def test_widths_that_a_codebook_cannot_have(llama: Path) -> None:
    source = SourceModel(llama)
    message = r"found \[3\] with decoder_kind 'vectors-4d', expected one of \[2\]. A codebook .* 256 .* --bits"
    with pytest.raises(ConfigError, match="widths: " + message):
        plan_format(source, GPTVQ((3,)), 32, [], decoder_kind=VECTORS_4D)
    with pytest.raises(ConfigError, match=r"widths of model\.layers\.0\.mlp\.down_proj: " + message):
        plan_format(source, GPTVQ((2,)), 32, [], bits_for=[("down_proj", (3,))], decoder_kind=VECTORS_4D)
    with pytest.raises(ValueError, match="found method gptvq, which needs all rows of a layer at once"):
        plan_format(source, GPTVQ((2,)), 32, [], quantize_embeddings=True)
    assert plan_format(source, GPTVQ((3,)), "channel", []).decoder_kind is VECTORS_2D


def job(source: Path, output: Path, text: Path, **settings: Any) -> Quantize:
    given: dict[str, Any] = {"method": "gptvq", "bits": (2,), "group_size": 32, "setting": ["iterations=5"]}
    texts: dict[str, Any] = {"calibration": text, "samples": 4, "sequence_length": 32}
    return Quantize(source, output, **(given | texts | settings))


@pytest.mark.parametrize("kind", VECTOR_KINDS)
def test_from_a_source_to_its_quality(
    kind: str, llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "_TRIALS", probe._TRIALS[:1])
    said: list[str] = []
    output = tmp_path / "output"
    made = job(llama, output, text_file, decoder=kind, held_out=text_file, held_out_samples=2)
    plan = made.plan()
    outcome = made.run(said.append)
    checkpoint = open_checkpoint(output)
    counted = counted_by_hand(checkpoint)
    expected = f"{output} has 2 bits, {counted:.3f} a weight as GPTVQ counts them; no kernel serves it, but it can be"
    assert said[-1].startswith(expected)
    assert f"matquant evaluate {output} --reference {llama}" in said[-1]
    assert checkpoint.format.decoder_kind.name == kind
    assert all(result.passed for result in verify(output))
    assert plan.output == sum(path.stat().st_size for path in output.glob("*.safetensors")) - headers(output)
    assert set(outcome.errors) == set(checkpoint.layers)
    [row] = Evaluate(output, reference=llama, text=text_file, samples=2, sequence_length=32).run()
    assert row["kl"] == pytest.approx(outcome.quality[0]["kl"], rel=0.05)
    weights = sum(rows * columns for rows, columns in checkpoint.layers.values())
    assert row["bits_per_weight"] == pytest.approx(8 * checkpoint.slice(2).resident_bytes / weights)
    card = (output / "README.md").read_text()
    assert "no kernel\nserves it" in card
    assert "vllm serve" not in card
    with pytest.raises(ValueError, match=f"found decoders of the kind {kind}, expected one that gives layers a choice"):
        Search(output, budget=2).run()


def counted_by_hand(checkpoint: Checkpoint) -> float:
    """Bits of a weight without scales and steps, of the tensors that were written."""
    bits = weights = 0
    for layer, (rows, columns) in checkpoint.layers.items():
        weights += rows * columns
        bits += 2 * rows * columns + 8 * checkpoint.decoder(layer, 2).parts["codebook"].numel()
    return bits / weights


def headers(folder: Path) -> int:
    """Bytes of the headers of a folder's shards."""
    return sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in folder.glob("*.safetensors"))


def test_resuming(llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was stopped in the second block and goes on is what was never stopped."""
    job(llama, tmp_path / "whole", text_file, no_report=True).run()
    calls, solve = [0], VectorSolver.solve

    def stop(self: VectorSolver, *arguments: torch.Tensor) -> tuple[torch.Tensor, VectorBooks]:
        calls[0] += 1
        if calls[0] == 10:
            raise KeyboardInterrupt
        return solve(self, *arguments)

    monkeypatch.setattr(VectorSolver, "solve", stop)
    with pytest.raises(KeyboardInterrupt):
        job(llama, tmp_path / "stopped", text_file, no_report=True).run()
    monkeypatch.undo()
    job(llama, tmp_path / "stopped", text_file, no_report=True, resume=True).run()
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert (tmp_path / "stopped" / file.name).read_bytes() == file.read_bytes()
