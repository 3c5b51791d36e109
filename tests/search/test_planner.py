"""What a search measures, against other ways to compute it; that it finds, repeats and resumes."""

from __future__ import annotations

import json
import os
import random
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.serve.tiny_models import own_decoder, reference_model
from vllm_matquant.checkpoint.reader import Checkpoint
from vllm_matquant.measure.sliced import REFERENCE, SlicedModel
from vllm_matquant.research.evolution import evolution, fill
from vllm_matquant.search.budget import Budget, spent
from vllm_matquant.search.divergence import Divergence, fisher_samples
from vllm_matquant.search.journal import Journal, JournalError
from vllm_matquant.search.planner import Planner

NewModel = Callable[[], SlicedModel]


def random_widths(model: SlicedModel, seed: int) -> dict[str, int]:
    draw = random.Random(seed)
    return {layer: draw.choice(model.widths_of(layer)) for layer in model.layers}


def logs_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits[:, :-1].double().log_softmax(-1)


def divergence(expected: torch.Tensor, found: torch.Tensor) -> float:
    return float((expected.exp() * (expected - found)).sum(-1).mean())


@pytest.mark.parametrize("seed", range(3))
def test_layers_change_their_widths_in_place(
    checkpoint: Checkpoint, new_model: NewModel, tokens: torch.Tensor, seed: int
) -> None:
    model = new_model()
    model.set(random_widths(model, seed + 10))
    widths = random_widths(model, seed)
    model.set(widths)
    expected = logs_of(reference_model(checkpoint.folder, widths), tokens)
    torch.testing.assert_close(model.logits(tokens).double().log_softmax(-1), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_other_decoders_come_and_go(
    checkpoint: Checkpoint, new_model: NewModel, tokens: torch.Tensor, seed: int
) -> None:
    model = new_model()
    widths = random_widths(model, seed)
    decoders = {layer: own_decoder(checkpoint.decoder(layer, width)) for layer, width in widths.items()}
    plain, own = (logs_of(reference_model(checkpoint.folder, widths, each), tokens) for each in (False, True))
    assert divergence(plain, own) > 1e-3
    model.set(widths)
    with model.other_decoders(decoders):
        model.set(widths)
        torch.testing.assert_close(model.logits(tokens).double().log_softmax(-1), own, rtol=0, atol=1e-4)
    model.set(widths)
    torch.testing.assert_close(model.logits(tokens).double().log_softmax(-1), plain, rtol=0, atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_divergence(checkpoint: Checkpoint, new_model: NewModel, tokens: torch.Tensor, seed: int) -> None:
    model = new_model()
    widths = random_widths(model, seed)
    widest = {layer: model.widths_of(layer)[-1] for layer in model.layers}
    expected, found = (logs_of(reference_model(checkpoint.folder, own), tokens) for own in (widest, widths))
    measured = Divergence(model, tokens)
    assert measured.of(widths) == pytest.approx(divergence(expected, found), rel=1e-3)
    assert measured.of(widest) == pytest.approx(0, abs=1e-6)
    assert measured.of(widths) == measured.of(widths)


def test_divergence_from_the_source_and_on_a_part(
    checkpoint: Checkpoint, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_matquant.measure.model._BATCH_TOKENS", 48)
    source = reference_model(checkpoint.folder, 8)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.01)
    expected = logs_of(source, tokens)
    model = SlicedModel(checkpoint, source, dtype=torch.float32)
    widths = random_widths(model, 0)
    measured = Divergence(model, tokens)
    of_slices = reference_model(checkpoint.folder, widths)  # all that is not quantized is the source's
    state = of_slices.state_dict()
    quantized = {f"{layer}.weight" for layer in model.layers}
    of_slices.load_state_dict({n: source.state_dict()[n] if n not in quantized else t for n, t in state.items()})
    found = logs_of(of_slices, tokens)
    assert measured.of(widths, 1 / 3) == pytest.approx(divergence(expected[:2], found[:2]), rel=1e-3)
    assert measured.of(widths) == pytest.approx(divergence(expected, found), rel=1e-3)


def test_slopes_are_the_derivative(checkpoint: Checkpoint, new_model: NewModel, tokens: torch.Tensor) -> None:
    model = new_model()
    widths = random_widths(model, 1)
    measured = Divergence(model, tokens)
    slopes = measured.slopes(widths)
    assert {layer: tuple(own) for layer, own in slopes.items()} == {
        layer: model.widths_of(layer) for layer in model.layers
    }
    weights = dict(model.model.named_parameters())
    step = 0.02
    for layer in model.layers[::3]:
        assert slopes[layer][widths[layer]] == pytest.approx(0, abs=1e-7)
        weight = weights[f"{layer}.weight"]
        for width in model.widths_of(layer)[:2]:
            change = model.decode(layer, width) - model.decode(layer, widths[layer])
            ends = []
            for sign in (1, -1):
                weight.data.add_(sign * step * change)
                ends.append(measured.of(widths))
                weight.data.add_(-sign * step * change)
            numeric = (ends[0] - ends[1]) / (2 * step)
            assert slopes[layer][width] == pytest.approx(numeric, rel=0.05, abs=2e-5)


def test_fisher_samples_are_directional_derivatives(new_model: NewModel, tokens: torch.Tensor) -> None:
    model = new_model()
    samples = fisher_samples(model, tokens[:2], [5, 6])
    model.set(dict.fromkeys(model.layers, REFERENCE))
    weights = dict(model.model.named_parameters())
    for window, seed in ((0, 5), (1, 6)):
        text = tokens[window : window + 1]
        logs = model.logits(text)[0].log_softmax(-1)
        labels = torch.multinomial(logs.exp(), 1, generator=torch.Generator().manual_seed(seed))
        for layer in model.layers[::4]:
            for width in model.widths_of(layer)[:2]:
                change = model.decode(layer, width) - model.decode(layer, REFERENCE)
                ends = []
                for sign in (1e-2, -1e-2):
                    weights[f"{layer}.weight"].data.add_(sign * change)
                    found = model.logits(text)[0].double().log_softmax(-1)
                    ends.append(-float(found.gather(1, labels).sum()))
                    weights[f"{layer}.weight"].data.add_(-sign * change)
                numeric = (ends[0] - ends[1]) / 2e-2 / len(logs) ** 0.5
                assert samples[layer][width][window] == pytest.approx(numeric, rel=0.02, abs=1e-3)


def test_samples_give_the_divergence_of_small_changes(new_model: NewModel) -> None:
    model = new_model()
    text = torch.randint(128, (240, 12), generator=torch.Generator().manual_seed(1))
    samples = fisher_samples(model, text, range(240))
    measured = Divergence(model, text)
    widest = {layer: model.widths_of(layer)[-1] for layer in model.layers}
    layers = [layer for layer in model.layers if 6 in model.widths_of(layer) and widest[layer] == 8]
    expected = sum(measured.of(widest | {layer: 6}) for layer in layers)
    predicted = sum(sum(value**2 for value in samples[layer][6]) / len(text) / 2 for layer in layers)
    assert predicted == pytest.approx(expected, rel=0.25)


def new_planner(model: SlicedModel, tokens: torch.Tensor, journal: Path | None = None, **options: Any) -> Planner:
    return Planner(model, tokens, tokens[:, :12].repeat(3, 1), Journal(journal, {}, **options))


@pytest.fixture(scope="module")
def budget(checkpoint: Checkpoint) -> tuple[Any, float]:
    return Budget("3.3", "bits", 3.3).costs(checkpoint)


def test_the_programs_find_better_widths_than_the_same_for_all(
    new_model: NewModel, tokens: torch.Tensor, budget: Any
) -> None:
    planner = new_planner(new_model(), tokens)
    planner.fisher_tokens = tokens.repeat(20, 1)
    steps = list(planner.program(*budget, 3))
    losses = [step.kl for step in steps]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] < planner.kl(fill(*budget))
    assert steps[0].passes < steps[-1].passes
    for step in steps:
        assert spent(budget[0], step.widths) <= budget[1]
        assert step.kl == planner.kl(step.widths)


def test_evolution_goes_on_from_where_it_is_told(new_model: NewModel, tokens: torch.Tensor, budget: Any) -> None:
    planner = new_planner(new_model(), tokens)
    start = planner.start(*budget)
    steps = list(evolution(planner, *budget, 2, 6, start))
    assert steps[-1].kl <= planner.kl(start)
    assert [step.widths for step in steps] == [step.widths for step in evolution(planner, *budget, 2, 6, start)]
    again = list(evolution(new_planner(new_model(), tokens), *budget, 2, 6, start))
    assert [(step.widths, step.kl) for step in again] == [(step.widths, step.kl) for step in steps]


@pytest.mark.parametrize("lines", [1, 2, 5, 9])
def test_a_search_that_was_cut_off_ends_as_one_that_was_not(
    new_model: NewModel, tokens: torch.Tensor, budget: Any, tmp_path: Path, lines: int
) -> None:
    path = tmp_path / "journal.jsonl"

    def search(planner: Planner) -> list[Any]:
        return [*planner.program(*budget, 2), *evolution(planner, *budget, 1, 3)]

    whole = search(new_planner(new_model(), tokens, path))
    written = path.read_text().splitlines(keepends=True)
    assert len(written) > lines
    path.write_text("".join(written[:lines]) + written[lines][: len(written[lines]) // 2])  # the last line cut short
    planner = new_planner(new_model(), tokens, path, resume=True)
    assert search(planner) == whole
    assert planner.journal.replayed == lines - 1
    assert path.read_text().splitlines() == [line.rstrip("\n") for line in written]


def test_a_journal_of_other_settings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state" / "journal.jsonl"
    journal = Journal(path, {"seed": 1, "text": "a"})
    assert journal.measure("x", lambda: (0.5, 3)) == 0.5
    with pytest.raises(JournalError, match=r"other settings \(seed\), expected those of this search"):
        Journal(path, {"seed": 2, "text": "a"}, resume=True)
    same = Journal(path, {"seed": 1, "text": "a"}, resume=True)
    assert same.measure("x", lambda: pytest.fail("measured again")) == 0.5
    assert (same.passes, same.replayed) == (3, 1)
    anew = Journal(path, {"seed": 2, "text": "a"})
    assert anew.measure("x", lambda: (0.25, 1)) == 0.25
    assert json.loads(path.read_text().splitlines()[1]) == {"key": "x", "value": 0.25, "passes": 1}
    path.write_text("not JSON\n")
    with pytest.raises(JournalError):
        Journal(path, {"seed": 2, "text": "a"}, resume=True)
    anew.remove()
    assert not path.exists()


def test_a_journal_has_the_permissions_that_the_umask_gives(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        Journal(tmp_path / "journal.jsonl", {"seed": 1}).tensors("own", lambda: ({"a": torch.ones(2)}, 5))
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o640}


def test_tensors_that_a_journal_does_not_know_are_made_anew(tmp_path: Path) -> None:
    """A file of theirs may be there: of a search of other settings, or of one that died before it was noted."""
    path = tmp_path / "state" / "journal.jsonl"
    first = Journal(path, {"seed": 1})
    made = first.tensors("own", lambda: ({"a": torch.ones(2)}, 5))
    assert torch.equal(made["a"], torch.ones(2))
    again = Journal(path, {"seed": 1}, resume=True)
    assert torch.equal(again.tensors("own", lambda: pytest.fail("made again"))["a"], torch.ones(2))
    assert (first.passes, again.passes) == (5, 5)
    other = Journal(path, {"seed": 2})
    assert torch.equal(other.tensors("own", lambda: ({"a": torch.zeros(2)}, 5))["a"], torch.zeros(2))
    assert torch.equal(Journal(None, {}).tensors("own", lambda: ({"a": torch.ones(1)}, 1))["a"], torch.ones(1))
    other.remove()
    assert not path.parent.exists()
