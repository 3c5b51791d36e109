"""What is quantized: a model's tensors, its matrices, and a way to run it block by block."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from vllm_matquant.checkpoint.copied import MODULES_FILE, check_copied, local_code, without_local_code
from vllm_matquant.checkpoint.decoder import TensorSpec
from vllm_matquant.checkpoint.errors import ConfigError, MissingFileError, MissingTensorError
from vllm_matquant.checkpoint.files import read_json
from vllm_matquant.checkpoint.model_config import tag_floats
from vllm_matquant.checkpoint.names import CONFIG_FILE, POOLING_FOLDERS
from vllm_matquant.checkpoint.skeleton import Skeleton, build_skeleton
from vllm_matquant.quantize import ranks
from vllm_matquant.quantize.causal import check_heads, check_layers, check_task, explain_missing
from vllm_matquant.quantize.runner import Head, Rows, TransformersRunner
from vllm_matquant.quantize.tensors import SafetensorsFolder

_LOGGER = logging.getLogger(__name__)
# What to fetch of a model on a hub: weights, configuration, tokenizer, and what states the licence.
# Of sub-folders, which hold the model once more in other formats, only chat templates.
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "README.md", "LICENSE*", "NOTICE*"]
_NO_FILES = ["consolidated*", *(f"*/{pattern}" for pattern in _FILES if pattern != "*.jinja")]


@dataclass(frozen=True)
class Matrix:
    """A matrix of weights that can be quantized: of a linear layer, or a table of embeddings.

    Attributes:
        name: full name of the layer, as the checkpoint calls it.
        parameter: the tensor that holds it. Layers that are tied have the same.
        index: where in the tensor, if that holds several matrices as a mixture's experts lie; None if it holds one.
        shape: (out_features, in_features).
        block: index of the transformer block that it is in, None for one outside of all blocks.
    """

    name: str
    parameter: str
    index: int | None
    shape: tuple[int, int]
    block: int | None


class Tensors(Protocol):
    """The tensors of a source as they are stored."""

    @property
    def files(self) -> Sequence[Path]:
        """The files that hold them."""

    @property
    def names(self) -> Sequence[str]:
        """The parameters that have a tensor of their own, sorted."""

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape of a tensor."""

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor."""

    def read_rows(self, name: str, rows: slice) -> torch.Tensor:
        """Some rows of a tensor."""

    def each(self) -> Iterator[tuple[Path, str, torch.Tensor]]:
        """The file, the name and the content of every tensor, file by file."""


class Runner(Protocol):
    """What runs a source part by part, see :class:`vllm_matquant.quantize.runner.TransformersRunner`."""

    block_names: list[str]

    @property
    def hidden_size(self) -> int:
        """Values in a token's hidden state."""

    def load_block(self, index: int) -> torch.nn.Module:
        """A transformer block with its weights in float32."""

    def empty_block(self, index: int) -> torch.nn.Module:
        """A transformer block without weights, to be called with others."""

    def block_parameters(self, index: int, without: Container[str] = ()) -> dict[str, torch.Tensor]:
        """A block's parameters in float32 but for the weights of some layers, by their names within the block."""

    def embed(self, tokens: torch.Tensor, hidden: torch.Tensor, embedding: Rows | None = None) -> list[dict[str, Any]]:
        """Fill in what the first block is given; returns the other arguments of every block."""

    def load_final(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """What lies between the last block and the output head."""

    def load_head(self, device: str = "cpu") -> Head:
        """What comes after the last block."""


class Source(Protocol):
    """A model to quantize.

    Attributes:
        folder: where its files are, such as those of its tokenizer.
        config: the content of config.json.
        skeleton: names and shapes of its parameters, and which are tied.
        tensors: its parameters as they are stored.
        matrices: what can be quantized, by name: the input embedding, then the linear layers of the blocks in the
            model's order, then those outside of blocks.
        runner: runs it block by block.
        embedding: name of the input embedding among ``matrices``, None if the model has none that is a table.
        output_head: name of the layer that gives the logits, None if the model has none.
    """

    folder: Path
    config: dict[str, Any]
    skeleton: Skeleton
    tensors: Tensors
    matrices: dict[str, Matrix]
    runner: Runner
    embedding: str | None
    output_head: str | None


class SourceModel:
    """A :class:`Source` of a Hugging Face checkpoint in safetensors files.

    Args:
        folder: a local folder with config.json and model.safetensors or its shards with their index.

    Raises:
        CheckpointError: a file is missing or unreadable, the model is quantized already, its architecture is not a
            causal language model that transformers knows and whose blocks can be run one after the other, or a
            parameter is missing or of another shape.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        check_copied(folder)
        # Numbers that JSON does not know, as transformers once wrote them, and reads them still.
        self.config: dict[str, Any] = tag_floats(read_json(folder / CONFIG_FILE, any_float=True))
        found = self.config.pop("quantization_config", None)
        if found:
            method = found.get("quant_method") if isinstance(found, dict) else found
            hint = "matquant import takes those of several other tools"
            raise ConfigError(
                folder / CONFIG_FILE, "quantization_config", method, "a model that is not quantized", hint
            )
        check_task(self.config, folder / CONFIG_FILE)
        self.config = without_local_code(self.config)
        if (named := local_code(folder)) and not ranks.launched_rank():
            _LOGGER.warning(
                "%s: auto_map: found names of code beside the model (%s), which is neither run nor copied: they are "
                "left out, and the checkpoint is served by the architecture and the tokenizer that transformers and "
                "vLLM know",
                folder,
                ", ".join(named),
            )
        self._open()
        if kept := self._own_though_tied():
            _LOGGER.warning(
                "%s: tie_word_embeddings: found true, and another %s in the files than what it is tied to: it is kept, "
                "and the checkpoint says false, for transformers and vLLM read the file so",
                folder / CONFIG_FILE,
                kept,
            )
            for part in (self.config, self.config.get("text_config")):
                if isinstance(part, dict):
                    part["tie_word_embeddings"] = False
            self._open()
        self._say_what_readers_guess()

    def _open(self) -> None:
        """Build the model of the configuration, and find its tensors in the files."""
        folder = self.folder
        self.skeleton = build_skeleton(self.config, folder / CONFIG_FILE)
        check_layers(self.config, self.skeleton, folder / CONFIG_FILE)
        # Before the tensors: what an architecture lacks is not to be taken for a damaged download.
        runner = TransformersRunner(self.config, self.skeleton, self._read, folder / CONFIG_FILE)
        try:
            tensors = SafetensorsFolder(folder, self.skeleton)
        except MissingTensorError as cause:
            raise explain_missing(self.config, self.skeleton, cause, folder / CONFIG_FILE) from None
        for file, names in tensors.stored.items():
            check_heads(names, self.skeleton, file)
        self.tensors: Tensors = tensors
        self.runner: Runner = runner
        self.embedding = next(iter(self.skeleton.embeddings), None)
        self.output_head = runner.output_head
        self.matrices = {matrix.name: matrix for matrix in _matrices(self.skeleton, runner.block_names)}

    def _own_though_tied(self) -> str | None:
        """The parameter that is tied to another by the configuration, and not by the files; None if there is none."""
        stored = self.tensors.names
        for name, first in self.skeleton.tied.items():
            if name in stored and first in stored and not torch.equal(self._read(name), self._read(first)):
                return name
        return None

    def _say_what_readers_guess(self) -> None:
        """Put into the configuration what vLLM would read off other tensors than the source's."""
        if not self.config.get("architectures"):
            self.config["architectures"] = [self.skeleton.class_name]
        if not (self.config.get("dtype") or self.config.get("torch_dtype")):
            sizes: Counter[torch.dtype] = Counter()
            for name in self.tensors.names:
                spec = self.tensors.spec(name)
                sizes[spec.dtype] += math.prod(spec.shape)
            self.config["dtype"] = str(sizes.most_common(1)[0][0]).removeprefix("torch.")

    def _read(self, parameter: str) -> torch.Tensor:
        return self.tensors.read(parameter if parameter in self.tensors.names else self.skeleton.tied[parameter])


def _matrices(skeleton: Skeleton, blocks: Sequence[str]) -> list[Matrix]:
    places = {name: index for index, name in enumerate(blocks)}

    def matrix(name: str, shape: tuple[int, int]) -> Matrix:
        weight = f"{name}.weight"
        parts = name.split(".")
        prefixes = (".".join(parts[:count]) for count in range(1, len(parts)))
        block = next((places[prefix] for prefix in prefixes if prefix in places), None)
        return Matrix(name, skeleton.tied.get(weight, weight), None, shape, block)

    linears = [matrix(*named) for named in skeleton.linears.items()]
    return [
        *(matrix(*named) for named in skeleton.embeddings.items()),
        *(each for each in linears if each.block is not None),
        *(each for each in linears if each.block is None),
    ]


def head_weight(source: Source) -> torch.Tensor:
    """The weight that gives the logits, [vocabulary, hidden_size], as it is stored."""
    return read_matrix(source, source.output_head or source.embedding or "")


def read_matrix(source: Source, name: str, rows: slice = slice(None)) -> torch.Tensor:
    """Rows of a matrix as they are stored: [rows, in_features].

    Args:
        source: the model.
        name: of the matrix.
        rows: which; the others are not read where the matrix has a tensor of its own.
    """
    matrix = source.matrices[name]
    if matrix.index is None:
        return source.tensors.read_rows(matrix.parameter, rows)
    return source.tensors.read(matrix.parameter)[matrix.index, rows]


def name_of(model: Path | str) -> str:
    """What reports call a model: a folder's own name, or the name on the hub."""
    folder = Path(model)
    return folder.resolve().name if folder.is_dir() else str(model)


def locate(model: str) -> Path:
    """The folder of a model: ``model`` itself if it is one, else the download of the hub's model of that name.

    Raises:
        MissingFileError: neither.
    """
    if Path(model).is_dir():
        return Path(model)
    try:
        folder = Path(snapshot_download(model, allow_patterns=_FILES, ignore_patterns=_NO_FILES))
        if (folder / MODULES_FILE).is_file():  # an embedding model's
            snapshot_download(model, allow_patterns=[f"{POOLING_FOLDERS}/{CONFIG_FILE}"])
        return folder
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as cause:
        reason = str(cause).strip().split("\n")[0]
        found = f"no such folder, nor a model of the hub ({reason})"
        raise MissingFileError(model, "model", found, "one of them") from cause
