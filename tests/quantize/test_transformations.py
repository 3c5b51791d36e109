"""Scales learned between layers: what they leave as it is, what they gain, and where they are refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.quantize.test_omni import block_error, plainly_decoded, random_weight
from tests.quantize.test_resume import content, cut_off, run
from tests.quantize.test_sequential import first_task
from tests.quantize.tiny_sources import write_source
from vllm_matquant.checkpoint.verify import verify
from vllm_matquant.cli import main
from vllm_matquant.jobs.evaluate import Evaluate
from vllm_matquant.quantize import omni, transformations
from vllm_matquant.quantize.block import BlockTask
from vllm_matquant.quantize.methods import METHODS, with_settings
from vllm_matquant.quantize.omni import ClippedLayer, ClippingSettings, MatQuantOmni, OmniQuant
from vllm_matquant.quantize.runner import call_block
from vllm_matquant.quantize.source import SourceModel
from vllm_matquant.quantize.transformations import ChannelScales, Fold, Pair, TransformationSettings, find_pairs

__all__ = ["cut_off"]

PLAIN = {"attention_bias": False, "mlp_bias": False}
CLIPPING = ClippingSettings(iterations=40, sequences=10, rate=0.3)
SCALED = TransformationSettings(rate=0.05)
BLOCKS = 4


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Llama without biases, whose pairs of query heads share keys and values; not to be changed."""
    return write_source(tmp_path_factory.mktemp("plain") / "llama", **PLAIN)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with four blocks, for :func:`tests.quantize.test_resume.cut_off`."""
    return write_source(tmp_path_factory.mktemp("deep") / "llama", num_hidden_layers=BLOCKS, **PLAIN)


@pytest.fixture(autouse=True)
def _heard_again() -> None:
    transformations._say_once.cache_clear()


def pairs_of(task: BlockTask) -> dict[str, str]:
    return {
        pair.writer.removeprefix(f"{task.name}."): pair.reader.removeprefix(f"{task.name}.")
        for pair in find_pairs(task)
    }


def outputs(task: BlockTask, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    given = task.calibration
    return call_block(task.block, given.reference, given.arguments, task.local_names(weights))


@torch.no_grad()
@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", PLAIN),
        ("llama", PLAIN | {"num_key_value_heads": 1}),
        ("llama", PLAIN | {"num_key_value_heads": 4}),
        ("mistral", {}),
        ("qwen3", {}),
        ("gemma", {}),
        ("gemma2", {}),
        ("gemma3_text", {}),
    ],
)
def test_scaled_layers_give_the_blocks_outputs(model_type: str, changes: dict[str, Any], tmp_path: Path) -> None:
    task = first_task(SourceModel(write_source(tmp_path / "source", model_type, **changes)))
    assert pairs_of(task) == {"self_attn.v_proj": "self_attn.o_proj", "mlp.up_proj": "mlp.down_proj"}
    weights, generator = {}, torch.Generator().manual_seed(0)
    for pair in find_pairs(task):
        scales = ChannelScales(pair, torch.ones(len(pair.channels)), SCALED, "cpu")
        scales.logs.data.copy_(torch.randn(len(scales.logs), generator=generator))
        writer, reader = task.linears[pair.writer], task.linears[pair.reader]
        assert len(scales.logs) == writer.out_features
        weights[pair.writer] = Fold.of(writer, None, scales).weight()
        weights[pair.reader] = Fold.of(reader, scales, None).weight()
        ratio = weights[pair.reader] / reader.weight
        assert float((ratio.amax(0) / ratio.amin(0)).max()) < 1.001  # one scale for a column
        assert float(ratio.amax() / ratio.amin()) > 10
    torch.testing.assert_close(outputs(task, weights), outputs(task, {}), rtol=1e-4, atol=1e-4)


def test_heads_of_queries_share_the_scales_of_values(plain: Path) -> None:
    (values, _) = find_pairs(first_task(SourceModel(plain)))
    expected = [16 * (head // 2) + place for head in range(4) for place in range(16)]
    assert values.channels.tolist() == expected


@pytest.mark.parametrize("width", [2, 4, 8])
def test_weights_and_their_derivatives(width: int) -> None:
    weight = random_weight(width)
    pair = Pair("writer", "reader", torch.arange(32).repeat(2))
    scales = ChannelScales(pair, torch.ones(64), replace(SCALED, rate=0.5), "cpu")
    layer = ClippedLayer(weight, 16, 8, [width], "round", CLIPPING, scales)
    generator = torch.Generator().manual_seed(width)
    logs = torch.randn(32, generator=generator).requires_grad_()
    kept = (0.5 + torch.rand(2, 6, 4, generator=generator)).requires_grad_()
    scales.logs.data.copy_(logs.detach())
    layer._kept.data.copy_(kept.detach())
    [found] = layer.weights()
    columns = torch.cat([logs, logs]).exp()
    expected = plainly_decoded(weight * columns, kept, 16, width, 2**width - 1) / columns
    torch.testing.assert_close(found, expected)
    gradient = random_weight(width + 100)
    slopes = torch.autograd.grad(expected, [kept, logs], gradient)
    layer.step([gradient], 21)
    torch.testing.assert_close(layer._kept.grad, slopes[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(scales.logs.grad, slopes[1], rtol=1e-3, atol=1e-3)
    # Adam's first step is the rate, of which half is left in the 21st of 40 steps.
    moved = slopes[1].abs() > 1e-3
    torch.testing.assert_close((scales.logs - logs)[moved], -0.25 * slopes[1].sign()[moved], rtol=1e-2, atol=1e-3)


def with_outliers(source: Path) -> BlockTask:
    """The first block with some channels between layers that are hard to quantize: large columns behind small rows."""
    task = first_task(SourceModel(source), (3,))
    factors = torch.ones(128)
    factors[::7] = 20.0
    for writer, reader in (("self_attn.v_proj", "self_attn.o_proj"), ("mlp.up_proj", "mlp.down_proj")):
        rows, columns = (task.block.get_submodule(name).weight for name in (writer, reader))
        pair = next(each for each in find_pairs(task) if each.writer.endswith(writer))
        rows.div_(factors[: len(rows)].unsqueeze(1))
        columns.mul_(factors[: len(rows)][pair.channels])
    return task


@torch.no_grad()
@pytest.mark.parametrize("settings", [TransformationSettings(rate=0.1), TransformationSettings(migration=1.0)])
def test_channels_with_outliers_gain(plain: Path, settings: TransformationSettings) -> None:
    def error(settings: TransformationSettings) -> float:
        task = with_outliers(plain)
        method = OmniQuant((3,), clipping=CLIPPING, transformations=settings)
        return block_error(task, dict(method.quantize_block(task)), 3, OmniQuant)

    assert error(settings) < 0.8 * error(TransformationSettings())


@torch.no_grad()
def test_what_is_stored_is_what_was_trained(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights that the block's loss was taken of give the outputs of those that are stored."""
    task, trained = first_task(SourceModel(plain), (2, 4, 8)), dict[str, ClippedLayer]()

    def kept(of: BlockTask, layers: dict[str, ClippedLayer], *rest: Any) -> None:
        trained.update(layers)
        train_block(of, layers, *rest)

    train_block = omni.train_block
    monkeypatch.setattr(omni, "train_block", kept)
    method = MatQuantOmni((2, 4, 8), clipping=CLIPPING, transformations=replace(SCALED, rate=0.2, migration=0.5))
    layers = dict(method.quantize_block(task))
    for place, width in enumerate((8, 4, 2)):
        expected = outputs(task, {name: layer.weights()[place] for name, layer in trained.items()})
        found = outputs(task, {name: layer.decode(width, "round") for name, layer in layers.items()})
        source = outputs(task, {})
        assert float((found - expected).norm()) < 0.05 * float((expected - source).norm()) + 2e-3 * float(source.norm())
    for name in ("self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        layer, linear = layers[f"{task.name}.{name}"], task.linears[f"{task.name}.{name}"]
        assert float((layer.decode(8, "round") - linear.weight).norm()) > 0.1 * float(linear.weight.norm())
        assert layer.errors[8] < layer.errors[4] < layer.errors[2] < 0.5  # of its own outputs, scaled as they are
    hessians = method.collect(first_task(SourceModel(plain)))
    for name in ("self_attn.o_proj", "mlp.down_proj"):  # whose outputs are the source's
        layer, weight = layers[f"{task.name}.{name}"], task.linears[f"{task.name}.{name}"].weight
        hessian, columns = hessians.hessian(f"{task.name}.{name}"), trained[f"{task.name}.{name}"]._scales.of_columns()
        lost = layer.decode(4, "round") / columns - weight
        expected = ((lost @ hessian) * lost).sum() / ((weight @ hessian) * weight).sum()
        assert layer.errors[4] == pytest.approx(float(expected), rel=1e-3)


def test_where_scales_start() -> None:
    pair = Pair("writer", "reader", torch.tensor([0, 0, 1, 1, 2, 2]))
    energies = torch.tensor([1.0, 7.0, 0.0, 0.0, 64.0, 64.0])
    scales = ChannelScales(pair, energies, TransformationSettings(migration=0.5), "cpu").of_rows()
    assert float(scales[2] / scales[0]) == pytest.approx((64 / 4) ** 0.25)
    assert float(scales.log().sum()) == pytest.approx(0, abs=1e-5)
    assert scales[1] < scales[0]
    assert scales.isfinite().all()
    ones = ChannelScales(pair, energies, TransformationSettings(rate=0.1), "cpu")
    assert torch.equal(ones.of_rows(), torch.ones(3))
    assert torch.equal(ones.of_columns(), torch.ones(6))


@torch.no_grad()
def test_without_them_nothing_is_looked_for(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(omni, "find_pairs", None)
    method = OmniQuant((2,), clipping=replace(CLIPPING, iterations=1))
    assert not method.transformations.wanted
    assert len(dict(method.quantize_block(first_task(SourceModel(llama), (2,))))) == 7


@torch.no_grad()
def test_same_seed_same_bytes(plain: Path) -> None:
    def codes(rate: float) -> torch.Tensor:
        method = MatQuantOmni(
            (2, 8), clipping=replace(CLIPPING, iterations=4), transformations=replace(SCALED, rate=rate)
        )
        layers = dict(method.quantize_block(first_task(SourceModel(plain), (2, 8))))
        return torch.cat([layer.codes.flatten() for layer in layers.values()])

    assert torch.equal(codes(0.05), codes(0.05))
    assert not torch.equal(codes(0.05), codes(0.06))


def test_a_resumed_run_writes_the_same_bytes(
    deep: Path, text_file: Path, tmp_path: Path, cut_off: Callable[..., None]
) -> None:
    settings = ["transformations.rate=0.05", "clipping.iterations=3"]
    own = {"method": with_settings(METHODS["matquant-omni"]((2, 4, 8)), settings)}
    whole = run(deep, tmp_path / "whole", text_file, **own)
    cut_off(tmp_path / "out", **own)
    with pytest.raises(ValueError, match=r"transformations"):
        run(
            deep,
            tmp_path / "out",
            text_file,
            resume=True,
            method=with_settings(own["method"], ["transformations.rate=1"]),
        )
    assert run(deep, tmp_path / "out", text_file, resume=True, **own) == whole
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_checkpoint(plain: Path, text_file: Path, tmp_path: Path) -> None:
    """What the report measures block by block is what the folder gives as a whole, and 8 bits are the source nearly."""
    arguments = ["--method", "matquant-omni", "--bits", "2,4,8", "--samples", "6", "--sequence-length", "32"]
    arguments += ["--setting", "transformations.rate=0.3", "--setting", "clipping.iterations=10", "--group-size", "32"]
    arguments += ["--held-out", str(text_file), "--held-out-samples", "4"]
    assert main(["quantize", str(plain), "--output", str(tmp_path / "out"), *arguments]) == 0
    assert all(result.passed for result in verify(tmp_path / "out"))
    report = json.loads((tmp_path / "out" / "report" / "report.json").read_text())
    rows = Evaluate(tmp_path / "out", plain, text_file, samples=4, sequence_length=32).run()
    for measured, row in zip(report["quality"], rows, strict=True):
        assert measured["kl"] == pytest.approx(row["kl"], rel=1e-2, abs=1e-6)
    assert rows[-1]["kl"] < 1e-3 < rows[0]["kl"]


class TestPairsThatAreNone:
    """Each is left out with a sentence, and a block without any pair is refused."""

    @torch.no_grad()
    def test_biases(self, llama: Path) -> None:
        expected = (
            "model.layers.0: found no layers .*self_attn.v_proj: found a bias.*mlp.up_proj: found a bias.*Leave out"
        )
        with pytest.raises(ValueError, match=expected):
            find_pairs(first_task(SourceModel(llama)))

    @torch.no_grad()
    def test_one_bias(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        task = first_task(SourceModel(write_source(tmp_path / "source", "qwen2")))
        with caplog.at_level(logging.WARNING):
            assert pairs_of(task) == pairs_of(task) == {"mlp.up_proj": "mlp.down_proj"}
        (said,) = caplog.messages  # once, not for every block
        assert said.startswith("no channels are scaled behind self_attn.v_proj: found a bias, expected none")

    @torch.no_grad()
    def test_ignored_layer(self, plain: Path, caplog: pytest.LogCaptureFixture) -> None:
        task = first_task(SourceModel(plain))
        sizes = {name: size for name, size in task.group_sizes.items() if not name.endswith("down_proj")}
        assert pairs_of(replace(task, group_sizes=sizes)) == {"self_attn.v_proj": "self_attn.o_proj"}
        assert "mlp.up_proj: found down_proj not quantized, expected both to be" in caplog.text

    @torch.no_grad()
    def test_something_in_between(self, plain: Path, caplog: pytest.LogCaptureFixture) -> None:
        task = first_task(SourceModel(plain))
        values = task.linears["model.layers.0.self_attn.v_proj"]
        values.register_forward_hook(lambda _, inputs, output: output / output.norm(dim=-1, keepdim=True))
        assert pairs_of(task) == {"mlp.up_proj": "mlp.down_proj"}
        assert "found other outputs of the block with scaled channels between it and o_proj" in caplog.text

    @torch.no_grad()
    @pytest.mark.parametrize("size", [None, 24])
    def test_heads_of_unknown_size(
        self, plain: Path, caplog: pytest.LogCaptureFixture, size: int | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        task = first_task(SourceModel(plain))
        task.block.self_attn.head_dim = size
        monkeypatch.setattr(Pair, "trial", lambda *_: True)  # transformers' own code asks for the size too
        assert pairs_of(task) == {"mlp.up_proj": "mlp.down_proj"}
        assert f"found 32 channels for 64 columns and heads of {size}, expected whole groups of heads" in caplog.text

    @torch.no_grad()
    def test_two_layers_behind_it(self, plain: Path, caplog: pytest.LogCaptureFixture) -> None:
        task = first_task(SourceModel(plain))
        task.block.mlp.other = torch.nn.Linear(4, 4)
        assert pairs_of(task) == {"self_attn.v_proj": "self_attn.o_proj"}
        assert "mlp.up_proj: found down_proj, other behind it, expected one linear layer" in caplog.text

    @torch.no_grad()
    def test_no_gate(self, plain: Path, caplog: pytest.LogCaptureFixture) -> None:
        task = first_task(SourceModel(plain))
        del task.block.mlp.gate_proj
        sizes = {name: size for name, size in task.group_sizes.items() if "gate" not in name}
        task.block.mlp.forward = lambda hidden: hidden
        assert pairs_of(replace(task, group_sizes=sizes)) == {"self_attn.v_proj": "self_attn.o_proj"}
        assert "mlp.up_proj: found no gate_proj beside it, expected gate_proj, up_proj" in caplog.text


@pytest.mark.parametrize("setting", ["rate=-0.1", "migration=inf"])
def test_faults_of_settings(setting: str) -> None:
    with pytest.raises(ValueError, match=r"setting transformations.*: found .*, expected a number from 0 up"):
        with_settings(OmniQuant((2,)), [f"transformations.{setting}"])
