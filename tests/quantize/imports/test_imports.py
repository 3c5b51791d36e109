"""Checkpoints of other tools: the widest slice of what is made of them is what their formats mean."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.quantize.imports.packers import Layer, Model, auto_round, awq, compressed, gptq, write_model
from vllm_matquant.checkpoint.errors import ConfigError
from vllm_matquant.checkpoint.reader import Checkpoint, open_checkpoint
from vllm_matquant.checkpoint.verify import verify
from vllm_matquant.cli import main
from vllm_matquant.jobs.import_model import import_model
from vllm_matquant.jobs.models import load_model
from vllm_matquant.quantize.imports.convert import largest_group_size
from vllm_matquant.quantize.imports.formats import find_layout

Pack = Callable[[Layer], Mapping[str, torch.Tensor]]


def gptq_config(bits: int, group_size: int, version: str | None = None, **more: Any) -> dict[str, Any]:
    named = {} if version is None else {"checkpoint_format": version}
    return {"quant_method": "gptq", "bits": bits, "group_size": group_size, **named, **more}


def compressed_config(bits: int, group_size: int, symmetric: bool = False, version: str = "0.17.0") -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": group_size}
    if group_size == -1:
        weights |= {"strategy": "channel", "group_size": None}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "version": version,
    }


def cases() -> dict[str, tuple[dict[str, Any], Pack, int, int, dict[str, Any]]]:
    """By name: configuration, packer, bits, group size (0 for whole rows), and how layers are drawn."""
    found: dict[str, tuple[dict[str, Any], Pack, int, int, dict[str, Any]]] = {}
    for bits in (2, 3, 4, 8):
        # Without a name the version is 1; zeros of 0 are among them, which borrow from the field after.
        found[f"gptq v1, {bits} bits"] = (gptq_config(bits, 32), gptq, bits, 32, {})
        found[f"gptq v2, {bits} bits"] = (
            gptq_config(bits, -1, "gptq_v2"), functools.partial(gptq, version="gptq_v2"), bits, 0, {},
        )  # fmt: skip
    for bits in (3, 5, 6, 7):
        planes = functools.partial(gptq, version="gptq_p")
        whole = {"shape": {"head_dim": 32}}  # GPTQModel has planes of 32 rows and columns alone
        found[f"gptq_p, {bits} bits"] = (gptq_config(bits, 32, "gptq_p"), planes, bits, 32, whole)
        for dense in (True, False):
            pack, version = functools.partial(compressed, dense=dense), "0.20.0" if dense else "0.17.0"
            config = compressed_config(bits, 32, version=version)
            found[f"compressed-tensors {version}, {bits} bits"] = (config, pack, bits, 32, {})
    # A last group of half the size, and no index: the parts of ours are smaller.
    found["gptq, symmetric, ragged"] = (
        gptq_config(4, 64),
        functools.partial(gptq, index=False),
        4,
        64,
        {"symmetric": True},
    )
    found["awq"] = (
        {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
        awq,
        4,
        32,
        {},
    )
    symmetric = functools.partial(compressed, symmetric=True)
    found["compressed-tensors, symmetric"] = (compressed_config(4, 16, True), symmetric, 4, 16, {"symmetric": True})
    found["compressed-tensors, whole rows"] = (compressed_config(8, -1, True), symmetric, 8, 0, {"symmetric": True})
    signed = {"symmetric": True, "signed": True}
    config = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True, "data_type": "int"}
    found["auto-round, symmetric"] = (config | {"packing_format": "auto_round:auto_gptq"}, auto_round, 4, 32, signed)
    own = functools.partial(gptq, version="gptq_v2", index=False)
    found["auto-round, 3 bits"] = (config | {"bits": 3, "sym": False, "packing_format": "auto_round"}, own, 3, 32, {})
    found["auto-round, awq"] = (config | {"sym": False, "packing_format": "auto_round:auto_awq"}, awq, 4, 32, {})
    return found


CASES = cases()


def make(name: str, folder: Path, seed: int = 0) -> Model:
    config, pack, bits, group_size, how = CASES[name]
    return write_model(folder, config, pack, bits, group_size, seed, **how)


def check_widest(checkpoint: Checkpoint, model: Model) -> None:
    """The weights of the widest slice, but for the rounding of ``scale * zero`` to float16."""
    found = dict(checkpoint.weights(checkpoint.slice()))
    assert found.keys() == model.layers.keys()
    for name, layer in model.layers.items():
        # From a negative scale codes and zero points count from the other end.
        zero = np.where(layer.scale < 0, 2**layer.bits - 1 - layer.zero, layer.zero)
        offset = np.abs(layer.scale.astype(np.float64)) * zero
        rounding = (offset - offset.astype(np.float16))[:, layer.group_of]
        assert np.allclose(found[name].numpy(), layer.weight() + rounding, rtol=0, atol=2.0**-22)


@pytest.mark.parametrize("name", CASES)
def test_the_widest_slice_is_the_model(name: str, tmp_path: Path) -> None:
    seed = 1 + list(CASES).index(name)
    model = make(name, tmp_path / "given", seed)
    outcome = import_model(tmp_path / "given", tmp_path / "nested", no_report=True)
    checkpoint = open_checkpoint(tmp_path / "nested")
    bits = CASES[name][2]
    assert checkpoint.format.widths == tuple(range(2, bits + 1))
    check_widest(checkpoint, model)
    tokens = torch.randint(320, (2, 9), generator=torch.Generator().manual_seed(seed))
    expected = model.reference(tokens).logits
    found = load_model(checkpoint, None, torch.float32)(tokens).logits
    assert (found - expected).norm() < 2.0**-8 * expected.norm()
    for errors in outcome.errors.values():
        assert errors[bits] < 1e-4
        assert list(errors.values()) == sorted(errors.values(), reverse=True)


def test_narrower_slices_are_fitted_by_least_squares(tmp_path: Path) -> None:
    model = make("gptq v1, 4 bits", tmp_path / "given", 7)
    import_model(tmp_path / "given", tmp_path / "nested", no_report=True)
    checkpoint = open_checkpoint(tmp_path / "nested")
    assert checkpoint.format.group_size == 32
    for name, layer in model.layers.items():
        codes = layer.codes.reshape(len(layer.codes), -1, 32) >> 2
        weights = layer.weight().reshape(codes.shape)
        decoder = checkpoint.decoder(name, 2).affine
        assert np.array_equal(checkpoint.codes(name, 2).numpy().reshape(codes.shape), codes)
        for row, group in ((0, 0), (1, 1), (len(codes) - 1, codes.shape[1] - 1)):
            slope, offset = np.polyfit(codes[row, group], weights[row, group], 1)
            assert decoder.scale[row, group].item() == pytest.approx(slope, rel=2**-10)
            assert decoder.offset[row, group].item() == pytest.approx(offset, rel=2**-9, abs=1e-4)


def test_layers_with_bits_of_their_own(tmp_path: Path) -> None:
    """Where the model is at a width that a layer lacks it takes its widest."""
    config = gptq_config(4, 32, dynamic={"+:.*mlp.*": {"bits": 8}})
    model = write_model(tmp_path / "given", config, gptq, lambda name: 8 if "mlp" in name else 4, 32, 3)
    import_model(tmp_path / "given", tmp_path / "nested", bits="2,4,6,8", no_report=True)
    checkpoint = open_checkpoint(tmp_path / "nested")
    assert checkpoint.slice(8).widths == {name: layer.bits for name, layer in model.layers.items()}
    check_widest(checkpoint, model)
    config["dynamic"] = None
    given = tmp_path / "given" / "config.json"
    given.write_text(json.dumps(json.loads(given.read_text()) | {"quantization_config": config}))
    with pytest.raises(ValueError, match=r"gate_proj.qweight: found \[24, 160\], expected \[12, 160\] by config.json"):
        import_model(tmp_path / "given", tmp_path / "other")


def test_groups_in_the_order_of_activations(tmp_path: Path) -> None:
    """Groups that lie anywhere are refused by name, or their weights rounded to codes of 8 bits."""
    order = {columns: np.random.default_rng(columns).permutation(columns) for columns in (96, 160)}

    def pack(layer: Layer) -> dict[str, torch.Tensor]:
        return gptq(layer, "gptq_v2") | {"g_idx": torch.from_numpy(layer.group_of).int()}

    def draw(layer: Layer) -> dict[str, torch.Tensor]:
        layer.group_of = layer.group_of[order[len(layer.group_of)]]
        return pack(layer)

    model = write_model(tmp_path / "given", gptq_config(4, 32, "gptq_v2", desc_act=True), draw, 4, 32, 5)
    with pytest.raises(ValueError, match=r"q_proj.g_idx: found 3 groups of 96 columns, of which no 8 side by side"):
        import_model(tmp_path / "given", tmp_path / "nested")
    assert not (tmp_path / "nested").exists()
    outcome = import_model(tmp_path / "given", tmp_path / "nested", method="nearest", no_report=True)
    checkpoint = open_checkpoint(tmp_path / "nested")
    assert checkpoint.format.widths == tuple(range(2, 9))
    for name, weight in checkpoint.weights(checkpoint.slice()):
        expected = model.layers[name].weight()
        error = np.square(weight.numpy() - expected).sum() / np.square(expected).sum()
        assert outcome.errors[name][8] == pytest.approx(error, rel=1e-3)
        assert error < 1e-4


def test_an_order_of_whole_groups_is_kept(tmp_path: Path) -> None:
    """GPTQ's static groups: each span of 32 columns has a scale of its own, wherever it stands in the file."""

    def pack(layer: Layer) -> dict[str, torch.Tensor]:
        layer.group_of = (len(np.unique(layer.group_of)) - 1) - layer.group_of
        return gptq(layer)

    model = write_model(tmp_path / "given", gptq_config(4, 32, desc_act=True), pack, 4, 32, 6)
    import_model(tmp_path / "given", tmp_path / "nested", no_report=True)
    check_widest(open_checkpoint(tmp_path / "nested"), model)


def test_one_scale_for_a_whole_layer(tmp_path: Path) -> None:
    def pack(layer: Layer) -> dict[str, torch.Tensor]:
        layer.scale[:], layer.zero[:] = layer.scale[0, 0], layer.zero[0, 0]
        zero = torch.tensor([layer.zero[0, 0] - 8]).to(torch.int8)
        one = {"weight_scale": torch.from_numpy(layer.scale[0]), "weight_zero_point": zero}
        return {**compressed(layer, symmetric=True), **one}

    config = compressed_config(4, -1)
    config["config_groups"]["group_0"]["weights"]["strategy"] = "tensor"
    model = write_model(tmp_path / "given", config, pack, 4, 0, 8)
    import_model(tmp_path / "given", tmp_path / "nested", no_report=True)
    checkpoint = open_checkpoint(tmp_path / "nested")
    assert checkpoint.format.group_size == "channel"
    check_widest(checkpoint, model)


@pytest.mark.parametrize(
    ("group_of", "expected"),
    [
        ([0] * 48, 48),
        ([0] * 32 + [1] * 16, 16),
        ([0] * 8 + [1] * 16, 8),
        ([0] * 12 + [1] * 12, None),
        ([0] * 20, None),
    ],
)
def test_the_largest_group_size(group_of: list[int], expected: int | None) -> None:
    assert largest_group_size(torch.tensor(group_of), 8) == expected


def test_the_version_tells_where_the_packed_width_does_not(tmp_path: Path) -> None:
    """48 codes of 3 bits are 5 words in either packing."""
    shape = {"hidden_size": 48, "intermediate_size": 48, "head_dim": 12, "num_key_value_heads": 4}
    for dense, version in ((True, "0.18.0"), (False, "0.17.1")):
        folder, pack = tmp_path / version, functools.partial(compressed, dense=dense)
        model = write_model(folder / "given", compressed_config(3, 16, version=version), pack, 3, 16, 4, shape)
        import_model(folder / "given", folder / "nested", no_report=True)
        check_widest(open_checkpoint(folder / "nested"), model)
    config = json.loads((folder / "given" / "config.json").read_text())
    del config["quantization_config"]["version"]
    (folder / "given" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="found 5 words for 48 codes of 3 bits, which releases pack in two ways"):
        import_model(folder / "given", folder / "other")


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make("awq", tmp_path / "given", 9)
    arguments = ["import", str(tmp_path / "given"), "--output", str(tmp_path / "nested"), "--bits", "2,4"]
    assert main([*arguments, "--dry-run"]) == 0
    assert "awq, quantized layers: 7 of 4 bits" in capsys.readouterr().out
    assert not (tmp_path / "nested").exists()
    assert main([*arguments, "--errors", str(tmp_path / "errors.json")]) == 0
    said = capsys.readouterr().out
    assert "offers 2, 4 bits: vllm serve" in said
    assert len(json.loads((tmp_path / "errors.json").read_text())) == 7
    assert all(result.passed for result in verify(tmp_path / "nested"))
    manifest = json.loads((tmp_path / "nested" / "MANIFEST.json").read_text())
    assert manifest["command"] == [
        "matquant",
        "import",
        "given",
        "--output",
        "nested",
        "--bits",
        "2,4",
        "--errors",
        "errors.json",
    ]
    assert manifest["imported"]["quantization_config"]["quant_method"] == "awq"
    assert set(manifest["source"]) == {"config.json", "model.safetensors"}
    card = (tmp_path / "nested" / "README.md").read_text()
    assert "import of awq" in card
    assert "Perplexity was not measured" in card
    assert "quant_method" not in json.loads((tmp_path / "nested" / "config.json").read_text())
    with pytest.raises(SystemExit):
        main(arguments)
    assert "--overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "--no-report"]) == 0


def changed(**fields: Any) -> Callable[[Path], None]:
    """Another value of a field of quantization_config, or None for no such field."""

    def change(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        content["quantization_config"] |= fields
        content["quantization_config"] = {
            name: value for name, value in content["quantization_config"].items() if value is not None
        }
        (folder / "config.json").write_text(json.dumps(content))

    return change


def spoiled(suffix: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
    """Another tensor in the place of one of the first layer's, or none."""

    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        name = f"model.layers.0.self_attn.q_proj.{suffix}"
        found = change(tensors.pop(name))
        save_file(tensors | ({} if found is None else {name: found}), folder / "model.safetensors", {"format": "pt"})

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (changed(quant_method="hqq"), r"config.json: quantization_config.quant_method: found 'hqq', expected one of"),
        (changed(quant_method="matquant"), "It is a matquant checkpoint already"),
        (changed(bits=16), r"quantization_config.bits: found 16, expected one of"),
        (changed(bits=5), r"bits: found 5, expected one of \[2, 3, 4, 8\], or 'gptq_p' as checkpoint_format"),
        (changed(group_size=0), r"group_size: found 0, expected a number of columns, or -1"),
        (changed(checkpoint_format="marlin"), r"checkpoint_format: found 'marlin', expected one of \['gptq', "),
        (
            changed(adapter={"name": "lora"}),
            r"adapter: found {'name': 'lora'}, expected nothing: an import would lose it",
        ),
        (changed(bits=3), r"q_proj.qweight: found \[12, 96\], expected \[9, 96\] by config.json"),
        (spoiled("scales", lambda scales: scales.double()), r"q_proj.scales: found torch.float64, expected"),
        (spoiled("scales", lambda scales: None), r"q_proj.scales: found in no file, expected one for each"),
        (spoiled("qzeros", lambda zeros: zeros[:, :5].clone()), r"qzeros: found \[3, 5\], expected \[3, 12\]"),
        (spoiled("g_idx", lambda index: index + 1), r"q_proj.g_idx: found groups 1 to 3, expected some of 0 to 2"),
        (spoiled("scales", lambda scales: scales * float("inf")), r"weight_scale.: found .* expected finite values"),
        (spoiled("qweight", lambda codes: None), r"q_proj.weight: found in no file, expected each of the model's"),
    ],
)
def test_what_is_refused(spoil: Callable[[Path], None], message: str, tmp_path: Path, given: Path) -> None:
    shutil.copytree(given, tmp_path / "given")
    spoil(tmp_path / "given")
    with pytest.raises(ValueError, match=message):
        import_model(tmp_path / "given", tmp_path / "nested")
    assert not (tmp_path / "nested").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "int-quantized"}, r"format: found 'int-quantized', expected one of \['pack-quantized'\]"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme: found .* expected nothing: an import would lose it"),
        ({"config_groups": {"a": {"weights": {"num_bits": 4}, "input_activations": {}}}}, None),
        ({"config_groups": {"a": {"weights": {"num_bits": 4}, "input_activations": {"num_bits": 8}}}},
         "config_groups.a.input_activations: found .* expected null"),
        ({"config_groups": {"a": {"weights": {"num_bits": 4, "strategy": "block"}}}},
         "config_groups.a.weights.strategy: found 'block'"),
        ({"config_groups": {"a": {}}}, "config_groups.a.weights: found None, expected an object"),
    ],
)  # fmt: skip
def test_what_is_refused_of_compressed_tensors(fields: dict[str, Any], message: str | None) -> None:
    config = compressed_config(4, 32) | fields
    if message is None:
        assert find_layout(config, Path("config.json")).name == "compressed-tensors pack-quantized"
        return
    with pytest.raises(ConfigError, match=message):
        find_layout(config, Path("config.json"))


def test_gguf_is_told_by_its_first_bytes(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(20))
    for source in (tmp_path / "model.gguf", tmp_path):
        with pytest.raises(ValueError, match=r"model.gguf: content: found a GGUF file, .* Load it with transformers"):
            import_model(source, tmp_path / "nested")


def test_widths_that_no_layer_has(given: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"bits: found \[4, 8\], expected at most 4, .* --method nearest offers"):
        import_model(given, tmp_path / "nested", bits=(4, 8))


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of GPTQ, version 1, with 4 bits; not to be changed."""
    return make("gptq v1, 4 bits", tmp_path_factory.mktemp("imports") / "given").folder
