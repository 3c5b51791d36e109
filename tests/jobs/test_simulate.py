from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_matquant.cli import main
from vllm_matquant.jobs.simulate import simulate

TIMES = {8: 30.0, 4: 18.0, 2: 11.0}
FEW = {"peak": 2.5, "night": 0.5, "token_ms": 0.5, "between": 0.06}


def test_the_load_is_followed_between_the_two_widths() -> None:
    wide, narrow, followed = simulate(step_ms=TIMES, elastic_policy="load,waiting=2,dwell=1", **FEW)
    assert [wide["average_bits"], narrow["average_bits"]] == [8, 2]
    assert narrow["replica_hours"] <= followed["replica_hours"] < wide["replica_hours"]
    assert 2 < followed["average_bits"] < 8
    for row in (wide, narrow, followed):
        assert len(row["replicas_by_hour"]) == 24
        assert row["replicas"] == max(row["replicas_by_hour"])
        assert row["replica_hours"] == sum(row["replicas_by_hour"])
        assert row["replicas_by_hour"][15] >= row["replicas_by_hour"][3]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["simulate", "--step-ms", "8=30,2=11", "--peak", "1", "--night", "0.5"]
    assert main([*command, "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["serving"] for row in rows] == ["8 bits", "2 bits", "follows the load"]
    titles, *lines = capsys.readouterr().out.splitlines()
    assert titles.split() == ["replicas", "replica_hours", "average_bits"]
    assert [line.split()[0] for line in lines] == [str(row["replicas"]) for row in rows]


def test_times_from_a_benchmark(tmp_path: Path) -> None:
    rows = [
        {"bits": bits, "batch": 1, "decode_tokens_per_s": 1e3 / time, "output_tokens_per_s": 1.0}
        for bits, time in TIMES.items()
    ]
    others = [{"bits": 16, "batch": 1, "decode_tokens_per_s": 9.0}, {"model": "llama.cpp Q4_0", "batch": 1}]
    bench = tmp_path / "bench.json"
    bench.write_text(json.dumps([*rows, *others, rows[0] | {"recipe": "mine", "bits": 8}]))
    assert simulate(bench=bench, **FEW) == simulate(step_ms=TIMES, **FEW)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "found --step-ms None and --bench None, expected one of them"),
        ({"step_ms": {8: 30.0}}, r"--step-ms: found times of the widths \[8\], expected two widths at least"),
        ({"step_ms": "8=30,9=2"}, "step_ms: found '9=2', expected WIDTH=MILLISECONDS"),
        ({"step_ms": "8=30,4=x"}, "step_ms: found 'x', expected a positive number"),
        ({"step_ms": TIMES, "peak": 0}, "peak: found '0', expected a positive number"),
        ({"step_ms": TIMES, "token_ms": -1}, "token_ms: found '-1', expected a positive number"),
        ({"step_ms": TIMES, "elastic_policy": "load,floor=3"}, "elastic_policy: found a floor or a ceiling"),
        ({"step_ms": TIMES, "elastic_policy": "other"}, "elastic_policy: found 'other', expected \"load\""),
        ({"step_ms": TIMES, "between": 0.001}, "found 64 replicas too few to answer within 2.0 s and 0.001 s a token"),
    ],
)
def test_refusals(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(**options)
