"""Decoders that follow Adam, and the order of the windows."""

from __future__ import annotations

import pytest
import torch

from tests.checkpoint.samples import random_codebook, random_decoder
from vllm_matquant.checkpoint.decoder import KINDS, Affine, DecoderKind
from vllm_matquant.quantize import ranks
from vllm_matquant.quantize.training import TrainedAffine, TrainedCodebook, batches, begin_training


def random_values(seed: int, rows: int = 5, groups: int = 3) -> Affine:
    generator = torch.Generator().manual_seed(seed)
    return Affine(torch.rand(rows, groups, generator=generator) + 0.1, torch.randn(rows, groups, generator=generator))


@pytest.mark.parametrize("width", range(2, 9))
@pytest.mark.parametrize("seed", range(3))
def test_the_start_is_the_decoder(width: int, seed: int) -> None:
    start = random_values(seed)
    codes = torch.randint(2**width, (5, 48), generator=torch.Generator().manual_seed(seed))
    trained = TrainedAffine(start, width)
    torch.testing.assert_close(trained.decode(codes.float()), start.decode(codes.to(torch.uint8)))
    torch.testing.assert_close(trained.values.scale, start.scale)
    torch.testing.assert_close(trained.values.offset, start.offset)


@pytest.mark.parametrize("width", range(2, 9))
@pytest.mark.parametrize("seed", range(3))
def test_steps_are_those_of_torch(width: int, seed: int) -> None:
    """On relative changes of the scale and of the value at the middle of the codes, with torch's own gradients."""
    generator = torch.Generator().manual_seed(seed)
    start = random_values(seed)
    codes = torch.randint(2**width, (5, 48), generator=generator).float()
    target = torch.randn(5, 48, generator=generator)
    middle = (2**width - 1) / 2
    changes = torch.zeros(2, 5, 3, requires_grad=True)
    optimizer = torch.optim.Adam([changes], betas=(0.9, 0.99), eps=1e-12)
    trained = TrainedAffine(start, width)

    def expand(values: torch.Tensor) -> torch.Tensor:
        return values.repeat_interleave(16, dim=1)

    for step in range(1, 6):
        rate = 0.01 / step
        optimizer.param_groups[0]["lr"] = rate
        scale = start.scale * (1 + changes[0])
        centre = start.offset + middle * start.scale + start.scale * changes[1]
        weight = (codes - middle) * expand(scale) + expand(centre)
        torch.testing.assert_close(trained.decode(codes), weight.detach(), rtol=1e-4, atol=1e-4)
        optimizer.zero_grad()
        ((weight - target) ** 2).sum().backward()
        slopes = trained.slopes(2 * (weight.detach() - target), codes)
        torch.testing.assert_close(slopes, changes.grad, rtol=1e-4, atol=1e-3)
        optimizer.step()
        trained.step(slopes, rate, step)
    assert not torch.equal(trained.values.scale, start.scale)


@pytest.mark.parametrize("width", range(2, 9))
@pytest.mark.parametrize("seed", range(2))
def test_steps_of_a_codebook_are_those_of_torch(width: int, seed: int) -> None:
    """On changes of scales relative to these, and of levels and increments relative to the levels' size."""
    generator = torch.Generator().manual_seed(seed)
    start = random_codebook(width, torch.rand(5, 3, generator=generator) + 0.1, generator)
    codes = torch.randint(2**width, (5, 48), generator=generator, dtype=torch.uint8)
    target = torch.randn(5, 48, generator=generator)
    size = start.levels.square().mean().sqrt()
    scales = torch.zeros(5, 3, requires_grad=True)
    planes = torch.zeros(width - 1, 64, 4, requires_grad=True)
    optimizer = torch.optim.Adam([scales, planes], betas=(0.9, 0.99), eps=1e-12)
    trained = TrainedCodebook(start)
    columns = torch.arange(48)
    top, place = (codes >> (width - 2)).long().unflatten(1, (3, 4, 4)), columns % 16 // 4
    index = (top * torch.tensor([1, 4, 16, 64])[:, None]).sum(2)[:, columns // 16, columns % 4]
    entry, sign = index % 64, 1 - 2 * (index >> torch.where(place < 2, 7, 6) & 1)
    for step in range(1, 6):
        rate = 0.01 / step
        optimizer.param_groups[0]["lr"] = rate
        moved = torch.cat([start.levels[None], start.increments]) + size * planes
        level = moved[0][entry, place]
        for bit in range(width - 2):
            level = level + moved[bit + 1][entry, place] * (codes >> (width - 3 - bit) & 1)
        weight = sign * level * (start.scale * (1 + scales)).repeat_interleave(16, 1)
        torch.testing.assert_close(trained.decode(codes), weight.detach(), rtol=1e-4, atol=1e-4)
        optimizer.zero_grad()
        ((weight - target) ** 2).sum().backward()
        assert scales.grad is not None
        assert planes.grad is not None
        slopes = trained.slopes(2 * (weight.detach() - target), codes)
        expected = torch.cat([scales.grad.flatten(), planes.grad.flatten()])
        torch.testing.assert_close(slopes, expected, rtol=1e-4, atol=1e-3)
        optimizer.step()
        trained.step(slopes, rate, step)
    assert not torch.equal(trained.values.levels, start.levels)
    assert not torch.equal(trained.values.scale, start.scale)


@pytest.mark.parametrize("width", [2, 4, 8])
@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_training_begins_with_any_decoder(kind: DecoderKind, width: int) -> None:
    decoder = random_decoder(kind, width, 5, 3, torch.Generator().manual_seed(0))
    codes = torch.randint(2**width, (5, 48), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    given: list[tuple[int, ...]] = []

    def allocate(shape: tuple[int, ...]) -> torch.Tensor:
        given.append(shape)
        return torch.empty(shape)

    trained = begin_training(decoder, allocate)
    assert trained.width == width
    assert given
    torch.testing.assert_close(trained.decode(codes), decoder.decode(codes), rtol=1e-4, atol=1e-5)
    again = kind.encode(trained.values, width)
    torch.testing.assert_close(again.decode(codes), decoder.decode(codes), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_every_window_is_seen_once_in_an_epoch(size: int) -> None:
    taken = list(batches(8, 16, size, seed=0))
    assert all(0 < len(batch) <= size for batch in taken)
    seen: list[int] = []
    for batch in taken:
        seen += batch
    epochs = [sorted(seen[start : start + 8]) for start in range(0, len(seen) - 7, 8)]
    if 8 % size == 0:
        assert epochs == [list(range(8))] * len(epochs)
    assert len(set(map(tuple, taken))) > 1 or size == 8
    assert taken == list(batches(8, 16, size, seed=0))
    assert taken != list(batches(8, 16, size, seed=1))


def test_each_rank_takes_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "count", lambda: 4)
    assert [len(batch) for batch in batches(6, 3, 8, seed=0)] == [2, 2, 2]
    assert [len(batch) for batch in batches(6, 3, 2, seed=0)] == [1, 1, 1]
