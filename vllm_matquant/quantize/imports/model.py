"""A model that another tool has quantized, as it lies in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from vllm_matquant.checkpoint.copied import check_copied, without_local_code
from vllm_matquant.checkpoint.decoder import TensorSpec
from vllm_matquant.checkpoint.errors import ConfigError, MissingTensorError, TensorDtypeError, TensorShapeError
from vllm_matquant.checkpoint.files import read_json
from vllm_matquant.checkpoint.model_config import tag_floats
from vllm_matquant.checkpoint.names import CONFIG_FILE
from vllm_matquant.checkpoint.shard import read_header
from vllm_matquant.checkpoint.skeleton import build_skeleton
from vllm_matquant.checkpoint.spec import UNQUANTIZED_DTYPES
from vllm_matquant.quantize.causal import check_layers, check_task
from vllm_matquant.quantize.imports.formats import find_layout
from vllm_matquant.quantize.imports.layer import GivenLayer, Outline, StoredLayer
from vllm_matquant.quantize.tensors import locate_tensors


class StoredTensors:
    """The tensors of a folder's safetensors files, whatever they are.

    Args:
        folder: with model.safetensors, or shards and their index.

    Raises:
        CheckpointError: a file is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = locate_tensors(folder)
        self._headers = {file: read_header(folder / file) for file in sorted(set(self._files.values()))}

    @property
    def files(self) -> list[Path]:
        """The files."""
        return [self._folder / file for file in self._headers]

    @property
    def names(self) -> list[str]:
        """The names of all tensors."""
        return sorted(self._files)

    def spec(self, name: str) -> TensorSpec | None:
        """Dtype and shape of a tensor, None if there is none."""
        return self._headers[self._files[name]].get(name) if name in self._files else None

    def path(self, name: str) -> Path:
        """The file of a tensor; the folder if there is none."""
        return self._folder / self._files[name] if name in self._files else self._folder

    def read(self, name: str) -> torch.Tensor:
        """A tensor as it is stored."""
        with safe_open(self.path(name), framework="pt") as file:
            return file.get_tensor(name)


_GGUF = b"GGUF"


def refuse_gguf(source: Path) -> None:
    """Refuse a GGUF file, by its first bytes, and a folder that holds such files and no configuration.

    Raises:
        ConfigError: it is one.
    """
    files = [source] if source.is_file() else []
    if source.is_dir() and not (source / CONFIG_FILE).exists():
        files = sorted(path for path in source.glob("*.gguf") if path.is_file())
    for path in files:
        with path.open("rb") as file:
            if file.read(len(_GGUF)) == _GGUF:
                expected = f"a folder with {CONFIG_FILE} and safetensors files"
                hint = "Load it with transformers (gguf_file=), write it with save_pretrained, and quantize that"
                raise ConfigError(path, "content", "a GGUF file", expected, hint)


class ImportedModel:
    """A model that another tool has quantized; everything but its tensors' values is checked.

    Args:
        folder: a local folder with config.json and safetensors files.

    Attributes:
        folder: the same.
        config: the content of config.json without ``quantization_config``.
        quantization_config: that.
        layout: how its layers are stored.
        skeleton: names and shapes of the model's parameters.
        tensors: in its files.
        layers: the quantized layers with what is known of them, in the model's order.

    Raises:
        CheckpointError: one of its subclasses for each fault, naming file, field or tensor, found and expected.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        where = folder / CONFIG_FILE
        check_copied(folder)
        config = tag_floats(read_json(where, any_float=True))
        self.quantization_config: Any = config.pop("quantization_config", None)
        self.layout = find_layout(self.quantization_config, where)
        check_task(config, where)
        self.config: dict[str, Any] = without_local_code(config)
        self.skeleton = build_skeleton(self.config, where)
        if self.skeleton.tower:
            found, expected = f"{config.get('model_type')!r}, which is given pictures too", "a model of text alone"
            raise ConfigError(where, "model_type", found, expected, "Quantize the source that it was made from")
        check_layers(self.config, self.skeleton, where)
        self.tensors = StoredTensors(folder)
        self.layers: dict[str, Outline] = {}
        for name in self.skeleton.linears:
            layer = self._stored(name)
            if layer.spec(self.layout.marker) is not None:
                self.layers[name] = self.layout.outline(layer)
        if not self.layers:
            found = f"no tensor such as {next(iter(self.skeleton.linears))}.{self.layout.marker}"
            raise MissingTensorError(folder, "quantized layers", found, f"those of {self.layout.name}")
        self._check_plain()

    def layer(self, name: str) -> GivenLayer:
        """A quantized layer."""
        return self.layout.read(self._stored(name), self.layers[name])

    @property
    def unquantized(self) -> list[str]:
        """The model's other parameters that the files have."""
        weights = {f"{name}.weight" for name in self.layers}
        return [name for name in self.skeleton.parameters if name not in weights and self.tensors.spec(name)]

    @property
    def ignored(self) -> tuple[str, ...]:
        """The linear layers that are not quantized."""
        return tuple(name for name in self.skeleton.linears if name not in self.layers)

    def _stored(self, name: str) -> StoredLayer:
        return StoredLayer(name, self.skeleton.linears[name], self.tensors)

    def _check_plain(self) -> None:
        """Check the parameters that are not quantized."""
        tied = self.skeleton.tied
        for name, first in tied.items():
            pair = {parameter.removesuffix(".weight") for parameter in (name, first)}
            if found := sorted(pair & self.layers.keys()):
                where, expected = self.folder / CONFIG_FILE, "a head of its own, or one that is not quantized"
                raise ConfigError(where, "tie_word_embeddings", f"true, with {found[0]} quantized", expected)
        for name, shape in self.skeleton.parameters.items():
            if name.removesuffix(".weight") in self.layers and name.endswith(".weight"):
                continue
            spec, path = self.tensors.spec(name), self.tensors.path(name)
            if spec is None:
                if name in tied:
                    continue
                raise MissingTensorError(path, name, "in no file", "each of the model's parameters, or its codes")
            if spec.shape != shape:
                raise TensorShapeError(path, f"shape of {name}", list(spec.shape), f"{list(shape)} by {CONFIG_FILE}")
            if spec.dtype not in UNQUANTIZED_DTYPES:
                raise TensorDtypeError(path, name, spec.dtype, " or ".join(map(str, UNQUANTIZED_DTYPES)))
