"""Write a checkpoint: shard by shard while layers come, checked by the reader before it is published."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from vllm_matquant.checkpoint.decoder import Decoder, part_name
from vllm_matquant.checkpoint.errors import (
    MissingTensorError,
    TensorDtypeError,
    TensorShapeError,
    UnexpectedTensorError,
)
from vllm_matquant.checkpoint.files import move, save_tensors, sync_file, write_json, writing
from vllm_matquant.checkpoint.manifest import build_manifest
from vllm_matquant.checkpoint.names import (
    CONFIG_FILE,
    INDEX_FILE,
    MANIFEST_FILE,
    WEIGHT_BASE,
    plane_name,
    shard_name,
    split_tensor_name,
)
from vllm_matquant.checkpoint.packing import pack_codes
from vllm_matquant.checkpoint.quantization_config import format_to_config
from vllm_matquant.checkpoint.reader import open_checkpoint
from vllm_matquant.checkpoint.spec import (
    BASE_BITS,
    CODE_DTYPE,
    UNQUANTIZED_DTYPES,
    Format,
)
from vllm_matquant.checkpoint.staging import Staging


class CheckpointWriter:
    """Writes a checkpoint; a context manager that removes its unfinished files on an error.

    Nothing of the folder changes before :meth:`finish`, see :mod:`vllm_matquant.checkpoint.staging`.

    Args:
        folder: the output; made if absent.
        format: what ``quantization_config`` shall say.
        shard_bytes: bytes of tensors to hold in memory before the largest shard is written out, thus also the limit of
            a shard, but for a tensor that is larger.
        overwrite: replace the matquant checkpoint that the folder holds.

    Raises:
        OutputError: the folder holds files of a model, another process is writing to it, or it is no folder.
        OSError: the folder cannot be written to.
    """

    def __init__(
        self, folder: Path | str, format: Format, *, shard_bytes: int = 2 * 2**30, overwrite: bool = False
    ) -> None:
        self.folder = Path(folder)
        self.format = format
        self._shard_bytes = shard_bytes
        self._names: set[str] = set()
        self._buffers: dict[int, dict[str, torch.Tensor]] = defaultdict(dict)  # by the width of the shard
        self._buffered: Counter[int] = Counter()  # bytes, by the width of the shard
        self._written: dict[int, list[list[str]]] = defaultdict(list)  # names in each shard that is on disk, by width
        self._total_size = 0
        self._staging = Staging(self.folder, overwrite=overwrite)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._staging.close()

    def add_layer(self, name: str, codes: torch.Tensor, decoders: Mapping[int, Decoder]) -> None:
        """Add a quantized linear layer.

        Args:
            name: the layer's full name in the source checkpoint, without ".weight".
            codes: uint8 [out_features, in_features], the 8-bit parent codes.
            decoders: for each width of the layer, of the format's kind.

        Raises:
            ConfigError: the group size does not divide in_features.
            TensorDtypeError, TensorShapeError, MissingTensorError, UnexpectedTensorError: not as the format has it.
            DecoderValueError: a value is not finite or too large, or a scale or step is negative.
            ValueError: a decoder is of another kind or width.
        """
        if codes.dtype != CODE_DTYPE:
            raise TensorDtypeError(self.folder, f"codes of {name}", codes.dtype, CODE_DTYPE)
        if codes.dim() != 2:
            raise TensorShapeError(self.folder, f"codes of {name}", list(codes.shape), "[out_features, in_features]")
        out_features, in_features = codes.shape
        groups = in_features // self.format.group_size_of(in_features, name, self.folder)

        base, planes = pack_codes(codes.cpu(), self.format.stored_width(self.format.widths_of(name)[-1]))
        values = {WEIGHT_BASE: base}
        values |= {plane_name(width): plane for width, plane in zip(self.format.planes_of(name), planes, strict=True)}
        self._check_decoders(name, decoders, (out_features, groups))
        for width, decoder in decoders.items():
            # Copies, for a caller may use the memory again.
            copies = decoder.map(lambda part: part.detach().cpu().clone(memory_format=torch.contiguous_format))
            values |= {part_name(part, width): tensor for part, tensor in copies.parts.items()}
        for width, tensors in self.format.tensors_of_layer(out_features, in_features, name).items():
            for suffix in tensors:
                self._add(width, f"{name}.{suffix}", values[suffix])

    def add_tensor(self, name: str, tensor: torch.Tensor) -> None:
        """Add a tensor that is not quantized, as it is in the source checkpoint.

        Raises:
            TensorDtypeError: not one of the dtypes that the format has for it.
            UnexpectedTensorError: the name was added before, or is of the form of a quantized layer's tensor.
        """
        if tensor.dtype not in UNQUANTIZED_DTYPES:
            raise TensorDtypeError(self.folder, name, tensor.dtype, " or ".join(map(str, UNQUANTIZED_DTYPES)))
        if split_tensor_name(name):
            raise UnexpectedTensorError(self.folder, name, "the name of a quantized layer's tensor", "another name")
        # A copy, for the source may be a view of more, or memory that the caller uses again.
        self._add(BASE_BITS, name, tensor.detach().cpu().clone(memory_format=torch.contiguous_format))

    def finish(
        self, config: dict[str, Any], copy_from: Path | None = None, manifest: dict[str, Any] | None = None
    ) -> None:
        """Write what remains, open the whole with the reader and publish it.

        Args:
            config: the content of the source's config.json; a ``quantization_config`` in it is replaced.
            copy_from: the source folder, whose tokenizer, chat template and generation config are copied.
            manifest: what MANIFEST.json shall say of the origin: ``source``, ``calibration``, ``command``.

        Raises:
            CheckpointError: what was added is not the checkpoint that ``config`` implies; nothing was published.
        """
        for width in sorted(self._buffers):
            self._flush(width)
        index = {"metadata": {"total_size": self._total_size}, "weight_map": self._name_shards()}
        folder = self._staging.path
        write_json(folder / INDEX_FILE, index)
        write_json(folder / CONFIG_FILE, config | {"quantization_config": format_to_config(self.format)})
        open_checkpoint(folder, check_values=False)  # the values were checked as they came
        if copy_from is not None:
            self._staging.copy_from(copy_from)
        write_json(folder / MANIFEST_FILE, build_manifest(folder, manifest or {}))
        self._staging.publish()

    def _check_decoders(self, layer: str, decoders: Mapping[int, Decoder], shape: tuple[int, int]) -> None:
        offered, given = set(self.format.widths_of(layer)), set(decoders)
        if given != offered:
            fault = MissingTensorError if offered - given else UnexpectedTensorError
            raise fault(self.folder, f"decoders of {layer}", f"widths {sorted(given)}", sorted(offered))
        for width, decoder in decoders.items():
            form = self.format.decoder_kind.form(width)
            if (decoder.form, decoder.width) != (form, width):
                found = f"{decoder.form.name} of width {decoder.width}"
                raise ValueError(f"decoder of {layer}: found {found}, expected {form.name} of width {width}")
            for part, spec in form.parts(*shape).items():
                name, tensor = f"{layer}.{part_name(part, width)}", decoder.parts[part]
                if tensor.dtype != spec.dtype:
                    raise TensorDtypeError(self.folder, name, tensor.dtype, spec.dtype)
                if tensor.shape != spec.shape:
                    raise TensorShapeError(self.folder, name, list(tensor.shape), list(spec.shape))
            decoder.check(layer, self.folder)

    def _add(self, width: int, name: str, tensor: torch.Tensor) -> None:
        if name in self._names:
            raise UnexpectedTensorError(self.folder, name, "a tensor for the second time", "each tensor once")
        self._names.add(name)
        while self._buffers and self._buffered.total() + tensor.nbytes > self._shard_bytes:
            self._flush(self._buffered.most_common(1)[0][0])
        self._buffers[width][name] = tensor
        self._buffered[width] += tensor.nbytes

    def _flush(self, width: int) -> None:
        tensors = self._buffers.pop(width)
        self._total_size += self._buffered.pop(width)
        path = self._staging.path / f"{width}-{len(self._written[width])}"
        with writing(path):
            save_tensors(tensors, path, {"format": "pt"})
            sync_file(path)
        self._written[width].append(sorted(tensors))

    def _name_shards(self) -> dict[str, str]:
        """Give the shards their final names, now that their number is known, and return the index's weight_map."""
        weight_map: dict[str, str] = {}
        for width, shards in self._written.items():
            for number, names in enumerate(shards):
                file = shard_name(width, number + 1, len(shards))
                move(self._staging.path / f"{width}-{number}", self._staging.path / file)
                weight_map |= dict.fromkeys(names, file)
        return dict(sorted(weight_map.items()))
