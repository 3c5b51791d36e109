"""The --bits and --activation-bits arguments, as vLLM's own parsers see it; no engine is started."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_matquant.plugin import register
from vllm_matquant.serve.config import MatquantConfig

register()

ADDED = '{"other": 1}'
PARSERS = {
    "serve": lambda: make_arg_parser(FlexibleArgumentParser()),
    "bench": lambda: EngineArgs.add_cli_args(FlexibleArgumentParser()),
}


@pytest.fixture(params=PARSERS)
def parser(request: pytest.FixtureRequest) -> FlexibleArgumentParser:
    return PARSERS[request.param]()


def parsed(parser: FlexibleArgumentParser, *args: str) -> dict:
    return parser.parse_args(list(args)).additional_config


@pytest.mark.parametrize("bits", range(2, 9))
def test_bits_lands_in_additional_config(parser: FlexibleArgumentParser, bits: int) -> None:
    assert parsed(parser, "--bits", str(bits)) == {"matquant": {"bits": bits}}
    assert parsed(parser, f"--bits={bits}") == {"matquant": {"bits": bits}}


def test_activation_bits_stand_beside_bits(parser: FlexibleArgumentParser) -> None:
    assert parsed(parser, "--activation-bits", "8") == {"matquant": {"activation_bits": 8}}
    both = {"matquant": {"bits": 3, "activation_bits": 16}}
    assert parsed(parser, "--bits", "3", "--activation-bits", "16") == both
    assert parsed(parser, "--activation-bits", "16", "--bits", "3") == both


@pytest.mark.parametrize("bits", ["4", "24", "", "eight"])
def test_other_activation_bits_exit_with_2(
    parser: FlexibleArgumentParser, bits: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_status:
        parser.parse_args([f"--activation-bits={bits}"])
    assert exit_status.value.code == 2
    assert "--activation-bits" in capsys.readouterr().err


def test_without_bits_nothing_is_added(parser: FlexibleArgumentParser) -> None:
    # Also after a call with bits: vLLM's default is one object, shared by all calls.
    parsed(parser, "--bits", "3")
    namespace = parser.parse_args([])
    assert namespace.additional_config == {}
    assert "bits" not in vars(namespace)


def test_bits_and_additional_config_merge_in_either_order(parser: FlexibleArgumentParser) -> None:
    merged = {"other": 1, "matquant": {"bits": 3}}
    assert parsed(parser, "--bits", "3", "--additional-config", ADDED) == merged
    assert parsed(parser, "--additional-config", ADDED, "--bits", "3") == merged
    assert parsed(parser, "--bits", "3", "--additional-config.other", "1") == merged


def test_the_later_of_two_widths_holds(parser: FlexibleArgumentParser) -> None:
    four = '{"matquant": {"bits": 4}}'
    assert parsed(parser, "--bits", "3", "--additional-config", four) == {"matquant": {"bits": 4}}
    assert parsed(parser, "--additional-config", four, "--bits", "3") == {"matquant": {"bits": 3}}
    assert parsed(parser, "--bits", "3", "--bits", "5") == {"matquant": {"bits": 5}}


def test_malformed_settings_reach_the_check_at_the_start_of_the_engine(parser: FlexibleArgumentParser) -> None:
    malformed = {"matquant": 4}
    assert parsed(parser, "--bits", "3", "--additional-config", json.dumps(malformed)) == malformed


@pytest.mark.parametrize("bits", ["9", "1", "0", "-3", "1.9", "8.1", "nan", "four", ""])
def test_a_width_that_no_checkpoint_offers_exits_with_2(
    parser: FlexibleArgumentParser, bits: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_status:
        parser.parse_args([f"--bits={bits}"])
    assert exit_status.value.code == 2
    assert "--bits" in capsys.readouterr().err


def test_the_refusal_lists_the_allowed_widths(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        PARSERS["bench"]().parse_args(["--bits", "9"])
    assert "found '9', expected 2 to 8, or an average such as 2.5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lines", "args", "expected"),
    [
        ("bits: 3", [], {"matquant": {"bits": 3}}),
        ("bits: 3", ["--bits", "4"], {"matquant": {"bits": 4}}),
        ("bits: 3", ["--additional-config", ADDED], {"other": 1, "matquant": {"bits": 3}}),
        (f"additional-config: {ADDED}", ["--bits", "4"], {"other": 1, "matquant": {"bits": 4}}),
        (f"bits: 3\nadditional-config: {ADDED}", [], {"other": 1, "matquant": {"bits": 3}}),
    ],
)
def test_config_file(tmp_path: Path, lines: str, args: list[str], expected: dict) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(lines + "\n")
    assert parsed(PARSERS["bench"](), "--config", str(file), *args) == expected


def test_help_describes_bits() -> None:
    [action] = [action for action in PARSERS["serve"]()._actions if "--bits" in action.option_strings]
    assert "additional-config" in action.help


@pytest.mark.parametrize("engine_args", [EngineArgs, AsyncEngineArgs])
def test_engine_args_carry_the_bits(engine_args: type[EngineArgs], tmp_path: Path) -> None:
    namespace = PARSERS["bench"]().parse_args(["--bits", "5", "--model", str(tmp_path)])
    assert engine_args.from_cli_args(namespace).additional_config == {"matquant": {"bits": 5}}


def test_registration_is_idempotent() -> None:
    wrapped = EngineArgs.add_cli_args, EngineArgs.create_engine_config
    register()
    assert (EngineArgs.add_cli_args, EngineArgs.create_engine_config) == wrapped
    assert get_quantization_config("matquant") is MatquantConfig
