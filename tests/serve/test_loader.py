"""Which files are fetched and read; the engine tests show that what is read is enough."""

from __future__ import annotations

import fnmatch
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from tests.checkpoint.samples import decoder_names
from tests.serve.tiny_models import EMBEDDINGS, own_decoder, write_checkpoint
from vllm_matquant.checkpoint.decoder import AFFINE_INT8, CODEBOOK, DecoderKind
from vllm_matquant.checkpoint.errors import CheckpointError, ConfigError
from vllm_matquant.checkpoint.names import shard_width
from vllm_matquant.checkpoint.reader import open_checkpoint
from vllm_matquant.checkpoint.recipe import Recipe, average_bits
from vllm_matquant.checkpoint.recipe_store import add_recipes
from vllm_matquant.checkpoint.spec import Format
from vllm_matquant.plugin import register
from vllm_matquant.serve import files
from vllm_matquant.serve.config import MatquantConfig, settle
from vllm_matquant.serve.loader import LOAD_FORMATS, MatquantModelLoader
from vllm_matquant.serve.request import Request

register()


@pytest.fixture(scope="module", params=[AFFINE_INT8, CODEBOOK], ids=lambda kind: kind.name)
def kind(request: pytest.FixtureRequest) -> DecoderKind:
    found: DecoderKind = request.param
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, kind: DecoderKind) -> Path:
    checkpoint_format = Format(group_size=64, decoder_kind=kind)
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model", "llama", checkpoint_format)


class Hub:
    """A hub that holds one model, as far as the loader uses one."""

    def __init__(self, model: Path, cache: Path) -> None:
        self.model, self.cache = model, cache
        self.fetched: list[str] = []

    def snapshot_download(self, name: str, *, allow_patterns: list[str], **options: Any) -> str:
        for file in filter(Path.is_file, self.model.rglob("*")):
            path = file.relative_to(self.model).as_posix()
            if any(fnmatch.fnmatch(path, pattern) for pattern in allow_patterns) and path not in self.fetched:
                (self.cache / path).parent.mkdir(exist_ok=True)
                (self.cache / path).symlink_to(file)
                self.fetched.append(path)
        return str(self.cache)


def load(monkeypatch: pytest.MonkeyPatch, model: str, checkpoint_format: Format, bits: int) -> dict[str, torch.Tensor]:
    """The tensors that vLLM's loading of a model would be handed."""
    seen: dict[str, torch.Tensor] = {}

    def load_model(self: Any, vllm_config: Any, model_config: Any, prefix: str = "") -> torch.nn.Module:
        module = torch.nn.Module()
        seen.update(self.get_all_weights(model_config, module))
        return module

    monkeypatch.setattr(DefaultModelLoader, "load_model", load_model)
    quant_config = MatquantConfig(checkpoint_format)
    quant_config.maybe_update_config(model)
    config = SimpleNamespace(
        quant_config=quant_config,
        additional_config={"matquant": {"bits": bits}},
        lora_config=None,
        parallel_config=SimpleNamespace(local_world_size=1),
    )
    model_config = SimpleNamespace(model=model, revision=None, quantization="matquant")
    get_model_loader(LoadConfig()).load_model(config, model_config)
    return seen


def test_a_budget_fetches_one_recipe_and_its_decoders_from_a_hub(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cache = tmp_path / "model", tmp_path / "cache"
    shutil.copytree(folder, model)
    cache.mkdir()
    checkpoint = open_checkpoint(model)
    narrow = dict.fromkeys(checkpoint.layers, 2)
    mixes = {"some": narrow | {"model.layers.1.mlp.down_proj": 3}, "more": narrow | {"model.layers.1.mlp.up_proj": 4}}
    decoders = {
        name: {layer: own_decoder(checkpoint.decoder(layer, width)) for layer, width in widths.items()}
        for name, widths in mixes.items()
    }
    recipes = [
        Recipe(name, widths, kl, own_decoders=True)
        for (name, widths), kl in zip(mixes.items(), (0.5, 0.4), strict=True)
    ]
    add_recipes(checkpoint, recipes, decoders)

    hub = Hub(model, cache)
    monkeypatch.setattr(files, "hf_api", lambda: hub)
    quant_config = MatquantConfig(checkpoint.format)
    quant_config.maybe_update_config("someone/model")
    config = SimpleNamespace(
        quant_config=quant_config,
        additional_config={"matquant": {"bits": average_bits(mixes["some"], checkpoint.layers)}},
        load_config=LoadConfig(),
        speculative_config=None,
        lora_config=None,
        parallel_config=SimpleNamespace(
            tensor_parallel_size=1, data_parallel_size=1, enable_expert_parallel=False, local_world_size=1
        ),
        model_config=SimpleNamespace(
            model="someone/model",
            revision=None,
            quantization="matquant",
            runner_type="generate",
            hf_config=PreTrainedConfig(),
        ),
    )
    settle(config)
    assert config.additional_config == {}
    assert quant_config.served.active.widths == mixes["some"]
    assert {shard_width(name) for name in hub.fetched} == {None}
    assert not [name for name in hub.fetched if name.startswith("recipes/") and name.endswith(".safetensors")]

    seen: dict[str, torch.Tensor] = {}

    def load_model(self: Any, vllm_config: Any, model_config: Any, prefix: str = "") -> torch.nn.Module:
        seen.update(self.get_all_weights(model_config, torch.nn.Module()))
        return torch.nn.Module()

    monkeypatch.setattr(DefaultModelLoader, "load_model", load_model)
    get_model_loader(LoadConfig()).load_model(config, config.model_config)
    assert {shard_width(name) for name in hub.fetched} == {None, 2, 3}
    assert [name for name in hub.fetched if name.endswith(".safetensors") and shard_width(name) is None] == [
        "recipes/some.safetensors"
    ]
    for layer in mixes["some"]:
        for name, tensor in decoders["some"][layer].named(layer).items():
            assert torch.equal(seen[name], tensor)


@pytest.mark.parametrize("bits", [2, 3, 7, 8])
def test_only_files_of_the_width_are_fetched_from_a_hub(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int, kind: DecoderKind
) -> None:
    hub = Hub(folder, tmp_path)
    monkeypatch.setattr(files, "hf_api", lambda: hub)
    tensors = load(monkeypatch, "someone/model", Format(group_size=64, decoder_kind=kind), bits)
    shards = {width for name in hub.fetched if (width := shard_width(name)) is not None}
    assert shards == set(range(2, bits + 1))
    assert {"config.json", "model.safetensors.index.json"} <= set(hub.fetched)
    down = {name for name in tensors if name.startswith("model.layers.1.mlp.down_proj.")}
    suffixes = {"weight_base", *decoder_names(kind, bits), *(f"weight_plane{width}" for width in range(3, bits + 1))}
    assert down == {f"model.layers.1.mlp.down_proj.{suffix}" for suffix in suffixes}
    assert "model.embed_tokens.weight" in tensors


def test_files_of_other_widths_are_not_opened(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: DecoderKind
) -> None:
    checkpoint_format = Format(group_size=64, decoder_kind=kind)
    for file in folder.iterdir():
        width = shard_width(file.name)
        if width is not None and width > 3:
            (tmp_path / file.name).write_bytes(b"not a safetensors file")
        else:
            (tmp_path / file.name).symlink_to(file)
    assert load(monkeypatch, str(tmp_path), checkpoint_format, 3)
    with pytest.raises(CheckpointError, match="model-width4"):
        load(monkeypatch, str(tmp_path), checkpoint_format, 4)


def test_a_faulty_download_is_refused_before_the_model_is_made(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: DecoderKind
) -> None:
    faulty, cache = tmp_path / "faulty", tmp_path / "cache"
    faulty.mkdir()
    cache.mkdir()
    for file in folder.iterdir():
        (faulty / file.name).write_bytes(file.read_bytes()[: -1 if "width3" in file.name else None])
    hub = Hub(faulty, cache)
    monkeypatch.setattr(files, "hf_api", lambda: hub)
    made: list[Any] = []
    monkeypatch.setattr(DefaultModelLoader, "load_model", lambda *args: made.append(args))
    quant_config = MatquantConfig(Format(group_size=64, decoder_kind=kind))
    quant_config.maybe_update_config("someone/model")
    config = SimpleNamespace(
        quant_config=quant_config,
        additional_config={"matquant": {"bits": 3}},
        parallel_config=SimpleNamespace(local_world_size=1),
    )
    with pytest.raises(CheckpointError, match="model-width3"):
        MatquantModelLoader(LoadConfig()).load_model(
            config, SimpleNamespace(model="someone/model", revision=None, quantization="matquant")
        )
    assert not made


@pytest.mark.parametrize("load_format", LOAD_FORMATS)
@pytest.mark.parametrize("quantization", [None, "fp8"])
def test_other_models_are_left_to_vllm(
    load_format: str, quantization: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = get_model_loader(LoadConfig(load_format=load_format))
    assert isinstance(loader, MatquantModelLoader)
    monkeypatch.setattr(DefaultModelLoader, "load_model", lambda *args: "vLLM's model")
    monkeypatch.setattr(DefaultModelLoader, "get_all_weights", lambda *args: iter([("vLLM's", "weights")]))
    model_config = SimpleNamespace(quantization=quantization)
    assert loader.load_model(None, model_config) == "vLLM's model"
    assert list(loader.get_all_weights(model_config, torch.nn.Module())) == [("vLLM's", "weights")]


def test_a_model_that_keeps_a_quantized_embedding_unquantized_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", "llama", Format(group_size=64, **EMBEDDINGS))
    model = torch.nn.Module()
    model.model = torch.nn.Module()
    model.model.embed_tokens = VocabParallelEmbedding.__new__(VocabParallelEmbedding)
    torch.nn.Module.__init__(model.model.embed_tokens)
    model.model.embed_tokens.quant_method = UnquantizedEmbeddingMethod()
    loader = MatquantModelLoader(LoadConfig())
    checkpoint = open_checkpoint(folder)
    loader._opened = checkpoint, Request(3).served(checkpoint, print), MatquantConfig(checkpoint.format)
    with pytest.raises(ConfigError, match=r"^model\.embed_tokens: quantized embedding: found vLLM's Module"):
        next(loader.get_all_weights(SimpleNamespace(quantization="matquant"), model))


def test_reloading_in_place_is_refused() -> None:
    loader = MatquantModelLoader(LoadConfig())
    with pytest.raises(RuntimeError, match="reloaded"):
        next(loader.get_all_weights(SimpleNamespace(quantization="matquant", model="m"), torch.nn.Module()))
