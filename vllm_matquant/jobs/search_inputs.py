"""What a search works on: the checkpoint, the model it comes from, and the texts to measure and to train on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_matquant.checkpoint.manifest import read_manifest
from vllm_matquant.checkpoint.names import INDEX_FILE, MANIFEST_FILE, shard_width
from vllm_matquant.checkpoint.quantization_config import format_to_config
from vllm_matquant.checkpoint.reader import Checkpoint, open_checkpoint
from vllm_matquant.checkpoint.staging import check_writable
from vllm_matquant.jobs.reference import locate_reference
from vllm_matquant.measure.windows import Windows, draw_windows, load_tokenizer, split_windows

SENSITIVITY_LENGTH = 128  # tokens of a window from which sensitivities are estimated
DECODER_SAMPLES = 64


@dataclass(frozen=True)
class TextSettings:
    """Which text, and how many windows of it.

    Attributes:
        source: see :func:`vllm_matquant.measure.text.read_source`.
        text_column: the text's field in a line, or column in a data set.
        samples: windows to measure divergence on.
        sequence_length: tokens of each.
        sensitivity_samples: windows of SENSITIVITY_LENGTH tokens.
        decoder_samples: windows to train decoders on; None for DECODER_SAMPLES where there is a reference, else none.
        seed: of the windows' places.
    """

    source: str | None
    text_column: str
    samples: int
    sequence_length: int
    sensitivity_samples: int
    decoder_samples: int | None
    seed: int


@dataclass(frozen=True)
class SearchInputs:
    """What a search works on.

    Attributes:
        checkpoint: with the files of every offered width.
        reference: folder of the model to measure divergence from; None for the checkpoint's widest slice.
        calibration: windows to measure divergence on.
        training: windows to train decoders on, which share no token with those of ``calibration``; may be none.
        sensitivity: windows to estimate sensitivities on.
    """

    checkpoint: Checkpoint
    reference: Path | None
    calibration: Windows
    training: Windows
    sensitivity: Windows

    def fingerprint(self, seed: int, device: str) -> dict[str, Any]:
        """All that the measurements of a search depend on, as JSON values."""
        folder = self.checkpoint.folder
        config = format_to_config(self.checkpoint.format) | {"recipes": []}
        shards = {}
        if (folder / MANIFEST_FILE).is_file():
            files = read_manifest(folder)
            shards = {name: entry["sha256"] for name, entry in files.items() if shard_width(name) is not None}
        content = (folder / INDEX_FILE).read_bytes() + json.dumps([config, shards], sort_keys=True).encode()
        return {
            "checkpoint": hashlib.sha256(content).hexdigest(),
            "reference": self.reference.name if self.reference else None,
            "calibration": self.calibration.source,
            "sensitivity": self.sensitivity.source,
            "training": self.training.source,
            "seed": seed,
            "device": device,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }


def open_inputs(folder: Path, model: str | None, text: TextSettings) -> SearchInputs:
    """Open and read what a search works on.

    Args:
        folder: of the checkpoint.
        model: the model to measure divergence from: a folder or a hub name; None for the checkpoint's widest slice.
        text: which text.

    Raises:
        CheckpointError: the folder holds no sound checkpoint, or there is no such model.
        TextError: the text cannot be used.
        ValueError: layers have no choice of widths, files of an offered width are missing, or decoders shall be
            trained without a reference.
    """
    checkpoint = open_checkpoint(folder)
    check_writable(folder)
    kind = checkpoint.format.decoder_kind
    if kind.one_width:
        raise ValueError(
            f"{folder}: found decoders of the kind {kind.name}, expected one that gives layers a choice of widths"
        )
    missing = sorted(set(checkpoint.format.widths) - set(checkpoint.servable_widths))
    if missing:
        raise ValueError(f"{folder}: found no files of {missing} bits, expected those of all offered widths")
    reference = locate_reference(model, checkpoint) if model else None
    trained = text.decoder_samples
    if trained is None:
        trained = DECODER_SAMPLES if reference else 0
    if trained < 0 or (trained and not reference):
        expected = "a number from 0 up" if reference else "--reference, whose predictions they are trained on"
        raise ValueError(f"--decoder-samples: found {trained}, expected {expected}")
    tokenizer = load_tokenizer(reference or folder)
    # Decoders are not measured on what they were trained on.
    calibration, training = split_windows(
        text.source,
        tokenizer,
        samples=(text.samples, trained),
        sequence_length=text.sequence_length,
        seed=text.seed,
        text_column=text.text_column,
    )
    sensitivity = draw_windows(
        text.source,
        tokenizer,
        samples=text.sensitivity_samples,
        sequence_length=SENSITIVITY_LENGTH,
        seed=text.seed,
        text_column=text.text_column,
    )
    return SearchInputs(checkpoint, reference, calibration, training, sensitivity)
