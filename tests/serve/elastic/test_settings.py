"""The settings of an elastic server, and engines that cannot be one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tests.serve.elastic.slices import EIGHT, RECIPE, an_offer
from tests.serve.tiny_models import write_checkpoint
from vllm_matquant.checkpoint.errors import CheckpointError, ConfigError
from vllm_matquant.checkpoint.reader import Checkpoint, open_checkpoint
from vllm_matquant.checkpoint.spec import Format
from vllm_matquant.plugin import register
from vllm_matquant.serve.elastic.engine import LISTENER, WORKER, graph_key, settle_elastic
from vllm_matquant.serve.elastic.policy import LoadPolicy
from vllm_matquant.serve.request import read_request
from vllm_matquant.serve.served import Served

register()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("settings")
    return open_checkpoint(
        write_checkpoint(folder / "tiny", "llama", Format(group_size=32, ignored_layers=("lm_head",)))
    )


def served(checkpoint: Checkpoint, **settings: Any) -> Served:
    return read_request({"matquant": settings}).served(checkpoint, lambda line: None)


def names(served: Served) -> list[str]:
    return [each.name for each in served.resident]


def test_what_is_resident_and_active(checkpoint: Checkpoint) -> None:
    both = served(checkpoint, bits=4, elastic="2,8")
    assert names(both) == ["uniform-8", "uniform-4", "uniform-2"]
    assert both.active.width == 4
    assert both.offer is not None
    assert both.offer.slices == both.resident
    assert served(checkpoint, elastic=[2, 5]).active.width == 5
    assert served(checkpoint, bits=4).offer is None


def test_clients_and_policies(checkpoint: Checkpoint) -> None:
    offer = served(checkpoint, elastic="2..8", client_bits=[4, 3], elastic_policy="load,floor=3,ceiling=6").offer
    assert offer is not None
    assert offer.for_clients == ("uniform-4", "uniform-3")
    assert offer.policy == LoadPolicy(floor=3, ceiling=6)
    offer = served(checkpoint, elastic="8", client_bits=[], elastic_policy={"floor": 2}).offer
    assert offer is not None
    assert offer.for_clients == ()
    assert [each.width for each in offer.slices] == [8, 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"elastic": "1..8"}, "matquant.elastic: found '1..8', expected widths from 2 to 8"),
        ({"elastic": 4}, "matquant.elastic"),
        ({"elastic": ["other"]}, "'other'"),
        ({"client_bits": [4]}, "matquant.client_bits"),
        ({"elastic_policy": "load"}, "matquant.elastic_policy"),
        ({"elastic": "2..8", "client_bits": [9]}, "matquant.client_bits"),
        ({"elastic": "2..8", "elastic_policy": "load,waiting=0"}, "waiting: found 0"),
        ({"elastic": "2..8", "elastic_policy": "load,floor=8"}, "expected a floor with fewer bits than a ceiling"),
    ],
)
def test_wrong_settings(checkpoint: Checkpoint, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as error:
        served(checkpoint, **settings)
    assert message in str(error.value)


def test_rounded_slices_do_not_nest(tmp_path: Path) -> None:
    rounded = write_checkpoint(tmp_path / "a", "llama", Format(slicing="round", ignored_layers=("lm_head",)))
    with pytest.raises(ConfigError, match="rounded slices"):
        served(open_checkpoint(rounded), elastic="2,8")


def parsed(*arguments: str) -> Any:
    return EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(list(arguments)).additional_config


def test_options() -> None:
    arguments = ["--elastic", "2..4,mine", "--client-bits", "none", "--elastic-policy", "load,waiting=2"]
    assert parsed(*arguments, "--bits", "4") == {
        "matquant": {"elastic": [2, 3, 4, "mine"], "client_bits": [], "elastic_policy": "load,waiting=2", "bits": 4}
    }


@pytest.mark.parametrize("argument", ["--elastic=9", "--client-bits=0", "--elastic-policy=load,x=1", "--elastic="])
def test_wrong_options_exit_with_2(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_status:
        parsed(argument)
    assert exit_status.value.code == 2
    assert "expected" in capsys.readouterr().err


def an_engine(device: str = "cpu", v2: bool = False, runner: str = "generate", **others: Any) -> Any:
    served = Served(EIGHT, an_offer().slices, offer=an_offer())
    parallel = {"_api_process_count": 1, "data_parallel_size": 1, "worker_extension_cls": ""}
    return SimpleNamespace(
        quant_config=SimpleNamespace(
            served=served, offer=served.offer, front=None, quantized_embeddings=others.pop("embeddings", ())
        ),
        model_config=SimpleNamespace(
            runner_type=runner,
            use_mla=others.pop("use_mla", False),
            logits_processors=None,
            return_sampling_mask=False,
            is_multimodal_model=others.pop("is_multimodal_model", False),
        ),
        device_config=SimpleNamespace(device_type=device),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=64, max_num_seqs=4),
        speculative_config=others.pop("speculative_config", None),
        use_v2_model_runner=v2,
        parallel_config=SimpleNamespace(**parallel | others),
    )


def test_an_engine_whose_requests_have_widths_of_their_own() -> None:
    engine = an_engine()
    settle_elastic(engine)
    assert engine.model_config.logits_processors == [LISTENER]
    assert engine.parallel_config.worker_extension_cls == WORKER
    assert engine.quant_config.front.active == EIGHT
    assert engine.quant_config.front.offer.refusal is None
    assert graph_key(engine) == {"matquant_rows": 64}


@pytest.mark.parametrize(
    ("engine", "reason"),
    [
        (an_engine("cuda"), "no GPU has run the kernels"),
        (an_engine(v2=True), "VLLM_USE_V2_MODEL_RUNNER=0"),
        (an_engine(runner="pooling"), "pooling"),
        (an_engine(is_multimodal_model=True, embeddings=("embed_tokens",)), "looks tokens of a multimodal model up"),
    ],
)
def test_engines_whose_requests_have_one_width(engine: Any, reason: str) -> None:
    settle_elastic(engine)
    assert engine.model_config.logits_processors is None
    assert engine.parallel_config.worker_extension_cls == WORKER
    assert reason in engine.quant_config.front.offer.refusal
    assert engine.quant_config.served.offer.refusal == engine.quant_config.front.offer.refusal


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"_api_process_count": 2}, "api_server_count"),
        ({"data_parallel_size": 2}, "data_parallel_size"),
        ({"worker_extension_cls": "mine.Worker"}, "worker_extension_cls"),
        ({"use_mla": True}, "use_mla"),
        ({"speculative_config": SimpleNamespace(method="ngram")}, "speculative_config"),
    ],
)
def test_engines_that_cannot_be_elastic(changed: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        settle_elastic(an_engine(**changed))


def test_a_server_of_another_language(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(ConfigError, match="VLLM_USE_RUST_FRONTEND"):
        settle_elastic(an_engine())


def test_decoders_of_a_recipe_alone_need_rows() -> None:
    engine = an_engine("cuda")
    own = an_offer(slices=(EIGHT, RECIPE.__class__(**{**RECIPE.to_dict(), "decoders_file": "recipes/a.safetensors"})))
    engine.quant_config.offer = own
    with pytest.raises(ConfigError, match="my-recipe with decoders of their own"):
        settle_elastic(engine)
