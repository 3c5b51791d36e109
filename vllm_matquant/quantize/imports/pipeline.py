"""From a model that another tool has quantized to a nested checkpoint."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from vllm_matquant.checkpoint.decoder import AFFINE_FLOAT16, DecoderKind
from vllm_matquant.checkpoint.errors import ConfigError
from vllm_matquant.checkpoint.manifest import describe_files
from vllm_matquant.checkpoint.names import CONFIG_FILE
from vllm_matquant.checkpoint.spec import BASE_BITS, WIDTHS, Format, GroupSize
from vllm_matquant.checkpoint.staging import check_output
from vllm_matquant.checkpoint.writer import CheckpointWriter
from vllm_matquant.quantize.fused import check_fused
from vllm_matquant.quantize.imports.convert import keep_codes, largest_group_size, nearest_codes, weight_errors
from vllm_matquant.quantize.imports.model import ImportedModel
from vllm_matquant.quantize.layer import QuantizedLayer
from vllm_matquant.quantize.pipeline import Outcome
from vllm_matquant.quantize.plan import free_bytes, need_room
from vllm_matquant.quantize.report.wording import size

Way = Literal["exact", "nearest"]
WAYS: tuple[Way, ...] = ("exact", "nearest")
_NEAREST = "--method nearest rounds its weights to groups of columns that lie side by side"
_GROUP_UNIT = 8  # columns: groups begin on a byte of every plane
_NEAREST_GROUP = 128  # the most columns of a group that is made here
_SHARD_BYTES = 2**30


@dataclass(frozen=True)
class ImportPlan:
    """What an import will write.

    Attributes:
        model: what is imported.
        way: "exact", codes as they are, or "nearest", codes of 8 bits for its weights.
        format: of the checkpoint.
        output: bytes of all tensors.
        free: bytes free on the output's disk, None if its file system does not tell.
    """

    model: ImportedModel
    way: Way
    format: Format
    output: int
    free: int | None

    def __str__(self) -> str:
        layers = self.model.layers
        bits = Counter(outline.bits for outline in layers.values())
        counts = ", ".join(f"{count} of {width} bits" for width, count in sorted(bits.items()))
        enough = "" if self.free is None or self.output <= self.free else ": NOT ENOUGH"
        sizes = [self.format.group_size, *self.format.layer_group_sizes.values()]
        lines = [
            ("found", f"{self.model.layout.name}, quantized layers: {counts}"),
            ("widths", ", ".join(map(str, self.format.widths))),
            ("codes", "as they are" if self.way == "exact" else "the nearest of 8 bits to the weights"),
            ("group size", ", ".join(map(str, dict.fromkeys(sizes)))),
            ("disk", f"{size(self.output)}; {size(self.free)} free{enough}"),
        ]
        return "\n".join(f"{name:<16}{value}" for name, value in lines)


def plan_import(
    model: ImportedModel,
    output: Path,
    way: Way = "exact",
    bits: Sequence[int] | None = None,
    kind: DecoderKind = AFFINE_FLOAT16,
) -> ImportPlan:
    """What to write of a model; reads no codes.

    Args:
        model: to import.
        output: folder of the checkpoint.
        way: see :class:`ImportPlan`.
        bits: widths to offer; by default all up to the most bits of a layer, or up to 8 of the nearest codes.
        kind: how decoders are stored.

    Raises:
        ConfigError: the format cannot say a layer's groups, or a width is more than any layer has.
        ValueError: layers that vLLM computes as one differ in what they have.
    """
    where = model.folder / CONFIG_FILE
    most = max(outline.bits for outline in model.layers.values()) if way == "exact" else WIDTHS[-1]
    widths = tuple(bits or range(BASE_BITS, most + 1))
    if widths[-1] > most:
        expected = f"at most {most}, the bits of {model.layout.name} in this folder"
        raise ConfigError(where, "bits", list(widths), expected, "--method nearest offers up to 8 bits")
    sizes = {name: _group_size(model, name, way) for name in model.layers}
    setting, own_sizes = _settings(model, sizes)
    own_widths = {
        name: own
        for name, outline in model.layers.items()
        if way == "exact" and (own := _own_widths(widths, outline.bits)) != widths
    }
    format_ = Format(
        widths, setting, model.ignored, layer_group_sizes=own_sizes, layer_widths=own_widths, decoder_kind=kind
    )
    check_fused(model.skeleton, format_, options=False)
    return ImportPlan(model, way, format_, _bytes(model, format_), free_bytes(output))


def run_import(plan: ImportPlan, output: Path, *, command: Sequence[str] = (), overwrite: bool = False) -> Outcome:
    """Write the checkpoint, layer by layer; it appears whole or not at all.

    Args:
        plan: what to write.
        output: folder of the checkpoint; made if absent.
        command: the command line, for the manifest.
        overwrite: replace the matquant checkpoint in ``output``.

    Raises:
        CheckpointError: a value cannot be stored, the output cannot be used, or the disk has too little room.
        OSError: the folder cannot be written to.

    Returns:
        As errors, of each layer at each of its widths, ``|E|^2 / |W|^2`` with E the difference from the weight W that
        the other tool's format means.
    """
    started = time.perf_counter()
    model, format_ = plan.model, plan.format
    check_output(output, overwrite)
    check_room(plan, output)
    errors: dict[str, dict[int, float]] = {}
    with CheckpointWriter(output, format_, shard_bytes=_SHARD_BYTES, overwrite=overwrite) as writer:
        for name in tqdm(model.layers, desc="importing", unit="layer"):
            layer, weight = _converted(plan, name)
            writer.add_layer(name, layer.codes, layer.decoders)
            errors[name] = weight_errors(weight, layer)
        for name in model.unquantized:
            writer.add_tensor(name, model.tensors.read(name))
        writer.finish(model.config, copy_from=model.folder, manifest={"command": list(command), **_origin(plan)})
    return Outcome(errors, [], None, {"import": time.perf_counter() - started})


def check_room(plan: ImportPlan, output: Path) -> None:
    """Refuse a disk that is too small.

    Raises:
        OutputError: it is.
    """
    need_room(output, plan.output, plan.free, "Write to another disk (--output), or offer fewer widths (--bits)")


def _converted(plan: ImportPlan, name: str) -> tuple[QuantizedLayer, torch.Tensor]:
    """A layer, and the weight that it comes from."""
    model, format_ = plan.model, plan.format
    given = model.layer(name)
    weight, widths = given.weight(), format_.widths_of(name)
    group_size = format_.group_size_of(weight.shape[1], name, model.folder / CONFIG_FILE)
    if plan.way == "nearest":
        return nearest_codes(weight, widths, group_size, format_.decoder_kind), weight
    return keep_codes(given, widths, group_size, format_.decoder_kind), weight


def _group_size(model: ImportedModel, name: str, way: Way) -> int:
    """Columns that share a decoder in a layer."""
    outline, columns = model.layers[name], model.skeleton.linears[name][1]
    found = largest_group_size(outline.group_of, _GROUP_UNIT)
    if found is not None:
        return found
    if way == "nearest" and columns % _GROUP_UNIT == 0:
        return next(size for size in range(_NEAREST_GROUP, 0, -_GROUP_UNIT) if columns % size == 0)
    index = [suffix for suffix in ("g_idx", "weight_g_idx") if model.tensors.spec(f"{name}.{suffix}")]
    path = model.tensors.path(f"{name}.{(index or [model.layout.marker])[0]}")
    subject = f"{name}.{index[0]}" if index else f"groups of {name}"
    found_groups = (
        f"{outline.groups} groups of {columns} columns, of which no {_GROUP_UNIT} side by side are always in one"
    )
    expected = f"groups of {_GROUP_UNIT} columns or more that lie side by side and divide them"
    raise ConfigError(path, subject, found_groups, expected, _NEAREST)


def _settings(model: ImportedModel, sizes: Mapping[str, int]) -> tuple[GroupSize, dict[str, GroupSize]]:
    """The group size of most layers, and those of others; of whole rows "channel"."""
    columns = {name: model.skeleton.linears[name][1] for name in sizes}
    common = Counter(size for name, size in sizes.items() if size < columns[name]).most_common(1)
    if not common:
        return "channel", {}
    setting = common[0][0]
    return setting, {
        name: "channel" if size == columns[name] else size for name, size in sizes.items() if size != setting
    }


def _own_widths(widths: Sequence[int], bits: int) -> tuple[int, ...]:
    """The widths of a layer whose codes have so many bits: those that it has, and its own where the model goes on."""
    own = {width for width in widths if width <= bits}
    return tuple(sorted(own | {bits} if widths[-1] > bits else own))


def _bytes(model: ImportedModel, format_: Format) -> int:
    """Bytes of all tensors of the checkpoint."""
    total = 0
    for name in model.layers:
        for tensors in format_.tensors_of_layer(*model.skeleton.linears[name], name).values():
            total += sum(spec.nbytes for spec in tensors.values())
    specs = (model.tensors.spec(name) for name in model.unquantized)
    return total + sum(spec.nbytes for spec in specs if spec)


def _origin(plan: ImportPlan) -> dict[str, Any]:
    """What the manifest says of where the checkpoint comes from."""
    model = plan.model
    files = [model.folder / CONFIG_FILE, *model.tensors.files]
    imported = {"format": model.layout.name, "method": plan.way, "quantization_config": model.quantization_config}
    return {"source": describe_files(files), "calibration": None, "imported": imported}
