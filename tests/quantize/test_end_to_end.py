"""Decoders trained on the whole model's predictions, against gradients of the whole model by torch."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from tests.quantize.exact_decoders import assert_same_decoders
from tests.quantize.tiny_sources import ARCHITECTURES, VOCABULARY, write_source
from vllm_matquant.checkpoint.codebook import Codebook
from vllm_matquant.checkpoint.decoder import AFFINE_INT8, CODEBOOK, Decoder, DecoderKind
from vllm_matquant.checkpoint.reader import open_checkpoint
from vllm_matquant.quantize import device, end_to_end, run
from vllm_matquant.quantize.baselines import RoundToNearest
from vllm_matquant.quantize.end_to_end import EndToEnd, EndToEndSettings
from vllm_matquant.quantize.layer import QuantizedLayer
from vllm_matquant.quantize.methods import with_settings
from vllm_matquant.quantize.nested import Nested
from vllm_matquant.quantize.nested_vq import NestedVQ
from vllm_matquant.quantize.pipeline import CalibrationSettings, plan_format, quantize
from vllm_matquant.quantize.recipe_decoders import train_recipe
from vllm_matquant.quantize.selection import Selection
from vllm_matquant.quantize.source import SourceModel, read_matrix
from vllm_matquant.quantize.training import TrainedAffine, TrainedCodebook

WIDTHS = (2, 3, 5, 8)
GROUP = 32


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in float32 whatever the processor."""
    monkeypatch.setattr(device, "_bfloat16_is_faster", lambda: False)


def tokens_of(seed: int, windows: int = 4, length: int = 24) -> torch.Tensor:
    return torch.randint(VOCABULARY, (windows, length), generator=torch.Generator().manual_seed(seed))


class Model:
    """A source quantized at once without calibration, and the same in transformers."""

    def __init__(self, folder: Path, tokens: torch.Tensor, kind: DecoderKind = AFFINE_INT8, **plan: Any) -> None:
        self.source, self.tokens = SourceModel(folder), tokens
        method = RoundToNearest(WIDTHS) if kind.affine else NestedVQ(WIDTHS, sweeps=0)
        self.format = plan_format(self.source, method, GROUP, plan.pop("ignore", []), decoder_kind=kind, **plan)
        shapes = self.source.skeleton.quantized_layers(self.format)
        self.layers = {
            name: method.with_widths(self.format.widths_of(name)).quantize(
                read_matrix(self.source, name).float(), torch.eye(shape[1]), GROUP, kind
            )
            for name, shape in shapes.items()
        }
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        states: list[torch.Tensor] = []
        last = self.model.get_decoder().layers[-1]
        hook = last.register_forward_hook(lambda _, __, out: states.append(out[0] if isinstance(out, tuple) else out))
        with torch.no_grad():
            self.expected = self.model(tokens).logits.log_softmax(-1)
        hook.remove()
        self.states = states[0]

    def load(self, name: str, widths_of: Callable[[str], tuple[int, ...]]) -> dict[str, QuantizedLayer]:
        return {
            layer: QuantizedLayer(each.codes, {width: each.decoders[width] for width in widths_of(layer)})
            for layer, each in self.layers.items()
            if layer == name or layer.startswith(f"{name}.")
        }

    def training(
        self, widths: int | dict[str, int], settings: EndToEndSettings, folder: Path | None = None
    ) -> EndToEnd:
        return EndToEnd(
            Selection(self.source, self.format), widths, self.load, self.tokens, self.states, settings, folder
        )

    def divergence(self, weights: dict[str, torch.Tensor], windows: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """Mean KL divergence with these weights in the place of the source's."""
        named = {f"{name}.weight": weight for name, weight in weights.items()}
        logits = functional_call(self.model, named, (self.tokens[windows],)).logits.log_softmax(-1)
        expected = self.expected[windows]
        return (expected.exp() * (expected - logits)).sum(-1).mean()

    def decoded(
        self, widths: int | dict[str, int], decoders: dict[str, Decoder] | None = None
    ) -> dict[str, torch.Tensor]:
        """The weights of a slice, with other decoders where given."""
        weights = {}
        for name, layer in self.layers.items():
            width = widths if isinstance(widths, int) else widths[name]
            own = layer if name not in (decoders or {}) else replace(layer, decoders={width: (decoders or {})[name]})
            weights[name] = own.decode(width, "truncate")
        return weights


def recorded_slopes(
    model: Model, widths: int | dict[str, int], monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> dict[str, torch.Tensor]:
    """The derivatives of the first step, taken on all windows."""
    found: list[torch.Tensor] = []
    for trained in (TrainedAffine, TrainedCodebook):
        monkeypatch.setattr(trained, "step", lambda self, slopes, rate, step: found.append(slopes))
    all_windows = EndToEndSettings(epochs=1, sequences=len(model.tokens), **settings)
    training = model.training(widths, all_windows)
    training.train()
    names = [name for block in reversed(training._trained) for name in block]
    return dict(zip(names, found, strict=True))


def changed_affine(start: Any, codes: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights with relative changes of scales and centres, which are zero, and these changes."""
    middle = (2**width - 1) / 2
    change = torch.zeros(2, *start.scale.shape, requires_grad=True)
    scale = start.scale * (1 + change[0])
    centre = start.offset + middle * start.scale + change[1] * start.scale
    expanded = scale.repeat_interleave(GROUP, 1), centre.repeat_interleave(GROUP, 1)
    return (codes.float() - middle) * expanded[0] + expanded[1], change


def changed_codebook(start: Any, codes: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with relative changes of scales, and of a codebook relative to its levels' size."""
    scales = start.scale.numel()
    change = torch.zeros(scales + (width - 1) * 256, requires_grad=True)
    size = start.levels.square().mean().sqrt()
    moved = torch.cat([start.levels[None], start.increments]) + size * change[scales:].view(width - 1, 64, 4)
    top, columns = (codes >> (width - 2)).long().unflatten(1, (-1, 4, 4)), torch.arange(codes.shape[1])
    index = (top * torch.tensor([1, 4, 16, 64])[:, None]).sum(2)[:, columns // 16, columns % 4]
    place = columns % 16 // 4
    entry, sign = index % 64, 1 - 2 * (index >> torch.where(place < 2, 7, 6) & 1)
    level = moved[0][entry, place]
    for bit in range(width - 2):
        level = level + moved[bit + 1][entry, place] * (codes >> (width - 3 - bit) & 1)
    scale = start.scale * (1 + change[:scales].view_as(start.scale))
    return sign * level * scale.repeat_interleave(GROUP, 1), change


def expected_slopes(model: Model, widths: int | dict[str, int]) -> dict[str, torch.Tensor]:
    """The same by torch alone."""
    weights, changes = model.decoded(widths), {}
    for name, layer in model.layers.items():
        width = widths if isinstance(widths, int) else widths[name]
        if width not in layer.decoders or ".layers." not in name:
            continue
        values, sliced = layer.decoders[width].values, layer.codes >> (8 - width)
        changed = changed_codebook if isinstance(values, Codebook) else changed_affine
        weights[name], changes[name] = changed(values, sliced, width)
    gradients = torch.autograd.grad(model.divergence(weights), list(changes.values()))
    return dict(zip(changes, gradients, strict=True))


def assert_same_slopes(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert sorted(found) == sorted(expected)
    for name, slopes in expected.items():
        assert slopes.abs().max() > 0, name
        torch.testing.assert_close(found[name], slopes, rtol=1e-3, atol=1e-3 * float(slopes.abs().max()))


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_gradients_of_every_architecture(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(write_source(tmp_path, model_type), tokens_of(0))
    assert_same_slopes(recorded_slopes(model, 2, monkeypatch), expected_slopes(model, 2))


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("seed", range(2))
def test_gradients_at_every_width(width: int, seed: int, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(llama, tokens_of(seed, 3, 17 + seed))
    monkeypatch.setattr(end_to_end, "HEAD_TOKENS", 5)  # parts that end within windows
    assert_same_slopes(recorded_slopes(model, width, monkeypatch), expected_slopes(model, width))


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("width", WIDTHS)
def test_gradients_of_codebooks(width: int, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = {"ignore": ["o_proj"], "bits_for": [("v_proj", (3,))]}
    model = Model(llama, tokens_of(width, 3, 17), CODEBOOK, **rules)
    found = recorded_slopes(model, width, monkeypatch)
    assert_same_slopes(found, expected_slopes(model, width))
    assert any("v_proj" in name for name in found) == (width == 3)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("tied", [False, True])
def test_gradients_where_embeddings_are_quantized(tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slice begins with its own embedding and ends with its own head."""
    model = Model(write_source(tmp_path, tie_word_embeddings=tied), tokens_of(1), quantize_embeddings=True)
    assert len([name for name in model.layers if ".layers." not in name]) == (1 if tied else 2)
    assert_same_slopes(recorded_slopes(model, 3, monkeypatch), expected_slopes(model, 3))


@pytest.mark.usefixtures("exact")
def test_layers_without_the_width_are_served_but_not_trained(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = {"ignore": ["o_proj"], "bits_for": [("down_proj", (5, 8)), ("v_proj", (3,))]}
    model = Model(llama, tokens_of(2), **rules)
    found = recorded_slopes(model, 2, monkeypatch)
    assert_same_slopes(found, expected_slopes(model, 2))
    assert {name.rsplit(".", 1)[1] for name in found} == {"q_proj", "k_proj", "gate_proj", "up_proj"}


def random_widths(model: Model, seed: int) -> dict[str, int]:
    draw = random.Random(seed)
    return {name: draw.choice(list(layer.decoders)) for name, layer in model.layers.items()}


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("embeddings", "kind"), [(False, AFFINE_INT8), (True, AFFINE_INT8), (False, CODEBOOK)])
def test_gradients_of_a_recipe(
    seed: int, embeddings: bool, kind: DecoderKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every layer is trained at its own width, among neighbours at theirs."""
    plan = {"quantize_embeddings": embeddings, "bits_for": [("v_proj", (3,))]}
    model = Model(write_source(tmp_path), tokens_of(seed), kind, **plan)
    widths = random_widths(model, seed)
    assert len(set(widths.values())) > 1
    assert_same_slopes(recorded_slopes(model, widths, monkeypatch), expected_slopes(model, widths))


def test_rates_of_a_recipe_are_those_of_the_widths(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: dict[int, set[float]] = {}

    def step(self: TrainedAffine, slopes: torch.Tensor, rate: float, step: int) -> None:
        rates.setdefault(self.width, set()).add(rate)

    monkeypatch.setattr(TrainedAffine, "step", step)
    model, settings = Model(llama, tokens_of(0)), EndToEndSettings(epochs=1)
    model.training(random_widths(model, 0), settings).train()
    mixed, rates = rates, {}
    assert set(mixed) == set(WIDTHS)
    for width in WIDTHS:
        model.training(width, settings).train()
    assert rates == mixed


@pytest.mark.parametrize("method", [Nested, NestedVQ])
def test_decoders_of_a_recipe_of_a_checkpoint(
    method: type[Nested | NestedVQ], llama: Path, text_file: Path, tmp_path: Path
) -> None:
    quantized(llama, tmp_path / "out", text_file, EndToEndSettings(up_to=0), method)
    checkpoint, model = open_checkpoint(tmp_path / "out"), Model(llama, tokens_of(3, 8))
    widths = {layer: width for layer, width in zip(checkpoint.layers, (2, 3, 2, 5) * 9, strict=False)}

    def lost(decoders: dict[str, Decoder]) -> float:
        weights = {layer: decoders[layer].decode(checkpoint.codes(layer, width)) for layer, width in widths.items()}
        return float(model.divergence(weights))

    plain = {layer: checkpoint.decoder(layer, width) for layer, width in widths.items()}
    settings = EndToEndSettings(epochs=10, sequences=2, rate=0.01)
    trained = train_recipe(model.source, checkpoint, widths, model.tokens, settings)
    assert list(trained) == list(widths)
    for layer, decoder in trained.items():
        assert decoder.form is checkpoint.format.decoder_kind.form(widths[layer])
    assert lost(trained) < 0.8 * lost(plain)
    again = train_recipe(model.source, checkpoint, widths, model.tokens, settings, tmp_path)
    for layer, decoder in trained.items():
        assert_same_decoders(decoder, again[layer])


@torch.no_grad()
@pytest.mark.parametrize("width", [2, 3])
@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("kind", [AFFINE_INT8, CODEBOOK], ids=lambda kind: kind.name)
def test_the_model_gets_better(kind: DecoderKind, width: int, on_disk: bool, llama: Path, tmp_path: Path) -> None:
    model = Model(llama, tokens_of(3, 8), kind)
    before = float(model.divergence(model.decoded(width)))
    settings = EndToEndSettings(epochs=10, sequences=2, rate=0.01)
    trained = model.training(width, settings, tmp_path if on_disk else None).train()
    decoders = {name: decoder for block in trained.values() for name, decoder in block.items()}
    assert float(model.divergence(model.decoded(width, decoders))) < 0.8 * before
    for decoder in decoders.values():
        assert decoder.form is kind.form(decoder.width)
    assert list(tmp_path.iterdir()) == []


def quantized(
    source: Path,
    output: Path,
    text: Path,
    settings: EndToEndSettings,
    kind: type[Nested | NestedVQ] = Nested,
    **options: Any,
) -> None:
    model, method = SourceModel(source), kind(WIDTHS, end_to_end=settings)
    chosen = CalibrationSettings(str(text), samples=4, sequence_length=32)
    quantize(model, output, method, plan_format(model, method, GROUP, []), chosen, **options)


@pytest.mark.parametrize("method", [Nested, NestedVQ])
def test_only_decoders_of_trained_widths_change(
    method: type[Nested | NestedVQ], llama: Path, text_file: Path, tmp_path: Path
) -> None:
    for name, up_to in (("none", 0), ("some", 3)):
        quantized(llama, tmp_path / name, text_file, EndToEndSettings(up_to=up_to, epochs=2, rate=0.01), method)
    none, some = open_checkpoint(tmp_path / "none"), open_checkpoint(tmp_path / "some")
    for layer in none.layers:
        assert torch.equal(none.codes(layer, 8), some.codes(layer, 8))
        for width in WIDTHS:
            before, after = none.decoder(layer, width).parts, some.decoder(layer, width).parts
            same = {name: torch.equal(part, after[name]) for name, part in before.items() if name != "step"}
            assert same == dict.fromkeys(same, width > 3), (layer, width)


@pytest.mark.parametrize("method", [Nested, NestedVQ])
def test_what_was_trained_is_not_trained_again(
    method: type[Nested | NestedVQ],
    llama: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Cut off while the second width is trained, and taken up again: the same bytes."""
    settings = EndToEndSettings(up_to=5)
    quantized(llama, tmp_path / "whole", text_file, settings, method)
    train, widths = EndToEnd.train, list[int]()

    def recorded(self: EndToEnd, fail_at: int | None = None) -> Any:
        assert isinstance(self._widths, int)
        widths.append(self._widths)
        if self._widths == fail_at:
            raise KeyboardInterrupt
        return train(self)

    monkeypatch.setattr(run.EndToEnd, "train", lambda self: recorded(self, 3))
    with pytest.raises(KeyboardInterrupt):
        quantized(llama, tmp_path / "out", text_file, settings, method)
    monkeypatch.setattr(run.EndToEnd, "train", recorded)
    quantized(llama, tmp_path / "out", text_file, settings, method, resume=True)
    assert widths == [2, 3, 3, 5]
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name


@torch.no_grad()
def test_a_rate_that_leads_nowhere_is_an_error(llama: Path) -> None:
    settings = EndToEndSettings(epochs=3, rate=1e30)
    with pytest.raises(
        ValueError, match=r"training 2 bits: the KL divergence is (nan|inf) in step \d.*end_to_end\.rate"
    ):
        Model(llama, tokens_of(0)).training(2, settings).train()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("sequences=0", r"end_to_end\.sequences: found 0, expected at least 1"),
        ("up_to=-1", r"end_to_end\.up_to: found -1, expected at least 0"),
        ("epochs=0", r"end_to_end\.epochs: found 0\.0, expected a positive number"),
        ("rate=nan", r"end_to_end\.rate: found nan, expected a positive number"),
    ],
)
def test_bad_settings(setting: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_settings(Nested(WIDTHS), [f"end_to_end.{setting}"])
