"""What a plan foresees, against what a quantization does."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.checkpoint.samples import decoder_bytes, random_decoder
from tests.quantize.tiny_sources import ONE_WIDTH, byte_tokenizer, write_source
from vllm_matquant.checkpoint.decoder import CODEBOOK
from vllm_matquant.checkpoint.errors import OutputError
from vllm_matquant.checkpoint.names import shard_pattern
from vllm_matquant.checkpoint.reader import open_checkpoint
from vllm_matquant.checkpoint.shard import read_header
from vllm_matquant.checkpoint.spec import WIDTHS, Format, GroupSize
from vllm_matquant.checkpoint.tensor_parallel import misfits
from vllm_matquant.measure.peak import PeakBytes
from vllm_matquant.measure.text import TextError
from vllm_matquant.quantize import pipeline, probe
from vllm_matquant.quantize.activations import Activations
from vllm_matquant.quantize.block import BlockTask
from vllm_matquant.quantize.methods import METHODS, with_settings
from vllm_matquant.quantize.pipeline import CalibrationSettings, dry_run, plan_format, quantize
from vllm_matquant.quantize.plan import Plan, make_plan, shard_bytes
from vllm_matquant.quantize.probe import Speed, measure_speed
from vllm_matquant.quantize.resume import WorkFolder
from vllm_matquant.quantize.selection import Selection
from vllm_matquant.quantize.source import SourceModel
from vllm_matquant.quantize.training import begin_training

NO_TIME = Speed([0.0] * 5, 0.0, 0.0)


def tensor_bytes(folder: Path, width: int) -> int:
    """Bytes of the tensors in the files that a width is served from."""
    checkpoint = open_checkpoint(folder)
    files = folder.glob(shard_pattern(checkpoint.format.stored_width(width)))
    return sum(spec.nbytes for file in files for spec in read_header(file).values())


@pytest.mark.parametrize(
    ("method", "widths", "group_size", "ignore", "model_type"),
    [
        ("rtn", WIDTHS, "auto", [], "llama"),
        ("rtn", (2, 8), 32, ["k_proj", r"layers\.0\."], "qwen3"),
        ("rtn", (4,), "channel", [], "gemma2"),
        ("matgptq", (2, 3, 5), 8, ["down_proj"], "llama"),
        ("nested", (2, 3, 8), 32, ["down_proj"], "llama"),
        ("nested-vq", (2, 3, 5), 32, ["down_proj"], "llama"),
        ("nested-vq", (2, 4), "channel", [r"layers\.0\."], "qwen3"),
        ("gptvq", (3,), 32, ["down_proj"], "llama"),
    ],
)
def test_bytes_of_the_files(
    method: str,
    widths: Sequence[int],
    group_size: int | str,
    ignore: Sequence[str],
    model_type: str,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, chosen = SourceModel(write_source(tmp_path / "source", model_type)), METHODS[method](tuple(widths))
    format_ = plan_format(source, chosen, group_size, ignore)
    settings = CalibrationSettings(str(text_file), samples=4, sequence_length=32)
    finished: list[int] = []
    monkeypatch.setattr(
        WorkFolder,
        "begin_publishing",
        lambda self: finished.extend(
            spec.nbytes for file in self.path.rglob("*.safetensors") for spec in read_header(file).values()
        ),
    )
    plan = make_plan(Selection(source, format_), chosen, NO_TIME, tmp_path, (4, 32))
    quantize(source, tmp_path / "out", chosen, format_, settings)
    assert plan.files == {width: tensor_bytes(tmp_path / "out", width) for width in widths}
    assert plan.output == max(plan.files.values())
    assert plan.disk == plan.output + sum(finished)


def test_activations_in_memory_or_on_disk(llama: Path, tmp_path: Path) -> None:
    source, method = SourceModel(llama), METHODS["nested"]((2, 3, 8))
    format_ = plan_format(source, method, "auto", [])
    tokens = 10**6
    in_memory, on_disk = (
        make_plan(Selection(source, format_), method, NO_TIME, tmp_path, (1, tokens), on_disk=where)
        for where in (False, True)
    )
    # Two hidden states of each token; and its weights in 14 layers, or of each group scale, centre, the scale at the
    # start, and two moments of both.
    groups = 2 * (64 + 32 + 32 + 64 + 128 + 128 + 64)  # one a row: "auto" takes the whole of 64 or 128 columns
    calibrating, training = tokens * (64 * 4 * 2 + 14 * 4), tokens * 64 * 4 * 2 + 7 * 4 * groups
    assert in_memory.memory["activations"] == training  # the step with the largest batch in the model
    assert "activations" not in on_disk.memory
    assert on_disk.disk == in_memory.disk + max(calibrating, training)


@pytest.mark.parametrize("up_to", [2, 3, 8])
def test_codebooks_in_training(up_to: int, llama: Path, tmp_path: Path) -> None:
    source = SourceModel(llama)
    method = with_settings(METHODS["nested-vq"]((2, 3, 8)), [f"end_to_end.up_to={up_to}"])
    format_ = plan_format(source, method, 32, [])
    tokens = 10**6
    plan = make_plan(Selection(source, format_), method, NO_TIME, tmp_path, (1, tokens))
    kept = 0
    for rows, columns in Selection(source, format_).linears.values():
        decoder = random_decoder(CODEBOOK, up_to, rows, columns // 32, torch.Generator().manual_seed(0))
        trained = begin_training(decoder, torch.empty)
        storages = [each.untyped_storage() for each in vars(trained).values() if isinstance(each, torch.Tensor)]
        kept += sum({each.data_ptr(): each.nbytes() for each in storages}.values())
    decoders = plan.memory["activations"] - 2 * tokens * 64 * 4
    assert kept <= decoders < 1.5 * kept


@pytest.mark.slow
def test_dry_run_of_codebooks(llama: Path, text_file: Path, tmp_path: Path) -> None:
    source, method = SourceModel(llama), METHODS["nested-vq"]((2, 3, 8))
    format_ = plan_format(source, method, 32, [])
    plan = dry_run(source, tmp_path / "out", method, format_, CalibrationSettings(str(text_file), 4, 32))
    assert list(tmp_path.iterdir()) == []
    assert plan.seconds > 0
    shapes = 2 * [(64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128)]
    for narrow, wide in ((2, 3), (3, 8)):
        codes = sum((wide - narrow) * rows * columns // 8 for rows, columns in shapes)
        decoders = sum(decoder_bytes(CODEBOOK.form(wide), rows, columns // 32) for rows, columns in shapes)
        assert plan.files[wide] - plan.files[narrow] == codes + decoders


def test_held_out_text(llama: Path, tmp_path: Path) -> None:
    source, method = SourceModel(llama), METHODS["rtn"]((2, 3, 8))
    format_ = plan_format(source, method, "auto", [])
    plans = [
        make_plan(Selection(source, format_), method, NO_TIME, tmp_path, (0, 0), (4, 10**6), on_disk=where)
        for where in (False, True)
    ]
    size = 4 * 10**6 * 64 * 4 * (2 + 3)
    assert plans[0].memory["activations"] == size
    assert plans[0].memory["output heads"] == 20 * 320 * 10**6 + 2 * 4 * 320 * 64
    assert plans[1].disk == plans[0].disk + size


def test_shards_are_as_large_as_a_block(llama: Path) -> None:
    assert shard_bytes(SourceModel(llama)) == 2**27  # a tiny block: the least


def test_a_full_disk_is_said() -> None:
    plan = Plan({2: 10**9, 8: 3 * 10**9}, 3 * 10**9, 5 * 10**9, 6 * 10**9, {"program": 10**9, "block": 5 * 10**8}, 90.0)
    lines = str(plan).splitlines()
    assert lines[0] == "files to serve  2 bits 1.00 GB, 8 bits 3.00 GB"
    assert lines[1] == "disk            5.00 GB until the end, then 3.00 GB; 6.00 GB free"
    assert lines[2] == "memory          about 1.50 GB (program 1.00 GB, block 500.0 MB)"
    assert lines[3].startswith("time            about 1 min 30 s")
    full = Plan({2: 1}, 1, 5 * 10**9, 10**9, {}, 1.0)
    assert "1.00 GB free: NOT ENOUGH" in str(full)


def test_tensor_parallel_sizes() -> None:
    # The rows of a layer such as q_proj are divided, whatever its columns are.
    shapes = {"a.q_proj": (64, 72), "a.o_proj": (64, 512), "b.down_proj": (64, 1024)}
    sizes: dict[GroupSize, list[int]] = {8: [], 64: [], 128: [8], "auto": [8], "channel": []}
    for group_size, expected in sizes.items():
        assert [each.size for each in misfits(Format(group_size=group_size), shapes)] == expected, group_size
    narrow = {"a.o_proj": (64, 160)}  # whose rows are whole groups: cut on bytes, or on fours of columns
    assert [each.size for each in misfits(Format(group_size="channel"), narrow)] == [8]
    [misfit, _] = misfits(Format(group_size="channel", decoder_kind=CODEBOOK), narrow)
    assert (misfit.size, misfit.unit) == (4, 16)
    found = misfits(Format(group_size=512), shapes)
    line = str(Plan({2: 1}, 1, 1, 1, {}, 1.0, found)).splitlines()[-1]
    assert line == (
        "tensor parallel refused on 2, 4, 8 ranks: a.o_proj has 512 input features, no multiple of 2 x 512; "
        "a smaller --group-size fits more"
    )


@pytest.fixture(scope="module")
def llama_70b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the shape of Llama 3 70B: headers, and holes of the right size in the place of data."""
    folder = tmp_path_factory.mktemp("70b")
    config = AutoConfig.for_model(
        "llama",
        vocab_size=128_256,
        hidden_size=8192,
        intermediate_size=28_672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).state_dict()
    located, names = {}, list(parameters)
    for number in range(0, len(names), 50):
        file, header, end = f"{number}.safetensors", {}, 0
        for name in names[number : number + 50]:
            begin, end = end, end + parameters[name].nbytes
            header[name] = {"dtype": "BF16", "shape": list(parameters[name].shape), "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        (folder / file).write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(folder / file, 8 + len(text) + end)
        located |= dict.fromkeys(header, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": located}))
    return folder


@pytest.mark.slow
def test_70b(llama_70b: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "check_values", lambda *_: None)  # to read 140 GB of zeros takes minutes
    source, method = SourceModel(llama_70b), METHODS["nested"]((2, 4, 8))
    format_ = plan_format(source, method, 128, [])
    settings = CalibrationSettings(str(text_file), samples=2, sequence_length=128)
    before = {path.name: path.stat().st_mtime_ns for path in llama_70b.iterdir()}
    plan = dry_run(source, tmp_path / "out", method, format_, settings)
    assert list(tmp_path.iterdir()) == []
    assert {path.name: path.stat().st_mtime_ns for path in llama_70b.iterdir()} == before
    # 80 blocks of 64 rows of heads, 8 of keys and values: from the architecture's definition.
    weights = 80 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28_672)
    others = 2 * (2 * 128_256 * 8192 + 161 * 8192)
    rows = 80 * (2 * 8192 + 2 * 1024 + 2 * 28_672 + 8192)
    decoder = weights // 128 * 2 + rows * 4  # a scale and a centre for each group, two steps for each row
    assert plan.files[2] == weights // 4 + decoder + others
    assert plan.files[4] == plan.files[2] + 2 * weights // 8 + decoder
    wide = weights // 128 * 4  # scale and offset in float16
    assert plan.files[8] == plan.files[4] + 4 * weights // 8 + wide == plan.output
    assert plan.disk == plan.output + weights + 2 * decoder + wide + decoder  # 2 bits twice: before training and after
    block = 4 * weights // 80
    assert plan.memory["block"] == block
    # Less than the whole model takes, and far more than a block.
    assert 2 * block < sum(plan.memory.values()) < 2 * weights
    assert 3600 < plan.seconds < 1e8


def test_nothing_is_written_when_the_plan_is_refused(llama: Path, text_file: Path, tmp_path: Path) -> None:
    source, method = SourceModel(llama), METHODS["rtn"](WIDTHS)
    format_ = plan_format(source, method, "auto", [])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(OutputError, match=r"found config\.json, expected no files of a checkpoint"):
        dry_run(source, tmp_path, method, format_, CalibrationSettings())
    nested = METHODS["nested"](WIDTHS)
    with pytest.raises(TextError, match=r"text\.txt: found"):
        dry_run(source, tmp_path / "out", nested, format_, CalibrationSettings(str(text_file), samples=10_000))
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("seed", range(5))
def test_fit_finds_coefficients(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    expected = torch.rand(5, generator=generator, dtype=torch.float64) * 10.0 ** -torch.arange(5)
    expected[seed] = 0
    terms = torch.rand(7, 5, generator=generator, dtype=torch.float64)
    found = probe._fit(terms.tolist(), (terms @ expected).tolist())
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_fit_to_few_values_is_never_negative(count: int) -> None:
    terms = [[1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 1.0, 1.0, 9.0, 2.0], [9.0, 1.0, 3.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0, 7.0]]
    values = [1.0, 5.0, 0.5, 3.0][:count]
    found = probe._fit(terms[:count], values)
    assert min(found) >= 0
    assert max(found) > 0


@pytest.mark.parametrize("method", list(METHODS))
def test_time_grows_with_the_work(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_TRIALS", ((16, 64, 1), (64, 64, 1), (16, 256, 1)))
    speed = measure_speed(METHODS[method]((4,) if method in ONE_WIDTH else (2, 8)), 32, 32)
    small = speed.seconds(64, 256, 32)
    assert 0 < small < speed.seconds(256, 1024, 32)
    assert 0 < speed.product < speed.decoding


def test_peak_bytes() -> None:
    with PeakBytes() as memory:
        first = torch.zeros(1000)
        second = first + 1
        view = second.view(10, 100).add_(1)  # no memory of their own
        assert memory.peak == 8000
        del second
        third = torch.zeros(500)
        assert memory.peak == 8000 + 2000  # the view still holds what it shows
        del view, third
        fourth = torch.zeros(1500)
        assert memory.peak == 10_000
    assert len(first) + len(fourth) == 2500


class Chain(torch.nn.ModuleList):
    """A block of linear layers, each of which is called with inputs of its own."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self:
            hidden = hidden + layer(hidden).mean(dim=-1, keepdim=True)
        return hidden


@torch.no_grad()
@pytest.mark.parametrize(("rows", "columns", "layers"), [(64, 512, 1), (256, 384, 3), (1024, 256, 1)])
@pytest.mark.parametrize("name", METHODS)
def test_memory_of_a_block_is_foreseen(name: str, rows: int, columns: int, layers: int) -> None:
    method = METHODS[name]((4,) if name in ONE_WIDTH else (2, 3, 8))
    block = Chain(torch.nn.Linear(columns, rows, bias=False) for _ in range(layers))
    activations = None
    if method.needs_calibration:
        noise = probe._Noise(columns)
        activations = Activations(noise, torch.zeros(4, 64, dtype=torch.int64), method.followed_widths)
    groups = {f"block.{index}": 64 for index in range(layers)}
    task = BlockTask("block", block, groups, activations, decoder_kind=method.decoder_kinds[-1])
    with PeakBytes() as memory:
        dict(method.quantize_block(task))
    assert 0.8 * memory.peak < method.work_bytes([(rows, columns)] * layers) < 2 * memory.peak
