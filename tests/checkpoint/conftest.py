"""Tiny random models, and checkpoints of random codes made from them."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.checkpoint.samples import Sample, random_decoder
from vllm_matquant.checkpoint.decoder import KINDS, DecoderKind
from vllm_matquant.checkpoint.files import read_json
from vllm_matquant.checkpoint.skeleton import build_skeleton
from vllm_matquant.checkpoint.spec import Format
from vllm_matquant.checkpoint.writer import CheckpointWriter

COPIED = {
    "tokenizer.json": b'{"any": "bytes"}',
    "tokenizer_config.json": b"\xff\x00 not even JSON",
    "chat_template.jinja": b"{{ messages }}\r\n",
    "generation_config.json": b"{}",
    "LICENSE.txt": b"free",
}
NOT_COPIED = ("modeling_evil.py", "README.md", "pytorch_model.bin")


Writer = Callable[..., Sample]


@pytest.fixture(scope="session", params=KINDS)
def kind(request: pytest.FixtureRequest) -> DecoderKind:
    """Each kind of decoders; what it is used by runs once for each."""
    return KINDS[request.param]


@pytest.fixture(scope="session")
def make_source(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Function that saves a random Llama, with biases and tied embeddings, and says where."""

    def make(hidden: int = 64, intermediate: int = 96, *, tied: bool = True) -> Path:
        folder = tmp_path_factory.mktemp("source")
        config = LlamaConfig(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=40,
            attention_bias=True,
            tie_word_embeddings=tied,
        )
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        for name, content in COPIED.items():
            (folder / name).write_bytes(content)
        for name in NOT_COPIED:
            (folder / name).write_bytes(b"left")
        return folder

    return make


@pytest.fixture(scope="session")
def source(make_source: Callable[..., Path]) -> Path:
    return make_source()


@pytest.fixture(scope="session")
def write(source: Path) -> Writer:
    """Function that writes a checkpoint with random codes and decoders."""

    def write_checkpoint(
        folder: Path,
        format: Format | None = None,
        *,
        model: Path = source,
        seed: int = 0,
        shard_bytes: int = 30_000,
        overwrite: bool = False,
    ) -> Sample:
        format = format or Format()
        generator = torch.Generator().manual_seed(seed)
        config = read_json(model / "config.json")
        layers = build_skeleton(config).quantized_layers(format)
        sample = Sample(folder, format, {}, {}, {})
        with CheckpointWriter(folder, format, shard_bytes=shard_bytes, overwrite=overwrite) as writer:
            for name, tensor in sorted(load_file(model / "model.safetensors").items()):
                layer = name.removesuffix(".weight")
                if layer in layers:
                    rows, columns = layers[layer]
                    groups = columns // format.group_size_of(columns, layer)
                    sample.codes[layer] = torch.randint(0, 256, (rows, columns), dtype=torch.uint8, generator=generator)
                    sample.decoders[layer] = {
                        width: random_decoder(format.decoder_kind, width, rows, groups, generator)
                        for width in format.widths_of(layer)
                    }
                    writer.add_layer(layer, sample.codes[layer], sample.decoders[layer])
                else:
                    sample.unquantized[name] = tensor
                    writer.add_tensor(name, tensor)
            writer.finish(config, copy_from=model, manifest={"command": ["quantize.py"]})
        return sample

    return write_checkpoint


@pytest.fixture(scope="session")
def shared_sample(write: Writer, kind: DecoderKind, tmp_path_factory: pytest.TempPathFactory) -> Sample:
    """A checkpoint of each kind of decoders, with several shards of each width; not to be changed."""
    return write(tmp_path_factory.mktemp("shared") / "checkpoint", Format(decoder_kind=kind))


@pytest.fixture
def sample(shared_sample: Sample, tmp_path: Path) -> Sample:
    """A copy of ``shared_sample`` to spoil."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(shared_sample.folder, folder)
    return dataclasses.replace(shared_sample, folder=folder)
