"""The names of a checkpoint: its files, and the tensors of a quantized layer."""

from __future__ import annotations

import re

from vllm_matquant.checkpoint.decoder import FORMS

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
MANIFEST_FILE = "MANIFEST.json"
RECIPES_FOLDER = "recipes"
TEMPLATES_FOLDER = "additional_chat_templates"  # where transformers keeps those besides the default one
POOLING_FOLDERS = "[0-9]_Pooling"  # glob: where Sentence Transformers keeps what it makes of the hidden states
# What people read about a checkpoint. It lies next to the checkpoint but is no part of it: it comes after the rest is
# published, a model card is edited on a hub, and a report holds seconds, so the manifest lists none of them.
MODEL_CARD_FILE = "README.md"
REPORT_FOLDER = "report"
REPORT_DATA_FILE = f"{REPORT_FOLDER}/report.json"
REPORT_PAGE_FILE = f"{REPORT_FOLDER}/index.html"
DOCUMENT_FILES = (MODEL_CARD_FILE, REPORT_DATA_FILE, REPORT_PAGE_FILE)

WEIGHT_BASE = "weight_base"
_PARTS = "|".join(sorted({part for form in FORMS for part in form.parts(1, 1)}))
_SUFFIX = re.compile(rf"weight_(?:base|(?:plane|{_PARTS})\d+)")
_RECIPE_PATH = rf"{RECIPES_FOLDER}/[A-Za-z0-9][A-Za-z0-9._+-]*"  # without its suffix
_RECIPE = re.compile(rf"{_RECIPE_PATH}\.json")
_RECIPE_DECODERS = re.compile(rf"{_RECIPE_PATH}\.safetensors")
_TEMPLATE = re.compile(rf"{TEMPLATES_FOLDER}/[A-Za-z0-9_][A-Za-z0-9._+-]*\.jinja")
_POOLING = re.compile(r"[0-9]_Pooling/config\.json")
_SHARD = re.compile(r"model-width(?P<width>[2-8])-\d{5}-of-\d{5}\.safetensors")


def plane_name(width: int) -> str:
    """Name of the plane whose bit lifts a code of ``width - 1`` bits to ``width`` bits (3..8)."""
    return f"weight_plane{width}"


def split_tensor_name(name: str) -> tuple[str, str] | None:
    """(layer, suffix) of a tensor that belongs to a quantized layer, None for any other tensor."""
    layer, _, suffix = name.rpartition(".")
    return (layer, suffix) if layer and _SUFFIX.fullmatch(suffix) else None


def shard_name(width: int, number: int, count: int) -> str:
    """File name of a shard of what ``width`` adds; ``number`` counts from 1."""
    return f"model-width{width}-{number:05d}-of-{count:05d}.safetensors"


def shard_width(file_name: str) -> int | None:
    """The width whose data a shard holds, None if the name is not a shard's."""
    match = _SHARD.fullmatch(file_name)
    return int(match["width"]) if match else None


def recipe_file(name: str) -> str:
    """Path in the checkpoint's folder of the recipe of this name."""
    return f"{RECIPES_FOLDER}/{name}.json"


def is_recipe_file(path: str) -> bool:
    """Whether a path in the checkpoint's folder is one of a recipe."""
    return _RECIPE.fullmatch(path) is not None


def recipe_decoders_file(name: str) -> str:
    """Path in the checkpoint's folder of the decoders that belong to the recipe of this name alone, if it has any."""
    return f"{RECIPES_FOLDER}/{name}.safetensors"


def is_recipe_decoders_file(path: str) -> bool:
    """Whether a path in the checkpoint's folder is one of a recipe's decoders."""
    return _RECIPE_DECODERS.fullmatch(path) is not None


def is_template_file(path: str) -> bool:
    """Whether a path in a model's folder is one of a chat template besides the default one."""
    return _TEMPLATE.fullmatch(path) is not None


def is_pooling_file(path: str) -> bool:
    """Whether a path in a model's folder is one that says how hidden states are pooled to an embedding."""
    return _POOLING.fullmatch(path) is not None


def is_plain_name(name: str) -> bool:
    """Whether a file name stays in its folder: no separator, no drive, neither "." nor ".."."""
    return name not in ("", ".", "..") and not set(name) & set("/\\:\0")


def shard_pattern(stored_width: int) -> str:
    """Glob (also fnmatch) of the shards that hold the widths up to ``stored_width`` and no others."""
    return f"model-width[2-{stored_width}]-*.safetensors"
