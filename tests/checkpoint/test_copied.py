"""Of a model's folder all that decides what serving computes is copied, or refused by name."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.quantize.tiny_sources import write_source
from vllm_matquant.checkpoint.copied import check_copied, copied_files, copy_files
from vllm_matquant.checkpoint.errors import CheckpointError, ConfigError, MissingFileError
from vllm_matquant.checkpoint.files import read_json
from vllm_matquant.checkpoint.spec import Format
from vllm_matquant.checkpoint.verify import verify
from vllm_matquant.quantize.source import SourceModel

FORMAT = Format(tuple(range(2, 9)), group_size=32, ignored_layers=("lm_head",))
KIND = "sentence_transformers.models."
# As the model cards of decoder-only embedding models have it.
POOLING = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": f"{KIND}Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{KIND}Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": f"{KIND}Normalize"},
    ],
    "1_Pooling/config.json": {"word_embedding_dimension": 64, "pooling_mode_lasttoken": True},
    "config_sentence_transformers.json": {"prompts": {"query": "Instruct: find\nQuery:"}},
    "sentence_bert_config.json": {"max_seq_length": 64},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("copied") / "llama")


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "model"))


def write_files(folder: Path, contents: dict[str, Any]) -> None:
    for name, content in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))


def test_all_that_an_embedding_model_needs(write: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    write_files(model, POOLING | {"1_Pooling/other.json": {}, "onnx/config.json": {}})
    SourceModel(model)
    output = tmp_path / "out"
    write(output, FORMAT, model=model)
    for name in POOLING:
        assert (output / name).read_bytes() == (model / name).read_bytes()
    assert not (output / "1_Pooling" / "other.json").exists()
    assert not (output / "onnx").exists()
    assert all(result.passed for result in verify(output))
    (output / "1_Pooling" / "config.json").write_text("{}")
    assert not all(result.passed for result in verify(output))
    shutil.rmtree(model / "1_Pooling")
    (model / "modules.json").unlink()
    write(output, FORMAT, model=model, overwrite=True)
    assert not (output / "1_Pooling" / "config.json").exists()
    assert not (output / "modules.json").exists()


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (
            [{"path": "2_Dense", "type": f"{KIND}Dense"}],
            r"modules\.json: \[0\]\.type: found sentence_transformers\.models\.Dense in '2_Dense', expected Tr",
        ),
        ([{"path": "", "type": f"{KIND}Transformer"}, {"path": "own.Module"}], r"\[1\]\.type: found None in 'own"),
        ([{"path": "pooling", "type": f"{KIND}Pooling"}], r"Pooling in 'pooling', expected .* such as 1_Pooling"),
        ([{"path": "../1_Pooling", "type": f"{KIND}Pooling"}], r"Pooling in '\.\./1_Pooling'"),
        ({"0": {}}, r"modules: found dict, expected a list of objects"),
        (["Transformer"], r"modules: found list, expected a list of objects"),
    ],
)
def test_what_an_embedding_model_computes_that_no_copied_file_holds(model: Path, modules: object, message: str) -> None:
    write_files(model, {"modules.json": modules})
    with pytest.raises(ConfigError, match=message):
        SourceModel(model)


def test_a_copy_without_its_sub_folders(model: Path) -> None:
    write_files(model, {"modules.json": POOLING["modules.json"]})
    message = r"1_Pooling/config\.json: found no such file, expected that of the sentence_transformers\.models\.Pooling"
    with pytest.raises(MissingFileError, match=message):
        SourceModel(model)


def test_modules_that_are_no_json(model: Path) -> None:
    (model / "modules.json").write_text("[")
    with pytest.raises(ConfigError, match="found no valid JSON"):
        check_copied(model)


@pytest.mark.parametrize("alone", [False, True])
def test_an_adapter(model: Path, alone: bool) -> None:
    write_files(model, {"adapter_config.json": {"peft_type": "LORA"}})
    if alone:
        (model / "config.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"adapter_config\.json: .*found an adapter, .*\. Merge the adapter into it"
    ):
        SourceModel(model)


HUB = "some/model--modeling.Own"


def test_code_beside_the_model_is_left_out(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    SourceModel(model)
    assert not caplog.records
    tokenizer = read_json(model / "tokenizer_config.json")
    named = {"AutoTokenizer": ["tokenization_own.Own", None]}
    write_files(
        model,
        {
            "tokenizer_config.json": tokenizer | {"auto_map": named, "name": "\u00e9"},
            "preprocessor_config.json": {"auto_map": {"AutoProcessor": HUB}},
            "config.json": read_json(model / "config.json") | {"auto_map": {"AutoConfig": "own.Own", "AutoModel": HUB}},
        },
    )
    with caplog.at_level(logging.WARNING):
        source = SourceModel(model)
    assert source.config["auto_map"] == {"AutoModel": HUB}
    (said,) = (record.message for record in caplog.records)
    assert "found names of code beside the model (config.json, tokenizer_config.json)" in said
    (tmp_path / "out").mkdir()
    copy_files(model, tmp_path / "out")
    assert read_json(tmp_path / "out" / "tokenizer_config.json") == tokenizer | {"name": "\u00e9"}
    for name in set(copied_files(model)) - {"tokenizer_config.json"}:
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()
