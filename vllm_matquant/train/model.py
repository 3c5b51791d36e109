"""The source model with the parent's layers in place: one model that is run at any width, or as the source."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch.nn.utils import parametrize
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from vllm_matquant.checkpoint.language_model import load_language_model
from vllm_matquant.checkpoint.names import CONFIG_FILE
from vllm_matquant.checkpoint.reader import Checkpoint
from vllm_matquant.checkpoint.skeleton import Skeleton, build_skeleton
from vllm_matquant.checkpoint.spec import PARENT_BITS, Format, served_width
from vllm_matquant.quantize import ranks
from vllm_matquant.train.latent import LatentWeight, NestedWeight, Parent, Switch, place_in, scatter_in
from vllm_matquant.train.rounded import RoundedWeight
from vllm_matquant.train.settings import AT_RANDOM, AT_SOURCE, NATIVE, SLICINGS

LoadParent = Callable[[str], Parent]
"""Gives the parent's layer of a name."""
MakeLatent = Callable[[str, torch.Tensor, Sequence[int], Switch], LatentWeight]
"""Gives what takes the place of the weight of a layer, by its name, its weight in the source, the widths of the model
that are trained, and the model's switch."""


class NestedModel:
    """A causal language model whose layers have the source's weights or those of a slice, whichever is asked for.

    Attributes:
        model: transformers' model.
        layers: the parent's layers, in the model's order, each with what takes the place of its weight.
        trained: the widths of the model that are trained, ascending.
        device: where it is, see :func:`vllm_matquant.train.distributed.place`.
        sharded: whether this process has a part of it alone.

    Args:
        model: the source, with its own weights; none of them will be trained.
        skeleton: of the model.
        layers: names of the parent's layers.
        trained: the widths of the model that are trained.
        load: gives the parent's layers, of which those that are not trained are taken as they are.
        make: gives what takes the place of the weights that are trained, see :func:`maker_of`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        skeleton: Skeleton,
        layers: Iterable[str],
        trained: Iterable[int],
        load: LoadParent,
        make: MakeLatent,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.trained = tuple(sorted(trained))
        self.device, self.sharded = "cpu", False
        self._switch = Switch()
        self.layers: dict[str, LatentWeight] = {}
        for name in layers:
            nested: LatentWeight
            if is_fixed(name, skeleton):
                nested = NestedWeight(load(name), (), self._switch)
            else:
                nested = make(name, model.get_submodule(name).weight.detach(), self.trained, self._switch)
            tied = [
                other.removesuffix(".weight") for other, first in skeleton.tied.items() if first == f"{name}.weight"
            ]
            for place in (name, *tied):
                parametrize.register_parametrization(model.get_submodule(place), "weight", nested, unsafe=True)
            self.layers[name] = nested

    @property
    def weights(self) -> int:
        """How many weights have positions."""
        return sum(nested.codes.numel() for nested in self.layers.values() if nested.trained)

    def parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """What is trained, by name: ``LAYER.shift``, and ``LAYER.changes.R`` of each trained width R of a layer."""
        for name, nested in self.layers.items():
            for own, parameter in nested.named_parameters():
                yield f"{name}.{own}", parameter

    def logits(self, tokens: torch.Tensor, width: int) -> torch.Tensor:
        """The logits of every position.

        Until they have been differentiated the model must not be run at another width, if blocks are run once more for
        their derivatives.

        Args:
            tokens: int64 [windows, length].
            width: of the model, or :data:`vllm_matquant.quantize.terms.SOURCE`.

        Returns:
            [windows, length, vocabulary] in the model's dtype.
        """
        self._switch.width = width
        found: torch.Tensor = self.model(tokens, use_cache=False).logits
        return found

    def keep_no_activations(self) -> None:
        """Keep of each block its inputs alone, and run it once more for its derivatives."""
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for module in self.model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True  # of the block itself: what is in it drops nothing out


def load_model(
    source: Path,
    checkpoint: Checkpoint,
    trained: Iterable[int],
    run: Iterable[int],
    dtype: torch.dtype,
    form: str = NATIVE,
    start: str = AT_RANDOM,
    seed: int = 0,
) -> NestedModel:
    """Load source and parent.

    Args:
        source: folder of the model that was quantized.
        checkpoint: the parent.
        trained: the widths of the model that are trained.
        run: the widths of the model that are run.
        dtype: of weights and activations.
        form, start, seed: of the training, see :class:`vllm_matquant.train.settings.TrainingSettings`.
    """
    skeleton = build_skeleton(checkpoint.config, checkpoint.folder / CONFIG_FILE)
    if not ranks.is_first():
        logging.disable_progress_bar()
    model = load_language_model(source, checkpoint.config, dtype=dtype)
    widths = tuple(run)

    def load(layer: str) -> Parent:
        return read_parent(checkpoint, layer, widths)

    make = maker_of(checkpoint.format, load, form, start, seed)
    return NestedModel(model, skeleton, checkpoint.layers, trained, load, make)


def maker_of(format_: Format, load: LoadParent, form: str, start: str, seed: int) -> MakeLatent:
    """What makes the trained weights of a form of training.

    Args:
        format_: of the parent.
        load: gives the parent's layers.
        form, start, seed: see :class:`vllm_matquant.train.settings.TrainingSettings`.
    """

    def make(layer: str, weight: torch.Tensor, trained: Sequence[int], switch: Switch) -> LatentWeight:
        if form == NATIVE:
            parent, places = load(layer), None
            if start == AT_RANDOM:
                places = scatter_in(parent, zlib.crc32(layer.encode(), seed))
            elif start == AT_SOURCE:
                places = place_in(parent, weight)
            return NestedWeight(parent, trained, switch, places)
        group_size = format_.group_size_of(weight.shape[1], layer)
        return RoundedWeight(weight, group_size, format_.widths_of(layer), trained, switch, SLICINGS[form])

    return make


def is_fixed(layer: str, skeleton: Skeleton) -> bool:
    """Whether a layer is not trained, as it is an embedding or the output head."""
    return layer in skeleton.embeddings or layer == skeleton.head


def read_parent(checkpoint: Checkpoint, layer: str, run: Iterable[int]) -> Parent:
    """A layer of the parent, with the decoders of the widths that it has where the model is at one of ``run``."""
    widths = checkpoint.format.widths_of(layer)
    stored = checkpoint.format.stored_width(widths[-1])
    codes = checkpoint.stored_codes(layer, stored) << (PARENT_BITS - stored)
    own = sorted({served_width(widths, width) for width in run})
    decoders = {width: checkpoint.decoder(layer, width).affine for width in own}
    finest = checkpoint.decoder(layer, widths[-1]).affine
    return Parent(codes, stored, widths, decoders, finest, checkpoint.format.slicing)
