"""What stored decoders mean and what encoding loses, against exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.checkpoint.samples import PARTS, decoder_bytes, random_decoder, same_decoder
from vllm_matquant.checkpoint.codebook import CodebookForm
from vllm_matquant.checkpoint.decoder import (
    AFFINE_FLOAT16,
    AFFINE_INT8,
    AFFINE_KINDS,
    CODEBOOK,
    FLOAT16,
    FORMS,
    INT8,
    KINDS,
    VECTOR_KINDS,
    Affine,
    Decoder,
    DecoderForm,
    dequantize,
    join_rows,
)
from vllm_matquant.checkpoint.errors import DecoderValueError
from vllm_matquant.checkpoint.spec import WIDTHS

SHAPES = [(1, 1), (3, 1), (5, 3), (7, 11)]  # rows and groups
AFFINE_FORMS = [FLOAT16, INT8]
BFLOAT16 = st.integers(0, 0x7EFF).map(lambda bits: torch.tensor(bits, dtype=torch.int16).view(torch.bfloat16).item())
"""Steps from 0 to 1.7e38."""


@pytest.fixture(params=AFFINE_FORMS, ids=lambda form: form.name)
def form(request: pytest.FixtureRequest) -> DecoderForm:
    """Each form with scales and offsets."""
    found: DecoderForm = request.param
    return found


def float32(value: Fraction) -> float:
    """The float32 nearest to a number, ties to the even one."""
    if value == 0:
        return 0.0
    exponent = math.floor(math.log2(abs(value)))  # may be one off at a power of two
    exponent += (abs(value) >= Fraction(2) ** (exponent + 1)) - (abs(value) < Fraction(2) ** exponent)
    unit = Fraction(2) ** max(exponent - 23, -149)
    return float(round(value / unit) * unit)


def exactly(tensor: torch.Tensor) -> list[list[Fraction]]:
    """The numbers of a matrix."""
    return [[Fraction(value) for value in row] for row in tensor.tolist()]


def random_affine(rows: int, groups: int, seed: int, magnitude: float = 1.0) -> Affine:
    """Scales of very different rows, centres around 0: what weights give."""
    generator = torch.Generator().manual_seed(seed)
    size = magnitude * torch.randn(rows, 1, generator=generator).mul(2).exp()
    scale = size * torch.rand(rows, groups, generator=generator)
    return Affine(scale, -2 * scale + size * torch.randn(rows, groups, generator=generator))


def stored(scale: int, centre: int, steps: tuple[float, float], width: int) -> Decoder:
    parts = {
        "scale": torch.tensor([[scale]], dtype=torch.uint8),
        "centre": torch.tensor([[centre]], dtype=torch.int8),
        "step": torch.tensor([steps], dtype=torch.bfloat16),
    }
    return Decoder(INT8, width, parts)


def check_meaning(decoder: Decoder) -> None:
    """Scale, centre and offset of 8-bit decoders are what exact arithmetic says, the offset rounded once."""
    scales, centres, steps = (exactly(decoder.parts[part]) for part in ("scale", "centre", "step"))
    affine = decoder.affine
    assert affine.scale.dtype == affine.offset.dtype == torch.float32
    middle = Fraction(2**decoder.width - 1, 2)
    for row, (scale_step, centre_step) in enumerate(steps):
        for group, (scale, centre) in enumerate(zip(scales[row], centres[row], strict=True)):
            exact = scale * scale_step
            assert Fraction(affine.scale[row, group].item()) == exact
            assert affine.offset[row, group].item() == float32(centre * centre_step - middle * exact)
            assert Fraction(float32(centre * centre_step)) == centre * centre_step  # a kernel may multiply in float32


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_what_8_bit_decoders_mean(width: int, shape: tuple[int, int]) -> None:
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        parts = {
            "scale": torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8),
            "centre": torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8),
            "step": torch.rand(shape[0], 2, generator=generator).mul(8).exp().bfloat16(),
        }
        check_meaning(Decoder(INT8, width, parts))


@given(st.integers(0, 255), st.integers(-128, 127), st.tuples(BFLOAT16, BFLOAT16), st.sampled_from(WIDTHS))
def test_what_8_bit_decoders_mean_at_any_steps(scale: int, centre: int, steps: tuple[float, float], width: int) -> None:
    """Also where one step is far below the last bit of the other, or below float32's normal numbers."""
    decoder = stored(scale, centre, steps, width)
    if not any(wrong.any() for _, wrong, _ in INT8.faults(decoder.parts)):
        check_meaning(decoder)


@pytest.mark.parametrize("width", WIDTHS)
def test_weights_are_rounded_once(width: int, form: DecoderForm) -> None:
    for seed, (rows, groups) in enumerate(SHAPES):
        generator = torch.Generator().manual_seed(seed)
        decoder = random_decoder(form, width, rows, groups, generator)
        codes = torch.randint(0, 2**width, (rows, 8 * groups), generator=generator, dtype=torch.uint8)
        weights = decoder.decode(codes)
        assert weights.dtype == torch.float32
        assert torch.equal(weights, decoder.affine.decode(codes))
        scales, offsets = exactly(decoder.affine.scale), exactly(decoder.affine.offset)
        for row in range(rows):
            for column, code in enumerate(codes[row].tolist()):
                exact = scales[row][column // 8] * code + offsets[row][column // 8]
                assert weights[row, column].item() == float32(exact)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_middle_of_the_codes_has_the_weight_of_the_centre(width: int) -> None:
    decoder = INT8.encode(random_affine(6, 5, width), width)
    centre = decoder.parts["centre"] * decoder.parts["step"][:, 1:].float()
    torch.testing.assert_close(decoder.affine.centre(width), centre, rtol=0, atol=2e-6 * centre.abs().max().item())
    ends = decoder.affine.decode(torch.tensor([[0, 2**width - 1] * 5] * 6, dtype=torch.uint8).view(6, 10))
    torch.testing.assert_close(ends.view(6, 5, 2).mean(-1), centre, rtol=0, atol=2e-6 * ends.abs().max().item())


@pytest.mark.parametrize("magnitude", [1e-30, 1e-3, 1.0, 1e30])
@pytest.mark.parametrize("width", WIDTHS)
def test_encoding_takes_the_nearest_multiples_of_the_smallest_steps(width: int, magnitude: float) -> None:
    for seed, (rows, groups) in enumerate(SHAPES):
        values = random_affine(rows, groups, seed, magnitude)
        decoder = INT8.encode(values, width)
        decoder.check("layer", Path("file"))
        scales, offsets = exactly(values.scale), exactly(values.offset)
        middle = Fraction(2**width - 1, 2)
        centres = [
            [offset + middle * scale for scale, offset in zip(*row, strict=True)]
            for row in zip(scales, offsets, strict=True)
        ]
        for part, column, wanted, most in (("scale", 0, scales, 255), ("centre", 1, centres, 127)):
            steps = decoder.parts["step"][:, column]
            smaller = torch.nextafter(steps, torch.tensor(-math.inf, dtype=torch.bfloat16))
            for row in range(rows):
                step, reach = Fraction(steps[row].item()), max(map(abs, wanted[row])) / most
                assert Fraction(smaller[row].item()) < reach <= step
                for code, value in zip(decoder.parts[part][row].tolist(), wanted[row], strict=True):
                    assert abs(code) <= most
                    # In double precision, a value in the middle of two multiples may be taken for either side of it.
                    assert abs(code * step - value) <= step * (Fraction(1, 2) + Fraction(1, 2**40))


@pytest.mark.parametrize("width", WIDTHS)
def test_what_steps_reach_exactly_is_kept(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    parts = {
        "scale": torch.randint(0, 256, (6, 9), generator=generator, dtype=torch.uint8),
        "centre": torch.randint(-127, 128, (6, 9), generator=generator, dtype=torch.int8),
        "step": torch.rand(6, 2, generator=generator).bfloat16(),
    }
    parts["scale"][:, 0], parts["centre"][:, 1] = 255, -127
    step = parts["step"].double()
    scale = parts["scale"] * step[:, :1]
    values = Affine(scale, parts["centre"] * step[:, 1:] - (2**width - 1) / 2 * scale)
    assert same_decoder(INT8.encode(values, width), Decoder(INT8, width, parts))


@pytest.mark.parametrize("width", WIDTHS)
def test_how_far_weights_may_move(width: int) -> None:
    """Half a step of the scale for each code from the middle, half a step of the centre, and float32's rounding."""
    for seed, (rows, groups) in enumerate(SHAPES):
        values = random_affine(rows, groups, seed)
        decoder = INT8.encode(values, width)
        codes = torch.arange(2**width).repeat(groups).expand(rows, -1).to(torch.uint8)
        exact = dequantize(codes.double(), values.scale.double(), values.offset.double())
        moved = (decoder.decode(codes).double() - exact).abs()
        step = decoder.parts["step"].double()
        bound = step[:, :1] / 2 * (codes - (2**width - 1) / 2).abs() + step[:, 1:] / 2
        rounding = 2**-22 * (values.scale.amax(1, keepdim=True) * 2**width + values.offset.abs().amax(1, keepdim=True))
        assert (moved <= bound + rounding).all()
        assert (moved > 0).any()


@pytest.mark.parametrize("width", WIDTHS)
def test_offsets_that_suit_the_stored_scales_take_the_place_of_those_given(form: DecoderForm, width: int) -> None:
    values = random_affine(5, 7, seed=width)
    asked: list[torch.Tensor] = []

    def offsets_for(scale: torch.Tensor) -> torch.Tensor:
        asked.append(scale)
        return -3 * scale + values.scale

    decoder = form.encode(values, width, offsets_for)
    decoder.check("layer", Path("file"))
    assert [scale.dtype for scale in asked] == [torch.float32]
    assert torch.equal(asked[0], decoder.affine.scale)
    assert torch.equal(decoder.affine.scale, form.encode(values, width).affine.scale)
    wanted = Affine(asked[0], -3 * asked[0] + values.scale)
    if form is FLOAT16:
        assert same_decoder(decoder, form.encode(wanted, width))
    else:
        step = decoder.parts["step"][:, 1:].double()
        centre = wanted.offset.double() + (2**width - 1) / 2 * wanted.scale.double()
        assert ((decoder.parts["centre"] * step - centre).abs() <= step * (0.5 + 1e-9)).all()
        assert (centre.abs().amax(1) >= step[:, 0] * 126).all()


def test_float16_decoders_are_rounded_to_float16() -> None:
    values = random_affine(5, 3, seed=0)
    decoder = FLOAT16.encode(values, 4)
    for part in ("scale", "offset"):
        found, wanted = decoder.parts[part], getattr(values, part)
        assert found.dtype == torch.float16
        assert ((found.double() - wanted.double()).abs() <= wanted.double().abs() * 2**-11 + 2**-25).all()
        assert torch.equal(getattr(decoder.affine, part), found.float())


@pytest.mark.parametrize("width", WIDTHS)
def test_rows_of_zeros(form: DecoderForm, width: int) -> None:
    values = random_affine(4, 3, seed=0)
    values.scale[1], values.offset[1] = 0.0, 0.0  # nothing but zeros
    values.scale[2] = 0.0  # one weight for all codes
    decoder = form.encode(values, width)
    decoder.check("layer", Path("file"))
    codes = torch.randint(0, 2**width, (4, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    weights = decoder.decode(codes)
    assert not weights[1].any()
    assert torch.equal(weights[2], decoder.affine.offset[2].repeat_interleave(2))
    assert (weights[2].view(3, 2)[:, 0] - values.offset[2]).abs().max() <= values.offset[2].abs().max() / 250
    assert weights[0].unique().numel() > 1


@pytest.mark.parametrize("bad", [-1e-6, -1.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["scale", "offset"])
def test_values_that_no_decoder_may_have_are_refused(form: DecoderForm, name: str, bad: float) -> None:
    values = random_affine(4, 3, seed=1)
    getattr(values, name)[2, 1] = bad
    decoder = form.encode(values, 3)
    if name == "offset" and math.isfinite(bad):
        decoder.check("some.layer", Path("file"))
        return
    part, column = {FLOAT16: (name, 1), INT8: ("step", "[01]")}[form]
    with pytest.raises(
        DecoderValueError, match=rf"^file: some\.layer\.weight_{part}3: found .* in row 2, column {column}"
    ):
        decoder.check("some.layer", Path("file"))


@pytest.mark.parametrize("column", [0, 1])
@pytest.mark.parametrize(
    ("bad", "found"), [(-1.0, "-1.0"), (math.nan, "nan"), (math.inf, "inf"), (2.0**112, r"5\.19.*e\+33")]
)
def test_steps_that_give_no_weights_are_refused(bad: float, found: str, column: int) -> None:
    decoder = INT8.encode(random_affine(4, 3, seed=1), 3)
    decoder.parts["step"][1, column] = bad
    message = (
        rf"weight_step3: found {found} in row 1, column {column} \(as torch.bfloat16\), expected finite .* from 0 up"
    )
    with pytest.raises(DecoderValueError, match=message):
        decoder.check("some.layer", Path("file"))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_steps_give_finite_weights(width: int, sign: int) -> None:
    decoder = stored(255, sign * 127, (2.0**111, 2.0**111), width)
    decoder.check("layer", Path("file"))
    assert decoder.decode(torch.tensor([[0, 2**width - 1]], dtype=torch.uint8)).isfinite().all()


@pytest.mark.parametrize(
    "rows", [slice(1, 4), slice(None, None, 2), torch.tensor([4, 0, 4]), torch.arange(5) > 2, slice(0, 0)]
)
def test_rows_of_a_decoder(form: DecoderForm, rows: slice | torch.Tensor) -> None:
    decoder = random_decoder(form, 5, 5, 3, torch.Generator().manual_seed(2))
    part = decoder[rows]
    assert (part.form, part.width) == (form, 5)
    assert torch.equal(part.affine.scale, decoder.affine.scale[rows])
    assert torch.equal(part.affine.offset, decoder.affine.offset[rows])
    assert torch.equal(decoder.affine[rows].offset, decoder.affine.offset[rows])


@pytest.mark.parametrize("heights", [[5], [1, 4], [2, 0, 3]])
def test_rows_come_together_again(form: DecoderForm, heights: list[int]) -> None:
    decoder = random_decoder(form, 6, 5, 3, torch.Generator().manual_seed(3))
    ends = [sum(heights[: number + 1]) for number in range(len(heights))]
    parts = [decoder[end - height : end] for height, end in zip(heights, ends, strict=True)]
    assert same_decoder(join_rows(parts), decoder)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_stored_tensors(form: DecoderForm, width: int, shape: tuple[int, int]) -> None:
    decoder = random_decoder(form, width, *shape, torch.Generator().manual_seed(4))
    named = decoder.named("model.some.layer")
    assert list(named) == [f"model.some.layer.weight_{part}{width}" for part in PARTS[form.name]]
    specs = form.parts(*shape)
    for tensor, spec in zip(named.values(), specs.values(), strict=True):
        assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape)
    assert form.nbytes(*shape) == sum(tensor.nbytes for tensor in named.values()) == decoder_bytes(form, *shape)
    assert same_decoder(form.from_tensors(lambda name: named[f"model.some.layer.{name}"], width), decoder)
    assert same_decoder(decoder.to("cpu"), decoder)


def test_kinds_by_name() -> None:
    assert KINDS == {"affine-float16": AFFINE_FLOAT16, "affine-int8": AFFINE_INT8, "codebook-4d": CODEBOOK}
    assert {name: kind.name for name, kind in KINDS.items()} == dict(zip(KINDS, KINDS, strict=True))
    assert [kind.format_version for kind in KINDS.values()] == [1, 2, 3]
    assert AFFINE_KINDS == (AFFINE_FLOAT16, AFFINE_INT8)


def test_forms_of_all_widths_and_kinds() -> None:
    vectors = (form for kind in VECTOR_KINDS.values() for form in kind.forms)
    assert (FLOAT16, INT8, *map(CodebookForm, WIDTHS), *vectors) == FORMS
    assert [CODEBOOK.form(width) for width in WIDTHS] == list(map(CodebookForm, WIDTHS))
    assert {form.name for form in FORMS} == PARTS.keys()


@pytest.mark.parametrize("width", WIDTHS)
def test_wide_decoders_are_in_float16_whatever_their_kind(width: int) -> None:
    assert AFFINE_FLOAT16.form(width) is FLOAT16
    assert AFFINE_INT8.form(width) is (INT8 if width <= 4 else FLOAT16)
    values = random_affine(3, 2, seed=width)
    for kind in AFFINE_KINDS:
        assert same_decoder(kind.encode(values, width), kind.form(width).encode(values, width))


@pytest.mark.parametrize("group_size", [None, 4, 5, 12, 20])
def test_dequantize_by_groups(group_size: int | None) -> None:
    rows, columns = 3, 12
    groups = 3 if group_size is None else -(-columns // group_size)
    generator = torch.Generator().manual_seed(5)
    scale, offset = torch.rand(rows, groups, generator=generator), torch.randn(rows, groups, generator=generator)
    codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8, generator=generator)
    weights = dequantize(codes, scale, offset, group_size)
    for row in range(rows):
        for column in range(columns):
            group = column // (group_size or 4)
            expected = scale[row, group].item() * codes[row, column].item() + offset[row, group].item()
            assert weights[row, column].item() == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    ("groups", "group_size", "message"),
    [
        (5, None, "groups: found 5, expected a divisor of 12 columns or a group_size"),
        (2, 5, "groups: found 2, expected 12 columns / 5, rounded up"),
        (2, 4, "groups: found 2, expected 12 columns / 4, rounded up"),
    ],
)
def test_groups_that_do_not_cover_the_columns(groups: int, group_size: int | None, message: str) -> None:
    values = torch.ones(3, groups)
    with pytest.raises(ValueError, match=message):
        dequantize(torch.ones(3, 12, dtype=torch.uint8), values, values, group_size)
