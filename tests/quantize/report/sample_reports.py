"""Reports with made-up figures of a likely size."""

from __future__ import annotations

import math
import random
from typing import Any

from vllm_matquant.checkpoint.spec import WIDTHS, Format
from vllm_matquant.quantize.report.data import LayerRow, Report

KINDS = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}
SOURCE_PERPLEXITY = 31.61
QUALITY = {
    2: (758.67, 3.2233),
    3: (55.06, 0.5855),
    4: (35.31, 0.1186),
    5: (32.6, 0.0341),
    6: (31.91, 0.0103),
    7: (31.7, 0.0041),
    8: (31.64, 0.002),
}


def layer_rows(blocks: int, widths: tuple[int, ...] = WIDTHS, seed: int = 0) -> list[LayerRow]:
    """The seven linear layers of each block, with random errors that shrink about fourfold with each bit."""
    generator = random.Random(seed)
    return [
        LayerRow(
            f"model.layers.{block}.{kind}",
            shape,
            {width: 0.2 * 4.2 ** (2 - width) * math.exp(generator.gauss(0, 0.3)) for width in widths},
        )
        for block in range(blocks)
        for kind, shape in KINDS.items()
    ]


def make_report(blocks: int = 2, widths: tuple[int, ...] = WIDTHS, **fields: Any) -> Report:
    """A report of ``blocks`` blocks, with ``fields`` in place of its own."""
    quality = [
        {
            "bits": width,
            "perplexity": QUALITY[width][0],
            "reference_perplexity": SOURCE_PERPLEXITY,
            "kl": QUALITY[width][1],
            "tokens": 8176,
            "bits_per_weight": width + 0.5,
        }
        for width in widths
    ]
    text = {"name": "news.txt", "sha256": "ab" * 32, "samples": 16, "sequence_length": 512}
    report: dict[str, Any] = {
        "model": "org/tiny-model",
        "method": "nested",
        "settings": {"damping": 0.01, "sweeps": 2},
        "format": Format(widths, 64),
        "layers": layer_rows(blocks, widths),
        "quality": quality,
        "quality_text": text,
        "calibration": text | {"name": "built-in text", "seed": 7},
        "bytes": {width: 90_000_000 + 13_300_000 * width for width in widths},
        "seconds": {"calibrate": 1.9, "solve": 214.3, "total": 5025.0},
        "peak_memory_bytes": 1_106_000_000,
        "software": {"torch": "2.13.0", "threads": "2"},
        "command": ("matquant", "quantize", "org/tiny-model", "--ignore", "a|b"),
        "source_bytes": 269_000_000,
        "license": {"license": "apache-2.0"},
    }
    return Report(**(report | fields))
