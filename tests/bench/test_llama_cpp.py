from __future__ import annotations

import platform
import re
import shutil
from pathlib import Path

import gguf
import pytest

import vllm_matquant
from vllm_matquant.bench.llama_cpp import HEAD_TYPES, TYPES_OF_WIDTH, LlamaCpp, instruction_sets, misfit

CONFIG = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}


def program(folder: Path, script: str) -> Path:
    file = folder / "llama-batched-bench"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return file


@pytest.mark.parametrize(("width", "type_"), [(w, each) for w, types in TYPES_OF_WIDTH.items() for each in types])
def test_the_model_has_the_shape_and_the_type(tmp_path: Path, width: int, type_: str) -> None:
    peer = LlamaCpp(Path("none"), tmp_path, CONFIG, type_, threads=2)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(peer.file).tensors}
    assert len(tensors) == 3 + 2 * (2 + 7)
    down = tensors["blk.1.ffn_down.weight"]
    assert list(down.shape) == [512, 256]
    assert down.tensor_type.name == peer.type == type_
    values = gguf.quants.dequantize(down.data, down.tensor_type)
    assert 0 < abs(values).max() < 1  # scales where the type has them
    assert list(tensors["blk.0.attn_k.weight"].shape) == [256, 128]
    assert tensors["output.weight"].tensor_type.name == "BF16"
    assert 8 * down.n_bytes / (512 * 256) == peer.bits_per_weight
    assert width < peer.bits_per_weight < width + 1


@pytest.mark.parametrize("width", HEAD_TYPES)
def test_the_head_has_its_own_type(tmp_path: Path, width: int) -> None:
    peer = LlamaCpp(Path("none"), tmp_path, CONFIG, "Q4_0", threads=2, head_width=width)
    head = {tensor.name: tensor for tensor in gguf.GGUFReader(peer.file).tensors}["output.weight"]
    assert head.tensor_type.name == peer.head_type
    assert list(head.shape) == [256, 300]
    assert width <= 8 * head.n_bytes / (256 * 300) < width + 2
    assert gguf.quants.dequantize(head.data, head.tensor_type).std() > 0


def test_measure_reads_the_programs_lines(tmp_path: Path) -> None:
    line = '{"pp": 16, "tg": 8, "pl": 3, "speed_pp": 90.5, "speed_tg": 12.25}'
    peer = LlamaCpp(
        program(tmp_path, f"echo loading; echo '{line}'; echo $* > {tmp_path}/asked"), tmp_path, CONFIG, "Q4_0", 2
    )
    assert peer.measure(3, 16, 8) == {"prompt_tokens_per_s": 90.5, "decode_tokens_per_s": 12.25}
    asked = (tmp_path / "asked").read_text()
    assert f"-m {peer.file} -t 2 " in asked
    assert "-npp 16 -ntg 8 -npl 3" in asked


@pytest.mark.parametrize(
    ("hidden", "width", "head", "reason"),
    [
        (256, 4, None, None),
        (576, 8, 4, None),
        (576, 3, None, "576 columns are no blocks of 256, as Q3_K has them"),
        (576, 4, 6, "576 columns are no blocks of 256, as Q6_K has them"),
        (256, 5, None, "no type of about 5 bits"),
    ],
)
def test_shapes_and_widths_without_a_type(hidden: int, width: int, head: int | None, reason: str | None) -> None:
    assert misfit(CONFIG | {"hidden_size": hidden}, width, head) == reason


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'no such type' >&2; exit 1", "(status 1):\nno such type"),
        ("echo nothing", "(status 0):\nnothing"),
        ("kill -ILL $$", "(signal SIGILL):"),
    ],
)
def test_a_program_that_fails(tmp_path: Path, script: str, said: str) -> None:
    peer = LlamaCpp(program(tmp_path, script), tmp_path, CONFIG, "Q4_0", 2)
    with pytest.raises(ValueError, match=re.escape(f"llama-batched-bench failed at Q4_0 {said}")):
        peer.measure(1, 16, 8)


@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump (Debian: binutils)")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets of x86")
def test_instruction_sets(tmp_path: Path) -> None:
    library = Path(vllm_matquant.__file__).with_name("_C.abi3.so")
    assert instruction_sets(library) == "AVX-512, AVX-512 VNNI, AVX-VNNI, AMX"
    assert instruction_sets(program(tmp_path, "")) == "none past AVX2"
