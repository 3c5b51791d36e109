"""Check a checkpoint folder from end to end: the manifest's SHA-256s, the format, the nesting of the widths."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from vllm_matquant.checkpoint.errors import CheckpointError, NestingError
from vllm_matquant.checkpoint.manifest import check_file, read_manifest
from vllm_matquant.checkpoint.names import (
    MANIFEST_FILE,
    RECIPES_FOLDER,
    TEMPLATES_FOLDER,
    is_recipe_decoders_file,
    shard_width,
)
from vllm_matquant.checkpoint.reader import Checkpoint, open_checkpoint
from vllm_matquant.checkpoint.staging import is_checkpoint_file


class Result(NamedTuple):
    """Outcome of one check; ``text`` says what was checked, or what is wrong."""

    passed: bool
    text: str


def verify(folder: Path) -> Iterator[Result]:
    """Check a folder, with progress bars on a terminal.

    Shards that were left out are no fault as long as a width can be served without them, nor are a recipe's decoders:
    the recipe cannot be served then.

    Yields:
        One result for each file of the manifest, one for the format and one for the nesting.
    """
    try:
        yield from _verify_files(folder)
    except CheckpointError as error:
        yield Result(False, str(error))
    try:
        checkpoint = open_checkpoint(folder)
    except CheckpointError as error:
        yield Result(False, str(error))
        return
    widths = ", ".join(map(str, checkpoint.servable_widths))
    yield Result(True, f"format: every name, shape and decoder is sound; the folder serves {widths} bits")
    try:
        for layer in tqdm(checkpoint.layers, desc="nesting", unit="layer", disable=None, leave=False):
            check_nesting(checkpoint, layer)
    except NestingError as error:
        yield Result(False, str(error))
    else:
        yield Result(True, f"nesting: {len(checkpoint.layers)} layers, {widths} bits are slices of the same codes")


def check_nesting(checkpoint: Checkpoint, layer: str) -> None:
    """Check that the codes served at each width are the widest stored codes, sliced.

    Raises:
        NestingError: at some width they are not.
    """
    format = checkpoint.format
    widest = format.stored_width(format.width_of(layer, checkpoint.servable_widths[-1]))
    codes = checkpoint.stored_codes(layer, widest)
    for width in checkpoint.servable_widths:
        own = format.width_of(layer, width)
        differing = checkpoint.codes(layer, width) != format.slice_rule.slice(codes, widest, own)
        if differing.any():
            count = int(differing.sum())
            raise NestingError(
                checkpoint.folder, f"{own}-bit codes of {layer}", f"{count} others", f"those of {widest} bits, sliced"
            )


def _verify_files(folder: Path) -> Iterator[Result]:
    files = read_manifest(folder)
    own = [path for path in sorted(folder.iterdir()) if is_checkpoint_file(path.name) and path.name != MANIFEST_FILE]
    recipes, templates = folder / RECIPES_FOLDER, folder / TEMPLATES_FOLDER
    below = sorted([*recipes.glob("*.json"), *recipes.glob("*.safetensors"), *templates.glob("*.jinja")])
    for path in [*own, *below]:
        if path.relative_to(folder).as_posix() not in files:
            yield Result(False, f"{path}: not in {MANIFEST_FILE}")
    present = [name for name in sorted(files) if (folder / name).is_file()]
    total = sum((folder / name).stat().st_size for name in present)
    with tqdm(total=total, desc="SHA-256", unit="B", unit_scale=True, disable=None, leave=False) as bar:
        for name, entry in sorted(files.items()):
            if name not in present and (shard_width(name) is not None or is_recipe_decoders_file(name)):
                yield Result(True, f"{name}: absent, left out")
                continue
            try:
                check_file(folder, name, entry, bar.update)
            except CheckpointError as error:
                yield Result(False, str(error))
            else:
                yield Result(True, f"{name}: SHA-256 as in {MANIFEST_FILE}")
