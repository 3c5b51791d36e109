"""What ``from_pretrained`` asks of a quantization method: a configuration, and layers for the model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from vllm_matquant.checkpoint.errors import ConfigError
from vllm_matquant.checkpoint.experts import separate_experts
from vllm_matquant.checkpoint.names import CONFIG_FILE
from vllm_matquant.checkpoint.reader import Checkpoint, open_checkpoint
from vllm_matquant.checkpoint.servable import check_served
from vllm_matquant.checkpoint.slice import Slice
from vllm_matquant.checkpoint.spec import QUANT_METHOD
from vllm_matquant.transformers.layers import PackedEmbedding, PackedLayer, PackedLinear, TiedHead

_tie_weights = PreTrainedModel.tie_weights  # which transformers has do nothing while it loads


@auto.register_quantization_config(QUANT_METHOD)
class MatquantConfig(QuantizationConfigMixin):
    """What to load of a checkpoint: ``from_pretrained(DIR, quantization_config=MatquantConfig(bits=4))``.

    Args:
        bits: a width (4), or the budget of an average (2.5, 3.0), within which the best recipe is loaded. By default
            the widest width that the folder can serve.
        recipe: in place of it the name of one of the checkpoint's recipes, or the Path of a recipe's file.
        activation_bits: bits to which the CPU's kernels round activations, 8 or 16; by default by the width, see
            :func:`vllm_matquant.kernels.ops.linear`.
        stored: what config.json says of the checkpoint; transformers gives it.

    Raises:
        ValueError: bits and a recipe are given.
    """

    def __init__(
        self,
        bits: float | None = None,
        recipe: Path | str | None = None,
        activation_bits: int | None = None,
        **stored: Any,
    ) -> None:
        if bits is not None and recipe is not None:
            raise ValueError(f"MatquantConfig: found bits {bits} and recipe {recipe}, expected one of them")
        self.quant_method = QUANT_METHOD
        self.bits, self.recipe, self.activation_bits = bits, recipe, activation_bits
        self._stored = stored | {"quant_method": QUANT_METHOD}

    def get_loading_attributes(self) -> dict[str, Any]:
        """What of the configuration that the caller gives takes the place of the checkpoint's."""
        return {"bits": self.bits, "recipe": self.recipe, "activation_bits": self.activation_bits}

    def to_dict(self) -> dict[str, Any]:
        """What config.json says of the checkpoint, which does not depend on what is loaded of it."""
        return dict(self._stored)

    def slice_of(self, checkpoint: Checkpoint) -> Slice:
        """What is asked for of a checkpoint.

        Raises:
            CheckpointError: it does not offer it.
        """
        if isinstance(self.bits, float):
            return checkpoint.slice(budget=self.bits)
        return checkpoint.slice(self.recipe if self.bits is None else self.bits)


# transformers asks the configuration that its caller gives for these attributes only if its class stands here.
auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (MatquantConfig,)


@auto.register_quantizer(QUANT_METHOD)
class MatquantQuantizer(HfQuantizer):
    """Gives a model layers of one slice, which transformers loads and which are then packed for the kernels."""

    requires_calibration = True  # a model that is not quantized is refused: matquant quantize does it

    @property
    def is_trainable(self) -> bool:
        return False

    def is_serializable(self) -> bool:
        return False

    def update_weight_conversions(self, weight_conversions: list[Any]) -> list[Any]:
        """None: the modules bear the names of the files, also those of experts, which transformers would join."""
        return []

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        dtype: torch.dtype | None = None,
        checkpoint_files: list[str] | None = None,
        **kwargs: Any,
    ) -> PreTrainedModel:
        """Check the checkpoint, put empty layers of the slice into the model, and have its files read alone.

        Raises:
            CheckpointError: the checkpoint is not sound, does not offer the slice, or has layers that cannot be put
                into the model.
        """
        if not checkpoint_files:
            raise ValueError("from_pretrained: found no files, expected the folder of a matquant checkpoint")
        folder = Path(checkpoint_files[0]).parent
        with _outside_of_loading():
            checkpoint = open_checkpoint(folder, check_files=False)
            check_served(checkpoint.format, folder / CONFIG_FILE)
            served = self.quantization_config.slice_of(checkpoint)
            checkpoint.check(served)
        separate_experts(model)
        _put_layers(model, checkpoint, served, dtype or model.dtype)
        # transformers has listed the shards of all widths; a recipe's own decoders come last and take others' places.
        own = [served.decoders_file] if served.decoders_file else []
        checkpoint_files[:] = [str(folder / name) for name in (*(set(served.files) - set(own)), *own)]
        model._keys_to_ignore_on_load_unexpected |= _patterns(checkpoint)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for module in model.modules():
            if isinstance(module, PackedLayer):
                module.pack(self.quantization_config.activation_bits)
        return model


@contextmanager
def _outside_of_loading() -> Iterator[None]:
    """Undo what transformers does while it makes the model: tensors on the meta device in its dtype, nothing tied."""
    tie_weights, dtype = PreTrainedModel.tie_weights, torch.get_default_dtype()
    PreTrainedModel.tie_weights = _tie_weights
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)
        PreTrainedModel.tie_weights = tie_weights


def _put_layers(model: PreTrainedModel, checkpoint: Checkpoint, served: Slice, dtype: torch.dtype) -> None:
    """Put empty layers into a model, in the place of those that are quantized."""
    for name, shape in checkpoint.layers.items():
        module = model.get_submodule(name)
        how = (name, checkpoint.format, shape, served.widths[name], dtype)
        if isinstance(module, torch.nn.Linear):
            model.set_submodule(name, PackedLinear(module.bias, *how))
        elif type(module) is torch.nn.Embedding:
            model.set_submodule(name, PackedEmbedding(*how))
        else:  # one that scales its rows, say
            raise ConfigError(
                checkpoint.folder / CONFIG_FILE,
                "quantization_config.quantized_embeddings",
                f"{name}, of transformers' class {type(module).__name__}",
                "a plain embedding",
                "Quantize the model without --quantize-embeddings",
            )
    for tied, first in list(model.all_tied_weights_keys.items()):
        embedding = model.get_submodule(first.removesuffix(".weight"))
        if isinstance(embedding, PackedEmbedding):
            del model.all_tied_weights_keys[tied]
            head = tied.removesuffix(".weight")
            model.set_submodule(head, TiedHead(embedding, model.get_submodule(head).bias))


def _patterns(checkpoint: Checkpoint) -> set[str]:
    """Regular expressions for the tensors of other widths that lie in the files which are read."""
    suffixes = {
        suffix
        for name, shape in checkpoint.layers.items()
        for tensors in checkpoint.format.tensors_of_layer(*shape, name).values()
        for suffix in tensors
    }
    return {rf"\.{re.escape(suffix)}$" for suffix in suffixes}
