"""What vLLM's plugin loader calls: registration of the quantization method and of its arguments, ``--bits`` above all.

vLLM has no hook for a plugin's own arguments, and none between the making of its configuration and the start of the
engine, so two methods of EngineArgs are wrapped. The wrappers change nothing for models that are not matquant's.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from vllm_matquant.checkpoint.sizes import parse_bytes
from vllm_matquant.checkpoint.spec import QUANT_METHOD, WIDTHS
from vllm_matquant.serve.elastic.offer import parse_choices
from vllm_matquant.serve.elastic.policy import read_policy
from vllm_matquant.serve.speculation.settings import DEFAULT_TOKENS, MOST_TOKENS, parse_draft
from vllm_matquant.serve.version import check_version

_Value = TypeVar("_Value")

_BITS_HELP = (
    f"Bits per weight at which to serve a matquant checkpoint: {WIDTHS[0]} to {WIDTHS[-1]}, as far as it offers them; "
    "or, with a decimal point, such as 2.5 or 3.0, the budget of an average, within which the best of the checkpoint's "
    "recipes is served, which give each layer its width. Only the files that hold these bits are read, and only these "
    "bits take memory. Without this argument: the most bits that the checkpoint offers. Short for "
    '--additional-config \'{"matquant": {"bits": N}}\'; where both are given, the later one holds.'
)
_MEMORY_HELP = (
    "Memory that all weights of a matquant checkpoint may take, such as 90MiB or 1.2GB; activations and the KV cache "
    "come on top. The best of the checkpoint's recipes and widths that fits is served."
)
_RECIPE_HELP = (
    "A file that gives each layer of a matquant checkpoint its width, an object such as "
    '{"recipe_version": 1, "name": "mine", "widths": {"model.layers.0.mlp.down_proj": 8}, "default": 4}. '
    "Recipes of the checkpoint itself are chosen by --bits 2.5 and --memory."
)
_ACTIVATION_BITS_HELP = (
    "Bits to which the CPU's kernels round the activations of a matquant layer: 16 loses next to nothing; 8 is up to "
    "twice as fast for prompts and batches and costs some accuracy. Default: up to 4 bits per weight 8, and 16 for "
    "outliers, which costs nothing that counts; above 16. Short for "
    '--additional-config \'{"matquant": {"activation_bits": N}}\'.'
)
_ELASTIC_HELP = (
    "Widths, and names of the checkpoint's recipes, that the server can switch to while it serves, and that a request "
    "can ask for: a list such as 2,4,8 or 2..8. Planes up to the widest are in memory once, and decoders of each; "
    '--bits says which one is active at first. Short for --additional-config \'{"matquant": {"elastic": "2..8"}}\'.'
)
_POLICY_HELP = (
    "Let the active width follow the load: load, or load with settings such as load,floor=3,waiting=8,tpot=0.05. "
    "floor and ceiling are widths or recipes; fewer bits are read while waiting requests, kv_usage (0 to 1) "
    "or tpot (seconds from token to token) reach these thresholds, more when all have been below relief times theirs "
    "for calm seconds; each width lasts dwell seconds at least."
)
_CLIENT_BITS_HELP = (
    "Those of --elastic that a request may ask for, by its argument matquant_bits; none for none. Default: all of them."
)
_SPECULATE_HELP = (
    "Draft with a narrower slice of the same planes: a width such as 3, the name of one of the checkpoint's recipes, "
    "or a number such as 2.5 as the budget of an average. It guesses the next tokens, and what is served checks them "
    "all in one step: the answers are those of what is served. Costs no memory but the draft's decoders. Short for "
    '--additional-config \'{"matquant": {"speculate_bits": 3}}\'.'
)
_TOKENS_HELP = (
    f"Tokens that --speculate-bits guesses before they are checked, 1 to {MOST_TOKENS}. Default: {DEFAULT_TOKENS}."
)


@functools.cache
def register() -> None:
    """Make matquant known to vLLM in this process; a second call does nothing.

    Raises:
        ImportError: this vLLM is too old.
    """
    import vllm

    check_version(vllm.__version__)
    from vllm import plugins
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor import model_loader
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.v1.engine.input_processor import InputProcessor

    from vllm_matquant.serve.config import MatquantConfig
    from vllm_matquant.serve.elastic.api import with_control
    from vllm_matquant.serve.elastic.requests import with_slices
    from vllm_matquant.serve.loader import LOAD_FORMATS, MatquantModelLoader

    register_quantization_config(QUANT_METHOD)(MatquantConfig)
    for load_format in LOAD_FORMATS:
        # Not through register_model_loader: it warns of each format that it replaces, in every process.
        model_loader._LOAD_FORMAT_TO_MODEL_LOADER[load_format] = MatquantModelLoader
    EngineArgs.add_cli_args = staticmethod(_with_arguments(EngineArgs.add_cli_args))
    EngineArgs.create_engine_config = _settling(EngineArgs.create_engine_config)
    InputProcessor.process_inputs = with_slices(InputProcessor.process_inputs)
    plugins.load_endpoint_plugins = with_control(plugins.load_endpoint_plugins)


def _with_arguments(add_cli_args: Callable[..., Any]) -> Callable[..., Any]:
    from vllm_matquant.serve.request import ACTIVATION_BITS

    @functools.wraps(add_cli_args)
    def wrapper(parser: Any) -> Any:
        parser = add_cli_args(parser)
        group = parser.add_argument_group(title="Matquant", description="Checkpoints of every width from 2 to 8 bits.")
        add = functools.partial(group.add_argument, action=_StoreSetting, default=argparse.SUPPRESS)
        add("--bits", type=_bits, metavar="N", help=_BITS_HELP)
        add("--memory", type=_refusing(parse_bytes), metavar="SIZE", help=_MEMORY_HELP)
        add("--recipe", type=_file, metavar="FILE", help=_RECIPE_HELP)
        add("--elastic", type=_refusing(_choices), metavar="LIST", help=_ELASTIC_HELP)
        add("--client-bits", type=_refusing(_client_choices), metavar="LIST", help=_CLIENT_BITS_HELP)
        add("--elastic-policy", type=_refusing(_policy), metavar="POLICY", help=_POLICY_HELP)
        add("--speculate-bits", type=_refusing(parse_draft), metavar="N", help=_SPECULATE_HELP)
        add("--speculate-tokens", type=int, metavar="K", help=_TOKENS_HELP)
        add("--activation-bits", type=int, choices=ACTIVATION_BITS, help=_ACTIVATION_BITS_HELP)
        parser._option_string_actions["--additional-config"].__class__ = _StoreAdditionalConfig
        return parser

    return wrapper


def _bits(text: str) -> int | float:
    """A width, or with a decimal point the budget of an average."""
    try:
        bits = float(text) if "." in text else int(text)
    except ValueError:
        bits = 0
    if not WIDTHS[0] <= bits <= WIDTHS[-1]:
        expected = f"{WIDTHS[0]} to {WIDTHS[-1]}, or an average such as 2.5"
        raise argparse.ArgumentTypeError(f"found {text!r}, expected {expected}")
    return bits


def _refusing(parse: Callable[[str], _Value]) -> Callable[[str], _Value]:
    """A parser whose errors argparse shows as they are."""

    @functools.wraps(parse)
    def wrapper(text: str) -> _Value:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return wrapper


def _choices(text: str) -> list[int | str]:
    """A list of widths and recipes, such as 2..8."""
    return list(parse_choices(text))


def _client_choices(text: str) -> list[int | str]:
    """Such a list, or none."""
    return [] if text == "none" else _choices(text)


def _policy(text: str) -> str:
    """The settings of a policy."""
    read_policy(text)
    return text


def _file(text: str) -> str:
    """The whole path of a file that exists: another process may have another folder to start from."""
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"found no file {text!r}, expected a recipe (JSON)")
    return str(path.absolute())


def _settling(create_engine_config: Callable[..., Any]) -> Callable[..., Any]:
    from vllm_matquant.serve.config import settle
    from vllm_matquant.serve.speculation.engine import drafting

    @functools.wraps(create_engine_config)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        with drafting(self):
            vllm_config = create_engine_config(self, *args, **kwargs)
        settle(vllm_config)
        return vllm_config

    return wrapper


class _StoreAdditionalConfig(argparse._StoreAction):
    """Stores ``--additional-config`` on top of what the plugin's arguments have set, whichever comes first."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        earlier, later = (_settings(config) for config in (namespace.additional_config, values))
        if earlier and later is not None:
            values = {**values, QUANT_METHOD: {**earlier, **later}}
        setattr(namespace, self.dest, values)


class _StoreSetting(argparse.Action):
    """Stores a setting where the settling of the engine's configuration finds it."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        config = namespace.additional_config
        namespace.additional_config = {**config, QUANT_METHOD: {**(_settings(config) or {}), self.dest: values}}


def _settings(additional_config: Any) -> dict[str, Any] | None:
    """The plugin's settings as far as they are well formed; the engine's start refuses the others."""
    settings = additional_config.get(QUANT_METHOD, {}) if isinstance(additional_config, Mapping) else None
    return settings if isinstance(settings, dict) else None
