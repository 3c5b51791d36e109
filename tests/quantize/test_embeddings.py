"""Input embedding and output head as nested codes, tied and not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.quantize.test_plan import NO_TIME, tensor_bytes
from tests.quantize.tiny_sources import ARCHITECTURES, VOCABULARY, block_layers, write_source
from vllm_matquant.checkpoint.decoder import AFFINE_FLOAT16, AFFINE_INT8
from vllm_matquant.checkpoint.errors import ConfigError
from vllm_matquant.checkpoint.reader import Checkpoint, open_checkpoint
from vllm_matquant.checkpoint.shard import read_header
from vllm_matquant.checkpoint.spec import WIDTHS
from vllm_matquant.checkpoint.verify import verify
from vllm_matquant.measure.peak import PeakBytes
from vllm_matquant.measure.windows import draw_windows, load_tokenizer
from vllm_matquant.quantize import embeddings
from vllm_matquant.quantize.block import BlockTask
from vllm_matquant.quantize.embeddings import quantize_rows
from vllm_matquant.quantize.method import Method
from vllm_matquant.quantize.methods import METHODS
from vllm_matquant.quantize.pipeline import CalibrationSettings, Outcome, plan_format, quantize
from vllm_matquant.quantize.plan import _steps, make_plan
from vllm_matquant.quantize.resume import WorkFolder
from vllm_matquant.quantize.selection import Selection
from vllm_matquant.quantize.source import SourceModel, read_matrix

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
SAMPLES, LENGTH = 16, 64


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Tiny models, by whether their embeddings are tied; not to be changed."""
    folder = tmp_path_factory.mktemp("sources")
    return {tied: write_source(folder / str(tied), tie_word_embeddings=tied) for tied in (False, True)}


def run(
    model: Path,
    output: Path,
    text: Path,
    method: str = "rtn",
    widths: Sequence[int] = (2, 3, 8),
    ignore: Sequence[str] = (),
    **options: Any,
) -> Outcome:
    source, chosen = SourceModel(model), METHODS[method](tuple(widths))
    kind = options.pop("decoder_kind", None)
    format_ = plan_format(source, chosen, 32, ignore, quantize_embeddings=True, decoder_kind=kind)
    settings = CalibrationSettings(str(text), samples=SAMPLES, sequence_length=LENGTH)
    return quantize(source, output, chosen, format_, settings, **options)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def outer_names(checkpoint: Checkpoint) -> set[str]:
    return {name for name in checkpoint.layers if ".layers." not in name}


def rounded(weight: torch.Tensor, width: int) -> torch.Tensor:
    """Rounding to nearest on the min-max grid of groups of 32, each slice at the middle of its cells."""
    groups = weight.view(len(weight), -1, 32)
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    step = (high - low) / 255
    cell = 2 ** (8 - width)
    codes = ((groups - low) / step).round().int() // cell
    return (low + step * (codes * cell + (cell - 1) / 2)).view_as(weight)


@pytest.mark.parametrize("widths", [(2, 3, 8), (4,), WIDTHS])
@pytest.mark.parametrize("tied", [False, True])
def test_rounding_to_nearest(
    tied: bool, widths: tuple[int, ...], sources: dict[bool, Path], text_file: Path, tmp_path: Path
) -> None:
    run(sources[tied], tmp_path / "out", text_file, widths=widths, decoder_kind=AFFINE_FLOAT16)
    checkpoint, source = open_checkpoint(tmp_path / "out"), SourceModel(sources[tied])
    assert outer_names(checkpoint) == ({EMBEDDING} if tied else {EMBEDDING, HEAD})
    assert set(block_layers(source)) < set(checkpoint.layers)
    assert not any(name.startswith((EMBEDDING, HEAD)) for name, _ in checkpoint.unquantized())
    for width in widths:
        weights = dict(checkpoint.weights(checkpoint.slice(width)))
        for name in outer_names(checkpoint):
            expected = rounded(source.tensors.read(f"{name}.weight"), width)
            # Another code would be off by 0.002 and more.
            torch.testing.assert_close(weights[name], expected, rtol=0, atol=6e-4)
    assert all(result.passed for result in verify(tmp_path / "out"))


@torch.no_grad()
def head_inputs(model: Path, text: Path) -> torch.Tensor:
    """What transformers gives the output head on the calibration text: float32 [tokens, hidden size]."""
    calibration = draw_windows(
        str(text), load_tokenizer(model), samples=SAMPLES, sequence_length=LENGTH, seed=0, text_column="text"
    )
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    inputs: list[torch.Tensor] = []
    loaded.lm_head.register_forward_pre_hook(lambda _, given: inputs.append(given[0].flatten(0, 1)))
    loaded(calibration.tokens)
    return inputs[0]


@pytest.mark.parametrize("method", ["nested", "gptq", "matgptq"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_head_fits_its_inputs(
    tied: bool, method: str, sources: dict[bool, Path], text_file: Path, tmp_path: Path
) -> None:
    widths = (3,) if method == "gptq" else (2, 3, 8)
    outcome = run(sources[tied], tmp_path / "out", text_file, method, widths)
    checkpoint, inputs = open_checkpoint(tmp_path / "out"), head_inputs(sources[tied], text_file)
    assert list(outcome.errors) == list(checkpoint.layers)
    name = EMBEDDING if tied else HEAD
    weight = SourceModel(sources[tied]).tensors.read(f"{name}.weight")

    def error(decoded: torch.Tensor) -> float:
        return float((inputs @ (weight - decoded).T).square().sum() / (inputs @ weight.T).square().sum())

    for width in widths:
        found = error(dict(checkpoint.weights(checkpoint.slice(width)))[name])
        assert outcome.errors[name][width] == pytest.approx(found, rel=0.05)
        if method != "matgptq":  # whose one copy of the weights favours the mean of the widths
            assert found < 0.8 * error(rounded(weight, width))


def test_an_embedding_of_its_own_is_fitted_to_its_weights(
    sources: dict[bool, Path], text_file: Path, tmp_path: Path
) -> None:
    outcome = run(sources[False], tmp_path / "out", text_file, "nested")
    weight, checkpoint = read_matrix(SourceModel(sources[False]), EMBEDDING), open_checkpoint(tmp_path / "out")
    for width in (2, 3, 8):
        decoded = dict(checkpoint.weights(checkpoint.slice(width)))[EMBEDDING]
        found = float((weight - decoded).square().sum() / weight.square().sum())
        assert outcome.errors[EMBEDDING][width] == pytest.approx(found, rel=1e-3)
        if width < 8:
            assert found < float((weight - rounded(weight, width)).square().sum() / weight.square().sum())


@pytest.mark.parametrize(
    ("tied", "ignore", "expected"),
    [
        (False, ["lm_head"], {EMBEDDING}),
        (False, ["embed"], {HEAD}),
        (False, [r"layers\.0\."], {EMBEDDING, HEAD}),
        (True, [r"layers\.0\."], {EMBEDDING}),
    ],
)
def test_ignore(
    tied: bool, ignore: list[str], expected: set[str], sources: dict[bool, Path], text_file: Path, tmp_path: Path
) -> None:
    run(sources[tied], tmp_path / "out", text_file, ignore=ignore)
    checkpoint, source = open_checkpoint(tmp_path / "out"), SourceModel(sources[tied])
    assert outer_names(checkpoint) == expected
    kept = dict(checkpoint.unquantized())
    for name in {EMBEDDING, HEAD} - expected - ({HEAD} if tied else set()):
        assert torch.equal(kept[f"{name}.weight"], source.tensors.read(f"{name}.weight"))
    assert not any(EMBEDDING in name or HEAD in name for name in checkpoint.format.ignored_layers if name in expected)


@pytest.mark.parametrize(
    ("tied", "ignore"), [(True, ["lm_head"]), (True, ["embed_tokens"]), (False, ["lm_head", "embed"])]
)
def test_nothing_is_left_to_quantize(tied: bool, ignore: list[str], sources: dict[bool, Path]) -> None:
    message = r"quantize-embeddings: found model\.embed_tokens and lm_head, of which ignore leaves none, expected"
    with pytest.raises(ValueError, match=message):
        plan_format(SourceModel(sources[tied]), METHODS["rtn"]((2,)), 32, ignore, quantize_embeddings=True)


def test_group_sizes(sources: dict[bool, Path]) -> None:
    method = METHODS["rtn"]((2, 8))
    source = SourceModel(sources[True])
    format_ = plan_format(source, method, 64, [], [("lm_head", 16)], quantize_embeddings=True)
    assert format_.layer_group_sizes == {EMBEDDING: 16}  # tied: one layer
    with pytest.raises(
        ConfigError, match=r"group_size for model\.embed_tokens: found 48, expected a divisor of its 64"
    ):
        plan_format(source, method, 64, [], [("embed", 48)], quantize_embeddings=True)
    with pytest.raises(ConfigError, match="group_size for lm_head: found 48, expected a divisor of its 64"):
        plan_format(SourceModel(sources[False]), method, 64, [], [("head", 48)], quantize_embeddings=True)
    with pytest.raises(ValueError, match="'embed' matches none of the model's 15 linear layers"):
        plan_format(source, method, 64, ["embed"])


def test_a_method_of_blocks_only(sources: dict[bool, Path]) -> None:
    class Whole(Method):
        name = "whole"

        def quantize_block(self, task: BlockTask) -> Any:
            raise NotImplementedError

    with pytest.raises(ValueError, match="found method whole, expected one that quantizes single layers"):
        plan_format(SourceModel(sources[False]), Whole((2,)), 32, [], quantize_embeddings=True)


def test_a_method_of_whole_layers_only(sources: dict[bool, Path]) -> None:
    message = "found method nested-vq, which needs all rows of a layer at once, expected one that takes them in parts"
    with pytest.raises(ValueError, match=message):
        plan_format(SourceModel(sources[False]), METHODS["nested-vq"]((2, 8)), 32, [], quantize_embeddings=True)


@pytest.mark.parametrize("saved", [1, 2, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_resume(
    tied: bool, saved: int, sources: dict[bool, Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(sources[tied], tmp_path / "whole", text_file, "nested")
    save = WorkFolder.save
    names: list[str] = []

    def interrupted(self: WorkFolder, block: str, *arguments: Any) -> None:
        save(self, block, *arguments)
        names.append(block)
        if len(names) == saved:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(sources[tied], tmp_path / "out", text_file, "nested")
        assert run(sources[tied], tmp_path / "out", text_file, "nested", resume=True).errors == whole.errors
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    # Each was made once.
    assert names == ["model.layers.0", "model.layers.1", EMBEDDING, *([] if tied else [HEAD])]


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_bytes_are_foreseen(
    tied: bool, both: bool, sources: dict[bool, Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = sources[tied]
    if both:  # a source may store a tied weight under both names
        model = write_source(tmp_path / "source", tie_word_embeddings=tied)
        tensors = load_file(model / "model.safetensors")
        tensors[f"{HEAD}.weight"] = tensors[f"{EMBEDDING}.weight"].clone()
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    finished: list[int] = []
    monkeypatch.setattr(
        WorkFolder,
        "begin_publishing",
        lambda self: finished.extend(
            spec.nbytes for file in self.path.glob("*.safetensors") for spec in read_header(file).values()
        ),
    )
    source, method = SourceModel(model), METHODS["rtn"]((2, 3, 8))
    format_ = plan_format(source, method, 32, [], quantize_embeddings=True)
    plan = make_plan(Selection(source, format_), method, NO_TIME, tmp_path, (4, 32))
    run(model, tmp_path / "out", text_file)
    assert plan.files == {width: tensor_bytes(tmp_path / "out", width) for width in (2, 3, 8)}
    assert plan.disk == plan.output + sum(finished)
    weights = VOCABULARY * 64 * (1 if tied else 2)
    blocks_alone = Selection(source, plan_format(source, method, 32, []))
    plain = make_plan(blocks_alone, method, NO_TIME, tmp_path, (4, 32))
    stored = 4 * VOCABULARY * 64 * (2 if both or not tied else 1)
    decoders = sum(AFFINE_INT8.form(width).nbytes(weights // 64, 2) for width in (2, 3, 8))
    assert plain.files[8] - plan.files[8] == stored - weights - decoders


def test_parts_of_the_rows_make_the_whole(sources: dict[bool, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    source, seen = SourceModel(sources[False]), []
    for rows in (7, VOCABULARY):
        monkeypatch.setattr(embeddings, "part_rows", lambda *_, rows=rows: rows)
        counted: list[int] = []
        method = METHODS["nested"]((2, 8))
        seen.append(quantize_rows(source, HEAD, method, 32, AFFINE_INT8, None, counted.append))  # type: ignore[arg-type]
        assert sum(counted) == VOCABULARY
        assert max(counted) == rows
    assert seen[0].errors == pytest.approx(seen[1].errors, rel=1e-3)
    # Rows are padded to whole lanes: sums in another order may choose another code where two are as good.
    assert float((seen[0].codes != seen[1].codes).float().mean()) < 0.01


def test_memory_of_a_large_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_source(tmp_path, vocab_size=40_000, hidden_size=256, intermediate_size=512)
    source, method = SourceModel(folder), METHODS["nested"]((2, 3, 8))
    format_ = plan_format(source, method, 64, [], quantize_embeddings=True)
    weight = source.tensors.read(f"{HEAD}.weight")
    # A part that safetensors reads is a view of the mapped file, whose size would count.
    monkeypatch.setattr(source.tensors, "read_rows", lambda name, rows: weight[rows].clone())
    with torch.no_grad(), PeakBytes() as memory:
        quantize_rows(source, HEAD, method, 64, AFFINE_INT8, torch.eye(256))  # type: ignore[arg-type]
    foreseen = sum(_steps(Selection(source, format_), method, {}, 0, 0)[HEAD].values())
    assert memory.peak < 4 * 40_000 * 256  # less than the weights in float32
    assert 0.7 * memory.peak < foreseen < 2 * memory.peak


@torch.no_grad()
def test_a_head_with_a_bias(text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "phi", {})
    model = write_source(tmp_path / "source", "phi")
    run(model, tmp_path / "out", text_file, "nested")
    checkpoint = open_checkpoint(tmp_path / "out")
    assert HEAD in checkpoint.layers
    assert torch.equal(dict(checkpoint.unquantized())[f"{HEAD}.bias"], SourceModel(model).tensors.read(f"{HEAD}.bias"))
