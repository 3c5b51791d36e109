"""The comparison with other projects' quantizers, with a peer that stands in for them, and with them where they are."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import compare_quantizers
import peer_quantizers
import pytest
import torch
from matplotlib.figure import Figure
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.quantize.tiny_sources import block_layers
from vllm_matquant.checkpoint.reader import open_checkpoint
from vllm_matquant.cli import main
from vllm_matquant.measure.windows import draw_windows, load_tokenizer, spread_windows
from vllm_matquant.quantize.source import SourceModel

pytestmark = pytest.mark.usefixtures("few_windows")

PEER_PYTHON = os.environ.get("VLLM_MATQUANT_PEER_PYTHON", sys.executable)
"""Interpreter of the environment that has the peers."""

# Called like peer_quantizers.py. Its weights are the source's in steps of 1 / 2^bits; at 3 bits it fails.
STAND_IN = """#!{python}
import sys
from pathlib import Path
from safetensors.numpy import load_file, save_file

script, peer, *rest = sys.argv[1:]
options = dict(zip(rest[::2], rest[1::2], strict=True))
bits = int(options["--bits"])
tokens = load_file(options["--tokens"])["tokens"]
print("at work on", tokens.shape, "in groups of", options["--group-size"])
if bits == 3:
    sys.exit("three is too odd")
source = load_file(Path(options["--model"]) / "model.safetensors")
linears = [name for name, weight in source.items() if "layers" in name and weight.ndim == 2]
weights = {{name.removesuffix(".weight"): (source[name] * 2**bits).round() / 2**bits for name in linears}}
save_file(weights, options["--output"], metadata={{"seconds": "7.5", "bits_per_weight": str(bits + 0.5)}})
"""
OPTIONS = ["--group-size", "32", "--samples", "3", "--sequence-length", "20"]


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    script = tmp_path_factory.mktemp("peer") / "python"
    script.write_text(STAND_IN.format(python=sys.executable))
    script.chmod(0o755)
    return script


@pytest.fixture(scope="module")
def compared(
    few_windows: None, source: Path, text_file: Path, stand_in: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Folder of a comparison of two texts; not to be changed."""
    folder = tmp_path_factory.mktemp("compared") / "results"
    other = folder.parent / "other.txt"
    other.write_text("A house of cats and hats. " * 40)
    arguments = [str(source), "--text", str(text_file), str(other), "--output", str(folder), *OPTIONS]
    arguments += ["--peer-python", str(stand_in), "--methods", "rtn,gptqmodel", "--bits", "2,4"]
    assert compare_quantizers.main(arguments) == 0
    return folder


def run(*arguments: object) -> int:
    return compare_quantizers.main([*map(str, arguments), *OPTIONS])


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    return stop.value.code, capsys.readouterr().err.strip().splitlines()[-1]


def test_rows(compared: Path, source: Path, text_file: Path, tmp_path: Path) -> None:
    rows = json.loads((compared / "results.json").read_text())
    cases = [("rtn", 2), ("rtn", 4), ("gptqmodel", 2), ("gptqmodel", 4)]
    assert [(row["text"], row["method"], row["bits"]) for row in rows] == [
        (text, *case) for text in ("text.txt", "other.txt") for case in cases
    ]
    shapes = open_checkpoint(compared / "rtn").layers.values()
    steps = 2 * 16 * sum(rows for rows, _ in shapes) / sum(map(math.prod, shapes))
    for row in rows:
        assert row["gap"] == pytest.approx(math.log(row["perplexity"]) - math.log(row["reference_perplexity"]))
        assert row["tokens"] == 4 * 23
        if row["method"] == "gptqmodel":
            assert (row["seconds"], row["bits_per_weight"]) == (7.5, row["bits"] + 0.5)
        else:
            assert row["seconds"] > 0
            assert row["bits_per_weight"] == pytest.approx(row["bits"] + 2 * 8 / 32 + steps)
    of_text = {(row["method"], row["bits"]): row for row in rows if row["text"] == "text.txt"}
    assert of_text["rtn", 2]["kl"] > of_text["rtn", 4]["kl"] > 0
    assert of_text["rtn", 2]["seconds"] == of_text["rtn", 4]["seconds"]
    evaluated = tmp_path / "rows.json"
    arguments = ["--reference", str(source), "--text", str(text_file), "--json", str(evaluated), "--bits", "2,4"]
    main(["evaluate", str(compared / "rtn"), *arguments, "--samples", "4", "--sequence-length", "24"])
    for expected in json.loads(evaluated.read_text()):
        assert expected == {name: of_text["rtn", expected["bits"]][name] for name in expected}


@pytest.mark.parametrize(("method", "bits_read"), [("matgptq", {2: 3, 8: 8}), ("nested-vq", {2: 2, 8: 8})])
def test_bits_are_those_of_the_stored_tensors(
    source: Path, tmp_path: Path, method: str, bits_read: dict[int, int]
) -> None:
    folder = tmp_path / method
    arguments = ["--method", method, "--bits", "2,8", "--group-size", "32", "--samples", "3", "--sequence-length", "20"]
    main(["quantize", str(source), "--output", str(folder), "--no-report", *arguments])
    (folder / "record.json").write_text('{"seconds": 1}')
    sizes = {}
    for path in folder.glob("*.safetensors"):
        sizes |= {name: tensor.nbytes for name, tensor in load_file(path).items()}
    layers = block_layers(SourceModel(source))
    weights = sum(4 * sizes[f"{layer}.weight_base"] for layer in layers)
    candidate = compare_quantizers.Candidate(method, (2, 8), (2, 8))
    for entry in compare_quantizers.entries(candidate, tmp_path):
        # A rounded slice is decided by one bit more than it has.
        planes = "|".join(f"plane{plane}" for plane in range(3, bits_read[entry.bits] + 1))
        read = re.compile(rf".*\.weight_(base|{planes or '-'}|(?!plane)[a-z]+{entry.bits})")
        stored = sum(size for name, size in sizes.items() if read.fullmatch(name))
        assert entry.bits_per_weight == pytest.approx(8 * stored / weights)


@torch.no_grad()
@pytest.mark.parametrize("bits", [2, 4])
def test_peer_is_judged_by_its_weights(compared: Path, source: Path, text_file: Path, bits: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tokens = spread_windows(text_file, load_tokenizer(source), samples=4, sequence_length=24).tokens
    for name in block_layers(SourceModel(source)):
        weight = model.get_parameter(f"{name}.weight")
        weight.copy_((weight * 2**bits).round() / 2**bits)
    loss = torch.nn.functional.cross_entropy(model(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    rows = json.loads((compared / "results.json").read_text())
    (row,) = [row for row in rows if (row["text"], row["method"], row["bits"]) == ("text.txt", "gptqmodel", bits)]
    assert math.log(row["perplexity"]) == pytest.approx(float(loss), rel=1e-5)


def test_all_calibrate_on_the_same_tokens(compared: Path, source: Path) -> None:
    tokens = load_file(compared / "tokens.safetensors")["tokens"]
    expected = draw_windows(None, load_tokenizer(source), samples=3, sequence_length=20, seed=0)
    assert torch.equal(tokens, expected.tokens)
    assert (compared / "gptqmodel-2.log").read_text() == "at work on (3, 20) in groups of 32\n"
    command = json.loads((compared / "rtn" / "record.json").read_text())["command"]
    asked = dict(zip(command[6::2], command[7::2], strict=True))
    expected_options = {"--samples": "3", "--sequence-length": "20", "--seed": "0", "--group-size": "32"}
    assert expected_options.items() <= asked.items()
    assert "--calibration" not in asked


FIGURES = {"text": "t.txt", "reference_perplexity": math.e}
ROWS = [
    {"method": "nested", "bits": 4, "bits_per_weight": 4.25, "gap": -0.00004, "kl": 0.0125, "seconds": 30.0} | FIGURES,
    {"method": "nested", "bits": 2, "bits_per_weight": 2.25, "gap": 0.5, "kl": 0.625, "seconds": 30.0} | FIGURES,
    {"method": "gptqmodel", "bits": 4, "bits_per_weight": 4.3125, "gap": 2, "kl": 3, "seconds": 11.6} | FIGURES,
    {
        "method": "Q2_K",
        "bits": 2,
        "bits_per_weight": 4.1,
        "gap": 0.25,
        "kl": 0.375,
        "seconds": 7,
        "types": {"Q4_0": 0.625, "Q3_K": 0.375},
    }
    | FIGURES,
]
ROWS.append(ROWS[0] | {"text": "u.txt", "reference_perplexity": 1.0})


def test_table() -> None:
    expected = """\
t.txt: KL divergence from the source model and log-perplexity above its 1.0000, in nats

| method | width | bits per weight as stored | KL divergence | log-perplexity | seconds |
|---|---|---|---|---|---|
| nested | 4 | 4.250 | 0.01250 | -0.0000 | 30 |
| nested | 2 | 2.250 | 0.62500 | 0.5000 | 30 |
| gptqmodel | 4 | 4.312 | 3.00000 | 2.0000 | 12 |
| Q2_K | 2 | 4.100 | 0.37500 | 0.2500 | 7 |

u.txt: KL divergence from the source model and log-perplexity above its 0.0000, in nats

| method | width | bits per weight as stored | KL divergence | log-perplexity | seconds |
|---|---|---|---|---|---|
| nested | 4 | 4.250 | 0.01250 | -0.0000 | 30 |

Weights in llama.cpp's files:

- Q2_K: 62.5% Q4_0, 37.5% Q3_K
"""
    assert compare_quantizers.tables(ROWS) == expected


def test_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *rest, **more: saved.append(self) or save(self, *rest, **more))
    compare_quantizers.draw(ROWS, tmp_path / "results.png")
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG\r\n")
    first, second = saved[0].axes
    assert {line.get_label(): line.get_xydata().tolist() for line in first.lines} == {
        "nested": [[2.25, 0.625], [4.25, 0.0125]],
        "gptqmodel": [[4.3125, 3]],
        "llama.cpp": [[4.1, 0.375]],
    }
    assert [text.get_text() for text in first.texts] == ["2", "4", "Q2_K"]
    assert [line.get_label() for line in second.lines] == ["nested"]
    assert [panel.get_title() for panel in (first, second)] == ["t.txt", "u.txt"]
    assert first.get_yscale() == "log"


def test_what_is_written_and_printed(compared: Path) -> None:
    rows = json.loads((compared / "results.json").read_text())
    assert (compared / "results.md").read_text() == compare_quantizers.tables(rows)
    assert (compared / "results.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_commands_of_models_for_one_width(source: Path, tmp_path: Path) -> None:
    arguments = [str(source), "--text", "t", "--output", "out", "--calibration", "hf:x", "--seed", "7"]
    options = compare_quantizers.build_parser().parse_args([*arguments, "--peer-python", "/bin/sh"])
    planned = compare_quantizers.plan(("nested-one-width", "auto-round"), (3,))
    ours, peer = (candidate.command(tmp_path, options, source) for candidate in planned)
    assert ours[0] == sys.executable
    assert ours[1:6] == ["-m", "vllm_matquant", "quantize", "--no-report", str(source)]
    assert dict(zip(ours[6::2], ours[7::2], strict=True)) == {
        "--output": str(tmp_path),
        "--method": "nested",
        "--bits": "3",
        "--group-size": "64",
        "--calibration": "hf:x",
        "--samples": "64",
        "--sequence-length": "512",
        "--seed": "7",
    }
    assert (peer[0], Path(peer[1]), peer[2]) == ("/bin/sh", Path(peer_quantizers.__file__), "auto-round")
    peer_quantizers.build_parser().parse_args(peer[2:])


def test_a_failed_peer_does_not_stop_the_others(
    compared: Path, source: Path, text_file: Path, stand_in: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "results"
    shutil.copytree(compared, folder)
    (folder / "gptqmodel-2" / "weights.safetensors").touch()
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("*/*")}
    arguments = [source, "--text", text_file, "--output", folder, "--peer-python", stand_in]
    arguments += ["--methods", "gptqmodel,auto-round,rtn"]
    assert run(*arguments, "--bits", "2,3,4") == 1
    said = capsys.readouterr()
    for peer in ("gptqmodel", "auto-round"):
        assert f"{peer}-3: " in said.err
        assert f"ended with status 1; the end of {folder / f'{peer}-3.log'}:\nat work on (3, 20)" in said.err
    assert said.err.count("three is too odd") == 2
    assert "gptqmodel-2: there already" in said.out
    rows = json.loads((folder / "results.json").read_text())
    made = [("gptqmodel", 2), ("gptqmodel", 4), ("auto-round", 2), ("auto-round", 4)]
    assert [(row["method"], row["bits"]) for row in rows] == [*made, ("rtn", 2), ("rtn", 3), ("rtn", 4)]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
    assert not (folder / "gptqmodel-3").exists()


def test_what_a_killed_run_left_is_made_again(
    compared: Path, source: Path, text_file: Path, stand_in: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "results"
    shutil.copytree(compared, folder)
    (folder / "gptqmodel-2").rename(folder / ".gptqmodel-2.unfinished")
    (folder / ".gptqmodel-2.unfinished" / "weights.safetensors").write_bytes(b"half")
    arguments = [source, "--text", text_file, "--output", folder, "--peer-python", stand_in]
    assert run(*arguments, "--methods", "gptqmodel", "--bits", "2") == 0
    found, expected = (load_file(output / "gptqmodel-2" / "weights.safetensors") for output in (folder, compared))
    assert found.keys() == expected.keys()
    assert all(torch.equal(weight, expected[layer]) for layer, weight in found.items())


def test_nothing_could_be_made(
    source: Path, text_file: Path, stand_in: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [source, "--text", text_file, "--output", tmp_path / "results", "--peer-python", stand_in]
    status, said = refusal(capsys, *arguments, "--methods", "gptqmodel", "--bits", "3")
    assert (status, said) == (1, f"{Path(sys.argv[0]).name}: no model could be made")
    assert not (tmp_path / "results" / "results.json").exists()


@pytest.mark.parametrize("change", [("--seed", "1"), ("--group-size", "16"), ("--calibration", "another text")])
def test_results_of_other_settings(
    compared: Path, source: Path, text_file: Path, capsys: pytest.CaptureFixture[str], change: tuple[str, str]
) -> None:
    option, value = change
    value = str(text_file) if option == "--calibration" else value
    arguments = [str(source), "--text", str(text_file), "--output", str(compared), *OPTIONS, option, value]
    before = {path: path.read_bytes() for path in compared.glob("*.*")}
    with pytest.raises(SystemExit) as stop:
        compare_quantizers.main(arguments)
    said = capsys.readouterr().err
    name = "group_size: found 32, expected 16" if option == "--group-size" else "tokens_sha256: found"
    assert stop.value.code == 1
    assert f"{compared / 'settings.json'}: {name}" in said
    assert "give another --output" in said
    assert {path: path.read_bytes() for path in compared.glob("*.*")} == before


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"--methods": "nested,magic"}, 2, "argument --methods: found 'magic', expected some of nested"),
        ({"--methods": "nested,Q8_0"}, 2, "argument --llama-cpp-folder: found none, expected the folder of llama.cpp"),
        ({"--llama-cpp-folder": "/no"}, 2, "argument --llama-cpp-folder: found no /no/convert_hf_to_gguf.py, expected"),
        ({"--bits": "9"}, 2, "argument --bits: found '9'"),
        ({"--peer-python": "/no/python"}, 2, "argument --peer-python: found no program /no/python, expected a Python"),
        ({"--text": "nowhere.txt"}, 1, "nowhere.txt: found no such file"),
        ({"--calibration": "nowhere.txt"}, 1, "nowhere.txt: found no such file"),
    ],
)
def test_refusals(
    source: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, str],
    status: int,
    message: str,
) -> None:
    options = {"--text": str(text_file), "--output": str(tmp_path / "results")} | changes
    found, said = refusal(capsys, source, *(part for option in options.items() for part in option))
    assert found == status
    assert message in said
    assert not (tmp_path / "results").exists()


def test_plan() -> None:
    methods = ("nested", "nested-one-width", "gptqmodel", "auto-round", "Q2_K", "IQ2_M", "Q4_K_M")
    planned = compare_quantizers.plan(methods, (2, 8))
    assert [(candidate.name, candidate.widths, candidate.judged) for candidate in planned] == [
        ("nested", (2, 3, 4, 5, 6, 7, 8), (2, 8)),
        ("nested-one-width-2", (2,), (2,)),
        ("nested-one-width-8", (8,), (8,)),
        ("gptqmodel-2", (2,), (2,)),
        ("gptqmodel-8", (8,), (8,)),
        ("auto-round-2", (2,), (2,)),
        ("Q2_K", (2,), (2,)),
        ("IQ2_M", (2,), (2,)),
    ]


def peer_arguments(peer: str, model: Path, folder: Path, bits: int) -> list[str]:
    save_file({"tokens": torch.arange(120).view(6, 20) + 3}, folder / "tokens")
    files = ["--model", str(model), "--tokens", str(folder / "tokens"), "--output", str(folder / "weights")]
    return [peer, *files, "--bits", str(bits), "--group-size", "32"]


def test_peer_that_is_not_installed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = peer_quantizers.Peer("no-such-quantizer", peer_quantizers.auto_round, (2,))
    monkeypatch.setitem(peer_quantizers.PEERS, "auto-round", absent)
    with pytest.raises(SystemExit) as stop:
        peer_quantizers.main(peer_arguments("auto-round", source, tmp_path, 2))
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert said == "auto-round: found no package no-such-quantizer, expected it: pip install no-such-quantizer\n"
    assert not (tmp_path / "weights").exists()


def test_what_a_peer_writes(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def quantize(task: peer_quantizers.Task, options: object) -> tuple[peer_quantizers.Weights, float]:
        assert (task.model, task.bits, task.group_size, options) == (source, 3, 32, {"sym": False})
        Path("a log").write_text("which does not stay")
        return {"layer": task.tokens[:2].float()}, 1.25

    peer = peer_quantizers.Peer("torch", quantize, (3,), {"sym": False})
    monkeypatch.setitem(peer_quantizers.PEERS, "gptqmodel", peer)
    monkeypatch.chdir(tmp_path)
    assert peer_quantizers.main(peer_arguments("gptqmodel", source, Path(), 3)) == 0
    assert Path.cwd() == tmp_path
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokens", "weights"]
    with safe_open(tmp_path / "weights", framework="pt") as file:
        facts = file.metadata()
        assert torch.equal(file.get_tensor("layer"), torch.arange(40.0).view(2, 20) + 3)
    assert facts["package"].startswith("torch ")
    assert json.loads(facts["options"]) == {"sym": False}
    assert (float(facts["seconds"]), float(facts["bits_per_weight"])) == (1.25, 3 + (16 + 3) / 32)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("peer", peer_quantizers.PEERS)
def test_real_peer(source: Path, tmp_path: Path, peer: str, bits: int) -> None:
    package = peer_quantizers.PEERS[peer].package
    check = f"import importlib.metadata; importlib.metadata.version({package!r})"
    if subprocess.run([PEER_PYTHON, "-c", check], stderr=subprocess.DEVNULL, check=False).returncode:
        pytest.skip(f"{package} is not installed; VLLM_MATQUANT_PEER_PYTHON may name an interpreter that has it")
    command = [PEER_PYTHON, peer_quantizers.__file__, *peer_arguments(peer, source, tmp_path, bits)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-2000:]
    weights = load_file(tmp_path / "weights")
    model = SourceModel(source)
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == model.linears
    for name, weight in weights.items():
        assert weight.dtype == torch.float32
        groups = weight.unflatten(1, (-1, 32)).flatten(0, 1)
        assert max(len(group.unique()) for group in groups) <= 2**bits
        original = model.tensor(f"{name}.weight").float()
        assert (weight - original).norm() < {2: 0.8, 3: 0.5, 4: 0.25}[bits] * original.norm()
