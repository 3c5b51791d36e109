"""Open a checkpoint: everything is checked before any tensor is allocated, then tensors are read when asked for.

A folder without the last shards opens at the widths that are left.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from vllm_matquant.checkpoint.errors import ConfigError, IndexFileError, MissingFileError
from vllm_matquant.checkpoint.files import read_json
from vllm_matquant.checkpoint.packing import slice_codes, unpack_codes
from vllm_matquant.checkpoint.skeleton import build_skeleton
from vllm_matquant.checkpoint.spec import (
    BASE_BITS,
    CONFIG_FILE,
    INDEX_FILE,
    WEIGHT_BASE,
    Format,
    offset_name,
    plane_name,
    scale_name,
    shard_width,
)
from vllm_matquant.checkpoint.validate import (
    check_decoder,
    check_index,
    check_layer_count,
    check_shards,
    expected_tensors,
    read_index,
)


@dataclass
class Checkpoint:
    """A checked checkpoint folder; tensors are read when asked for.

    Attributes:
        folder: where it lies.
        config: the content of config.json.
        format: the parsed ``quantization_config``.
        layers: (out_features, in_features) of each quantized layer.
        weight_map: the index: shard file name of each tensor.
    """

    folder: Path
    config: dict[str, Any]
    format: Format
    layers: dict[str, tuple[int, int]]
    weight_map: dict[str, str]
    _open_shards: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def shards(self) -> dict[int, list[str]]:
        """File names of the shards that the index lists, by the width whose data they hold."""
        shards: dict[int, list[str]] = defaultdict(list)
        for name in sorted(set(self.weight_map.values())):
            width = shard_width(name)
            if width is not None:
                shards[width].append(name)
        return dict(shards)

    @property
    def missing_files(self) -> dict[int, list[str]]:
        """Likewise, of the shards that are not in the folder; a width that misses none has no entry."""
        present = {path.name for path in self.folder.iterdir() if path.is_file()}
        missing = {width: [name for name in names if name not in present] for width, names in self.shards.items()}
        return {width: names for width, names in missing.items() if names}

    @property
    def servable_widths(self) -> tuple[int, ...]:
        """The offered widths whose shards are all in the folder."""
        reach = min(self.missing_files, default=math.inf)
        return tuple(width for width in self.format.widths if self.format.stored_width(width) < reach)

    def files_for(self, width: int) -> list[Path]:
        """The shards that serving at ``width`` reads.

        Raises:
            WidthError: the checkpoint does not offer this width.
            MissingFileError: it does, but files of it are not in the folder.
        """
        self.format.check_width(width, self.folder)
        stored_width = self.format.stored_width(width)
        missing = [name for of, names in self.missing_files.items() if of <= stored_width for name in names]
        if missing:
            raise MissingFileError(
                self.folder,
                f"files of {width} bits",
                "no " + ", no ".join(missing),
                f"every shard of the widths up to {stored_width} that {INDEX_FILE} lists",
                f"The folder serves {_listed(self.servable_widths)}",
            )
        return [self.folder / name for of, names in sorted(self.shards.items()) if of <= stored_width for name in names]

    def tensors(self, width: int) -> Iterator[tuple[str, torch.Tensor]]:
        """What serving at ``width`` needs, shard by shard.

        These are the tensors that are not quantized, and of each quantized layer the base, the planes that its slice
        reads and the decoder of this slice alone.

        Raises:
            WidthError, MissingFileError: as :meth:`files_for`.
        """
        unwanted = {
            f"{layer}.{name}"
            for layer in self.layers
            for other in self.format.widths_of(layer)
            if other != self.format.width_of(layer, width)
            for name in (scale_name(other), offset_name(other))
        }
        for path in self.files_for(width):
            names = sorted(name for name, file in self.weight_map.items() if file == path.name and name not in unwanted)
            for name in names:
                yield name, self._read(name)

    def unquantized(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of every tensor that is not part of a quantized layer's codes or decoders."""
        quantized = {
            f"{layer}.{name}"
            for layer, shape in self.layers.items()
            for tensors in self.format.tensors_of_layer(*shape, layer).values()
            for name in tensors
        }
        for name in sorted(self.weight_map.keys() - quantized):
            yield name, self._read(name)

    def codes(self, layer: str, width: int) -> torch.Tensor:
        """The codes of a layer, as served at ``width``: uint8 [out_features, in_features]."""
        own = self.format.width_of(layer, width)
        stored_width = self.format.stored_width(own)
        return slice_codes(self.stored_codes(layer, stored_width), stored_width, own, self.format.slicing)

    def stored_codes(self, layer: str, bits: int) -> torch.Tensor:
        """The ``bits`` most significant bits of a layer's parent codes: uint8 [out_features, in_features]."""
        base = self._read(f"{layer}.{WEIGHT_BASE}")
        planes = [self._read(f"{layer}.{plane_name(plane)}") for plane in range(BASE_BITS + 1, bits + 1)]
        return unpack_codes(base, planes, self.layers[layer][1])

    def decoder(self, layer: str, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(scale, offset) of a layer, as served at ``width``: float16 [out_features, groups] each."""
        own = self.format.width_of(layer, width)
        return self._read(f"{layer}.{scale_name(own)}"), self._read(f"{layer}.{offset_name(own)}")

    def resident_bytes(self, width: int) -> int:
        """Bytes of the codes and decoders of all quantized layers at ``width``."""
        return sum(self.format.resident_bytes(*shape, width, name) for name, shape in self.layers.items())

    def _read(self, name: str) -> torch.Tensor:
        file = self.weight_map[name]
        if file not in self._open_shards:
            self._open_shards[file] = safe_open(self.folder / file, framework="pt")
        return self._open_shards[file].get_tensor(name)


def open_checkpoint(folder: Path | str, width: int | None = None, *, check_values: bool = True) -> Checkpoint:
    """Check a checkpoint folder and open it.

    Args:
        folder: a local folder.
        width: open only the files that this width reads; None for every file that is there.
        check_values: also read the decoders (of ``width``, or of every servable width) and refuse those that are not
            finite or have a negative scale.

    Raises:
        CheckpointError: one of its subclasses for each fault, naming file, tensor, found and expected.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MissingFileError(folder, "checkpoint", "no such folder", "a folder with " + CONFIG_FILE)
    config_path = folder / CONFIG_FILE
    config = read_json(config_path, ConfigError)
    if "quantization_config" not in config:
        raise ConfigError(config_path, "quantization_config", "nothing", "an object: this is no matquant checkpoint")
    format = Format.from_dict(config["quantization_config"], config_path)
    if width is not None:
        format.check_width(width, config_path)

    weight_map, total_size = read_index(folder)
    check_layer_count(config, len(weight_map), config_path)
    skeleton = build_skeleton(config, config_path)
    expected = expected_tensors(format, skeleton, config_path)
    check_index(folder / INDEX_FILE, weight_map, expected)

    checkpoint = Checkpoint(folder, config, format, skeleton.quantized_layers(format, config_path), weight_map)
    paths = checkpoint.files_for(format.widths[0] if width is None else width)
    if width is None:
        paths = [folder / name for name in sorted(set(weight_map.values())) if (folder / name).is_file()]
    found = check_shards(paths, weight_map, expected)
    found_size = sum(spec.nbytes for spec in found.values())
    if len(found) == len(weight_map) and found_size != total_size:
        raise IndexFileError(
            folder / INDEX_FILE, "metadata.total_size", total_size, f"{found_size}, the tensors' bytes"
        )
    if check_values:
        for checked in checkpoint.servable_widths if width is None else (width,):
            _check_decoders(checkpoint, checked)
    return checkpoint


def _check_decoders(checkpoint: Checkpoint, width: int) -> None:
    for layer in checkpoint.layers:
        own = checkpoint.format.width_of(layer, width)
        file = checkpoint.weight_map[f"{layer}.{scale_name(own)}"]
        check_decoder(*checkpoint.decoder(layer, width), layer, own, checkpoint.folder / file)


def _listed(widths: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, widths))} bits" if widths else "no width"
