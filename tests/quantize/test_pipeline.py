"""From a source on disk to a checkpoint on disk."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.quantize.test_plan import NO_TIME
from tests.quantize.tiny_sources import ARCHITECTURES, VOCABULARY, block_layers, write_source
from vllm_matquant.checkpoint.decoder import (
    AFFINE_FLOAT16,
    AFFINE_INT8,
    AFFINE_KINDS,
    CODEBOOK,
    FLOAT16,
    KINDS,
    DecoderKind,
)
from vllm_matquant.checkpoint.errors import ConfigError, OutputError, TensorValueError
from vllm_matquant.checkpoint.files import read_json
from vllm_matquant.checkpoint.names import MANIFEST_FILE
from vllm_matquant.checkpoint.reader import Checkpoint, open_checkpoint
from vllm_matquant.checkpoint.shard import read_header
from vllm_matquant.checkpoint.spec import WIDTHS, GroupSize
from vllm_matquant.checkpoint.verify import verify
from vllm_matquant.measure.model import LayerModel
from vllm_matquant.measure.text import TextError
from vllm_matquant.quantize import nested
from vllm_matquant.quantize.methods import METHODS, with_settings
from vllm_matquant.quantize.nested import Nested
from vllm_matquant.quantize.pipeline import CalibrationSettings, plan_format, quantize
from vllm_matquant.quantize.plan import make_plan
from vllm_matquant.quantize.resume import WORK_FOLDER
from vllm_matquant.quantize.selection import Selection
from vllm_matquant.quantize.source import SourceModel
from vllm_matquant.quantize.values import check_values

TOKENS = torch.randint(VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(5))
# How far the logits of random models may be from the source's, relative to their variance; a layer in another's place
# or a decoder of another width moves them by more than their variance.
LIMITS = {8: 0.05, 7: 0.05, 4: 0.5, 3: 0.7, 2: 2.0}


def run(
    model: Path,
    output: Path,
    text: Path,
    *,
    method: str = "nested",
    widths: Sequence[int] = WIDTHS,
    group_size: int | str = "auto",
    ignore: Sequence[str] = (),
    samples: int = 8,
    overwrite: bool = False,
) -> dict[str, dict[int, float]]:
    source, chosen = SourceModel(model), METHODS[method](tuple(widths))
    settings = CalibrationSettings(str(text), samples=samples, sequence_length=32, seed=1)
    planned = plan_format(source, chosen, group_size, ignore)
    return quantize(source, output, chosen, planned, settings, command=["quantize.py"], overwrite=overwrite).errors


@torch.no_grad()
def logits(model: Path, checkpoint: Checkpoint | None = None, width: int = 8) -> torch.Tensor:
    """What transformers computes with the source, or with a slice in its place."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    if checkpoint:
        LayerModel(loaded, checkpoint.layers).load(checkpoint.weights(checkpoint.slice(width)))
    return loaded(TOKENS).logits


def distance(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).square().mean() / right.var())


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_architectures(model_type: str, text_file: Path, tmp_path: Path) -> None:
    model = write_source(tmp_path / "source", model_type)
    errors = run(model, tmp_path / "output", text_file)
    checkpoint = open_checkpoint(tmp_path / "output")
    assert checkpoint.servable_widths == WIDTHS
    assert list(checkpoint.layers) == list(errors) == block_layers(SourceModel(model))
    assert all(result.passed for result in verify(tmp_path / "output"))
    expected = logits(model)
    distances = [distance(logits(model, checkpoint, width), expected) for width in (8, 5, 2)]
    assert distances[0] < LIMITS[8]
    assert distances == sorted(distances)


def test_what_is_not_quantized_stays(llama: Path, text_file: Path, tmp_path: Path) -> None:
    run(llama, tmp_path / "output", text_file)
    source, checkpoint = SourceModel(llama), open_checkpoint(tmp_path / "output")
    kept = dict(checkpoint.unquantized())
    assert sorted(kept) == [
        name for name in source.tensors.names if name.removesuffix(".weight") not in block_layers(source)
    ]
    assert "model.layers.0.self_attn.q_proj.bias" in kept
    for name, tensor in kept.items():
        assert tensor.dtype == source.tensors.read(name).dtype
        assert torch.equal(tensor, source.tensors.read(name))
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "output" / name).read_bytes() == (llama / name).read_bytes()
    written = {name: value for name, value in checkpoint.config.items() if name != "quantization_config"}
    assert written == source.config


def test_manifest(llama: Path, text_file: Path, tmp_path: Path) -> None:
    run(llama, tmp_path / "output", text_file)
    manifest = read_json(tmp_path / "output" / MANIFEST_FILE)
    assert sorted(manifest["source"]) == ["config.json", "model.safetensors"]
    assert manifest["calibration"]["name"] == "text.txt"
    assert (manifest["calibration"]["samples"], manifest["calibration"]["seed"]) == (8, 1)
    assert manifest["command"] == ["quantize.py"]
    assert str(tmp_path) not in (tmp_path / "output" / MANIFEST_FILE).read_text()


@pytest.mark.parametrize(
    ("method", "widths"),
    [
        ("nested", (2, 3, 8)),
        ("nested-vq", (2, 3, 8)),
        ("nested-vq", WIDTHS),
        ("matgptq", (2, 3, 8)),
        ("rtn", (2, 3, 8)),
        ("gptq", (3,)),
        ("matquant-omni", (2, 3, 4, 8)),
        ("omniquant", (3,)),
    ],
)
def test_methods(method: str, widths: tuple[int, ...], llama: Path, text_file: Path, tmp_path: Path) -> None:
    errors = run(llama, tmp_path / "output", text_file, method=method, widths=widths)
    checkpoint = open_checkpoint(tmp_path / "output")
    assert checkpoint.format.widths == widths
    rounded = method in ("matgptq", "matquant-omni")
    assert checkpoint.format.slicing == ("round" if rounded else "truncate")
    assert all(result.passed for result in verify(tmp_path / "output"))
    for layer in checkpoint.layers:
        for width in widths if not rounded else ():
            assert torch.equal(
                checkpoint.codes(layer, width), checkpoint.codes(layer, widths[-1]) >> (widths[-1] - width)
            )
    # Over all layers: one with hardly more fours than a codebook has entries may be as good at a narrow width.
    sums = [sum(each[width] for each in errors.values()) for width in widths] if errors else []
    assert all(wide < narrow for narrow, wide in itertools.pairwise(sums))
    expected = logits(llama)
    distances = [distance(logits(llama, checkpoint, width), expected) for width in reversed(widths)]
    assert distances == sorted(distances)
    assert distances[0] < (LIMITS[8] if widths[-1] == 8 and method != "matgptq" else 0.5)
    assert set(errors) == (set() if method == "rtn" else set(checkpoint.layers))
    calibration = read_json(tmp_path / "output" / MANIFEST_FILE)["calibration"]
    assert (calibration is None) == (method == "rtn")


@pytest.mark.parametrize("widths", [(2, 4), (3,), (8,), (2,), (5, 6, 7)])
def test_subsets_of_widths(widths: tuple[int, ...], llama: Path, text_file: Path, tmp_path: Path) -> None:
    run(llama, tmp_path / "output", text_file, widths=widths)
    checkpoint = open_checkpoint(tmp_path / "output")
    assert checkpoint.servable_widths == widths
    expected = logits(llama)
    distances = [distance(logits(llama, checkpoint, width), expected) for width in reversed(widths)]
    assert distances == sorted(distances)
    assert distances[0] < LIMITS[widths[-1]]


@pytest.mark.parametrize(
    ("group_size", "groups"),
    [(32, (2, 4)), (64, (1, 2)), ("auto", (1, 1)), ("channel", (1, 1)), (8, (8, 16))],
)
def test_group_sizes(
    group_size: int | str, groups: tuple[int, int], llama: Path, text_file: Path, tmp_path: Path
) -> None:
    run(llama, tmp_path / "output", text_file, group_size=group_size)
    checkpoint = open_checkpoint(tmp_path / "output")
    assert checkpoint.format.group_size == group_size
    for layer, expected in zip(("self_attn.q_proj", "mlp.down_proj"), groups, strict=True):
        values = checkpoint.decoder(f"model.layers.1.{layer}", 4).affine
        assert values.scale.shape == values.offset.shape == (64, expected)
    assert distance(logits(llama, checkpoint), logits(llama)) < LIMITS[8]


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        *itertools.product(["nested", "nested-tuned", "matgptq", "gptq", "rtn"], AFFINE_KINDS),
        ("nested-vq", CODEBOOK),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_decoder_kinds(method: str, kind: DecoderKind, llama: Path, text_file: Path, tmp_path: Path) -> None:
    source, output = SourceModel(llama), tmp_path / "output"
    chosen = METHODS[method]((3,) if method == "gptq" else (2, 8))
    if chosen.training:
        chosen = with_settings(chosen, ["end_to_end.up_to=0"])
    format_ = plan_format(source, chosen, 32, [], decoder_kind=kind)
    errors = quantize(source, output, chosen, format_, CalibrationSettings(str(text_file), 4, 32)).errors
    checkpoint = open_checkpoint(output)
    assert checkpoint.format.decoder_kind is kind
    assert all(result.passed for result in verify(output))
    widest = chosen.widths[-1]
    limit = {"gptq": 0.5, "matgptq": 0.5, "nested-tuned": 1.2 * LIMITS[8]}.get(method, LIMITS[8])
    assert distance(logits(llama, checkpoint, widest), logits(llama)) < limit
    assert all(layer_errors[widest] < 0.2 for layer_errors in errors.values())


def test_decoders_of_whole_rows_are_float16(llama: Path) -> None:
    source, method = SourceModel(llama), Nested(WIDTHS)
    assert plan_format(source, method, "channel", []).decoder_kind is AFFINE_FLOAT16
    assert plan_format(source, method, "auto", []).decoder_kind is AFFINE_INT8
    assert plan_format(source, method, "channel", [], decoder_kind=AFFINE_INT8).decoder_kind is AFFINE_INT8


@pytest.mark.parametrize("group_size", ["channel", "auto", 32])
def test_codebooks_are_stored_where_nothing_is_asked_for(llama: Path, group_size: GroupSize) -> None:
    format_ = plan_format(SourceModel(llama), METHODS["nested-vq"](WIDTHS), group_size, [])
    assert format_.decoder_kind is CODEBOOK
    assert format_.slicing == "truncate"


@pytest.mark.parametrize(
    ("method", "kind", "expected"),
    [
        *((method, CODEBOOK, "affine-float16 or affine-int8") for method in METHODS if "vq" not in method),
        *(("gptvq", kind, "vectors-1d or vectors-2d or vectors-4d") for kind in KINDS.values()),
        *(("nested-vq", kind, "codebook-4d") for kind in AFFINE_KINDS),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_decoders_that_a_method_cannot_fill(llama: Path, method: str, kind: DecoderKind, expected: str) -> None:
    message = f"decoder: found {kind.name}, expected {expected} for method {method}"
    chosen = METHODS[method]((4,))
    with pytest.raises(ValueError, match=message):
        plan_format(SourceModel(llama), chosen, 32, [], decoder_kind=kind)


def test_group_size_that_does_not_divide(tmp_path: Path) -> None:
    source = SourceModel(write_source(tmp_path / "source", intermediate_size=96))
    message = r"layers\.0\.mlp\.down_proj: found 64, expected .* 96 .*: 8, 16, 24, 32, 48, \"channel\""
    with pytest.raises(ConfigError, match=message):
        plan_format(source, Nested(WIDTHS), 64, [])
    assert plan_format(source, Nested(WIDTHS), "auto", []).group_size_of(96, "layer") == 32
    assert "model.layers.0.mlp.down_proj" in plan_format(source, Nested(WIDTHS), 64, ["down_proj"]).ignored_layers


def test_group_sizes_of_single_layers(llama: Path, text_file: Path, tmp_path: Path) -> None:
    source, method = SourceModel(llama), Nested((2, 8))
    rules: list[tuple[str, GroupSize]] = [(r"mlp\.", 32), (r"layers\.1\.mlp\.down", "channel"), ("k_proj", 8)]
    format_ = plan_format(source, method, 64, [r"layers\.0\..*k_proj"], rules)
    assert format_.layer_group_sizes == {
        **{f"model.layers.0.mlp.{name}_proj": 32 for name in ("gate", "up", "down")},
        "model.layers.1.self_attn.k_proj": 8,
        **{f"model.layers.1.mlp.{name}_proj": 32 for name in ("gate", "up")},
        "model.layers.1.mlp.down_proj": "channel",
    }
    settings = CalibrationSettings(str(text_file), samples=8, sequence_length=32)
    plan = make_plan(Selection(source, format_), method, NO_TIME, tmp_path, (0, 0))
    quantize(source, tmp_path / "output", method, format_, settings)
    checkpoint = open_checkpoint(tmp_path / "output")
    assert checkpoint.format == format_
    for layer, groups in (("0.mlp.down", 4), ("1.mlp.down", 1), ("1.self_attn.k", 8), ("1.self_attn.q", 1)):
        assert checkpoint.decoder(f"model.layers.{layer}_proj", 2).affine.scale.shape[1] == groups
    assert distance(logits(llama, checkpoint), logits(llama)) < LIMITS[8]
    assert checkpoint.slice(2).resident_bytes == sum(
        checkpoint.codes(name, 2).numel() // 4 + sum(p.nbytes for p in checkpoint.decoder(name, 2).parts.values())
        for name in checkpoint.layers
    )
    assert plan.output == sum(
        spec.nbytes for file in (tmp_path / "output").glob("*.safetensors") for spec in read_header(file).values()
    )
    assert all(result.passed for result in verify(tmp_path / "output"))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (("(", 32), r"group-size-for: found '\(', expected a regular expression"),
        (("nonesuch", 32), "group-size-for: 'nonesuch' matches none of the model's 15 linear layers"),
        (("v_proj", 48), r"group_size for model\.layers\.0\.self_attn\.v_proj: found 48, expected a divisor of its 64"),
    ],
)
def test_bad_group_size_for(llama: Path, rule: tuple[str, GroupSize], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_format(SourceModel(llama), Nested(WIDTHS), "auto", [], [rule])


@pytest.mark.parametrize("name", ["nested", "nested-vq"])
def test_widths_of_single_layers(name: str, llama: Path, text_file: Path, tmp_path: Path) -> None:
    source, method, output = SourceModel(llama), METHODS[name]((2, 3, 8)), tmp_path / "output"
    rules: list[tuple[str, tuple[int, ...]]] = [("down_proj", (8,)), (r"1\.mlp\.down", (4, 8)), ("k_proj", (2, 3, 8))]
    format_ = plan_format(source, method, 32, [], bits_for=rules)
    own = {"model.layers.0.mlp.down_proj": (8,), "model.layers.1.mlp.down_proj": (4, 8)}
    assert format_.layer_widths == own
    settings = CalibrationSettings(str(text_file), samples=8, sequence_length=32)
    plan = make_plan(Selection(source, format_), method, NO_TIME, tmp_path, (0, 0))
    errors = quantize(source, output, method, format_, settings).errors
    assert {name: tuple(found) for name, found in errors.items() if tuple(found) != method.widths} == own

    checkpoint = open_checkpoint(output)
    assert checkpoint.format == format_
    assert all(result.passed for result in verify(output))
    served = {name: [int(checkpoint.codes(name, width).max()).bit_length() for width in (2, 3, 8)] for name in own}
    assert served == {"model.layers.0.mlp.down_proj": [8, 8, 8], "model.layers.1.mlp.down_proj": [4, 4, 8]}
    for name, widths in own.items():  # what 2 bits read of these layers is wider, and so nearer to the source
        assert errors[name][widths[0]] < errors["model.layers.0.mlp.up_proj"][2] / 4
    sizes = {
        path.name: sum(spec.nbytes for spec in read_header(path).values()) for path in output.glob("*.safetensors")
    }
    assert plan.output == sum(sizes.values())
    assert plan.files[2] == sum(size for name, size in sizes.items() if name.startswith("model-width2-"))
    for path in output.glob("model-width[3-8]-*"):
        path.unlink()
    assert distance(logits(llama, open_checkpoint(output), 2), logits(llama)) < LIMITS[2]


@pytest.mark.parametrize(
    ("method", "rule", "message"),
    [
        ("nested", ("nonesuch", (2,)), "bits-for: 'nonesuch' matches none of the model's 15 linear layers"),
        (
            "nested",
            ("k_proj", (4, 5)),
            r"widths of model\.layers\.0\.self_attn\.k_proj: found \[4, 5\], of which \[5\]",
        ),
        ("nested-tuned", ("k_proj", (4,)), "bits-for: found method nested-tuned, expected one that takes layers with"),
    ],
)
def test_bad_bits_for(llama: Path, method: str, rule: tuple[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_format(SourceModel(llama), METHODS[method]((2, 3)), "auto", [], bits_for=[rule])


def test_ignore(llama: Path, text_file: Path, tmp_path: Path) -> None:
    run(llama, tmp_path / "output", text_file, ignore=[r"layers\.0\.mlp\.", "k_proj$", "lm_head"])
    checkpoint = open_checkpoint(tmp_path / "output")
    ignored = [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")]
    ignored += [f"model.layers.{index}.self_attn.k_proj" for index in (0, 1)]
    assert set(checkpoint.format.ignored_layers) == {"lm_head", *ignored}
    assert set(checkpoint.layers) == set(block_layers(SourceModel(llama))) - set(ignored)
    kept = dict(checkpoint.unquantized())
    assert torch.equal(kept[f"{ignored[0]}.weight"], SourceModel(llama).tensors.read(f"{ignored[0]}.weight"))


@pytest.mark.parametrize(
    ("ignore", "message"),
    [
        (["("], r"ignore: found '\(', expected a regular expression"),
        (["nonesuch"], "ignore: 'nonesuch' matches none of the model's 15 linear layers"),
        (["proj"], r"ignore: found \['proj'\], which match every linear layer"),
    ],
)
def test_bad_ignore(llama: Path, ignore: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_format(SourceModel(llama), Nested(WIDTHS), "auto", ignore)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("method", ["nested", "nested-vq"])
def test_two_runs_give_the_same_bytes(method: str, llama: Path, text_file: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        run(llama, tmp_path / name, text_file, method=method, widths=(2, 3, 8))
    assert content(tmp_path / "first") == content(tmp_path / "second")


def test_shards_of_the_source_do_not_matter(llama: Path, text_file: Path, tmp_path: Path) -> None:
    run(llama, tmp_path / "first", text_file)
    run(write_source(tmp_path / "source", shard_size="100KB"), tmp_path / "second", text_file)
    first, second = content(tmp_path / "first"), content(tmp_path / "second")
    assert first.pop(MANIFEST_FILE) != second.pop(MANIFEST_FILE)
    assert first == second


def test_nothing_is_written_without_enough_text(llama: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(TextError):
        run(llama, tmp_path / "output", text_file, samples=10_000)
    assert not (tmp_path / "output").exists()


def test_nothing_is_written_of_a_source_with_nan(llama: Path, text_file: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(llama, tmp_path / "source"))
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, model / "model.safetensors")
    for method in ("nested", "rtn"):
        with pytest.raises(TensorValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: found NaN"):
            run(model, tmp_path / "output", text_file, method=method)
        assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda weight: weight.index_fill(1, torch.tensor([5]), -1e5),
            r"weights of up to 1e\+05, expected up to 32752",
        ),
        (lambda weight: weight / 10_000, r"weights of up to \S+e-05, expected some of 0\.001 or more"),
    ],
)
@pytest.mark.parametrize("kind", AFFINE_KINDS, ids=lambda kind: kind.name)
def test_weights_that_decoders_cannot_hold(
    llama: Path, tmp_path: Path, kind: DecoderKind, change: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    model = Path(shutil.copytree(llama, tmp_path / "source"))
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {name: change(tensors[name])}, model / "model.safetensors")
    source = SourceModel(model)
    for widths in ((2, 3, 4), (4, 8)):
        format_ = plan_format(source, METHODS["rtn"](widths), 64, [], decoder_kind=kind)
        if kind.form(widths[-1]) is FLOAT16:
            with pytest.raises(TensorValueError, match=r"up_proj\.weight: found weights of up to"):
                check_values(Selection(source, format_))
        else:
            check_values(Selection(source, format_))
    with pytest.raises(TensorValueError, match=rf"model\.layers\.1\.mlp\.up_proj\.weight: found {message}"):
        run(model, tmp_path / "output", tmp_path, method="rtn")
    assert not (tmp_path / "output").exists()


def test_a_folder_that_was_there_stays(llama: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("mine")
    with pytest.raises(TextError):
        run(llama, tmp_path, text_file, samples=10_000)
    assert content(tmp_path) == {"notes.md": b"mine"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_source_is_not_overwritten(llama: Path, text_file: Path, tmp_path: Path, overwrite: bool) -> None:
    model = Path(shutil.copytree(llama, tmp_path / "source"))
    with pytest.raises(OutputError):
        run(model, model, text_file, overwrite=overwrite)
    assert content(model) == content(llama)


def test_an_interrupted_run_leaves_no_checkpoint(
    llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(llama, tmp_path / "old", text_file, widths=(4,))
    before = content(tmp_path / "old")
    relative_error = nested.relative_error
    calls: list[Any] = []

    def interrupted(*arguments: Any) -> dict[int, float]:
        calls.append(arguments)
        if len(calls) == 9:  # in the second block
            raise KeyboardInterrupt
        return relative_error(*arguments)

    monkeypatch.setattr(nested, "relative_error", interrupted)
    for folder, overwrite in ((tmp_path / "new", False), (tmp_path / "old", True)):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            run(llama, folder, text_file, overwrite=overwrite)
    assert [path.name for path in (tmp_path / "new").iterdir()] == [WORK_FOLDER]  # a finished block
    shutil.rmtree(tmp_path / "old" / WORK_FOLDER)
    assert content(tmp_path / "old") == before
