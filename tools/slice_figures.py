"""Figures of slices of models that were made in a folder; each is measured once."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from results_folder import RECORD_FILE

from vllm_matquant.checkpoint.files import publish_json, read_json
from vllm_matquant.checkpoint.manifest import describe_file
from vllm_matquant.checkpoint.reader import Checkpoint
from vllm_matquant.checkpoint.slice import Slice
from vllm_matquant.measure.evaluate import compare
from vllm_matquant.measure.windows import Windows


@dataclass(frozen=True)
class Case:
    """A slice of a model, to be measured.

    Attributes:
        title: what progress calls it.
        checkpoint: the model.
        served: its slice.
        facts: what its figures are told with.
    """

    title: str
    checkpoint: Checkpoint
    served: Slice
    facts: Mapping[str, Any] = field(hash=False)

    def key(self, windows: Windows) -> str:
        """What its figures depend on, in short: how the model was made, the slice and the text."""
        folder, own = self.checkpoint.folder, self.served.decoders_file
        decoders = describe_file(folder / own) if own else None  # of a recipe, which another search replaces
        parts = [read_json(folder / RECORD_FILE), dict(self.served.widths), decoders, dict(windows.source)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Measured:
    """Figures that were measured, kept in a file.

    Args:
        file: of all figures, which need not be there yet.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._found: dict[str, dict[str, Any]] = read_json(file) if file.exists() else {}

    def measure(
        self, cases: Sequence[Case], source: Path, layers: Mapping[str, tuple[int, int]], windows: Windows
    ) -> None:
        """Measure what is missing; each figure is kept as soon as it is there.

        Args:
            cases: what to measure.
            source: folder of the model that all of them were made from.
            layers: (out_features, in_features) of the quantized layers.
            windows: of the text to measure on.

        Raises:
            ValueError: a model has other quantized layers.
        """
        missing = {key: case for case in cases if (key := case.key(windows)) not in self._found}
        if not missing:
            return
        named = ((case.title, case.checkpoint.weights(case.served)) for case in missing.values())
        for key, quality in zip(missing, compare(source, windows.tokens, layers, named), strict=True):
            self._found[key] = quality
            publish_json(self._file, self._found)

    def figures(self, cases: Sequence[Case], windows: Mapping[str, Windows]) -> list[dict[str, Any]]:
        """The figures of all cases on each text, by its name; all must have been measured."""
        rows = []
        for text, each in windows.items():
            for case in cases:
                quality = self._found[case.key(each)]
                gap = math.log(quality["perplexity"] / quality["reference_perplexity"])
                rows.append({**case.facts, "text": text, "gap": gap, **quality})
        return rows
