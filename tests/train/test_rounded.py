"""MatQuant's own form of training, against the plainest formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.quantize.tiny_sources import write_source
from tests.train.conftest import Run, make_parent
from tests.train.test_training import LONG, assert_same_files
from vllm_matquant.checkpoint.files import read_json
from vllm_matquant.checkpoint.packing import slice_codes
from vllm_matquant.checkpoint.reader import open_checkpoint
from vllm_matquant.checkpoint.verify import verify
from vllm_matquant.cli import main
from vllm_matquant.jobs.evaluate import Evaluate
from vllm_matquant.train.latent import Switch
from vllm_matquant.train.optimizer import Optimizer
from vllm_matquant.train.rounded import RoundedWeight


def paper_weight(latent: torch.Tensor, group: int, width: int) -> torch.Tensor:
    """MatQuant's equations 1 and 6 on a min-max grid, with a straight-through derivative; clamping has its own."""
    grouped = latent.unflatten(1, (-1, group))
    low, high = (each.detach() for each in (grouped.amin(2, keepdim=True), grouped.amax(2, keepdim=True)))
    scale = (high - low) / 255

    def through(rounded: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
        return exact + (rounded - exact).detach()

    exact = (grouped - low) / scale
    code = through(exact.round(), exact)
    part = 2 ** (8 - width)
    sliced = through((code / part + 0.5).floor(), code / part).clamp(max=2**width - 1)
    return (scale * part * sliced + low).flatten(1)


@pytest.mark.parametrize("width", [2, 3, 4, 6, 7, 8])
@pytest.mark.parametrize(("rows", "columns", "group"), [(6, 64, 32), (3, 40, 40)])
@pytest.mark.parametrize("seed", range(2))
def test_weights_and_derivatives_of_the_paper(width: int, rows: int, columns: int, group: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    source = 0.1 * torch.randn(rows, columns, generator=generator)
    layer = RoundedWeight(source, group, (2, 3, 4, 6, 7, 8), (2, 8), Switch(width))
    layer.shift.data += 3 * torch.randn(rows, columns, generator=generator)
    unit, low = (each.repeat_interleave(group, 1) for each in (layer.unit, layer.low))
    latent = ((layer.codes + layer.shift) * unit + low).detach().requires_grad_()
    weight, expected = layer(source), paper_weight(latent, group, width)
    torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-5)
    gradient = torch.randn(rows, columns, generator=generator)
    weight.backward(gradient)
    expected.backward(gradient)
    torch.testing.assert_close(layer.shift.grad, latent.grad * unit, rtol=1e-5, atol=1e-7)
    assert width == 8 or float((latent.grad == 0).float().mean()) > 0  # of what the clamp has cut


def test_starts_at_the_source() -> None:
    source = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    source[1, :32] = 0.5  # a group of one value
    layer = RoundedWeight(source, 32, (2, 8), (2, 8), Switch(8))
    torch.testing.assert_close(layer(source), source, rtol=0, atol=0.02)
    latent = (layer.codes + layer.shift) * layer.unit.repeat_interleave(32, 1) + layer.low.repeat_interleave(32, 1)
    torch.testing.assert_close(latent, source)
    assert layer.changed_codes(2) == layer.changed_codes(8) == 0
    codes, decoders = layer.finished(lambda tensor: tensor.detach())
    assert torch.equal(codes, layer.codes)
    assert list(decoders) == [2, 8]


@pytest.mark.parametrize("width", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("seed", range(2))
def test_one_width_alone_is_on_its_own_grid(width: int, seed: int) -> None:
    """Equation 1 with 2^width levels from a group's lowest to its highest weight."""
    generator = torch.Generator().manual_seed(seed)
    source = 0.1 * torch.randn(6, 64, generator=generator)
    layer = RoundedWeight(source, 32, (width,), (width,), Switch(width))
    assert layer.changed_codes(width) == 0
    unit, low = (each.repeat_interleave(32, 1) for each in (layer.unit, layer.low))
    start = (layer.codes >> (8 - width)) * (255 / (2**width - 1))
    torch.testing.assert_close((start + layer.shift) * unit + low, source)
    layer.shift.data += 30 * torch.randn(6, 64, generator=generator)
    assert layer.changed_codes(width) > 0
    grouped = ((start + layer.shift) * unit + low).unflatten(1, (-1, 32))
    lowest, highest = grouped.amin(2, keepdim=True), grouped.amax(2, keepdim=True)
    step = (highest - lowest) / (2**width - 1)
    expected = (((grouped - lowest) / step).round() * step + lowest).flatten(1)
    weight = layer(source)
    torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-5)
    gradient = torch.randn(6, 64, generator=generator)
    weight.backward(gradient)
    torch.testing.assert_close(layer.shift.grad, gradient * unit)  # nothing is clamped
    codes, decoders = layer.finished(lambda tensor: tensor.detach())
    sliced = slice_codes(codes, 8, width, "round")
    torch.testing.assert_close(decoders[width].decode(sliced), weight.detach())
    assert not (codes & (2 ** (8 - width) - 1)).any()


def test_a_checkpoint_of_one_width(train: Run, source: Path, short_text: Path, tmp_path: Path) -> None:
    parent = make_parent(source, tmp_path / "parent", "--bits", "2", "--group-size", "32")
    given: dict[str, Any] = {"parent": parent, "form": "rounded", "terms": "2"}
    train(tmp_path / "start", code_rate=0, **given)
    train(tmp_path / "out", **given, **LONG)
    rows = [
        Evaluate(tmp_path / name, source, short_text, samples=4, sequence_length=32).run() for name in ("start", "out")
    ]
    assert [[row["bits"] for row in found] for found in rows] == [[2], [2]]
    assert rows[1][0]["kl"] < 0.85 * rows[0][0]["kl"]


@pytest.mark.parametrize(
    ("form", "slicing", "terms"),
    [
        ("rounded", "round", "8,4,2"),
        ("rounded", "round", "8:text,2:text,8->2"),
        ("rounded-extra", "round-extra", "8,4,2"),
    ],
)
def test_a_checkpoint_of_rounded_slices(
    form: str, slicing: str, terms: str, train: Run, source: Path, parent: Path, short_text: Path, tmp_path: Path
) -> None:
    untrained = train(tmp_path / "start", form=form, code_rate=0, terms=terms)
    outcome = train(tmp_path / "out", form=form, terms=terms, **LONG)
    for name, value in outcome.losses.items():
        assert name.startswith("8") or value < (0.98 if "text" in name else 0.85) * untrained.losses[name]
    assert all(result.passed for result in verify(tmp_path / "out"))
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.format.slicing == slicing
    assert checkpoint.format.widths == open_checkpoint(parent).format.widths
    assert read_json(tmp_path / "out" / "MANIFEST.json")["training"]["form"] == form
    rows = [
        Evaluate(tmp_path / name, source, short_text, samples=4, sequence_length=32).run() for name in ("start", "out")
    ]
    figure = "perplexity" if "text" in terms else "kl"
    start, end = ({row["bits"]: row[figure] for row in found} for found in rows)
    assert end[2] < start[2]
    # No term names it: it lies between. What was not clamped to begin with has less to gain.
    assert form == "rounded-extra" or end[3] < start[3]


def test_resumed(train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"form": "rounded", "checkpoint_every": 2}
    train(tmp_path / "whole", **options)
    step = Optimizer.step

    def limited(self: Optimizer, number: int) -> torch.Tensor:
        if number == 5:
            raise KeyboardInterrupt
        return step(self, number)

    with monkeypatch.context() as patched:
        patched.setattr(Optimizer, "step", limited)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "cut", **options)
    with pytest.raises(ValueError, match=r"training\.form: found native, expected rounded"):
        train(tmp_path / "cut", resume=True)
    train(tmp_path / "cut", resume=True, **options)
    assert_same_files(tmp_path / "cut", tmp_path / "whole")


def test_embeddings_that_stay_must_be_rounded_too(train: Run, short_text: Path, tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", tie_word_embeddings=True)
    parent = make_parent(source, tmp_path / "parent", "--bits", "2,8", "--quantize-embeddings")
    given: dict[str, Any] = {"source": source, "form": "rounded", "terms": "8,2"}
    with pytest.raises(ValueError, match=r"quantized_embeddings: found .*expected none.* --method matgptq"):
        train(tmp_path / "out", parent=parent, **given)
    command = ["quantize", str(source), "--output", str(tmp_path / "rounded"), "--method", "matgptq", "--no-report"]
    options = ["--bits", "2,8", "--quantize-embeddings", "--samples", "2", "--sequence-length", "16"]
    assert main([*command, *options]) == 0
    outcome = train(tmp_path / "out", parent=tmp_path / "rounded", held_out=short_text, held_out_samples=2, **given)
    rows = Evaluate(tmp_path / "out", source, short_text, samples=2, sequence_length=32).run()
    for row in rows:
        assert outcome.held_out[-1][1][row["bits"]] == pytest.approx(row["kl"], rel=0.05, abs=1e-3)
