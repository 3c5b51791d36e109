from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedConfig
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.load import LoadConfig
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.utils import WeightsMapper

from tests.serve.tiny_models import served_at, served_widths, write_checkpoint
from vllm_matquant.checkpoint import tensor_files, validate
from vllm_matquant.checkpoint.decoder import CODEBOOK, VECTOR_KINDS, DecoderKind
from vllm_matquant.checkpoint.errors import CheckpointError, ConfigError, MissingFileError, VersionError, WidthError
from vllm_matquant.checkpoint.quantization_config import format_to_config
from vllm_matquant.checkpoint.reader import open_checkpoint
from vllm_matquant.checkpoint.servable import check_served
from vllm_matquant.checkpoint.spec import Format
from vllm_matquant.serve import files, limits
from vllm_matquant.serve.config import MatquantConfig, settle
from vllm_matquant.serve.embedding import MatquantEmbeddingMethod
from vllm_matquant.serve.experts import MatquantExpertsMethod
from vllm_matquant.serve.linear import MatquantLinearMethod
from vllm_matquant.serve.loader import MatquantModelLoader

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def config_of(*ignored: str, bits: int = 4, embeddings: tuple[str, ...] = ()) -> MatquantConfig:
    checkpoint_format = Format(ignored_layers=ignored, quantized_embeddings=embeddings)
    config = MatquantConfig.from_config(format_to_config(checkpoint_format))
    config.packed_modules_mapping = FUSED
    config.served = served_at(bits)
    return config


def method_of(config: MatquantConfig, prefix: str, layer_class: type[torch.nn.Module] = LinearBase) -> Any:
    with set_current_vllm_config(VllmConfig()):
        return config.get_quant_method(layer_class.__new__(layer_class), prefix)


def test_a_fused_layer_is_served_as_its_parts() -> None:
    method = method_of(config_of(bits=3), "model.layers.0.self_attn.qkv_proj")
    assert isinstance(method, MatquantLinearMethod)
    assert method.parts == [f"model.layers.0.self_attn.{part}" for part in FUSED["qkv_proj"]]
    assert method_of(config_of(), "model.layers.0.mlp.down_proj").parts == ["model.layers.0.mlp.down_proj"]


def test_ignored_layers_stay_as_they_are() -> None:
    config = config_of("a.down_proj", "a.gate_proj", "a.up_proj")
    assert isinstance(method_of(config, "a.down_proj"), UnquantizedLinearMethod)
    assert isinstance(method_of(config, "a.gate_up_proj"), UnquantizedLinearMethod)
    # The names are compared whole.
    assert isinstance(method_of(config, "aa.down_proj"), MatquantLinearMethod)
    assert isinstance(method_of(config, "b.a.down_proj"), MatquantLinearMethod)


def test_a_fused_layer_cannot_be_ignored_in_part() -> None:
    with pytest.raises(ConfigError) as error:
        method_of(config_of("a.k_proj"), "a.qkv_proj")
    for name in ("a.q_proj", "a.k_proj", "a.v_proj", "a.qkv_proj"):
        assert name in str(error.value)


def test_names_follow_the_models_mapper() -> None:
    config = config_of("language_model.model.a.down_proj", embeddings=("language_model.model.embed_tokens",))
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"language_model.model.": "model."}))
    assert isinstance(method_of(config, "model.a.down_proj"), UnquantizedLinearMethod)
    assert method_of(config, "model.embed_tokens", VocabParallelEmbedding).parts == ["model.embed_tokens"]
    layer = "language_model.model.a.down_proj"
    config = MatquantConfig(Format(layer_group_sizes={layer: 32}, layer_widths={layer: (4, 8)}))
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"language_model.model.": "model."}))
    assert config.format.layer_group_sizes == {"model.a.down_proj": 32}
    assert config.format.layer_widths == {"model.a.down_proj": (4, 8)}


def test_the_names_of_a_multimodal_model() -> None:
    """vLLM's mappers rename what ends in a dot; its Qwen3-VL asks for its head without the part that it is in."""
    prefixes = {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."}
    mapper = WeightsMapper(orig_to_new_prefix=prefixes)
    config = config_of("lm_head", embeddings=("model.language_model.embed_tokens",))
    config.apply_vllm_mapper(mapper)
    assert method_of(config, "language_model.lm_head", ParallelLMHead) is None
    assert method_of(config, "lm_head", ParallelLMHead) is None
    embedding = "language_model.model.embed_tokens"
    for prefix in (embedding, ""):
        assert method_of(config, prefix, VocabParallelEmbedding).parts == [embedding]
    assert config.vllm_names(["lm_head", "vision_tower.a"]) == {"language_model.lm_head", "vision_tower.a"}
    config = config_of()
    config.served = served_widths({"lm_head": 3, "model.language_model.a.o_proj": 2})
    config.apply_vllm_mapper(mapper)
    for prefix in ("language_model.lm_head", "lm_head"):
        method = method_of(config, prefix, ParallelLMHead)
        assert method.served.of_layer(method.parts).active == (3,)
    method = method_of(config, "language_model.model.a.o_proj")
    assert method.served.of_layer(method.parts).active == (2,)


def test_a_draft_has_the_names_of_its_checkpoint() -> None:
    config = config_of("a.down_proj")
    assert isinstance(method_of(config, "draft_model.a.down_proj"), UnquantizedLinearMethod)
    assert method_of(config, "draft_model.a.o_proj").parts == ["a.o_proj"]


@pytest.mark.parametrize("layer_class", [VocabParallelEmbedding, ParallelLMHead])
@pytest.mark.parametrize("prefix", ["", "lm_head", ".lm_head", "draft_model.lm_head"])
def test_embeddings_that_are_not_quantized(layer_class: type[torch.nn.Module], prefix: str) -> None:
    assert method_of(config_of("lm_head"), prefix, layer_class) is None


def test_quantized_embeddings() -> None:
    config = config_of("lm_head", embeddings=("model.embed_tokens",))
    for prefix in ("model.embed_tokens", "draft_model.model.embed_tokens", ""):  # vLLM's Llama gives it no name
        method = method_of(config, prefix, VocabParallelEmbedding)
        assert isinstance(method, MatquantEmbeddingMethod)
        assert method.parts == ["model.embed_tokens"]
    assert method_of(config, "model.embed_tokens_per_layer", VocabParallelEmbedding) is None
    assert method_of(config, "lm_head", ParallelLMHead) is None


@pytest.mark.parametrize("prefix", ["lm_head", ".lm_head", "draft_model.lm_head"])
def test_quantized_heads(prefix: str) -> None:
    method = method_of(config_of(bits=3), prefix, ParallelLMHead)
    assert isinstance(method, MatquantEmbeddingMethod)
    assert method.parts == ["lm_head"]
    assert method_of(config_of(), "lm_head", VocabParallelEmbedding) is None


def experts_method(config: MatquantConfig, prefix: str) -> Any:
    """The method of three experts."""
    layer = RoutedExperts.__new__(RoutedExperts)
    names = {"ckpt_gate_proj_name": "w1", "ckpt_down_proj_name": "w2", "ckpt_up_proj_name": "w3"}
    moe = SimpleNamespace(num_logical_experts=3)
    layer.__dict__ |= names | {"moe_config": moe}
    with set_current_vllm_config(VllmConfig()):
        return config.get_quant_method(layer, prefix)


def test_experts_have_the_names_of_the_checkpoint() -> None:
    method = experts_method(config_of(bits=3), "draft_model.a.experts")
    assert isinstance(method, MatquantExpertsMethod)
    assert method.parts == [
        ([f"a.experts.{index}.w1", f"a.experts.{index}.w3"], [f"a.experts.{index}.w2"]) for index in range(3)
    ]


def test_experts_cannot_be_ignored_in_part() -> None:
    with pytest.raises(ConfigError, match=r"ignored_layers: found \['a\.experts\.1\.w2'\], expected all or none"):
        experts_method(config_of("a.experts.1.w2"), "a.experts")


def test_a_router_that_the_checkpoint_has_plain_is_left_alone(tmp_path: Path) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    folder = write_checkpoint(tmp_path / "mixture", "qwen3_moe", Format(group_size=32), **experts)
    config = MatquantConfig.from_config(open_checkpoint(folder).config["quantization_config"])
    config.model = str(folder)
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "other."}))
    assert isinstance(method_of(config, "other.layers.0.mlp.gate"), UnquantizedLinearMethod)
    assert isinstance(method_of(config, "other.layers.0.self_attn.o_proj"), MatquantLinearMethod)
    assert isinstance(method_of(config, "other.layers.0.mlp.gates"), MatquantLinearMethod)  # nobody knows of it


def test_config_json_is_checked() -> None:
    with pytest.raises(VersionError):
        MatquantConfig.from_config(format_to_config(Format()) | {"format_version": 4})
    with pytest.raises(ConfigError, match="slicing: found 'round', expected 'truncate'"):
        MatquantConfig.from_config(format_to_config(Format(decoder_kind=CODEBOOK)) | {"slicing": "round"})
    with pytest.raises(ConfigError, match="group_size"):
        MatquantConfig.from_config(format_to_config(Format()) | {"group_size": 12})


def test_slices_with_a_level_more_than_their_bits_hold_are_refused() -> None:
    check_served(Format(slicing="round"))
    with pytest.raises(ConfigError, match=r"slicing: found 'round-extra', .* 2\^r \+ 1 levels"):
        check_served(Format(slicing="round-extra"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    offered = Format(widths=(2, 3, 8), group_size=64)
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model", "llama", offered)


def engine_config(quant_config: Any, load_format: str = "auto", draft: str | None = None, **additional: Any) -> Any:
    """The part of a VllmConfig that is looked at before the engine starts."""
    quantization = None if quant_config is None else quant_config.get_name()
    return SimpleNamespace(
        lora_config=None,
        parallel_config=SimpleNamespace(
            tensor_parallel_size=1,
            data_parallel_size=1,
            enable_expert_parallel=False,
            enable_eplb=False,
            local_world_size=1,
        ),
        additional_config=additional,
        quant_config=quant_config,
        load_config=SimpleNamespace(load_format=load_format, download_dir=None),
        model_config=SimpleNamespace(
            quantization=quantization,
            runner_type="generate",
            using_transformers_backend=lambda: False,
            hf_config=PreTrainedConfig(),
        ),
        speculative_config=draft and SimpleNamespace(draft_model_config=SimpleNamespace(quantization=draft)),
    )


def opened(folder: Path) -> MatquantConfig:
    config = MatquantConfig(Format(widths=(2, 3, 8), group_size=64))
    config.maybe_update_config(str(folder))
    return config


def test_what_is_served_is_settled_and_no_part_of_the_key_of_the_compile_cache(folder: Path) -> None:
    for bits, settings in [(8, {}), (3, {"matquant": {"bits": 3}}), (2, {"matquant": {"bits": 2.9}})]:
        config = engine_config(opened(folder), other=1, **settings)
        settle(config)
        assert config.additional_config == {"other": 1}
        assert set(config.quant_config.served.active.widths.values()) == {bits}


def test_settings_stay_for_a_draft(folder: Path) -> None:
    config = engine_config(opened(folder), draft="matquant", matquant={"bits": 3})
    settle(config)
    assert config.quant_config.served.active.width == 3
    assert config.additional_config == {"matquant": {"bits": 3}}


def test_a_start_opens_and_checks_each_file_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []
    monkeypatch.setattr(files, "_opened", functools.lru_cache(files._opened.__wrapped__))
    monkeypatch.setattr(
        tensor_files, "check_shard", lambda path, *rest: checked.append(path.name) or validate.check_shard(path, *rest)
    )
    config = engine_config(opened(folder), matquant={"bits": 8.0})
    settle(config)
    config.model_config = SimpleNamespace(model=str(folder), revision=None, quantization="matquant")
    monkeypatch.setattr(DefaultModelLoader, "load_model", lambda self, *arguments: torch.nn.Module())
    MatquantModelLoader(LoadConfig()).load_model(config, config.model_config)
    assert sorted(checked) == sorted(file.name for file in folder.glob("*.safetensors"))


def test_a_width_that_cannot_be_served_is_refused_before_the_engine_starts(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(WidthError, match=r"\[2, 3, 8\]"):
        settle(engine_config(opened(folder), matquant={"bits": 4}))
    for file in folder.iterdir():
        if "width8" not in file.name:
            (tmp_path / file.name).symlink_to(file)
    settle(engine_config(opened(tmp_path), matquant={"bits": 3}))
    with pytest.raises(MissingFileError, match="model-width8"):
        settle(engine_config(opened(tmp_path), matquant={"bits": 8}))


@pytest.mark.parametrize("load_format", ["dummy", "fastsafetensors", "pt", "sharded_state"])
def test_load_formats_that_do_not_go_through_the_reader_are_refused(folder: Path, load_format: str) -> None:
    with pytest.raises(ConfigError, match=load_format):
        settle(engine_config(opened(folder), load_format))


@pytest.mark.parametrize("kind", VECTOR_KINDS.values(), ids=lambda kind: kind.name)
def test_checkpoints_to_compare_with_are_refused_before_the_engine_starts(kind: DecoderKind, folder: Path) -> None:
    config = MatquantConfig(Format(widths=(2,), group_size=64, decoder_kind=kind))
    config.maybe_update_config(str(folder))
    found = f"decoder_kind: found '{kind.name}', which no kernel reads: the checkpoint is for evaluation and comparison"
    with pytest.raises(ConfigError, match=rf"{found}, expected one of \['affine-float16', .*matquant evaluate"):
        settle(engine_config(config))


def test_bits_for_another_kind_of_model_are_refused() -> None:
    with pytest.raises(CheckpointError, match="matquant checkpoint"):
        settle(engine_config(None, matquant={"bits": 3}))
    settle(engine_config(None))
    settle(engine_config(None, draft="matquant", matquant={"bits": 3}))


@pytest.mark.parametrize(
    ("targets", "found"),
    [(None, "every module"), (["q_proj", "experts"], "'experts'"), (["model.layers.0.mlp.experts"], "0.mlp.experts")],
)
def test_adapters_on_experts_are_refused_before_the_engine_starts(
    targets: list[str] | None, found: str, tmp_path: Path
) -> None:
    checkpoint_format = Format(widths=(2, 3, 8), group_size=64)
    options = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 64, "num_hidden_layers": 1}
    config = engine_config(opened(write_checkpoint(tmp_path / "model", "qwen3_moe", checkpoint_format, **options)))
    config.lora_config = SimpleNamespace(target_modules=targets)
    with pytest.raises(
        ConfigError, match=f"target_modules: found .*{found}.*experts, expected .*--lora-target-modules"
    ):
        settle(config)
    config.lora_config.target_modules = ["q_proj", "o_proj"]
    settle(config)


def test_ranks_that_experts_cannot_be_divided_between(tmp_path: Path) -> None:
    options = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 64, "num_hidden_layers": 1}
    model = write_checkpoint(tmp_path / "model", "qwen3_moe", Format(widths=(2, 3, 8), group_size=64), **options)
    config = engine_config(opened(model))
    parallel = config.parallel_config
    parallel.tensor_parallel_size = 2
    found = r"enable_expert_parallel: found False on 2 ranks, and .*experts\.0\.down_proj has 64 input features"
    with pytest.raises(ConfigError, match=found):
        settle(config)
    parallel.enable_expert_parallel = True
    settle(config)
    for field, value in {"enable_eplb": True, "data_parallel_size": 2}.items():
        before = getattr(parallel, field)
        setattr(parallel, field, value)
        with pytest.raises(ConfigError, match=f"{field}: found {value}.*, expected"):
            settle(config)
        setattr(parallel, field, before)


def test_adapters_on_a_gpu_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = engine_config(opened(folder))
    config.lora_config = SimpleNamespace(target_modules=None)
    settle(config)
    monkeypatch.setattr(limits, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    with pytest.raises(ConfigError, match="enable_lora: found True on a GPU, expected a CPU"):
        settle(config)


def test_tensor_parallelism_that_cuts_a_group_is_refused_before_the_engine_starts(folder: Path) -> None:
    config = engine_config(opened(folder))
    columns = open_checkpoint(folder).layers["model.layers.0.self_attn.o_proj"][1]
    size = columns // 64
    config.parallel_config.tensor_parallel_size = size
    settle(config)
    config.parallel_config.tensor_parallel_size = 2 * size
    layer = rf"model\.layers\.0\.self_attn\.o_proj has {columns} input features, no multiple of {2 * size} x 64"
    with pytest.raises(ConfigError, match=rf"tensor_parallel_size: found {2 * size}, and {layer}, .* expected one of"):
        settle(config)


@pytest.mark.parametrize("tied", [True, False])
def test_quantized_embeddings_where_vllm_cannot_serve_them(tied: bool, tmp_path: Path) -> None:
    quantized = Format(quantized_embeddings=("model.embed_tokens",), ignored_layers=())
    write_checkpoint(tmp_path / "model", "llama", quantized, tie_word_embeddings=tied)
    quant_config = MatquantConfig(quantized)
    quant_config.maybe_update_config(str(tmp_path / "model"))
    config = engine_config(quant_config)
    settle(config)
    config.model_config.runner_type = "pooling"
    if tied:
        settle(config)  # the head has no tensors of its own that vLLM would drop
    else:
        with pytest.raises(
            ConfigError, match=r"runner: found pooling, for which vLLM drops lm_head,.* --ignore lm_head"
        ):
            settle(config)
    config.model_config.runner_type = "generate"
    config.model_config.hf_config = PreTrainedConfig(classifier_from_token=["no", "yes"], tie_word_embeddings=tied)
    if tied:
        message = "classifier_from_token: found a classifier made of the .* quantized as model.embed_tokens, expected"
        with pytest.raises(ConfigError, match=message):
            settle(config)
    else:
        settle(config)  # the head's rows are of another tensor
    config.model_config.using_transformers_backend = lambda: True
    with pytest.raises(ConfigError, match=r"Transformers backend, which cannot look up quantized model\.embed_tokens"):
        settle(config)
