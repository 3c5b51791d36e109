"""What stored codebooks mean and what encoding loses, against exact fractions, entry by entry."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from tests.checkpoint.samples import decoder_bytes, random_codebook, random_decoder, same_decoder
from tests.checkpoint.test_decoder import float32
from vllm_matquant.checkpoint.codebook import (
    Codebook,
    CodebookForm,
    by_column,
    by_four,
    collect_signs,
    entry_index,
    with_signs,
)
from vllm_matquant.checkpoint.decoder import CODEBOOK, Decoder, TensorSpec, join_rows
from vllm_matquant.checkpoint.errors import DecoderValueError
from vllm_matquant.checkpoint.spec import WIDTHS

SHAPES = [(1, 4, 4), (3, 8, 8), (2, 13, 8), (4, 7, 4), (2, 33, 16), (5, 1, 1)]  # rows, columns and a group's
PLANES = {2: 1, 3: 2, 4: 3, 5: 8, 6: 10, 7: 11, 8: 12}  # of each width, as docs/reference/format.md has it
Places = dict[tuple[int, int], list[Fraction]]
"""For each entry and place the level, and what each further bit adds to it."""


def parts_of(width: int) -> list[range]:
    """The planes whose bytes are added up: those of whole units, and those of sixteenths."""
    whole = min(width, 6) - 1
    return [range(whole), range(whole, PLANES[width])] if width > 4 else [range(PLANES[width])]


def random_parts(width: int, rows: int, groups: int, seed: int) -> dict[str, torch.Tensor]:
    """Stored tensors of every kind of value: levels from 1 that add up to 255 at most, some of them to just that."""
    generator = torch.Generator().manual_seed(seed)
    codebook = []
    for planes in map(len, parts_of(width)):
        ends = torch.randint(1, 256, (planes, 64, 4), generator=generator).sort(0).values
        ends[0, ::7], ends[-1, ::5] = 1, 255
        codebook.append(torch.diff(ends, dim=0, prepend=torch.zeros(1, 64, 4, dtype=ends.dtype)).to(torch.uint8))
    return {
        "scale": torch.randint(0, 256, (rows, groups), dtype=torch.uint8, generator=generator),
        "step": torch.rand(rows, 1, generator=generator).mul(8).exp().bfloat16(),
        "codebook": torch.cat(codebook),
    }


def random_stored(width: int, rows: int, groups: int, seed: int) -> Decoder:
    return Decoder(CodebookForm(width), width, random_parts(width, rows, groups, seed))


def random_codes(width: int, rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(0, 2**width, (rows, columns), dtype=torch.uint8, generator=generator)


def index_by_hand(codes: list[int], column: int, width: int) -> int:
    """The index of the four that a column is in: two bits of each of its columns, 0 for those that are not there."""
    first, index = column - column % 16 + column % 4, 0
    for place in range(4):
        code = codes[first + 4 * place] if first + 4 * place < len(codes) else 0
        index += (code // 2 ** (width - 2)) * 4**place
    return index


def level_by_hand(planes: list[list[list[int]]], index: int, place: int, code: int, width: int) -> Fraction:
    """A code's level by the definition of the stored bytes."""
    bytes_of = [plane[index % 64][place] for plane in planes]
    bits = [code // 2 ** (width - 3 - bit) % 2 for bit in range(width - 2)]  # further ones, most significant first
    level = Fraction(bytes_of[0] - 128)
    whole = min(width, 6) - 1
    level += sum(added * bit for added, bit in zip(bytes_of[1:whole], bits, strict=False))
    if width > 4:
        level += Fraction(bytes_of[whole] - 128, 16)
        level += sum(Fraction(added, 16) * bit for added, bit in zip(bytes_of[whole + 1 :], bits, strict=True))
    changed = index >= 128 if place < 2 else index % 128 >= 64
    return -level if changed else level


def weights_by_hand(decoder: Decoder, codes: torch.Tensor, group_size: int) -> list[list[float]]:
    """Each weight, rounded once."""
    parts, width = {name: part.tolist() for name, part in decoder.parts.items()}, decoder.width
    weights = []
    for row, own in enumerate(codes.tolist()):
        weights.append([])
        for column, code in enumerate(own):
            index = index_by_hand(own, column, width)
            level = level_by_hand(parts["codebook"], index, column % 16 // 4, code, width)
            scale = parts["scale"][row][column // group_size] * Fraction(parts["step"][row][0])
            weights[-1].append(float32(scale * level))
    return weights


def as_numbers(values: Codebook) -> Places:
    """The numbers of a codebook, exactly."""
    levels, increments = values.levels.tolist(), values.increments.tolist()
    return {
        (entry, place): [Fraction(levels[entry][place]), *(Fraction(plane[entry][place]) for plane in increments)]
        for entry in range(64)
        for place in range(4)
    }


@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_what_codebooks_mean(width: int, rows: int, columns: int, group_size: int) -> None:
    for seed in range(3):
        decoder = random_stored(width, rows, -(-columns // group_size), seed)
        decoder.check("layer", Path("file"))
        codes = random_codes(width, rows, columns, seed)
        weights = decoder.values.decode(codes, group_size)
        assert weights.dtype == torch.float32
        assert weights.tolist() == weights_by_hand(decoder, codes, group_size)
        if columns % group_size == 0:
            assert torch.equal(decoder.decode(codes), weights)


@pytest.mark.parametrize("width", WIDTHS)
def test_every_code_of_a_four_at_every_place(width: int) -> None:
    """All codes of one column while the others have a random one, each column of a block in its turn."""
    decoder = random_stored(width, 2**width, 1, seed=width)
    for column in range(16):
        codes = random_codes(width, 1, 16, column).repeat(2**width, 1)
        codes[:, column] = torch.arange(2**width)
        assert decoder.decode(codes).tolist() == weights_by_hand(decoder, codes, 16)


@pytest.mark.parametrize("columns", [1, 4, 7, 8, 16, 30, 48])
def test_entry_index(columns: int) -> None:
    for width in WIDTHS:
        codes = random_codes(width, 3, columns, width)
        found = entry_index(codes, width)
        assert found.dtype == torch.int32
        fours = [column for column in range(-(-columns // 16) * 16) if column % 16 < 4]
        expected = [[index_by_hand(own, column, width) for column in fours] for own in codes.tolist()]
        assert found.tolist() == expected
        assert torch.equal(entry_index(codes[1], width), found[1])


@pytest.mark.parametrize("columns", [5, 16])
def test_widths_nest(columns: int) -> None:
    """A narrower code is a prefix of a wider one, and the entries are those of the widest."""
    codes = random_codes(8, 6, columns, seed=1)
    parent = entry_index(codes, 8)
    for width in WIDTHS:
        assert torch.equal(entry_index(codes >> (8 - width), width), parent)
    values = random_codebook(8, torch.ones(6, 1), torch.Generator().manual_seed(2))
    for width in WIDTHS:
        # Without the increments of the further bits, and with these as zeros: the same level.
        prefix = replace(values, increments=values.increments[: width - 2])
        zeros = codes >> (8 - width) << (8 - width)
        assert prefix.width == width
        assert torch.equal(prefix.unscaled(codes >> (8 - width)), values.unscaled(zeros))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("width", WIDTHS)
def test_encoding_loses_half_a_unit_and_half_a_step(width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = random_codebook(width, torch.rand(5, 3, generator=generator) * 10.0 ** (seed - 1), generator)
    decoder = CODEBOOK.encode(values, width)
    decoder.check("layer", Path("file"))
    given, stored = as_numbers(values), as_numbers(decoder.values)  # type: ignore[arg-type]
    largest = max(max(abs(sum(numbers[: count + 1])) for count in range(len(numbers))) for numbers in given.values())
    unit = largest / (127 if width <= 4 else 120)
    finest = Fraction(1, 16) if width > 4 else Fraction(1)
    for place, numbers in given.items():
        found, level = Fraction(0), Fraction(0)
        for number, kept in zip(numbers, stored[place], strict=True):
            found, level = found + kept, level + number / unit
            assert abs(found - level) <= finest * (Fraction(1, 2) + Fraction(1, 2**30))
            assert found % finest == 0
    assert max(abs(numbers[0]) for numbers in stored.values()) <= 128
    for row in range(5):
        step, scales = Fraction(decoder.parts["step"][row].item()), values.scale[row].tolist()
        wanted = [Fraction(scale) * unit for scale in scales]
        smaller = torch.nextafter(decoder.parts["step"][row], torch.tensor([-math.inf], dtype=torch.bfloat16)).item()
        almost = 1 + Fraction(1, 2**40)  # the unit is one in double precision
        assert Fraction(smaller) < max(wanted) / 255 * almost
        assert max(wanted) / 255 <= step * almost
        for code, scale in zip(decoder.parts["scale"][row].tolist(), wanted, strict=True):
            assert abs(code * step - scale) <= step * (Fraction(1, 2) + Fraction(1, 2**30))


@pytest.mark.parametrize("width", WIDTHS)
def test_how_far_weights_may_move(width: int) -> None:
    """Half a unit, and one more for each bit that is set where the one before is not; and half a step of the scale."""
    generator = torch.Generator().manual_seed(width)
    values = random_codebook(width, torch.rand(6, 2, generator=generator), generator)
    decoder = CODEBOOK.encode(values, width)
    codes = random_codes(width, 6, 64, seed=width)
    scale = values.scale.double().repeat_interleave(32, 1)
    moved = (decoder.decode(codes).double() - values.unscaled(codes).double() * scale).abs()
    ends = torch.cat([values.levels[None], values.increments]).double().cumsum(0)
    unit = ends.abs().amax() / (127 if width <= 4 else 120)
    bits = [codes >> bit & 1 for bit in reversed(range(width - 2))]
    apart = sum((after & ~before for before, after in itertools.pairwise(bits)), torch.zeros(()))
    loss = (1 + 2 * apart.double()) * (0.5 if width <= 4 else 1 / 32)
    level = values.unscaled(codes).abs() / unit + loss
    bound = scale * unit * loss + decoder.parts["step"].double() / 2 * level
    assert (moved <= bound * (1 + 1e-5)).all()
    assert (moved > bound / 100).any()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("width", WIDTHS)
def test_whole_values_come_back(width: int, seed: int) -> None:
    """What encoding stores is stored in the very same bytes again, where the largest level is 127 or 120 units."""
    generator = torch.Generator().manual_seed(seed)
    parts = random_parts(width, 4, 3, seed)
    parts["scale"][:, 0] = 255
    if width <= 4:
        ends = torch.randint(1, 256, (width - 1, 64, 4), generator=generator).sort(0).values
        ends[:, 0], ends[:, 1] = 1, 255
        codebook = torch.cat([ends[:1], ends.diff(dim=0)])
    else:  # in sixteenths, of which those of the first bytes that make no whole unit are apart
        whole = min(width, 6) - 1
        ends = torch.randint(256, 3900, (whole, 64, 4), generator=generator).sort(0).values
        ends[:, 0], ends[:, 1] = 256, 4096
        steps = torch.cat([ends[:1] - 1, ends.diff(dim=0)])
        rest = torch.cat([steps[:1] % 16 + 1, steps[1:] % 16])
        fine = torch.randint(0, 150, (width - 1 - whole, 64, 4), generator=generator).sort(0).values
        fine[:, 1] = 0
        codebook = torch.cat([steps // 16, rest, fine[:1], fine.diff(dim=0)])
    parts["codebook"] = codebook.to(torch.uint8)
    decoder = Decoder(CodebookForm(width), width, parts)
    decoder.check("layer", Path("file"))
    assert same_decoder(CODEBOOK.encode(decoder.values, width), decoder)


@pytest.mark.parametrize("width", WIDTHS)
def test_whole_levels_are_nearest(width: int) -> None:
    """Units as they are given, levels to the ends of what bytes hold and a bit that adds nothing."""
    ends = torch.rand(width - 1, 64, 4, generator=torch.Generator().manual_seed(width), dtype=torch.float64)
    most = 127 if width <= 4 else 120
    ends = (ends * 2 * most - most).sort(0).values
    if width > 6:  # what is past the first ones is at most 10 units, which sixteenths can say
        ends[5:] = torch.minimum(ends[5:], ends[4] + 10)
        ends.clamp_(max=most)
    ends[:, 0], ends[:, 1], ends[:, 2] = -most, most, ends[:1, 2]
    stored = CodebookForm(width).whole_levels(ends)
    assert stored.dtype == torch.uint8
    assert stored.shape == (PLANES[width], 64, 4)
    values = CodebookForm(width).values(
        {"codebook": stored, "scale": torch.ones(1, 1), "step": torch.ones(1, 1)}, width
    )
    found = torch.cat([values.levels[None], values.increments]).double().cumsum(0)
    finest = 1 / 16 if width > 4 else 1.0
    assert ((found - ends).abs() <= finest / 2).all()
    assert (values.increments[:, :2] == 0).all()
    assert (values.increments[:, 2] == 0).all()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("fault", ["levels past the largest", "increments below zero", "one large increment"])
def test_whatever_is_encoded_adds_up_to_a_byte_at_most(width: int, fault: str) -> None:
    values = random_codebook(width, torch.ones(2, 1), torch.Generator().manual_seed(0))
    if fault == "levels past the largest":
        decoder = Decoder(
            CodebookForm(width),
            width,
            CODEBOOK.encode(values, width).parts
            | {"codebook": CodebookForm(width).whole_levels(torch.full((width - 1, 64, 4), 1e4).cumsum(0))},
        )
    elif fault == "increments below zero":
        values.increments.neg_()
        decoder = CODEBOOK.encode(values, width)
        stored: Codebook = decoder.values  # type: ignore[assignment]
        assert not stored.increments.any()
    else:
        values.increments[-1:] += 1e3
        decoder = CODEBOOK.encode(values, width)
    decoder.check("layer", Path("file"))
    for planes in parts_of(width):
        assert decoder.parts["codebook"][planes.start].min() >= 1
        assert decoder.parts["codebook"][planes.start : planes.stop].sum(0).max() <= 255


@pytest.mark.parametrize("width", WIDTHS)
def test_rows_of_zeros(width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(4, 3, generator=generator)
    scale[1] = 0.0  # nothing but zeros
    scale[2, 1] = 0.0  # a group of them
    values = random_codebook(width, scale, generator)
    codes = random_codes(width, 4, 24, seed=0)
    decoder = CODEBOOK.encode(values, width)
    decoder.check("layer", Path("file"))
    weights = decoder.decode(codes)
    assert weights.isfinite().all()
    assert not weights[1].any()
    assert not weights[2, 8:16].any()
    assert all(weights[row].any() for row in (0, 2, 3))
    for without in (replace(values, scale=torch.zeros(4, 3)), replace(values, levels=torch.zeros(64, 4))):
        without = replace(without, increments=torch.zeros(width - 2, 64, 4))
        decoder = CODEBOOK.encode(without, width)
        decoder.check("layer", Path("file"))
        assert not decoder.decode(codes).any()


@pytest.mark.parametrize("bad", [-1e-6, -1.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("width", [2, 4, 5, 8])
def test_scales_that_no_decoder_may_have_are_refused(width: int, bad: float) -> None:
    values = random_codebook(width, torch.ones(4, 3), torch.Generator().manual_seed(1))
    values.scale[2, 1] = bad
    with pytest.raises(
        DecoderValueError,
        match=rf"^file: some\.layer\.weight_step{width}: found \S+ in row 2, column 0 \(as torch.bfloat16\), "
        r"expected finite values from 0 up to 2\^111$",
    ):
        CODEBOOK.encode(values, width).check("some.layer", Path("file"))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["levels", "increments"])
def test_codebooks_that_are_not_finite_are_refused(name: str, bad: float) -> None:
    values = random_codebook(5, torch.ones(4, 3), torch.Generator().manual_seed(1))
    getattr(values, name).view(-1, 64, 4)[0, 9, 1] = bad
    with pytest.raises(DecoderValueError, match=r"some\.layer\.weight_step5: found \S+ in row 0, column 0"):
        CODEBOOK.encode(values, 5).check("some.layer", Path("file"))


@pytest.mark.parametrize(
    ("bad", "found"), [(-1.0, "-1.0"), (math.nan, "nan"), (math.inf, "inf"), (2.0**112, r"5\.19.*e\+33")]
)
def test_steps_that_give_no_weights_are_refused(bad: float, found: str) -> None:
    decoder = random_stored(3, 4, 2, seed=0)
    decoder.parts["step"][1] = bad
    message = rf"weight_step3: found {found} in row 1, column 0 \(as torch.bfloat16\), expected finite .* from 0 up"
    with pytest.raises(DecoderValueError, match=message):
        decoder.check("some.layer", Path("file"))


@pytest.mark.parametrize("width", WIDTHS)
def test_bytes_that_add_up_to_more_are_refused(width: int) -> None:
    """In each part of the planes, at the first place that does."""
    for planes in parts_of(width):
        if len(planes) == 1:
            continue  # a byte is never more
        decoder = random_stored(width, 4, 2, seed=width)
        codebook = decoder.parts["codebook"]
        codebook[:, 40:42] = 0
        for part in parts_of(width):
            codebook[part.start, 40:42] = 1
        codebook[planes.start, 41, 3] = 255
        decoder.check("some.layer", Path("file"))
        codebook[planes.stop - 1, 41, 3] += 1
        message = (
            rf"^file: some\.layer\.weight_codebook{width}: found 255 in plane {planes.start}, entry 41, place 3 "
            r"\(as torch.uint8\), expected levels from 1 up that with all increments add up to at most 255$"
        )
        with pytest.raises(DecoderValueError, match=message):
            decoder.check("some.layer", Path("file"))


def test_whole_units_and_sixteenths_are_added_up_apart() -> None:
    decoder = random_stored(8, 4, 2, seed=0)
    decoder.parts["codebook"][:] = 0
    decoder.parts["codebook"][[0, 5]] = 255
    decoder.check("layer", Path("file"))
    levels: torch.Tensor = decoder.values.levels  # type: ignore[attr-defined]
    assert (levels == 127 + 127 / 16).all()


@pytest.mark.parametrize("width", WIDTHS)
def test_levels_whose_other_sign_is_no_byte_are_refused(width: int) -> None:
    for planes in parts_of(width):
        decoder = random_stored(width, 4, 2, seed=width)
        decoder.parts["codebook"][planes.start, 7, 2] = 0
        message = (
            rf"weight_codebook{width}: found 0 in plane {planes.start}, entry 7, place 2 .*, expected levels from 1"
        )
        with pytest.raises(DecoderValueError, match=message):
            decoder.check("some.layer", Path("file"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_signs(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    entries = torch.randint(1, 256, (3, 64, 4), generator=generator).to(dtype)
    indexed = with_signs(entries)
    assert (indexed.shape, indexed.dtype) == ((3, 256, 4), dtype)
    for plane, index, place in itertools.product(range(3), range(256), range(4)):
        sign = -1 if (index // 128 if place < 2 else index // 64 % 2) else 1
        assert indexed[plane, index, place] == sign * entries[plane, index % 64, place]
    others = torch.randn(3, 256, 4, generator=generator).to(dtype)
    forwards = (indexed * others).double().sum()
    torch.testing.assert_close((entries * collect_signs(others)).double().sum(), forwards, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("level", [1, 255])
def test_the_largest_steps_give_finite_weights(width: int, level: int) -> None:
    decoder = random_stored(width, 1, 1, seed=0)
    decoder.parts["scale"][:], decoder.parts["step"][:] = 255, 2.0**111
    decoder.parts["codebook"][:] = 0
    for planes in parts_of(width):
        decoder.parts["codebook"][planes.start] = level
    decoder.check("layer", Path("file"))
    weights = decoder.decode(torch.tensor([[0, 2**width - 1, 1, 2]], dtype=torch.uint8))
    assert weights.isfinite().all()
    assert weights.all()


@pytest.mark.parametrize("width", [2, 4, 7])
@pytest.mark.parametrize(
    "rows", [slice(1, 4), slice(None, None, 2), torch.tensor([4, 0, 4]), torch.arange(5) > 2, slice(0, 0)]
)
def test_rows_of_a_decoder_have_its_codebook(rows: slice | torch.Tensor, width: int) -> None:
    decoder = random_decoder(CODEBOOK, width, 5, 3, torch.Generator().manual_seed(2))
    part = decoder[rows]
    assert (part.form, part.width) == (decoder.form, width)
    assert torch.equal(part.parts["codebook"], decoder.parts["codebook"])
    assert torch.equal(part.parts["scale"], decoder.parts["scale"][rows])
    assert torch.equal(part.parts["step"], decoder.parts["step"][rows])
    codes = random_codes(width, 5, 24, seed=3)
    assert torch.equal(part.decode(codes[rows]), decoder.decode(codes)[rows])


@pytest.mark.parametrize("heights", [[5], [1, 4], [2, 0, 3]])
@pytest.mark.parametrize("width", [3, 6])
def test_rows_come_together_again(heights: list[int], width: int) -> None:
    decoder = random_decoder(CODEBOOK, width, 5, 3, torch.Generator().manual_seed(3))
    ends = [sum(heights[: number + 1]) for number in range(len(heights))]
    parts = [decoder[end - height : end] for height, end in zip(heights, ends, strict=True)]
    assert same_decoder(join_rows(parts), decoder)


def test_what_changes_rows_leaves_the_codebook() -> None:
    decoder = random_decoder(CODEBOOK, 5, 5, 3, torch.Generator().manual_seed(3))
    doubled = decoder.map_rows(lambda part: part.repeat(2, 1))
    assert {name: len(part) for name, part in doubled.parts.items()} == {"scale": 10, "step": 10, "codebook": 8}
    copied = decoder.map(torch.clone)
    assert same_decoder(copied, decoder)
    assert copied.parts["codebook"] is not decoder.parts["codebook"]


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("width", WIDTHS)
def test_stored_tensors(width: int, layers: int) -> None:
    form, (rows, groups) = CodebookForm(width), (7, 3)
    assert form.planes == PLANES[width]
    assert form.parts(rows, groups, layers) == {
        "scale": TensorSpec(torch.uint8, (rows, groups)),
        "step": TensorSpec(torch.bfloat16, (rows, 1)),
        "codebook": TensorSpec(torch.uint8, (layers * PLANES[width], 64, 4)),
    }
    assert form.nbytes(rows, groups, layers) == rows * groups + 2 * rows + layers * 256 * PLANES[width]
    assert form.nbytes(rows, groups) == decoder_bytes(form, rows, groups)
    decoder = random_decoder(form, width, rows, groups, torch.Generator().manual_seed(4))
    named = decoder.named("model.some.layer")
    assert list(named) == [f"model.some.layer.weight_{part}{width}" for part in ("scale", "step", "codebook")]
    for tensor, spec in zip(named.values(), form.parts(rows, groups).values(), strict=True):
        assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape)
    assert same_decoder(form.from_tensors(lambda name: named[f"model.some.layer.{name}"], width), decoder)
    assert same_decoder(decoder.to("cpu"), decoder)


def test_codebooks_are_no_scales_and_offsets() -> None:
    decoder = random_decoder(CODEBOOK, 4, 5, 3, torch.Generator().manual_seed(3))
    with pytest.raises(TypeError, match="found the form codebook, expected one with scales and offsets"):
        _ = decoder.affine
    values: Codebook = decoder.values  # type: ignore[assignment]
    assert (values.width, values.groups) == (4, 3)
    moved = values.to("cpu")
    assert torch.equal(moved.decode(random_codes(4, 5, 12, 0)), decoder.decode(random_codes(4, 5, 12, 0)))


@pytest.mark.parametrize(
    ("groups", "group_size", "message"),
    [
        (5, None, "groups: found 5, expected 12 columns / 2, rounded up"),
        (13, None, "groups: found 13, expected 12 columns / "),
        (2, 5, "groups: found 2, expected 12 columns / 5, rounded up"),
        (2, 4, "groups: found 2, expected 12 columns / 4, rounded up"),
    ],
)
def test_groups_that_do_not_cover_the_columns(groups: int, group_size: int | None, message: str) -> None:
    values = random_codebook(3, torch.ones(2, groups), torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=message):
        values.decode(random_codes(3, 2, 12, 0), group_size)


@pytest.mark.parametrize("columns", [1, 4, 5, 16, 23, 48])
def test_fours_of_columns(columns: int) -> None:
    values = torch.arange(2 * columns).view(2, columns) + 1
    fours = by_four(values)
    assert fours.shape == (2, -(-columns // 16) * 4, 4)
    for row, four, place in itertools.product(range(2), range(fours.shape[1]), range(4)):
        column = four // 4 * 16 + four % 4 + 4 * place
        assert fours[row, four, place] == (values[row, column] if column < columns else 0)
    assert torch.equal(by_column(fours, columns), values)
