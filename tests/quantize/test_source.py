"""The source checkpoint: what its blocks compute, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from tests.quantize.tiny_architectures import TOKENS, write_tiny
from tests.quantize.tiny_sources import ARCHITECTURES, VOCABULARY, random_model, write_source
from vllm_matquant.checkpoint.decoder import TensorSpec
from vllm_matquant.checkpoint.errors import (
    CheckpointError,
    ConfigError,
    IndexFileError,
    MissingFileError,
    MissingTensorError,
    PointerFileError,
    ShardError,
    TensorDtypeError,
    TensorShapeError,
    TensorValueError,
    UnsafePathError,
)
from vllm_matquant.checkpoint.model_config import build_config
from vllm_matquant.measure.text import read_source, read_text
from vllm_matquant.measure.windows import load_tokenizer
from vllm_matquant.quantize.choice import plan_format
from vllm_matquant.quantize.methods import METHODS
from vllm_matquant.quantize.runner import run_block
from vllm_matquant.quantize.selection import Selection
from vllm_matquant.quantize.source import Matrix, SourceModel, head_weight, locate, read_matrix
from vllm_matquant.quantize.tensors import SafetensorsFolder
from vllm_matquant.quantize.values import check_values

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


@pytest.fixture
def spoiled(llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama to spoil."""
    return Path(shutil.copytree(llama, tmp_path / "spoiled"))


def edit_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_tensors(folder: Path, **changed: torch.Tensor | None) -> None:
    """Replace tensors, or with None remove them."""
    path = folder / "model.safetensors"
    tensors = load_file(path) | changed
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


@torch.no_grad()
def assert_blocks_match(folder: Path, model: torch.nn.Module, batch_tokens: int) -> None:
    expected = model.model(TOKENS, output_hidden_states=True, use_cache=False).hidden_states
    source = SourceModel(folder)
    hidden = torch.empty(*TOKENS.shape, source.runner.hidden_size)
    arguments = source.runner.embed(TOKENS, hidden)
    assert len(arguments) == len(source.runner.block_names) == len(expected) - 1
    for index in range(len(source.runner.block_names)):
        torch.testing.assert_close(hidden, expected[index], rtol=0, atol=1e-5)
        run_block(source.runner.load_block(index), hidden, hidden, arguments[index], batch_tokens)
    # transformers gives the last block's output after the final norm only.
    torch.testing.assert_close(model.model.norm(hidden), expected[-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_blocks_compute_what_transformers_does(model_type: str, tmp_path: Path) -> None:
    assert_blocks_match(write_source(tmp_path / "source", model_type), random_model(model_type), 40)


@pytest.mark.parametrize("batch_tokens", [1, 20, 59, 10_000])
def test_batches(llama: Path, batch_tokens: int) -> None:
    assert_blocks_match(llama, random_model("llama"), batch_tokens)


@pytest.mark.parametrize("tied", [False, True])
def test_another_task(tied: bool, tmp_path: Path) -> None:
    write_tiny(tmp_path, "qwen2", AutoModelForSequenceClassification, num_labels=3, tie_word_embeddings=tied)
    message = (
        r"config\.json: architectures: found Qwen2ForSequenceClassification, which has another head, expected a causal"
    )
    with pytest.raises(ConfigError, match=message):
        SourceModel(tmp_path)
    edit_config(tmp_path, architectures=None)
    message = r"score\.weight: found the head of another task" if tied else r"lm_head\.weight: found in no file"
    with pytest.raises(CheckpointError, match=message):
        SourceModel(tmp_path)


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])
def test_a_model_saved_without_its_head(model_type: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"architectures: found .*Model, which was saved without its output head"):
        SourceModel(write_tiny(tmp_path, model_type, AutoModel))


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("bloom", "whose blocks are in no list named layers"),
        ("gpt2", "whose blocks have no linear layers"),
        ("gpt_neox", "of which transformers renames or joins tensors while it loads them"),
        ("minicpm3", "for which transformers' own code fails with the values of this file"),
        ("granitemoe", "a mixture of experts"),
        ("gpt_oss", "a mixture of experts"),
    ],
)
def test_architectures_that_cannot_be_quantized(model_type: str, message: str, tmp_path: Path) -> None:
    fields = {"n_layer": 2, "n_head": 4} if model_type in ("bloom", "gpt2") else {}
    folder = write_tiny(tmp_path, model_type, **fields)
    with pytest.raises(ConfigError, match=rf"config\.json: model_type: found '{model_type}', {message}"):
        SourceModel(folder)


def test_shards(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "source", shard_size="100KB")
    source = SourceModel(folder)
    assert sorted(folder.glob("*.safetensors")) == source.tensors.files
    assert len(source.tensors.files) > 1
    assert_blocks_match(folder, random_model("llama"), 40)


def test_16_bits(tmp_path: Path) -> None:
    random_model("qwen3").bfloat16().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    source = SourceModel(tmp_path)
    assert source.tensors.read("model.norm.weight").dtype == torch.bfloat16
    assert {parameter.dtype for parameter in source.runner.load_block(0).parameters()} == {torch.float32}
    assert_blocks_match(tmp_path, model, 40)


def test_names(llama: Path) -> None:
    source = SourceModel(llama)
    model = random_model("llama")
    expected = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert list(source.matrices) == ["model.embed_tokens", *expected]
    down = Matrix("model.layers.0.mlp.down_proj", "model.layers.0.mlp.down_proj.weight", None, (64, 128), 0)
    assert source.matrices[down.name] == down
    for name, matrix in source.matrices.items():
        assert matrix.block == (int(name.split(".")[2]) if ".layers." in name else None)
    assert (source.embedding, source.output_head) == ("model.embed_tokens", "lm_head")
    embedding = model.get_input_embeddings()
    assert source.skeleton.embeddings == {"model.embed_tokens": (embedding.num_embeddings, 64)}
    assert source.tensors.names == sorted(model.state_dict())
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(source.tensors.read(name), tensor, rtol=0, atol=0)


def test_tied_embeddings_are_one_tensor(tmp_path: Path) -> None:
    source = SourceModel(write_source(tmp_path / "source", "qwen3"))
    assert source.output_head == "lm_head"
    assert source.matrices["lm_head"].parameter == "model.embed_tokens.weight"
    assert source.skeleton.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in source.tensors.names


@pytest.mark.parametrize("tied", [False, True])
def test_weight_of_the_output_head(tied: bool, tmp_path: Path) -> None:
    folder = write_source(tmp_path, tie_word_embeddings=tied)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).get_output_embeddings().weight
    assert torch.equal(head_weight(SourceModel(folder)), expected)


def test_a_block_without_some_of_its_weights(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, read = SourceModel(llama), []
    whole = source.runner.load_block(1).state_dict()
    tensor = source.tensors.read
    monkeypatch.setattr(source.tensors, "read", lambda name: read.append(name) or tensor(name))
    in_block = [matrix.name for matrix in source.matrices.values() if matrix.block == 1]
    left_out = {name for name in in_block if "o_proj" not in name}
    weights = {f"{name}.weight".removeprefix(f"{source.runner.block_names[1]}.") for name in left_out}
    found = source.runner.block_parameters(1, without=left_out)
    assert set(found) == set(whole) - weights  # biases and norms are there
    assert all(torch.equal(value, whole[name]) for name, value in found.items())
    assert len(read) == len(found)
    assert all(parameter.is_meta for parameter in source.runner.empty_block(1).parameters())
    assert not source.runner.empty_block(1).training


def test_tensors_that_are_no_parameters_are_left_out(spoiled: Path) -> None:
    edit_tensors(spoiled, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" not in SourceModel(spoiled).tensors.names


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_a_matrix(tied: bool, tmp_path: Path) -> None:
    source = SourceModel(write_source(tmp_path, tie_word_embeddings=tied))
    whole = source.tensors.read("model.embed_tokens.weight" if tied else "lm_head.weight")
    assert torch.equal(read_matrix(source, "lm_head"), whole)
    assert torch.equal(read_matrix(source, "lm_head", slice(5, 9)), whole[5:9])


def test_a_matrix_among_others_in_a_tensor(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, experts = SourceModel(llama), torch.arange(24.0).view(2, 4, 3)
    monkeypatch.setattr(source.tensors, "read", {"experts": experts}.__getitem__)
    source.matrices["second"] = Matrix("second", "experts", 1, (4, 3), 0)
    assert torch.equal(read_matrix(source, "second"), experts[1])
    assert torch.equal(read_matrix(source, "second", slice(1, 3)), experts[1, 1:3])


def real_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if not parameter.is_meta)


def test_no_more_than_a_block_is_in_memory(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0
    tensor = SafetensorsFolder.read

    def counting(self: SafetensorsFolder, name: str) -> torch.Tensor:
        nonlocal read
        value = tensor(self, name)
        read += value.numel()
        return value

    monkeypatch.setattr(SafetensorsFolder, "read", counting)
    source = SourceModel(llama)
    block_size = sum(parameter.numel() for parameter in random_model("llama").model.layers[0].parameters())
    assert real_parameters(source.runner._model) == read == 0
    block = source.runner.load_block(1)
    assert real_parameters(block) == read == block_size
    assert real_parameters(source.runner._model) == 0
    read = 0
    source.runner.embed(TOKENS, torch.empty(*TOKENS.shape, source.runner.hidden_size))
    assert read == VOCABULARY * 64 + 64  # embedding and final norm
    assert real_parameters(source.runner._model) == 0


def test_quantized_source(spoiled: Path) -> None:
    edit_config(spoiled, quantization_config={"quant_method": "awq"})
    with pytest.raises(ConfigError, match=r"config\.json: quantization_config: found awq, expected .* not quantized"):
        SourceModel(spoiled)


@pytest.mark.parametrize("nothing", [None, {}])
def test_a_quantization_config_of_nothing(spoiled: Path, nothing: object) -> None:
    edit_config(spoiled, quantization_config=nothing)
    assert "quantization_config" not in SourceModel(spoiled).config


@pytest.mark.parametrize(("number", "name"), [("Infinity", "Infinity"), ("-1e999", "-Infinity"), ("NaN", "NaN")])
def test_numbers_in_the_config_that_are_no_json(spoiled: Path, number: str, name: str) -> None:
    path = spoiled / "config.json"
    path.write_text(path.read_text().replace("{", f'{{"time_step_limit": [0.0, {number}],', 1))
    source = SourceModel(spoiled)
    json.dumps(source.config, allow_nan=False)  # what the checkpoint's config.json will hold
    read, wanted = build_config(source.config), AutoConfig.from_pretrained(spoiled)
    assert source.config["time_step_limit"] == [0.0, {"__float__": name}]
    assert repr(read.time_step_limit) == repr(wanted.time_step_limit) == f"[0.0, {float(number)}]"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer.model"])
def test_a_pointer_in_the_place_of_a_file(spoiled: Path, name: str) -> None:
    (spoiled / name).write_text(POINTER)
    said = rf"{spoiled}/{name}: content: found a Git LFS pointer, expected .* Fetch it: git lfs pull, or hf download$"
    with pytest.raises(PointerFileError, match=said):
        SourceModel(spoiled)
    if name.startswith("tokenizer"):
        with pytest.raises(PointerFileError, match=said):
            load_tokenizer(spoiled)


def test_a_pointer_in_the_place_of_a_text(tmp_path: Path) -> None:
    for name in ("text.txt", "text.jsonl"):
        (tmp_path / name).write_text(POINTER)
        for read in (lambda path: read_source(str(path), 1), read_text):
            with pytest.raises(PointerFileError, match="found a Git LFS pointer"):
                read(tmp_path / name)


def test_unknown_architecture(spoiled: Path) -> None:
    edit_config(spoiled, model_type="nonesuch")
    with pytest.raises(ConfigError, match="'nonesuch'"):
        SourceModel(spoiled)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", r"config\.json: found no such file"),
        ("model.safetensors", r"expected model\.safetensors or model\.safetensors\.index\.json"),
    ],
)
def test_missing_file(spoiled: Path, name: str, message: str) -> None:
    (spoiled / name).unlink()
    with pytest.raises(MissingFileError, match=message):
        SourceModel(spoiled)


def test_missing_shard(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "source", shard_size="100KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(MissingFileError, match=f"{shard.name}: found no such file"):
        SourceModel(folder)


def edit_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_index_that_names_no_files(spoiled: Path) -> None:
    edit_index(spoiled, ["model.safetensors"])
    with pytest.raises(IndexFileError, match="weight_map: found list, expected an object"):
        SourceModel(spoiled)


def test_index_that_leaves_the_folder(spoiled: Path) -> None:
    edit_index(spoiled, {"model.norm.weight": "../model.safetensors"})
    with pytest.raises(UnsafePathError, match=r"\.\./model\.safetensors"):
        SourceModel(spoiled)


def test_index_that_names_a_tensor_of_another_file(spoiled: Path) -> None:
    save_file({"other": torch.ones(1)}, spoiled / "other.safetensors")
    names = load_file(spoiled / "model.safetensors")
    edit_index(spoiled, dict.fromkeys(names, "model.safetensors") | {"model.norm.weight": "other.safetensors"})
    with pytest.raises(MissingTensorError, match=r"other\.safetensors: model\.norm\.weight: found no such tensor"):
        SourceModel(spoiled)


def test_an_index_beside_a_file_that_it_does_not_list(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "source", shard_size="100KB")
    save_file(random_model("llama", seed=1).state_dict(), folder / "model.safetensors")
    said = r"index\.json: weight_map: found shards, and model\.safetensors beside them.* Remove either "
    with pytest.raises(IndexFileError, match=said):
        SourceModel(folder)
    (folder / "model.safetensors.index.json").unlink()
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(SourceModel(folder).tensors.read("lm_head.weight"), loaded.lm_head.weight)


def test_one_shard_without_an_index(spoiled: Path) -> None:
    before = SourceModel(spoiled).tensors
    (spoiled / "model.safetensors").rename(spoiled / "model-00001-of-00001.safetensors")
    after = SourceModel(spoiled).tensors
    assert after.names == before.names
    assert [path.name for path in after.files] == ["model-00001-of-00001.safetensors"]


def test_shards_without_an_index(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "source", shard_size="100KB")
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(
        MissingFileError, match=r"weights: found model-00001-of-\d+\.safetensors without an index, .*Fetch"
    ):
        SourceModel(folder)


def test_tensors_that_the_index_does_not_list(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "source", shard_size="100KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    file = index.pop("model.norm.weight")
    assert file in index.values()
    edit_index(folder, index)
    assert torch.equal(
        SourceModel(folder).tensors.read("model.norm.weight"), load_file(folder / file)["model.norm.weight"]
    )


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.safetensors", "model-q4.gguf"])
def test_weights_of_another_format(spoiled: Path, name: str) -> None:
    (spoiled / "model.safetensors").rename(spoiled / name)
    with pytest.raises(MissingFileError, match=rf"weights: found {name}, expected .*save_pretrained$"):
        SourceModel(spoiled)


def test_what_is_fetched_of_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.model"]
    model += ["merges.txt", "chat_template.jinja", "additional_chat_templates/tool_use.jinja", "LICENSE", "README.md"]
    again = ["original/params.json", "original/tokenizer.model", "onnx/model.json", "consolidated.safetensors"]
    again += ["consolidated.00.pth", "pytorch_model.bin", "fp16/model.safetensors", "original/consolidated.00.pth"]
    fetched: list[str] = []

    def download(name: str, **patterns: list[str]) -> str:
        fetched.extend(filter_repo_objects([*model, *again], **patterns))
        return str(tmp_path)

    monkeypatch.setattr("vllm_matquant.quantize.source.snapshot_download", download)
    assert locate("some/model") == tmp_path
    assert fetched == model


def test_missing_tensor(spoiled: Path) -> None:
    edit_tensors(spoiled, **{"model.layers.1.mlp.up_proj.weight": None})
    with pytest.raises(MissingTensorError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: found in no file"):
        SourceModel(spoiled)


def test_wrong_shape(spoiled: Path) -> None:
    edit_tensors(spoiled, **{"model.norm.weight": torch.ones(63)})
    with pytest.raises(TensorShapeError, match=r"model\.norm\.weight: found \[63\], expected \[64\]"):
        SourceModel(spoiled)


def test_wrong_dtype(spoiled: Path) -> None:
    edit_tensors(spoiled, **{"model.norm.weight": torch.ones(64, dtype=torch.int8)})
    with pytest.raises(TensorDtypeError, match=r"model\.norm\.weight: found torch\.int8"):
        SourceModel(spoiled)


def test_float64_is_read_as_float32(spoiled: Path) -> None:
    tensors = load_file(spoiled / "model.safetensors")
    exact = {name: tensor.double() + 1e-9 for name, tensor in tensors.items()}
    save_file(exact, spoiled / "model.safetensors")
    found = SourceModel(spoiled).tensors
    name = "model.layers.0.mlp.up_proj.weight"
    assert found.spec(name) == TensorSpec(torch.float32, tuple(tensors[name].shape))
    torch.testing.assert_close(found.read(name), exact[name].float(), rtol=0, atol=0)
    torch.testing.assert_close(found.read_rows(name, slice(3, 5)), exact[name][3:5].float(), rtol=0, atol=0)
    assert {tensor.dtype for _, _, tensor in found.each()} == {torch.float32}
    save_file(exact | {name: exact[name] * 1e300}, spoiled / "model.safetensors")
    with pytest.raises(TensorValueError, match="found NaN or infinity"):
        check(spoiled)


@pytest.mark.parametrize("tied", [True, False])
def test_names_without_the_prefix_of_the_model(tmp_path: Path, tied: bool) -> None:
    """As AutoModel saves them; transformers reads such files too."""
    source = write_source(tmp_path / "source", "qwen3", tie_word_embeddings=tied)
    tensors = load_file(source / "model.safetensors")
    save_file({name.removeprefix("model."): each for name, each in tensors.items()}, source / "model.safetensors")
    found, model = SourceModel(source), AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    assert ("lm_head.weight" in found.tensors.names) is not tied
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found.tensors.read(name), parameter, rtol=0, atol=0)
    # Where some have the prefix, those without it are other tensors.
    save_file(
        {name.removeprefix("model.layers."): each for name, each in tensors.items()}, source / "model.safetensors"
    )
    with pytest.raises(MissingTensorError, match=r"model\.\S+: found in no file"):
        SourceModel(source)


@torch.no_grad()
def test_a_head_of_its_own_that_the_configuration_ties(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As adapters that train the head leave it: transformers and vLLM keep it."""
    folder = write_source(tmp_path / "source", "qwen3", tie_word_embeddings=True)
    words = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    edit_tensors(folder, **{"lm_head.weight": words.clone()})
    assert SourceModel(folder).config["tie_word_embeddings"] is True
    assert not caplog.records
    head = torch.randn(words.shape, generator=torch.Generator().manual_seed(1))
    edit_tensors(folder, **{"lm_head.weight": head})
    source = SourceModel(folder)
    assert "found true, and another lm_head.weight in the files than what it is tied to: it is kept" in caplog.text
    assert source.config["tie_word_embeddings"] is False
    assert not source.skeleton.tied
    torch.testing.assert_close(head_weight(source), head, rtol=0, atol=0)
    quantized = plan_format(source, METHODS["rtn"]((4, 8)), 32, [], quantize_embeddings=True)
    assert {"lm_head", "model.embed_tokens"} <= Selection(source, quantized).shapes.keys()
    logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(TOKENS).logits
    hidden = torch.empty(*TOKENS.shape, source.runner.hidden_size)
    arguments = source.runner.embed(TOKENS, hidden)
    for index in range(len(source.runner.block_names)):
        run_block(source.runner.load_block(index), hidden, hidden, arguments[index], 1000)
    torch.testing.assert_close(source.runner.load_head()(hidden), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_a_configuration_leaves_out_is_written(spoiled: Path, dtype: torch.dtype) -> None:
    """vLLM would read it off the checkpoint's tensors, which are others than the source's."""
    config = json.loads((spoiled / "config.json").read_text())
    for name in ("architectures", "dtype", "torch_dtype"):
        config.pop(name, None)
    (spoiled / "config.json").write_text(json.dumps(config))
    tensors = load_file(spoiled / "model.safetensors")
    kept = {name: each.to(dtype) if each.dim() > 1 else each.float() for name, each in tensors.items()}
    save_file(kept, spoiled / "model.safetensors")
    source = SourceModel(spoiled)
    assert source.config["architectures"] == ["LlamaForCausalLM"]
    assert source.config["dtype"] == ("float32" if dtype == torch.float64 else str(dtype).removeprefix("torch."))
    edit_config(spoiled, architectures=["LlamaForCausalLM"], torch_dtype="bfloat16")
    assert "dtype" not in SourceModel(spoiled).config


def check(folder: Path, progress: Callable[[int], object] = lambda size: None) -> None:
    source = SourceModel(folder)
    check_values(Selection(source, plan_format(source, METHODS["rtn"]((4, 8)), 32, [])), progress)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(spoiled: Path, name: str, value: float) -> None:
    check(spoiled)
    tensor = load_file(spoiled / "model.safetensors")[name]
    tensor.view(-1)[-1] = value
    edit_tensors(spoiled, **{name: tensor})
    message = rf"model\.safetensors: {name}: found NaN or infinity, expected finite weights"
    with pytest.raises(TensorValueError, match=message):
        check(spoiled)


def test_every_value_is_checked(tmp_path: Path) -> None:
    sizes: list[int] = []
    check(write_source(tmp_path / "source", shard_size="100KB"), sizes.append)
    assert sum(sizes) == sum(4 * parameter.numel() for parameter in random_model("llama").parameters())


def test_truncated_file(spoiled: Path) -> None:
    path = spoiled / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ShardError, match=r"model\.safetensors"):
        SourceModel(spoiled)


def test_locate_folder(llama: Path) -> None:
    assert locate(str(llama)) == llama


@pytest.mark.parametrize("name", ["no/such/folder", "/no such folder", "nonesuch-model"])
def test_locate_nothing(name: str) -> None:
    with pytest.raises(MissingFileError, match="found no such folder, nor a model of the hub"):
        locate(name)
