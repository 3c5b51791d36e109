"""The files of a source model that its checkpoint needs too: all that decides what serving computes but the weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from vllm_matquant.checkpoint.errors import CheckpointError, ConfigError, MissingFileError
from vllm_matquant.checkpoint.files import check_content, read_json, sync_file, writing
from vllm_matquant.checkpoint.names import (
    CONFIG_FILE,
    POOLING_FOLDERS,
    TEMPLATES_FOLDER,
    is_pooling_file,
    is_template_file,
)

MODULES_FILE = "modules.json"  # Sentence Transformers': what an embedding model does after its last block
ADAPTER_FILE = "adapter_config.json"  # PEFT's
COPIED_FILES = (  # patterns: tokenizer, processor, chat template, pooling, generation config, licence
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "chat_template.json",
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    MODULES_FILE,
    "config_sentence_transformers.json",
    "sentence_*_config.json",
    "LICENSE*",
    "NOTICE*",
)
# Those that have no weights: what they do is told by their files.
_POOLING = "Pooling"
_MODULES = ("Transformer", _POOLING, "Normalize")
_HUB_CODE = "--"  # between the name of a model on a hub and that of code there


def is_copied(name: str) -> bool:
    """Whether a file of this name in a source model's folder is copied to the checkpoint."""
    return any(fnmatchcase(name, pattern) for pattern in COPIED_FILES)


def copied_files(folder: Path) -> list[str]:
    """The files of a source model that :func:`copy_files` copies, sorted, as paths in its folder."""
    below = (*folder.glob(f"{TEMPLATES_FOLDER}/*.jinja"), *folder.glob(f"{POOLING_FOLDERS}/{CONFIG_FILE}"))
    names = sorted(path.relative_to(folder).as_posix() for path in (*folder.iterdir(), *below) if path.is_file())
    return [name for name in names if is_copied(name) or is_template_file(name) or is_pooling_file(name)]


def check_copied(folder: Path) -> None:
    """Check the files of a source model that :func:`copy_files` copies, before any work.

    Raises:
        PointerFileError: Git has not fetched one's content.
        MissingFileError: the file that says how an embedding model pools is absent.
        ConfigError: something would be computed after the last block that the copied files do not hold, or by an
            adapter that lies beside the model.
    """
    for name in copied_files(folder):
        check_content(folder / name)
    if (folder / ADAPTER_FILE).is_file():
        raise ConfigError(
            folder / ADAPTER_FILE,
            "peft_type",
            "an adapter, which transformers applies to the model and vLLM does not",
            "a model alone",
            "Merge the adapter into it (PEFT's merge_and_unload, then save_pretrained), or move the adapter away",
        )
    for number, module in enumerate(_modules(folder / MODULES_FILE)):
        kind, place = str(module.get("type")), str(module.get("path"))
        name, file = kind.rpartition(".")[2], f"{place}/{CONFIG_FILE}"
        if name not in _MODULES or (name == _POOLING and not is_pooling_file(file)):
            expected = f"{', '.join(_MODULES[:-1])} or {_MODULES[-1]}, the second in a folder such as 1_Pooling"
            raise ConfigError(folder / MODULES_FILE, f"[{number}].type", f"{kind} in {place!r}", expected)
        if name == _POOLING and not (folder / file).is_file():
            raise MissingFileError(folder, file, "no such file", f"that of the {kind} which {MODULES_FILE} names")


def local_code(folder: Path) -> list[str]:
    """The files of a source model that name code in its folder (``auto_map``), which is not copied."""
    return [name for name in (CONFIG_FILE, *copied_files(folder)) if _shortened(folder / name) is not None]


def without_local_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without the names of code in the model's folder: whoever trusts it would look for it in vain."""
    kept = {name: value for name, value in config.items() if name != "auto_map"}
    named = config.get("auto_map")
    if isinstance(named, dict) and (hub := {name: code for name, code in named.items() if _HUB_CODE in str(code)}):
        kept["auto_map"] = hub
    return kept


def copy_files(source: Path, folder: Path) -> None:
    """Copy the files of a source model, byte for byte but for names of code in its folder.

    Args:
        source: the model's folder.
        folder: to copy them to.

    Raises:
        WriteError: the folder cannot be written to.
    """
    for name in copied_files(source):
        target = folder / name
        with writing(target):
            target.parent.mkdir(exist_ok=True)
            if (content := _shortened(source / name)) is not None:
                target.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            else:
                shutil.copyfile(source / name, target)
            sync_file(target)


def _shortened(path: Path) -> dict[str, Any] | None:
    """The content of a configuration that names code in its folder, without it; None of any other file.

    One that is no JSON object is copied as it is: whoever reads it says what is wrong.
    """
    if not path.name.endswith("config.json"):
        return None
    try:
        content = read_json(path, any_float=True)
    except CheckpointError:
        return None
    kept = without_local_code(content)
    return None if kept == content else kept


def _modules(path: Path) -> Iterator[Mapping[str, Any]]:
    """The modules of an embedding model, in their order; none without the file.

    Raises:
        ConfigError: it is no list of objects.
    """
    if not path.is_file():
        return
    try:
        modules = json.loads(path.read_bytes())
    except ValueError as cause:
        raise ConfigError(path, "modules", f"no valid JSON ({cause})", "a list of objects") from cause
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise ConfigError(path, "modules", type(modules).__name__, "a list of objects")
    yield from modules
