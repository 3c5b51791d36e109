"""Positions, decoders and the straight-through derivative, against the plainest formulas."""

from __future__ import annotations

import pytest
import torch

from vllm_matquant.checkpoint.affine import Affine
from vllm_matquant.train.latent import NestedWeight, Parent, Switch, moved_codes, place_in, scatter_in

SHAPES = [(5, 64, 32), (3, 24, 8), (4, 40, 40), (1, 8, 8)]  # the last two: a whole row is a group


def random_parent(rows: int, columns: int, group: int, seed: int, widths: tuple[int, ...] = (2, 4, 8)) -> Parent:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(256, (rows, columns), generator=generator, dtype=torch.uint8)
    shape = (rows, columns // group)

    def values(width: int) -> Affine:
        scale = 2.0 ** (8 - width) * (0.5 + torch.rand(shape, generator=generator))
        return Affine(scale, torch.randn(shape, generator=generator))

    decoders = {width: values(width) for width in widths}
    return Parent(codes, widths[-1], widths, decoders, decoders[widths[-1]])


def moved(parent: Parent, trained: tuple[int, ...], seed: int, size: float = 20.0) -> NestedWeight:
    """A layer whose every trained value is somewhere else."""
    nested, generator = NestedWeight(parent, trained, Switch()), torch.Generator().manual_seed(seed)
    for parameter in nested.parameters():
        scale = size if parameter is nested.shift else 0.1
        parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    nested.project()
    return nested


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("width", [2, 4, 8])
@pytest.mark.parametrize("seed", range(2))
def test_derivatives_pass_straight_through(shape: tuple[int, int, int], width: int, seed: int) -> None:
    parent = random_parent(*shape, seed)
    nested = moved(parent, (2, 4, 8), seed)
    nested.switch.width = width
    weight = nested(torch.zeros(shape[:2]))
    gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed + 9))
    weight.backward(gradient)

    shift, change = (each.detach().clone().requires_grad_() for each in (nested.shift, nested.changes[str(width)]))
    start, middle = parent.decoders[width], (2**width - 1) / 2
    position = (parent.codes + 0.5 + shift) / 2 ** (8 - width)
    code = position + (position.floor() - position).detach()  # the floor, with the derivative of what it is taken of
    scale = start.scale * (1 + change[..., 0])
    centre = start.offset + middle * start.scale + start.scale * change[..., 1]
    expanded = [each.repeat_interleave(shape[2], 1) for each in (scale, centre)]
    expected = expanded[0] * (code - middle) + expanded[1]
    expected.backward(gradient)

    torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(nested.shift.grad, shift.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(nested.changes[str(width)].grad, change.grad, rtol=1e-4, atol=1e-3)
    for other in {"2", "4", "8"} - {str(width)}:
        assert nested.changes[other].grad is None


@pytest.mark.parametrize("seed", range(3))
def test_starts_as_the_parent(seed: int) -> None:
    parent = random_parent(5, 64, 32, seed)
    nested = NestedWeight(parent, (2, 8), Switch())
    assert torch.equal(nested.parent_codes(), parent.codes)
    for width in (2, 4, 8):
        nested.switch.width = width
        expected = parent.decoders[width].decode(parent.codes >> (8 - width))
        torch.testing.assert_close(nested(torch.zeros(5, 64)), expected, rtol=1e-5, atol=1e-4)
        assert nested.changed_codes(width) == 0


@pytest.mark.parametrize("widest", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("seed", range(2))
def test_bits_below_stay_as_near_as_the_leading_ones_allow(widest: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(256, (16, 64), generator=generator, dtype=torch.uint8)
    shift = 30 * torch.randn(16, 64, generator=generator)
    found = moved_codes(codes, shift, 8, widest)
    leading = (codes + 0.5 + shift).clamp(0, 255.5).div(2 ** (8 - widest)).floor().int()
    assert torch.equal(found.int() >> (8 - widest), leading)
    every = torch.arange(256)
    for code, new, top in torch.stack([codes.int(), found.int(), leading]).flatten(1).T.tolist():
        cell = every[every >> (8 - widest) == top]
        assert new == int(cell[(cell - code).abs().argmin()])
    kept = leading == codes.int() >> (8 - widest)
    assert widest == 8 or torch.equal(found[kept], codes[kept])


def test_codes_stay_codes() -> None:
    parent = random_parent(5, 64, 32, 0)
    nested = moved(parent, (2, 8), 1, size=1000.0)
    positions = (parent.codes + 0.5 + nested.shift).detach()
    assert float(positions.min()) >= 0
    assert float(positions.max()) < 256
    assert {0, 255} <= set(nested.parent_codes().flatten().tolist())
    nested.changes["2"].data[..., 0] = -3
    nested.project()
    assert float(nested.decoder(2)[0].detach().min()) == 0


def test_a_layer_of_fewer_bits() -> None:
    """Codes whose last bits are not stored: a position starts in the middle of what they leave open."""
    parent = random_parent(4, 32, 32, 0, widths=(2, 4))
    codes = parent.codes & 0xF0
    nested = NestedWeight(Parent(codes, 4, (2, 4), parent.decoders, parent.finest), (2, 8), Switch())
    assert nested.trained == [2, 4]  # 8 bits are served with 4
    assert torch.equal(nested.parent_codes(), codes)
    nested.shift.data.fill_(7.9)
    assert torch.equal(nested.parent_codes(), codes)
    nested.shift.data.fill_(8.0)
    assert nested.changed_codes(4) == int((codes < 240).sum())
    nested.shift.data.fill_(-8.1)
    assert nested.changed_codes(4) == int((codes > 0).sum())


@pytest.mark.parametrize("widths", [(2, 4, 8), (2, 5)])
@pytest.mark.parametrize("seed", range(2))
def test_starts_where_the_source_lies(widths: tuple[int, ...], seed: int) -> None:
    """In the parent's cell: next to its border where the weight is outside."""
    parent, cell = random_parent(5, 64, 32, seed, widths), 2 ** (8 - widths[-1])
    codes = parent.codes & (256 - cell)
    parent = Parent(codes, widths[-1], widths, parent.decoders, parent.finest)
    away = 0.4 * torch.randn(5, 64, generator=torch.Generator().manual_seed(seed))
    scale, offset = (each.repeat_interleave(32, 1) for each in (parent.finest.scale, parent.finest.offset))
    source = scale * (codes // cell + away) + offset
    nested = NestedWeight(parent, (2, 8), Switch(), place_in(parent, source))
    torch.testing.assert_close(nested.shift.detach(), cell * away.clamp(-0.45, 0.45), rtol=1e-3, atol=1e-3 * cell)
    assert away.abs().max() > 0.5
    assert torch.equal(nested.parent_codes(), codes)


@pytest.mark.parametrize("widths", [(2, 4, 8), (2, 5)])
def test_starts_anywhere_in_its_cell(widths: tuple[int, ...]) -> None:
    parent, cell = random_parent(40, 64, 32, 0, widths), 2 ** (8 - widths[-1])
    parent = Parent(parent.codes & (256 - cell), widths[-1], widths, parent.decoders, parent.finest)
    nested = NestedWeight(parent, (2, 8), Switch(), scatter_in(parent, 1))
    places = nested.shift.detach() / cell
    assert torch.equal(nested.parent_codes(), parent.codes)
    assert -0.45 <= float(places.min()) < -0.44 < 0.44 < float(places.max()) <= 0.45
    assert torch.histc(places, 9, -0.45, 0.45).min() > 2560 / 9 / 2
    assert not torch.equal(scatter_in(parent, 1), scatter_in(parent, 2))


def test_starts_in_the_middle_of_a_group_of_one_value() -> None:
    parent = random_parent(2, 32, 32, 0)
    finest = Affine(torch.zeros(2, 1), torch.full((2, 1), 0.5))
    parent = Parent(torch.zeros_like(parent.codes), 8, parent.widths, parent.decoders, finest)
    nested = NestedWeight(parent, (8,), Switch(), place_in(parent, torch.full((2, 32), 0.5)))
    assert not nested.shift.any()


def test_a_layer_that_stays() -> None:
    parent = random_parent(4, 32, 32, 0)
    nested = NestedWeight(parent, (), Switch(4))
    assert list(nested.parameters()) == []
    weight = nested(torch.zeros(4, 32, dtype=torch.bfloat16))
    assert weight.dtype == torch.bfloat16
    assert not weight.requires_grad
    nested.project()
    assert nested.changed_codes(8) == 0
