"""Vectors: what stored codebooks mean, which rows share them, and which checkpoints of them are refused."""

from __future__ import annotations

import dataclasses
import math
import shutil
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from tests.checkpoint.conftest import Writer
from tests.checkpoint.samples import Sample, decoder_names, random_decoder, same_decoder
from tests.checkpoint.test_faults import (
    LAYER,
    Fault,
    fault,
    in_config,
    in_quantization,
    remove_tensor,
    replace_tensor,
)
from vllm_matquant.checkpoint import errors
from vllm_matquant.checkpoint.decoder import (
    EVERY_KIND,
    KINDS,
    VECTOR_KINDS,
    VECTORS_2D,
    Decoder,
    DecoderKind,
    TensorSpec,
)
from vllm_matquant.checkpoint.errors import DecoderValueError
from vllm_matquant.checkpoint.reader import open_checkpoint
from vllm_matquant.checkpoint.spec import Format
from vllm_matquant.checkpoint.vectors import (
    VectorBooks,
    VectorForm,
    band_count,
    band_rows,
    entry_count,
    vector_codes,
    vector_index,
)
from vllm_matquant.checkpoint.verify import verify

FORMS = [form for kind in VECTOR_KINDS.values() for form in kind.forms]
ids = pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.width}-bits-{form.places}d")


def bands_by_hand(rows: int, width: int, places: int) -> list[int]:
    """The band of each row, as docs/reference/format.md has it."""
    bands = max(1, rows // (places * 2 ** (width * places)))
    each = math.ceil(rows / bands)
    return [row // each for row in range(rows)]


def random_stored(form: VectorForm, rows: int, groups: int, seed: int) -> Decoder:
    """Stored tensors of every kind of value."""
    generator = torch.Generator().manual_seed(seed)
    bands = bands_by_hand(rows, form.width, form.places)[-1] + 1
    parts = {
        "scale": torch.randint(0, 256, (bands, groups), dtype=torch.uint8, generator=generator),
        "step": torch.rand(bands, 1, generator=generator).mul(8).exp().bfloat16(),
        "codebook": torch.randint(
            -128, 128, (bands, groups, form.entries, form.places), dtype=torch.int8, generator=generator
        ),
    }
    return Decoder(form, form.width, parts)


def random_codes(width: int, rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(0, 2**width, (rows, columns), dtype=torch.uint8, generator=generator)


@ids
@pytest.mark.parametrize(("rows", "columns", "group_size"), [(1, 8, 8), (5, 16, 8), (37, 24, 8), (70, 8, 4)])
def test_what_vectors_mean(form: VectorForm, rows: int, columns: int, group_size: int) -> None:
    decoder = random_stored(form, rows, columns // group_size, seed=rows)
    decoder.check("layer", Path("file"))
    codes = random_codes(form.width, rows, columns, seed=rows)
    weights = decoder.decode(codes)
    assert weights.dtype == torch.float32
    parts, bands = (
        {name: part.tolist() for name, part in decoder.parts.items()},
        bands_by_hand(rows, form.width, form.places),
    )
    for row, own in enumerate(codes.tolist()):
        band = bands[row]
        for column in range(columns):
            group, first = column // group_size, column - column % form.places
            index = sum(own[first + place] << form.width * place for place in range(form.places))
            scale = parts["scale"][band][group] * Fraction(parts["step"][band][0])
            level = parts["codebook"][band][group][index][column - first]
            assert Fraction(weights[row, column].item()) == scale * level  # exact in float32
    assert torch.equal(decoder.values.decode(codes, group_size), weights)


@ids
def test_indices(form: VectorForm) -> None:
    codes = random_codes(form.width, 6, 16, seed=form.width)
    index = vector_index(codes, form.width, form.places)
    assert (index.dtype, tuple(index.shape)) == (torch.int64, (6, 16 // form.places))
    assert int(index.max()) < form.entries == entry_count(form.width, form.places) <= 256
    assert torch.equal(vector_codes(index, form.width, form.places), codes)
    # The first column lies in the lowest bits.
    lone = torch.zeros(1, form.places, dtype=torch.uint8)
    lone[0, 0] = 1
    assert vector_index(lone, form.width, form.places).tolist() == [[1]]


@pytest.mark.parametrize(
    ("rows", "width", "places", "each", "bands"),
    [
        (1, 2, 1, 1, 1),
        (3, 2, 1, 3, 1),
        (4, 2, 1, 4, 1),
        (9, 2, 1, 5, 2),  # no band has fewer than 4 but the last
        (576, 2, 1, 4, 144),
        (576, 2, 2, 32, 18),
        (192, 2, 4, 192, 1),
        (1536, 2, 4, 1536, 1),
        (4096, 2, 4, 1024, 4),
        (4096, 4, 2, 512, 8),
        (14336, 4, 1, 16, 896),
        (100, 3, 1, 9, 12),
    ],
)
def test_rows_that_share_codebooks(rows: int, width: int, places: int, each: int, bands: int) -> None:
    entries = entry_count(width, places)
    assert (band_rows(rows, entries, places), band_count(rows, entries, places)) == (each, bands)
    assert bands_by_hand(rows, width, places)[-1] + 1 == bands


@ids
@pytest.mark.parametrize("rows", [1, 16, 100, 576, 2000, 4096, 14336])
def test_bits_are_counted(form: VectorForm, rows: int) -> None:
    """As GPTVQ counts: 1/8 bit a weight for codebooks of groups of 64 columns, more only where rows are few."""
    columns, group_size = 512, 64
    groups = columns // group_size
    counted = form.codebook_bits(rows, groups)
    bands = bands_by_hand(rows, form.width, form.places)[-1] + 1
    assert counted == 8 * bands * groups * form.entries * form.places
    each = form.entries * form.places
    assert counted / (rows * columns) <= 8 / group_size * max(1, each / rows)
    if rows % each == 0:  # a codebook belongs to 64 k d weights, as 2.125, 3.125 and 4.125 bits have it
        assert counted / (rows * columns) == 0.125
    stored = 8 * form.nbytes(rows, groups)
    assert stored == counted + bands * (8 * groups + 16)
    assert stored == 8 * sum(part.nbytes for part in random_stored(form, rows, groups, 0).parts.values())


@ids
def test_encoding_takes_the_nearest_levels(form: VectorForm) -> None:
    generator = torch.Generator().manual_seed(3)
    bands = bands_by_hand(90, form.width, form.places)[-1] + 1
    levels = torch.randn(bands, 3, form.entries, form.places, generator=generator)
    levels *= torch.randn(bands, 3, 1, 1, generator=generator).mul(2).exp()  # of very different groups
    decoder = form.encode(VectorBooks(levels), form.width)
    decoder.check("layer", Path("file"))
    scale = decoder.parts["scale"].double() * decoder.parts["step"].double()
    reach = levels.abs().amax((2, 3)).double()
    assert (127 * scale >= reach * (1 - 1e-12)).all()
    assert (127 * scale <= reach + 127 * decoder.parts["step"].double()).all()
    values: VectorBooks = decoder.values  # type: ignore[assignment]
    assert ((values.levels - levels).abs() <= (0.5 + 1e-6) * scale.float()[..., None, None]).all()
    assert int(decoder.parts["codebook"].min()) >= -127


@ids
def test_codebooks_of_zeros(form: VectorForm) -> None:
    levels = torch.zeros(1, 2, form.entries, form.places)
    levels[0, 1] = 0.5
    decoder = form.encode(VectorBooks(levels), form.width)
    decoder.check("layer", Path("file"))
    weights = decoder.decode(random_codes(form.width, 4, 16, 0))
    assert not weights[:, :8].any()
    torch.testing.assert_close(weights[:, 8:], torch.full((4, 8), 0.5), rtol=0.01, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_levels_that_are_not_finite_are_refused(bad: float) -> None:
    levels = torch.randn(1, 2, 16, 2, generator=torch.Generator().manual_seed(0))
    levels[0, 1, 3, 0] = bad
    decoder = VectorForm(2, 2).encode(VectorBooks(levels), 2)
    with pytest.raises(DecoderValueError, match=r"^file: some\.layer\.weight_step2: found .* in band 0, column 0"):
        decoder.check("some.layer", Path("file"))


@ids
def test_stored_tensors(form: VectorForm) -> None:
    parts = form.parts(90, 3)
    bands = bands_by_hand(90, form.width, form.places)[-1] + 1
    assert parts == {
        "scale": TensorSpec(torch.uint8, (bands, 3)),
        "step": TensorSpec(torch.bfloat16, (bands, 1)),
        "codebook": TensorSpec(torch.int8, (bands, 3, form.entries, form.places)),
    }
    decoder = random_decoder(form, form.width, 90, 3, torch.Generator().manual_seed(4))
    named = decoder.named("model.some.layer")
    assert same_decoder(form.from_tensors(lambda name: named[f"model.some.layer.{name}"], form.width), decoder)
    assert same_decoder(decoder.to("cpu"), decoder)
    assert torch.equal(
        decoder.values.to("cpu").decode(codes := random_codes(form.width, 90, 24, 1)), decoder.decode(codes)
    )


def test_codebooks_are_of_all_rows() -> None:
    decoder = random_decoder(VectorForm(2, 1), 2, 40, 3, torch.Generator().manual_seed(4))
    with pytest.raises(ValueError, match="bands: found 10, expected 5 for all of 20 rows"):
        decoder.decode(random_codes(2, 20, 24, 0))
    for size in (4, 16):
        with pytest.raises(ValueError, match=f"groups: found 3, expected 24 columns / {size}, rounded up"):
            decoder.values.decode(random_codes(2, 40, 24, 0), size)


def test_kinds() -> None:
    assert {name: kind.widths for name, kind in VECTOR_KINDS.items()} == {
        "vectors-1d": (2, 3, 4),
        "vectors-2d": (2, 3, 4),
        "vectors-4d": (2,),
    }
    for kind in VECTOR_KINDS.values():
        assert (kind.format_version, kind.affine, kind.one_width) == (3, False, True)
        assert [form.width for form in kind.forms if isinstance(form, VectorForm)] == list(kind.widths)
    assert KINDS.keys() | VECTOR_KINDS.keys() == EVERY_KIND.keys()
    assert not any(kind.one_width for kind in KINDS.values())
    assert not KINDS.keys() & VECTOR_KINDS.keys()


KINDS_AND_WIDTHS = [(kind, width) for kind in VECTOR_KINDS.values() for width in kind.widths]


@pytest.mark.parametrize(("kind", "width"), KINDS_AND_WIDTHS, ids=lambda value: getattr(value, "name", value))
def test_what_is_written_is_read(kind: DecoderKind, width: int, write: Writer, tmp_path: Path) -> None:
    sample = write(tmp_path / "checkpoint", Format((width,), 32, decoder_kind=kind))
    checkpoint = open_checkpoint(sample.folder)
    assert checkpoint.format == sample.format
    assert checkpoint.config["quantization_config"]["decoder_kind"] == kind.name
    assert all(result.passed for result in verify(sample.folder))
    for layer, decoders in sample.decoders.items():
        assert torch.equal(checkpoint.codes(layer, width), sample.codes[layer] >> (8 - width))
        assert same_decoder(checkpoint.decoder(layer, width), decoders[width])
        names = {
            name.removeprefix(f"{layer}.") for name in checkpoint.weight_map if name.startswith(f"{layer}.weight_")
        }
        assert names == {"weight_base", *(f"weight_plane{r}" for r in range(3, width + 1)), *decoder_names(kind, width)}
    size = sum(
        codes.numel() * width // 8 + sum(part.nbytes for part in sample.decoders[layer][width].parts.values())
        for layer, codes in sample.codes.items()
    )
    assert checkpoint.slice(width).resident_bytes == size


@pytest.fixture(scope="module")
def shared(write: Writer, tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return write(tmp_path_factory.mktemp("vectors") / "checkpoint", Format((3,), 32, decoder_kind=VECTORS_2D))


WIDE = "quantization_config.widths: found [3] with decoder_kind 'vectors-4d', expected one of [2]"
FAULTS: dict[str, Fault] = {
    "several widths": fault(
        in_quantization(widths=[2, 3]),
        errors.ConfigError,
        "quantization_config.widths: found [2, 3] with decoder_kind 'vectors-2d', expected one of [2, 3, 4]",
    ),
    "too many entries": fault(in_quantization(decoder_kind="vectors-4d"), errors.ConfigError, WIDE),
    "too wide a layer": fault(
        in_quantization(layer_widths={LAYER: [5]}),
        errors.ConfigError,
        f"quantization_config.layer_widths of {LAYER}: found [5] with decoder_kind 'vectors-2d', expected one of",
    ),
    "version 2": fault(
        in_quantization(format_version=2), errors.ConfigError, "decoder_kind: found 'vectors-2d', expected one of"
    ),
    "rounded slices": fault(
        in_quantization(slicing="round"),
        errors.ConfigError,
        "quantization_config.slicing: found 'round', expected 'truncate', as decoder_kind is 'vectors-2d'",
    ),
    "no kind": fault(
        in_config(lambda config: config["quantization_config"].pop("decoder_kind")),
        errors.ConfigError,
        "quantization_config.decoder_kind: found nothing",
    ),
    "another kind": fault(
        in_quantization(decoder_kind="vectors-1d"),
        errors.TensorShapeError,
        "weight_codebook3",
        "64, 2], expected [8, 3, 8, 1]",
    ),
    "another group size": fault(
        in_quantization(group_size=16), errors.TensorShapeError, "weight_codebook3", "expected [1, 6, 64, 2]"
    ),
    "no codebook": fault(
        remove_tensor(f"{LAYER}.weight_codebook3"), errors.MissingTensorError, f"{LAYER}.weight_codebook3"
    ),
    "codebook without signs": fault(
        replace_tensor(f"{LAYER}.weight_codebook3", lambda codebook: codebook.view(torch.uint8)),
        errors.TensorDtypeError,
        f"dtype of {LAYER}.weight_codebook3: found torch.uint8, expected torch.int8",
    ),
    "codebook of half the entries": fault(
        replace_tensor(f"{LAYER}.weight_codebook3", lambda codebook: codebook[:, :, :32]),
        errors.TensorShapeError,
        f"shape of {LAYER}.weight_codebook3: found [1, 2, 32, 2], expected [1, 2, 64, 2] by config.json",
    ),
    "a band too many": fault(
        replace_tensor(f"{LAYER}.weight_step3", lambda step: step.repeat(2, 1)),
        errors.TensorShapeError,
        f"shape of {LAYER}.weight_step3: found [2, 1], expected [1, 1] by config.json",
    ),
    "step of NaN": fault(
        replace_tensor(f"{LAYER}.weight_step3", lambda step: step * math.nan),
        errors.DecoderValueError,
        f"{LAYER}.weight_step3: found nan in band 0, column 0 (as torch.bfloat16)",
        "expected finite values from 0 up",
    ),
    "negative step": fault(
        replace_tensor(f"{LAYER}.weight_step3", lambda step: -step),
        errors.DecoderValueError,
        f"{LAYER}.weight_step3: found -",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_refused(shared: Sample, name: str, tmp_path: Path) -> None:
    sample = dataclasses.replace(shared, folder=Path(shutil.copytree(shared.folder, tmp_path / "checkpoint")))
    FAULTS[name].spoil(sample.folder)
    with pytest.raises(errors.CheckpointError) as caught:
        open_checkpoint(sample.folder)
    assert type(caught.value) is FAULTS[name].error
    for piece in (*FAULTS[name].message, "found", "expected", str(sample.folder)):
        assert piece in str(caught.value)
