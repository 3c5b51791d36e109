"""The command line of the scaling law, on tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import scaling_law

from vllm_matquant.research.law import read_law

SMALL = ["--samples", "4", "--sequence-length", "24", "--bits", "2", "--trials", "3"]
# Many, for half of the mixes make a random model better, by chance.
SMALL += ["--ratios", "0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1", "--blocks", "16,32,64"]


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        scaling_law.main(list(map(str, arguments)))
    return stop.value.code, capsys.readouterr().err.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def law(source: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("law") / "law.json"
    picture = file.with_name("law.png")
    arguments = [source, "--text", text_file, "--output", file, "--plot", picture, *SMALL]
    assert scaling_law.main(list(map(str, arguments))) == 0
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")
    return file


def test_measured_and_fitted(law: Path, source: Path) -> None:
    content = json.loads(law.read_text())
    assert len(content["measured"]) == 9 * 3
    assert sum(len(item["mixes"]) for item in content["measured"]) == (8 * 3 + 1) * 3
    assert {item["block"] for item in content["measured"]} == {16, 32, 64}
    assert {item["model"] for item in content["measured"]} == {source.name}
    found = read_law(law)
    assert (found.low_bits, found.high_bits) == (2, 16)
    assert found.models == {source.name: content["measured"][0]["weights"]}
    assert found.observations + found.left_out == 27


def test_another_call_adds_to_it(law: Path, source: Path, text_file: Path, tmp_path: Path) -> None:
    both = tmp_path / "both.json"
    arguments = [source, "--text", text_file, "--add", law, "--output", both, *SMALL, "--seed", 1]
    assert scaling_law.main(list(map(str, arguments))) == 0
    assert len(json.loads(both.read_text())["measured"]) == 54


def test_predictions(law: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--predict", law, "--weights", "7e9", "--budget", "3,9", "--blocks", "64"]
    assert scaling_law.main(list(map(str, arguments))) == 0
    titles, *lines = capsys.readouterr().out.splitlines()
    assert titles.split()[:2] == ["bits", "block"]
    found = read_law(law)
    for line, bits in zip(lines, (3, 9), strict=False):
        assert [float(cell) for cell in line.split()[:3]] == pytest.approx(
            [bits, 64, found.predict(found.ratio_for_budget(bits), 7e9, 64)], rel=1e-3
        )
    assert "weights 7,000,000,000 lie outside of the" in lines[-1]


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ([], 1, "found no MODEL or no --output"),
        (["--predict", "LAW"], 1, "found no --weights or no --budget, expected both"),
        (["--predict", "LAW", "--weights", "1e9", "--budget", "1"], 1, "found 1 bits, expected 2 to 16"),
        (["--predict", "/no/law.json"], 1, "law.json"),
        (["--ratios", "x"], 2, "expected positive numbers"),
        (["--blocks", "0"], 2, "expected a positive integer"),
        (["--add", "LAW", "--bits", "3", "--output", "OUT"], 1, "found a law of 2 and 16 bits, expected 3 and 16"),
    ],
)
def test_refusals(
    law: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], status: int, message: str
) -> None:
    names = {"LAW": str(law), "OUT": str(tmp_path / "out.json")}
    found, said = refusal(capsys, *(names.get(option, option) for option in options))
    assert found == status
    assert message in said
    assert not (tmp_path / "out.json").exists()
