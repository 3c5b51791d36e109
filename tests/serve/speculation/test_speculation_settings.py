"""The settings of drafts, and engines that cannot have any; no engine is started."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tests.serve.tiny_models import write_checkpoint
from vllm_matquant.checkpoint.errors import CheckpointError, ConfigError
from vllm_matquant.checkpoint.reader import open_checkpoint
from vllm_matquant.checkpoint.recipe import Recipe
from vllm_matquant.checkpoint.recipe_store import add_recipes
from vllm_matquant.checkpoint.spec import Format
from vllm_matquant.plugin import register
from vllm_matquant.serve.request import read_request
from vllm_matquant.serve.served import Served
from vllm_matquant.serve.speculation.engine import check_speculation
from vllm_matquant.serve.speculation.settings import parse_draft

register()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("settings") / "tiny"
    write_checkpoint(folder, "llama", Format(group_size=32, ignored_layers=("lm_head",)))
    checkpoint = open_checkpoint(folder)
    first, *others = checkpoint.layers
    recipes = {"wide-first": {first: 8, **dict.fromkeys(others, 2)}, "narrow": dict.fromkeys(others, 3) | {first: 2}}
    add_recipes(checkpoint, [Recipe(name, widths, kl=0.5) for name, widths in recipes.items()])
    return folder


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rounded") / "tiny"
    return write_checkpoint(folder, "llama", Format(group_size=32, slicing="round", ignored_layers=("lm_head",)))


def served(folder: Path, **settings: Any) -> Served:
    checkpoint = open_checkpoint(folder, check_files=False)
    return read_request({"matquant": settings}).served(checkpoint, lambda line: None)


def config(folder: Path, settings: dict[str, Any], **fields: Any) -> Any:
    args = EngineArgs(model=str(folder), additional_config={"matquant": settings}, max_model_len=64, **fields)
    return args.create_engine_config()


@pytest.mark.parametrize(
    ("text", "meant"), [("3", 3), ("2.5", 2.5), ("3.0", 3.0), ("narrow", "narrow"), ("2.5-bits", "2.5-bits")]
)
def test_what_a_text_means(text: str, meant: Any) -> None:
    assert parse_draft(text) == meant
    assert type(parse_draft(text)) is type(meant)


@pytest.mark.parametrize("text", ["", "1", "9", "8.5"])
def test_texts_that_mean_nothing(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected a width from 2 to 8, a number such as 2.5"):
        parse_draft(text)


@pytest.mark.parametrize(
    ("draft", "name"),
    [(3, "uniform-3"), ("3", "uniform-3"), ("narrow", "narrow"), (2.99, "narrow"), ("2.0", "uniform-2")],
)
def test_drafts(folder: Path, draft: Any, name: str) -> None:
    found = served(folder, bits=4, speculate_bits=draft)
    assert found.draft is not None
    assert found.draft.name == name
    assert found.resident == (found.active, found.draft)
    assert found.active.width == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 4, "speculate_bits": 4}, r"speculate_bits: found uniform-4, expected a slice .* than uniform-4"),
        ({"bits": 4, "speculate_bits": 6}, r"found uniform-6, which has 6 bits at .* narrower than uniform-4"),
        ({"bits": 4, "speculate_bits": "wide-first"}, r"found wide-first, which has 8 bits at model.* uniform-4"),
        ({"bits": 4, "speculate_bits": "other"}, r"other.*(narrow.*wide-first|wide-first.*narrow)"),
        ({"speculate_bits": 9}, r"speculate_bits: found 9, expected a width from 2 to 8"),
        ({"speculate_bits": True}, r"speculate_bits: found True"),
        ({"speculate_bits": [3]}, r"speculate_bits: found \[3\]"),
        ({"speculate_bits": 3, "speculate_tokens": 0}, r"speculate_tokens: found 0, expected an integer from 1 to 16"),
        ({"speculate_bits": 3, "speculate_tokens": 17}, r"speculate_tokens: found 17"),
        ({"speculate_tokens": 2}, r"speculate_tokens: found 2, expected speculate_bits too"),
        ({"speculate_bits": 3, "elastic": "2..8"}, r"speculate_bits: found 3, expected none with elastic"),
        ({"speculate_bits": 3, "resident": [4]}, r"speculate_bits: found 3, expected none with resident"),
    ],
)
def test_settings_that_are_refused(folder: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        served(folder, **settings)


def test_rounded_slices_do_not_draft(rounded: Path) -> None:
    with pytest.raises(ConfigError, match=r"speculate_bits: found 3 of a checkpoint with rounded slices"):
        served(rounded, bits=8, speculate_bits=3)


def test_what_vllm_is_asked_for(folder: Path) -> None:
    args = EngineArgs(
        model=str(folder), max_model_len=64, additional_config={"matquant": {"bits": 8, "speculate_bits": 3}, "own": 1}
    )
    made = args.create_engine_config()
    assert args.speculative_config is None
    assert made.speculative_config.method == "draft_model"
    assert made.speculative_config.num_speculative_tokens == 2
    assert made.quant_config.served.draft.name == "uniform-3"
    # A compiled graph knows of no draft.
    assert made.additional_config == {"own": 1} == config_without(folder)


def config_without(folder: Path) -> Any:
    args = EngineArgs(model=str(folder), max_model_len=64, additional_config={"matquant": {"bits": 8}, "own": 1})
    return args.create_engine_config().additional_config


def test_the_command_line(folder: Path) -> None:
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    line = ["--model", str(folder), "--bits", "8", "--speculate-bits", "narrow", "--speculate-tokens", "4"]
    args = EngineArgs.from_cli_args(parser.parse_args([*line, "--max-model-len", "64"]))
    made = args.create_engine_config()
    assert made.quant_config.served.draft.name == "narrow"
    assert made.speculative_config.num_speculative_tokens == 4


@pytest.mark.parametrize("option", ["--speculate-bits=9", "--speculate-bits=", "--speculate-tokens=two"])
def test_arguments_that_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    with pytest.raises(SystemExit):
        parser.parse_args([option])
    assert option.partition("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, r"speculative_config.*one of them"),
        ({"runner": "pooling"}, r"pooling, which generates nothing"),
        ({"pipeline_parallel_size": 2}, r"pipeline_parallel_size: found 2, expected 1"),
        ({"data_parallel_size": 2, "data_parallel_address": "127.0.0.1"}, r"data_parallel_size: found 2, expected 1"),
    ],
)
def test_engines_that_cannot_draft(folder: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(folder, {"bits": 8, "speculate_bits": 3}, enforce_eager=False, **fields)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"use_v2_model_runner": True}, r"VLLM_USE_V2_MODEL_RUNNER: found vLLM's model runner V2, expected V1"),
        ({"device_config.device_type": "cuda"}, r"device_type: found cuda, expected a CPU"),
        ({"kv_transfer_config": object()}, r"kv_connector: found a cache that others read"),
        ({"model_config.use_mla": True}, r"use_mla: found attention with latent keys"),
        ({"model_config.has_inner_state": True}, r"has_inner_state"),
        ({"model_config.is_multimodal_model": True}, r"found \['Seeing'\], of more than text"),
    ],
)
def test_what_no_small_model_here_has_is_refused(changed: dict[str, Any], message: str) -> None:
    parts = {
        "model_config": {
            "runner_type": "generate",
            "use_mla": False,
            "has_inner_state": False,
            "is_multimodal_model": False,
            "architectures": ["Seeing"],
        },
        "parallel_config": {"pipeline_parallel_size": 1, "data_parallel_size": 1},
        "device_config": {"device_type": "cpu"},
    }
    engine = SimpleNamespace(
        use_v2_model_runner=False,
        kv_transfer_config=None,
        **{part: SimpleNamespace(**fields) for part, fields in parts.items()},
    )
    check_speculation(engine)
    for name, value in changed.items():
        part, _, field = name.rpartition(".")
        setattr(getattr(engine, part) if part else engine, field, value)
    with pytest.raises(ConfigError, match=message) as error:
        check_speculation(engine)
    assert "serve without --speculate-bits" in str(error.value)
