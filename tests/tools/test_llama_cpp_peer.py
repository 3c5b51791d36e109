"""llama.cpp's types, made by scripts that stand in for llama.cpp's programs, and by llama.cpp where it is."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from pathlib import Path

import compare_quantizers
import gguf
import llama_cpp_peer
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.quantize.tiny_sources import block_layers, write_source
from vllm_matquant.quantize.source import SourceModel

pytestmark = pytest.mark.usefixtures("few_windows")

LLAMA_CPP = os.environ.get("VLLM_MATQUANT_LLAMA_CPP", "")
"""Folder of llama.cpp's source and build, as --llama-cpp-folder wants it."""

# Called like convert_hf_to_gguf.py. Rows of queries and keys are interleaved head by head, as llama.cpp's are.
CONVERTER = """
import sys
from pathlib import Path
import gguf
from safetensors.numpy import load_file

model, outtype, kind, outfile, file = sys.argv[1:]
assert (outtype, kind, outfile) == ("--outtype", "f32", "--outfile")
writer = gguf.GGUFWriter(file, "llama")
writer.add_block_count(2)
names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
for name, weight in load_file(Path(model) / "model.safetensors").items():
    if name.endswith("_proj.weight"):
        heads = {"q_proj.weight": 4, "k_proj.weight": 2}.get(name.rpartition("self_attn.")[2])
        if heads:
            weight = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), weight.copy())
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
"""
# Called like llama-quantize. It has Q8_0 and falls back to Q4_0 but for layers that read 128 columns; IQ2_M fails.
PROGRAM = """#!{python}
import sys
import gguf

imatrix, importance, source, file, name, threads = sys.argv[1:]
assert imatrix == "--imatrix" and int(threads) > 0
stored = {{tensor.name for tensor in gguf.GGUFReader(importance).tensors}}
if name == "IQ2_M":
    sys.exit("no such grid")
writer = gguf.GGUFWriter(file, "llama")
writer.add_block_count(2)
for tensor in gguf.GGUFReader(source).tensors:
    assert tensor.name + ".in_sum2" in stored
    kind = gguf.GGMLQuantizationType["Q8_0" if name == "Q8_0" or tensor.data.shape[1] == 128 else "Q4_0"]
    writer.add_tensor(tensor.name, gguf.quants.quantize(tensor.data, kind), raw_dtype=kind)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
"""
OPTIONS = ["--group-size", "32", "--samples", "3", "--sequence-length", "20"]


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stand-in") / "llama.cpp"
    program = folder / "build" / "bin" / "llama-quantize"
    program.parent.mkdir(parents=True)
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    (folder / "convert_hf_to_gguf.py").write_text(CONVERTER)
    return folder


@pytest.fixture(scope="module")
def compared(
    few_windows: None, source: Path, text_file: Path, llama_cpp: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Folder of a comparison; not to be changed."""
    folder = tmp_path_factory.mktemp("compared") / "results"
    arguments = [str(source), "--text", str(text_file), "--output", str(folder), *OPTIONS, "--bits", "2,8"]
    arguments += ["--llama-cpp-folder", str(llama_cpp), "--methods", "rtn,Q2_K,Q4_K_M,Q8_0"]
    assert compare_quantizers.main(arguments) == 0
    return folder


def expected_type(layer: str, name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType["Q8_0" if name == "Q8_0" or layer.endswith("down_proj") else "Q4_0"]


@pytest.mark.parametrize("name", ["Q2_K", "Q8_0"])
def test_weights_are_the_sources_quantized(compared: Path, source: Path, name: str) -> None:
    weights = load_file(compared / name / "weights.safetensors")
    model = SourceModel(source)
    assert list(weights) == sorted(block_layers(model))
    for layer, weight in weights.items():
        kind = expected_type(layer, name)
        # Rows are quantized one by one: their order in the file is none of the weight's.
        expected = gguf.quants.quantize(model.tensors.read(f"{layer}.weight").float().numpy(), kind)
        assert torch.equal(weight, torch.from_numpy(gguf.quants.dequantize(expected, kind))), layer


def test_rows(compared: Path) -> None:
    rows = json.loads((compared / "results.json").read_text())
    # Q4_K_M stands beside 4 bits, which were not asked for.
    assert [(row["method"], row["bits"]) for row in rows] == [("rtn", 2), ("rtn", 8), ("Q2_K", 2), ("Q8_0", 8)]
    wide, narrow = 2 * 64 * 128, 2 * (2 * 128 * 64 + 2 * 64 * 64 + 2 * 32 * 64)
    by_name = {row["method"]: row for row in rows[2:]}
    # A block of 32 weights has a float16 scale: 8.5 bits per weight with codes of 8, 4.5 with codes of 4.
    assert by_name["Q8_0"]["bits_per_weight"] == 8.5
    assert by_name["Q8_0"]["types"] == {"Q8_0": 1.0}
    assert by_name["Q2_K"]["bits_per_weight"] == pytest.approx((8.5 * wide + 4.5 * narrow) / (wide + narrow))
    assert by_name["Q2_K"]["types"] == pytest.approx({"Q4_0": narrow / (wide + narrow), "Q8_0": wide / (wide + narrow)})
    assert by_name["Q2_K"]["kl"] > by_name["Q8_0"]["kl"] > 0
    preparing = json.loads((compared / "llama.cpp" / "record.json").read_text())["seconds"]
    assert by_name["Q8_0"]["seconds"] > preparing > 0
    lines = (compared / "results.md").read_text().splitlines()
    assert lines[-2] == f"- Q2_K: {narrow / (wide + narrow):.1%} Q4_0, {wide / (wide + narrow):.1%} Q8_0"
    assert lines[-1] == "- Q8_0: 100.0% Q8_0"


def test_what_types_share_is_made_once(
    compared: Path, source: Path, text_file: Path, llama_cpp: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "results"
    shutil.copytree(compared, folder)
    kept = [path for name in ("llama.cpp", "Q2_K", "Q8_0") for path in (folder / name).iterdir()]
    before = {path: path.stat().st_mtime_ns for path in kept}
    arguments = [str(source), "--text", str(text_file), "--output", str(folder), *OPTIONS, "--bits", "2,8"]
    arguments += ["--llama-cpp-folder", str(llama_cpp), "--methods", "Q8_0,IQ2_M"]
    assert compare_quantizers.main(arguments) == 1  # IQ2_M fails
    said = capsys.readouterr()
    assert "Q8_0: there already" in said.out
    assert "llama.cpp: started" not in said.out
    assert re.search(r"IQ2_M: \[.*\] ended with status 1; the end of .*IQ2_M.log:\nno such grid\n", said.err)
    assert f"{llama_cpp / 'build' / 'bin' / 'llama-quantize'} --imatrix" in said.err
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    assert [row["method"] for row in json.loads((folder / "results.json").read_text())] == ["Q8_0"]


@pytest.mark.parametrize(
    ("layer", "tensor"),
    [
        ("model.layers.1.self_attn.q_proj", "blk.1.attn_q.weight"),
        ("model.layers.1.self_attn.k_proj", "blk.1.attn_k.weight"),
        ("model.layers.0.self_attn.v_proj", "blk.0.attn_v.weight"),
        ("model.layers.0.self_attn.o_proj", "blk.0.attn_output.weight"),
        ("model.layers.0.mlp.gate_proj", "blk.0.ffn_gate.weight"),
        ("model.layers.0.mlp.up_proj", "blk.0.ffn_up.weight"),
        ("model.layers.11.mlp.down_proj", "blk.11.ffn_down.weight"),
    ],
)
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_names(layer: str, tensor: str, architecture: str) -> None:
    assert llama_cpp_peer.tensor_names([layer], architecture, 12) == {layer: tensor}


def test_layers_without_a_tensor_of_their_own() -> None:
    expert = "model.layers.0.mlp.experts.3.gate_proj"
    with pytest.raises(ValueError, match=re.escape(f"{expert}: found no tensor of llama.cpp's llama for it")):
        llama_cpp_peer.tensor_names([expert], "llama", 2)
    with pytest.raises(ValueError, match="architecture: found 'abacus', expected one that the package gguf knows"):
        llama_cpp_peer.tensor_names([expert], "abacus", 2)


def test_interleaved_rows_are_put_back() -> None:
    heads, half, columns = 3, 4, 5
    source = np.random.default_rng(0).standard_normal((heads * 2 * half, columns), dtype=np.float32)
    converted = np.empty_like(source)
    for head in range(heads):
        for pair in range(half):  # a value and the one half a head on, which rotary positions turn together
            start = head * 2 * half
            converted[start + 2 * pair] = source[start + pair]
            converted[start + 2 * pair + 1] = source[start + half + pair]
    places = llama_cpp_peer.row_places(converted, source)
    assert sorted(places) == list(range(len(source)))
    assert np.array_equal(converted[places], source)
    assert np.array_equal(llama_cpp_peer.row_places(source, source), np.arange(len(source)))


@pytest.mark.parametrize("change", [lambda matrix: matrix + 1, lambda matrix: matrix[:3], lambda matrix: matrix.T])
def test_values_that_are_not_the_sources(change: object) -> None:
    source = np.random.default_rng(0).standard_normal((4, 4), dtype=np.float32)
    with pytest.raises(ValueError, match="found other values than the source's"):
        llama_cpp_peer.row_places(np.ascontiguousarray(change(source)), source)


@torch.no_grad()
def test_importance_is_the_mean_square_of_inputs(compared: Path, source: Path) -> None:
    tokens = load_file(compared / "tokens.safetensors")["tokens"]
    reader = gguf.GGUFReader(compared / "llama.cpp" / "importance.gguf")
    stored = {tensor.name: tensor.data for tensor in reader.tensors}
    assert {name: reader.fields[name].contents() for name in ("general.type", "imatrix.chunk_size")} == {
        "general.type": "imatrix",
        "imatrix.chunk_size": 20,
    }
    assert reader.fields["imatrix.chunk_count"].contents() == 3
    assert reader.fields["imatrix.datasets"].contents() == ["calibration"]
    assert len(stored) == 2 * 2 * 7
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    hidden = model.model(tokens, output_hidden_states=True).hidden_states
    for block, states in enumerate(hidden[:2]):
        inputs = model.model.layers[block].input_layernorm(states)
        expected = inputs.flatten(0, 1).square().mean(0)
        for name in ("attn_q", "attn_k", "attn_v"):
            sums, counts = (stored[f"blk.{block}.{name}.weight.{part}"] for part in ("in_sum2", "counts"))
            assert counts.item() == tokens.numel()
            assert sums.shape == (1, 64)
            assert torch.allclose(torch.from_numpy(sums[0] / counts.item()), expected, rtol=1e-5)


def test_folder_without_what_is_needed(tmp_path: Path, llama_cpp: Path) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"found no .*convert_hf_to_gguf.py.*pip download"):
        llama_cpp_peer.llama_cpp_folder(str(tmp_path))
    (tmp_path / "convert_hf_to_gguf.py").touch()
    with pytest.raises(argparse.ArgumentTypeError, match=r"found no .*/llama-quantize, .* --target llama-quantize"):
        llama_cpp_peer.llama_cpp_folder(str(tmp_path))
    assert llama_cpp_peer.llama_cpp_folder(str(llama_cpp)) == llama_cpp


def arguments_of(folder: Path, source: Path, llama_cpp: Path, job: str, *more: str) -> list[str]:
    folder.mkdir(exist_ok=True)
    return [job, "--model", str(source), "--llama-cpp-folder", str(llama_cpp), "--output", str(folder), *more]


def test_programs_that_fail(source: Path, llama_cpp: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = arguments_of(tmp_path / "out", source, llama_cpp, "quantize", "--prepared", str(tmp_path), "Q8_0")
    with pytest.raises(SystemExit) as stop:
        llama_cpp_peer.main(arguments)
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert f"{llama_cpp / 'build' / 'bin' / 'llama-quantize'} --imatrix" in said
    assert said.endswith(" ended with status 1\n")


def test_without_the_package_gguf(
    source: Path, llama_cpp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    save_file({"tokens": torch.arange(40).view(2, 20) + 3}, tmp_path / "tokens")
    tokens = ["--tokens", str(tmp_path / "tokens")]
    with pytest.raises(SystemExit) as stop:
        llama_cpp_peer.main(arguments_of(tmp_path / "out", source, llama_cpp, "prepare", *tokens))
    assert stop.value.code == 1
    assert "gguf: found no such package, expected it for llama.cpp's files: pip install gguf" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not LLAMA_CPP, reason="VLLM_MATQUANT_LLAMA_CPP names no folder of llama.cpp")
def test_real_llama_cpp(tmp_path: Path, real_model: Path) -> None:
    types = {"Q2_K": {"Q2_K", "Q3_K"}, "IQ2_XS": {"IQ2_XS", "Q2_K"}, "Q4_K_M": {"Q4_K", "Q6_K"}, "Q8_0": {"Q8_0"}}
    shape = {"vocab_size": 49152, "hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    source = write_source(tmp_path / "source", attention_bias=False, mlp_bias=False, **shape)
    for file in ("tokenizer.json", "tokenizer_config.json"):  # llama.cpp converts none that it does not know
        shutil.copy(real_model / file, source)
    save_file({"tokens": torch.arange(300).view(6, 50) + 3}, tmp_path / "tokens")
    tokens = ["--tokens", str(tmp_path / "tokens")]
    prepared, folder, model = tmp_path / "prepared", Path(LLAMA_CPP), SourceModel(source)
    assert llama_cpp_peer.main(arguments_of(prepared, source, folder, "prepare", *tokens)) == 0
    for name, expected in types.items():
        arguments = arguments_of(tmp_path / name, source, folder, "quantize", "--prepared", str(prepared), name)
        assert llama_cpp_peer.main(arguments) == 0
        with safe_open(tmp_path / name / "weights.safetensors", framework="pt") as file:
            facts = file.metadata()
            weights = {layer: file.get_tensor(layer) for layer in block_layers(model)}
        assert json.loads(facts["types"]).keys() == expected
        width = llama_cpp_peer.TYPES[name]
        assert width < float(facts["bits_per_weight"]) < width + 1.5
        for layer, weight in weights.items():
            original = model.tensors.read(f"{layer}.weight").float()
            assert (weight - original).norm() < {2: 0.5, 4: 0.12, 8: 0.01}[width] * original.norm()
