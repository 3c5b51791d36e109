"""The safetensors files of a checkpoint: each is checked once and opened once, when something of it is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from vllm_matquant.checkpoint.decoder import Decoder, DecoderForm, TensorSpec, part_name
from vllm_matquant.checkpoint.validate import ExpectedTensor, check_shard, check_tensors


class TensorFiles:
    """The tensors in a checkpoint's shards, and in the files of decoders that belong to recipes.

    Args:
        folder: the checkpoint's.
        weight_map: shard file name of each tensor.
        expected: what the configuration implies for each tensor.
    """

    def __init__(self, folder: Path, weight_map: Mapping[str, str], expected: Mapping[str, ExpectedTensor]) -> None:
        self._folder = folder
        self._weight_map = weight_map
        self._expected = expected
        self._headers: dict[str, dict[str, TensorSpec]] = {}
        self._sound_decoders: set[tuple[str, str, int]] = set()  # file, layer, width
        self._open_files: dict[str, Any] = {}

    def read(self, name: str, file: str | None = None) -> torch.Tensor:
        """A tensor, from ``file``, by default from the shard that the index says."""
        file = file or self._weight_map[name]
        if file not in self._open_files:
            self._open_files[file] = safe_open(self._folder / file, framework="pt")
        return self._open_files[file].get_tensor(name)

    def decoder(self, form: DecoderForm, layer: str, width: int, file: str | None = None) -> Decoder:
        """The decoder of a layer at one of its widths, from ``file``, by default from the shard."""
        return form.from_tensors(lambda name: self.read(f"{layer}.{name}", file), width)

    def check_shard(self, file: str) -> dict[str, TensorSpec]:
        """The header of a shard, which must hold what the index and the configuration say.

        Raises:
            CheckpointError: see :func:`vllm_matquant.checkpoint.validate.check_shard`.
        """
        if file not in self._headers:
            self._headers[file] = check_shard(self._folder / file, self._weight_map, self._expected)
        return self._headers[file]

    def check_decoders_file(self, file: str, names: Iterable[str]) -> None:
        """Check the header of a file of decoders that belong to a recipe, which must hold the named tensors.

        Raises:
            CheckpointError: see :func:`vllm_matquant.checkpoint.validate.check_tensors`.
        """
        if file not in self._headers:
            self._headers[file] = check_tensors(self._folder / file, {name: self._expected[name] for name in names})

    def check_decoder(self, form: DecoderForm, layer: str, width: int, file: str | None = None) -> None:
        """Read a decoder and refuse one that gives no weights.

        Raises:
            DecoderValueError: see :meth:`vllm_matquant.checkpoint.decoder.Decoder.check`.
        """
        first_part = f"{layer}.{part_name(next(iter(form.parts(1, 1))), width)}"
        place = file or self._weight_map[first_part], layer, width
        if place not in self._sound_decoders:
            self.decoder(form, layer, width, file).check(layer, self._folder / place[0])
            self._sound_decoders.add(place)

    def close(self) -> None:
        """Let go of the files that were opened to read tensors; they are opened again when they are needed."""
        self._open_files.clear()
