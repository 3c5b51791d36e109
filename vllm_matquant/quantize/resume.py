"""The work folder: blocks that are finished already, so that a run that was cut off can go on.

It lies inside the output folder, thus on its disk and under its permissions, from the first moment of the work until
the checkpoint is published:

    settings.json           what the work depends on; a run with other settings must not go on from here
    <block>.safetensors     parent codes, decoders and errors of the layers of one finished block
    trained-<width>/        a file for each block: decoders of this width that training end to end has changed since
    publishing              there once the checkpoint's own files may lie in the output folder

Whoever writes to the output folder holds its lock (:mod:`vllm_matquant.checkpoint.staging`), and so that of this one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from vllm_matquant.checkpoint.decoder import EVERY_KIND, Decoder, DecoderKind
from vllm_matquant.checkpoint.errors import CheckpointError
from vllm_matquant.checkpoint.files import publish, publish_json, read_json, save_tensors, sync_folder
from vllm_matquant.checkpoint.shard import read_header
from vllm_matquant.quantize.layer import QuantizedLayer

WORK_FOLDER = ".matquant-resume"
_SETTINGS = "settings.json"
_PUBLISHING = "publishing"
# Keys in the metadata of a block's file.
_ERRORS = "errors"
_KIND = "decoder_kind"
_SHOWN = "shown"


class ResumeError(CheckpointError):
    """There is unfinished work that this run cannot go on from, or was not asked to."""


class UnfinishedWork:
    """A folder of unfinished work, and what that work depends on.

    Args:
        path: of the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def exists(self) -> bool:
        return (self.path / _SETTINGS).is_file()

    @property
    def publishing(self) -> bool:
        """Whether the files of a checkpoint that lie in the output folder are those of this work."""
        return self.exists and (self.path / _PUBLISHING).is_file()

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Start from nothing, in place of whatever was there."""
        self.remove()
        self.path.mkdir()
        publish_json(self.path / _SETTINGS, settings)

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Check that the work that is there is the one to be done.

        Raises:
            ResumeError: a setting is another one; the message names the first.
        """
        path = self.path / _SETTINGS
        before, now = _flat(read_json(path, ResumeError)), _flat(json.loads(json.dumps(settings)))
        for field in sorted({*before, *now}):
            if before.get(field) != now.get(field):
                hint = "Run with what the unfinished work began with, or start again: --overwrite without --resume"
                raise ResumeError(path, field, now.get(field), before.get(field), hint)

    def begin_publishing(self) -> None:
        """Note that the checkpoint's files are about to come to the output folder."""
        (self.path / _PUBLISHING).touch()
        sync_folder(self.path)

    def remove(self) -> None:
        """Remove the folder; from the first step on it counts as gone."""
        (self.path / _SETTINGS).unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)


class WorkFolder(UnfinishedWork):
    """The work folder of a quantization.

    Args:
        output: the output folder.
    """

    def __init__(self, output: Path) -> None:
        super().__init__(output / WORK_FOLDER)

    def finished(self, blocks: Iterable[str]) -> int:
        """How many of ``blocks`` are finished, counted up to the first that is not."""
        count = 0
        for block in blocks:
            if not self._file(block).is_file():
                break
            count += 1
        return count

    def save(
        self, block: str, layers: Mapping[str, QuantizedLayer], kind: DecoderKind, shown: Iterable[str] = ()
    ) -> None:
        """Keep a block's layers; they are there after a crash or not at all.

        Args:
            block: full name of the block, or of a layer outside of blocks.
            layers: by their full names.
            kind: of their decoders.
            shown: those of them that were fitted to all tokens of the block, see
                :class:`vllm_matquant.quantize.block.BlockTask`.
        """
        tensors: dict[str, torch.Tensor] = {}
        for name, layer in layers.items():
            tensors[f"{name}.codes"] = layer.codes.contiguous()
            for decoder in layer.decoders.values():
                tensors |= _tensors(name, decoder)
        errors = {name: list(layer.errors.items()) for name, layer in layers.items()}
        metadata = {_ERRORS: json.dumps(errors), _KIND: kind.name, _SHOWN: json.dumps(sorted(shown))}
        publish(self._file(block), lambda temporary: save_tensors(tensors, temporary, metadata))

    def save_trained(self, width: int, blocks: Mapping[str, Mapping[str, Decoder]]) -> None:
        """Keep decoders of one width that shall take the place of those in :meth:`save`; all are there, or none.

        Args:
            blocks: for each block the decoders of its layers, by their full names.
        """
        folder = self._trained(width)
        temporary = folder.with_suffix(".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for block, decoders in blocks.items():
            tensors = {key: part for named in decoders.items() for key, part in _tensors(*named).items()}
            publish(temporary / f"{block}.safetensors", partial(save_tensors, tensors))
        os.rename(temporary, folder)
        sync_folder(self.path)

    def is_trained(self, width: int) -> bool:
        """Whether :meth:`save_trained` has kept the decoders of ``width``."""
        return self._trained(width).is_dir()

    def load(self, block: str, widths_of: Callable[[str], Iterable[int]]) -> dict[str, QuantizedLayer]:
        """The layers that :meth:`save` kept.

        Args:
            widths_of: gives the widths of a layer.

        Raises:
            ShardError: the block's file is damaged.
        """
        path = self._file(block)
        read_header(path)
        layers: dict[str, QuantizedLayer] = {}
        with safe_open(path, framework="pt") as file:
            kind = EVERY_KIND[file.metadata()[_KIND]]
            for name, errors in json.loads(file.metadata()[_ERRORS]).items():
                decoders = {width: _decoder(file, name, width, kind) for width in widths_of(name)}
                layers[name] = QuantizedLayer(file.get_tensor(f"{name}.codes"), decoders, dict(errors))
        for width in sorted({width for layer in layers.values() for width in layer.decoders}):
            trained = self._trained(width) / path.name
            if not trained.is_file():
                continue
            read_header(trained)
            with safe_open(trained, framework="pt") as file:
                for name in sorted({tensor.rpartition(".")[0] for tensor in file.keys()}):  # noqa: SIM118
                    layers[name].decoders[width] = _decoder(file, name, width, kind)
        return layers

    def shown(self, block: str) -> list[str]:
        """The layers of a block that were fitted to all of its tokens, as :meth:`save` was told."""
        with safe_open(self._file(block), framework="pt") as file:
            names: list[str] = json.loads(file.metadata()[_SHOWN])
        return names

    def _file(self, block: str) -> Path:
        return self.path / f"{block}.safetensors"

    def _trained(self, width: int) -> Path:
        return self.path / f"trained-{width}"


def _tensors(layer: str, decoder: Decoder) -> dict[str, torch.Tensor]:
    return decoder.map(torch.Tensor.contiguous).named(layer)


def _decoder(file: Any, layer: str, width: int, kind: DecoderKind) -> Decoder:
    return kind.form(width).from_tensors(lambda name: file.get_tensor(f"{layer}.{name}"), width)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects as one, by dotted names."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
