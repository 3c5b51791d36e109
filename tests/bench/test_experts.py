"""What `matquant bench experts` computes."""

from __future__ import annotations

import pytest
import torch

from vllm_matquant.bench import experts
from vllm_matquant.bench.experts import Mixture, Settings, Shape
from vllm_matquant.checkpoint.decoder import KINDS
from vllm_matquant.jobs.bench import BenchExperts

SHAPE = Shape(5, 2, 64, 32)


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
@pytest.mark.parametrize("width", [2, 3, 8])
def test_bytes_of_an_expert(kind: object, width: int) -> None:
    mixture = Mixture(Settings([SHAPE], group_size=32, decoder_kind=kind), SHAPE, width)  # type: ignore[arg-type]
    weights = [weight for pair in mixture._weights for weight in pair]
    planes = [weight.segments[0].resident.planes for weight in weights]
    assert sum(part.nbytes for part in planes) == mixture._planes.nbytes == 5 * 3 * 64 * 32 * width // 8
    assert sum(weight.resident_bytes for weight in weights) == 5 * mixture.expert_bytes
    # Whoever reads the mixture's experts and whoever multiplies with them reads the same memory.
    assert planes[0].data_ptr() == mixture._planes.data_ptr()
    assert [mixture.read(2) for _ in range(4)] == [2 * mixture._planes[0].nbytes] * 4


def test_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "SECONDS", 0)
    before = torch.get_num_threads()
    rows = BenchExperts(shapes="5x2x64x32", bits="2,8", batch="1,3", threads="1", group_size=32, peers="none").run()
    assert torch.get_num_threads() == before
    assert [(row["bits"], row["m"]) for row in rows] == [(2, 1), (8, 1), (2, 3), (8, 3)]
    for row in rows:
        assert (row["experts"], row["chosen"]) == SHAPE[:2]
        assert row["hit"] == 2 if row["m"] == 1 else 2 <= row["hit"] <= 5
        assert row["roofline"] == pytest.approx(row["gb_per_s"] / row["read_gb_per_s"])
        assert row["peer_seconds"] == {}
