"""The source checkpoint, read block by block: no more than one decoder block's weights are in memory at a time."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from vllm_matquant.checkpoint.decoder import TensorSpec
from vllm_matquant.checkpoint.errors import (
    ConfigError,
    IndexFileError,
    MissingFileError,
    MissingTensorError,
    TensorDtypeError,
    TensorShapeError,
    TensorValueError,
    UnsafePathError,
)
from vllm_matquant.checkpoint.files import read_json
from vllm_matquant.checkpoint.names import CONFIG_FILE, INDEX_FILE, is_plain_name
from vllm_matquant.checkpoint.shard import read_header
from vllm_matquant.checkpoint.skeleton import Skeleton, build_skeleton
from vllm_matquant.checkpoint.spec import UNQUANTIZED_DTYPES, Format

_SINGLE_FILE = "model.safetensors"
_CHECKED_VALUES = 2**24  # at a time
# What to fetch of a model on a hub: weights, configuration, tokenizer, and what states the licence.
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "README.md", "LICENSE*", "NOTICE*"]


def locate(model: str) -> Path:
    """The folder of a model: ``model`` itself if it is one, else the download of the hub's model of that name.

    Raises:
        MissingFileError: neither.
    """
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(model, allow_patterns=_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as cause:
        reason = str(cause).strip().split("\n")[0]
        found = f"no such folder, nor a model of the hub ({reason})"
        raise MissingFileError(model, "model", found, "one of them") from cause


class Head(Protocol):
    """What the model does after its last block."""

    def __call__(self, hidden: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        """The logits, float32 [sequences, length, vocabulary].

        Args:
            hidden: the last block's outputs, float32 [sequences, length, hidden_size].
            weight: what to use in the place of the output head's own, float32 [vocabulary, hidden_size].
        """


class SourceModel:
    """A Hugging Face checkpoint in safetensors files.

    Args:
        folder: a local folder with config.json and model.safetensors or its shards with their index.

    Attributes:
        config: the content of config.json.
        skeleton: names and shapes of its parameters, linear layers and input embedding, and which are tied.
        linears: (out_features, in_features) of the linear layers inside decoder blocks, by full name, in order.
        other_linears: full names of the linear layers outside of them, such as ``lm_head``.
        output_head: the one of these that gives the logits, None if the model has none.

    Raises:
        CheckpointError: a file is missing or unreadable, the model is quantized already, its architecture is not a
            causal language model that transformers knows, or a parameter is missing or of another shape.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: dict[str, Any] = read_json(folder / CONFIG_FILE)
        if "quantization_config" in self.config:
            found = self.config["quantization_config"]
            method = found.get("quant_method") if isinstance(found, dict) else found
            raise ConfigError(folder / CONFIG_FILE, "quantization_config", method, "a model that is not quantized")
        self._file_of = self._locate_tensors()
        self.skeleton = build_skeleton(self.config, folder / CONFIG_FILE)
        self._check_tensors(self.skeleton)
        self._model = self._build_empty_model()
        self._decoder = self._model.get_decoder()
        self._prefix = next(name for name, module in self._model.named_modules() if module is self._decoder)
        linears = self.skeleton.linears
        self.linears = {name: shape for name, shape in linears.items() if name.startswith(self._layers_prefix)}
        self.other_linears = [name for name in linears if name not in self.linears]
        head = self._model.get_output_embeddings()
        modules = dict(self._model.named_modules())
        self.output_head = next((name for name in self.other_linears if modules[name] is head), None)

    @property
    def files(self) -> list[Path]:
        """The files that hold weights and configuration."""
        names = sorted({*self._file_of.values(), CONFIG_FILE})
        return [self.folder / name for name in names]

    @property
    def tensor_names(self) -> list[str]:
        """The model's parameters that have a tensor in the files; anything else in them is no part of the model."""
        return sorted(name for name in self.skeleton.parameters if name in self._file_of)

    @property
    def block_count(self) -> int:
        return len(self._decoder.layers)

    @property
    def hidden_size(self) -> int:
        return self._decoder.config.hidden_size

    def block_name(self, index: int) -> str:
        return f"{self._layers_prefix}{index}"

    def block_linears(self, index: int) -> dict[str, tuple[int, int]]:
        """The linear layers of a decoder block, as in :attr:`linears`."""
        prefix = self.block_name(index) + "."
        return {name: shape for name, shape in self.linears.items() if name.startswith(prefix)}

    @property
    def embedding(self) -> str | None:
        """Full name of the input embedding, None if the model has none that is a table."""
        return next(iter(self.skeleton.embeddings), None)

    def owner(self, layer: str) -> str:
        """The layer whose weight ``layer`` uses: itself, or the one that it is tied to."""
        weight = f"{layer}.weight"
        return self.skeleton.tied.get(weight, weight).removesuffix(".weight")

    def quantized_owner(self, layer: str | None, format_: Format) -> str | None:
        """The :meth:`owner` of a layer outside of blocks if there is one and ``format_`` quantizes it."""
        owner = self.owner(layer) if layer else None
        return owner if owner in self.outer_layers(format_) else None

    def outer_layers(self, format_: Format) -> dict[str, tuple[int, int]]:
        """Shape of the layers outside of decoder blocks that ``format_`` quantizes: input embedding and output head."""
        layers = self.skeleton.quantized_layers(format_, self.folder / CONFIG_FILE)
        return {name: shape for name, shape in layers.items() if name not in self.linears}

    def quantized_linears(self, format_: Format) -> dict[str, tuple[int, int]]:
        """Those of :attr:`linears` that ``format_`` quantizes."""
        return {name: shape for name, shape in self.linears.items() if name not in format_.ignored_layers}

    def unquantized_names(self, format_: Format) -> list[str]:
        """Those of :attr:`tensor_names` that a checkpoint of ``format_`` keeps as they are."""
        quantized = {f"{name}.weight" for name in self.skeleton.quantized_layers(format_)}
        return [name for name in self.tensor_names if self.skeleton.tied.get(name, name) not in quantized]

    def tensor_spec(self, name: str) -> TensorSpec:
        """Dtype and shape of a tensor as it is stored."""
        return self._specs[name]

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor as it is stored."""
        with safe_open(self.folder / self._file_of[name], framework="pt") as file:
            return file.get_tensor(name)

    def tensor_rows(self, name: str, rows: slice) -> torch.Tensor:
        """Rows of a tensor as it is stored; the others are not read."""
        with safe_open(self.folder / self._file_of[name], framework="pt") as file:
            return file.get_slice(name)[rows]

    def check_values(self, progress: Callable[[int], object] = lambda size: None) -> None:
        """Read every tensor once; ``progress`` is called with the bytes of each.

        Raises:
            TensorValueError: a tensor holds NaN or infinity.
        """
        for name in self.tensor_names:
            tensor = self.tensor(name)
            if not all(part.isfinite().all() for part in tensor.flatten().split(_CHECKED_VALUES)):
                raise TensorValueError(self.folder / self._file_of[name], name, "NaN or infinity", "finite weights")
            progress(tensor.nbytes)

    def load_block(self, index: int) -> torch.nn.Module:
        """Decoder block ``index`` with its weights in float32."""
        block = copy.deepcopy(self._decoder.layers[index])
        self._load_into(block, self.block_name(index) + ".")
        return block.eval()

    def empty_block(self, index: int) -> torch.nn.Module:
        """Decoder block ``index`` with parameters on the meta device, to be called with others; not to be changed."""
        return self._decoder.layers[index]

    def block_parameters(self, index: int, without: Container[str] = ()) -> dict[str, torch.Tensor]:
        """Parameters of decoder block ``index`` in float32, by their names within it.

        Args:
            without: full names of layers whose weights are left out and not read.
        """
        prefix = self.block_name(index) + "."
        names = [name for name in self.empty_block(index).state_dict() if not _is_weight_of(prefix + name, without)]
        return {name: self.tensor(prefix + name).float() for name in names}

    def embed(
        self,
        tokens: torch.Tensor,
        hidden: torch.Tensor,
        embedding: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> list[dict[str, Any]]:
        """What the first decoder block is given.

        Args:
            tokens: int64 [sequences, length].
            hidden: float32 [sequences, length, hidden_size], to be filled.
            embedding: gives the rows, float32 [n, columns], that shall stand in the place of the input embedding's own,
                for tokens, int64 [n].

        Returns:
            For each block the keyword arguments that the model calls it with (attention mask, position embeddings),
            made for one sequence: they broadcast.
        """
        decoder = copy.deepcopy(self._decoder)
        blocks, decoder.layers = decoder.layers, torch.nn.ModuleList()
        self._load_into(decoder, self._prefix + ".", tokens.unique(), embedding)
        decoder.layers = blocks
        arguments: list[dict[str, Any]] = [{} for _ in blocks]
        first_input: list[torch.Tensor] = []

        def record(index: int, block: torch.nn.Module) -> None:
            names = [name for name in inspect.signature(block.forward).parameters][1:]

            def forward(hidden: torch.Tensor, *positional: Any, **keywords: Any) -> torch.Tensor:
                arguments[index] = dict(zip(names, positional, strict=False)) | keywords
                if index == 0:
                    first_input.append(hidden)
                return hidden

            block.forward = forward

        for index, block in enumerate(decoder.layers):
            record(index, block)
        with torch.no_grad():
            for sequence, filled in zip(tokens, hidden, strict=True):
                decoder(input_ids=sequence[None], use_cache=False)
                filled.copy_(first_input.pop()[0])
        return arguments

    def load_final(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """What the model does between its last block and its output head, with weights in float32.

        Returns:
            A function from the last block's outputs, float32 [sequences, length, hidden_size], to the head's inputs,
            float32 [sequences, length, in_features]; where a model scales these, without the constant factor.
        """
        model, last = self._load_last(lambda name: name.startswith(f"{self._prefix}."))
        decoder = model.get_decoder()

        def final(hidden: torch.Tensor) -> torch.Tensor:
            last.forward = lambda *_, **__: hidden
            return decoder(inputs_embeds=hidden, use_cache=False).last_hidden_state

        return final

    def head_weight(self) -> torch.Tensor:
        """The weight that gives the logits, [vocabulary, hidden_size], as it is stored."""
        return self.tensor(f"{self.owner(self.output_head or self.embedding or '')}.weight")

    def load_head(self, device: str = "cpu") -> Head:
        """What the model does after its last block, with weights in float32 on ``device``."""
        model, last = self._load_last(lambda name: True, device)

        def head(hidden: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
            last.forward = lambda *_, **__: hidden
            replacing = {} if weight is None else {f"{self.output_head}.weight": weight}
            asked = {"inputs_embeds": hidden, "use_cache": False}
            return functional_call(model, replacing, kwargs=asked).logits

        return head

    def _load_last(self, wanted: Callable[[str], bool], device: str = "cpu") -> tuple[PreTrainedModel, torch.nn.Module]:
        """The model with its last block alone, and that block, which has no weights.

        Args:
            wanted: which of the other parameters to load in float32, by their names.
            device: to load them on.
        """
        model = copy.deepcopy(self._model)
        decoder = model.get_decoder()
        last, decoder.layers = decoder.layers[-1], torch.nn.ModuleList()
        # The embedding is not asked, for its outputs are given.
        asked = [name for name in model.state_dict() if name.removesuffix(".weight") not in self.skeleton.embeddings]
        names = [name for name in asked if wanted(name)]
        stored = {name: self.skeleton.tied.get(name, name) for name in names}
        state = {
            name: self.tensor(name if name in self._file_of else stored[name]).to(device).float() for name in names
        }
        model.load_state_dict(state, strict=False, assign=True)
        decoder.layers = torch.nn.ModuleList([last])
        return model.eval(), last

    @property
    def _layers_prefix(self) -> str:
        return f"{self._prefix}.layers."

    def _load_into(
        self,
        module: torch.nn.Module,
        prefix: str,
        tokens: torch.Tensor | None = None,
        embedding: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        """Load the parameters of ``module`` in float32; of an input embedding only the rows of ``tokens``.

        Args:
            embedding: see :meth:`embed`.
        """

        def load(name: str) -> torch.Tensor:
            stored = self.tensor(prefix + name)
            if tokens is None or (prefix + name).removesuffix(".weight") not in self.skeleton.embeddings:
                return stored.float()
            # Rows that are never touched take no memory: a vocabulary can be larger than many blocks.
            table = torch.empty(stored.shape)
            table[tokens] = embedding(tokens) if embedding else stored[tokens].float()
            return table

        module.load_state_dict({name: load(name) for name in module.state_dict()}, assign=True)

    def _build_empty_model(self) -> PreTrainedModel:
        fields = {name: value for name, value in self.config.items() if name != "model_type"}
        config = AutoConfig.for_model(self.config["model_type"], **fields)
        # Parameters stay on the meta device; buffers, such as rotary frequencies, are no part of a checkpoint.
        with init_empty_weights(include_buffers=False):
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()

    def _locate_tensors(self) -> dict[str, str]:
        index = self.folder / INDEX_FILE
        if index.is_file():
            located = read_json(index).get("weight_map")
            if not isinstance(located, dict):
                raise IndexFileError(index, "weight_map", type(located).__name__, "an object")
            for name in sorted(set(map(str, located.values()))):
                if not is_plain_name(name):
                    raise UnsafePathError(index, "weight_map", repr(name), "a file name without a folder")
                if not (self.folder / name).is_file():
                    raise MissingFileError(self.folder, name, "no such file", f"a shard that {INDEX_FILE} lists")
            return located
        single = self.folder / _SINGLE_FILE
        if not single.is_file():
            raise MissingFileError(self.folder, "weights", "no such file", f"{_SINGLE_FILE} or {INDEX_FILE}")
        return dict.fromkeys(read_header(single), _SINGLE_FILE)

    def _check_tensors(self, skeleton: Skeleton) -> None:
        headers = {file: read_header(self.folder / file) for file in sorted(set(self._file_of.values()))}
        self._specs = {name: headers[file][name] for name, file in self._file_of.items() if name in headers[file]}
        for name, shape in skeleton.parameters.items():
            if name not in self._file_of:
                if name in skeleton.tied:
                    continue
                raise MissingTensorError(self.folder, name, "in no file", "each of the model's parameters")
            path = self.folder / self._file_of[name]
            found = headers[path.name].get(name)
            if found is None:
                raise MissingTensorError(path, name, "no such tensor", f"the one that {INDEX_FILE} lists")
            if found.shape != shape:
                raise TensorShapeError(path, f"shape of {name}", list(found.shape), f"{list(shape)} by {CONFIG_FILE}")
            if found.dtype not in UNQUANTIZED_DTYPES:
                raise TensorDtypeError(path, name, found.dtype, " or ".join(map(str, UNQUANTIZED_DTYPES)))


def _is_weight_of(parameter: str, layers: Container[str]) -> bool:
    return parameter.endswith(".weight") and parameter.removesuffix(".weight") in layers


def run_block(
    block: torch.nn.Module,
    inputs: torch.Tensor,
    outputs: torch.Tensor,
    arguments: dict[str, Any],
    batch_tokens: int,
    replacing: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Run ``block`` batch by batch.

    Args:
        inputs: float32 [sequences, length, hidden_size].
        outputs: of the same shape, to be filled; may be ``inputs`` itself.
        batch_tokens: tokens to run at a time.
        replacing: tensors to use in the place of the block's own, by name.
    """
    sequences = max(1, batch_tokens // inputs.shape[1])
    for batch, filled in zip(inputs.split(sequences), outputs.split(sequences), strict=True):
        filled.copy_(call_block(block, batch, arguments, replacing))


def call_block(
    block: torch.nn.Module,
    hidden: torch.Tensor,
    arguments: dict[str, Any],
    replacing: Mapping[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """The hidden states that ``block`` makes of ``hidden``: all that some architectures return, the first for others.

    Args:
        replacing: tensors to use in the place of the block's own, by name.
    """
    output = functional_call(block, dict(replacing or {}), (hidden,), arguments)
    return output[0] if isinstance(output, tuple) else output
