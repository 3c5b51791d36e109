"""What a quantization method is: from a transformer block to parent codes and a decoder for each width."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from typing_extensions import Self

from vllm_matquant.checkpoint.decoder import AFFINE_KINDS, DecoderKind
from vllm_matquant.checkpoint.packing import slice_codes
from vllm_matquant.checkpoint.spec import PARENT_BITS, Slicing
from vllm_matquant.quantize import ranks
from vllm_matquant.quantize.block import BlockTask
from vllm_matquant.quantize.end_to_end import EndToEndSettings
from vllm_matquant.quantize.hessian import HessianCollector
from vllm_matquant.quantize.layer import QuantizedLayer, relative_error
from vllm_matquant.quantize.sensitivity import SensitivitySettings

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Method(ABC):
    """A way to quantize the linear layers of a transformer block to all ``widths`` at once.

    Attributes:
        widths: ascending, each in 2..8.
        least_tokens: an expert that fewer tokens of the calibration text reach than this share of a layer's input
            features is shown all tokens of its block; 0 for none, "inf" for all experts.
    """

    widths: tuple[int, ...]
    least_tokens: float = 0.25

    name: ClassVar[str]
    slicing: ClassVar[Slicing] = "truncate"
    needs_calibration: ClassVar[bool] = True
    takes_layer_widths: ClassVar[bool] = True  # whether a layer may have other widths than the model
    decoder_kinds: ClassVar[tuple[DecoderKind, ...]] = AFFINE_KINDS  # that it can fill

    def with_widths(self, widths: tuple[int, ...]) -> Self:
        """The same method for other widths."""
        return replace(self, widths=widths)

    @property
    def followed_widths(self) -> tuple[int, ...]:
        """Widths whose slices' own activations the method wants to see."""
        return ()

    @property
    def weighing(self) -> SensitivitySettings | None:
        """How the tokens of the calibration text are weighed in the Hessians; None where all count the same."""
        return None

    @property
    def training(self) -> EndToEndSettings | None:
        """How decoders are trained on the whole model's predictions when all layers are quantized, if at all."""
        return None

    @property
    def trained_widths(self) -> tuple[int, ...]:
        """Widths whose decoders are trained end to end."""
        return tuple(width for width in self.widths if self.training and width <= self.training.up_to)

    def work_bytes(self, shapes: Sequence[tuple[int, int]]) -> int:
        """About how much memory it takes at the worst to quantize a block, besides the block and the activations.

        Args:
            shapes: (out_features, in_features) of the block's layers.
        """
        # Of the others in the meantime: the Hessian, if there is one, and what is finished.
        hessian = 4 if self.needs_calibration else 0
        others = sum(hessian * columns**2 + 2 * rows * columns for rows, columns in shapes)
        return others + max(self.layer_bytes(*shape) for shape in shapes)

    def layer_bytes(self, rows: int, columns: int) -> int:
        """About how much memory it takes at the worst to quantize a layer of this shape, its own weight included."""
        widths, followed = len(self.widths), len(self.followed_widths)
        if not self.needs_calibration:
            return 4 * columns**2 + 22 * rows * columns
        # A Hessian of each followed width is taken apart in float64, or the solver has copies of the weights.
        solving = (12 + 16 * followed) * columns**2 + (14 + 8 * widths + 8 * followed) * rows * columns
        return max((36 + 20 * followed) * columns**2, solving)

    def collect(self, task: BlockTask) -> HessianCollector:
        """Run the source's block and collect its layers' Hessians.

        An expert that no token reaches is shown all in any case. The log says how many layers are shown all.
        """
        hessians = HessianCollector(task.linears, task.token_weights)
        with hessians.collecting():
            task.calibration.outputs(task.block)
        starved = hessians.starved(self.least_tokens)
        if starved:
            task.shown.update(starved)
            least = min(map(hessians.tokens, starved))
            with hessians.showing(task.block, starved):
                task.calibration.run_again(task.block)
            if ranks.is_first():
                _LOGGER.warning(
                    "%s: %d of %d layers of experts were reached by fewer tokens than %g of their input features (%d "
                    "tokens at the least), and were shown all %d: more --samples reach more",
                    task.name, len(starved), len(hessians.expert_layers), self.least_tokens, least,
                    hessians.tokens(starved[0]),
                )  # fmt: skip
        return hessians

    @abstractmethod
    def quantize_block(self, task: BlockTask) -> Iterator[tuple[str, QuantizedLayer]]:
        """Quantize the layers of a block; yields each with its full name."""


@dataclass(frozen=True)
class LayerMethod(Method):
    """A method that takes one layer at a time and knows its Hessian only; each rank solves some of its rows.

    Attributes:
        damping: added to the Hessian's diagonal, relative to its mean.
    """

    damping: float = 0.01

    rows_apart: ClassVar[bool] = True  # whether what a row becomes does not depend on other rows of its layer

    def quantize_block(self, task: BlockTask) -> Iterator[tuple[str, QuantizedLayer]]:
        hessians = self.collect(task) if task.activations else None
        for name, linear in task.linears.items():
            rows = len(linear.weight)
            weight = linear.weight[ranks.own_rows(rows)] if self.rows_apart else linear.weight
            hessian = hessians.hessian(name) if hessians else torch.eye(weight.shape[1])
            method = self.with_widths(task.widths.get(name, self.widths))
            layer = method.quantize(weight, hessian, task.group_sizes[name], task.decoder_kind)
            if hessians:
                count = len(method.widths)
                errors = relative_error([weight] * count, layer, method.slices(layer.codes), [hessian] * count)
                layer = replace(layer, errors=errors)
            yield name, layer.gathered(rows) if self.rows_apart else layer

    @abstractmethod
    def quantize(
        self, weight: torch.Tensor, hessian: torch.Tensor, group_size: int, kind: DecoderKind
    ) -> QuantizedLayer:
        """Quantize a layer.

        Args:
            weight: float32 [out_features, in_features].
            hessian: float32 [in_features, in_features], mean of x^T x over the calibration tokens, weighed or not.
            group_size: columns that share a decoder; divides in_features.
            kind: how decoders are stored.
        """

    def slices(self, codes: torch.Tensor) -> list[torch.Tensor]:
        """The codes of each width's slice, uint8 of the shape of the parent ``codes``."""
        return [slice_codes(codes, PARENT_BITS, width, self.slicing) for width in self.widths]


@dataclass(frozen=True)
class WeighedMethod(LayerMethod):
    """A method whose Hessians may count each token by what an error there does to the model's predictions.

    Attributes:
        sensitivity: how tokens are weighed, see :mod:`vllm_matquant.quantize.sensitivity`; by default all count the
            same.
    """

    sensitivity: SensitivitySettings = field(default_factory=lambda: SensitivitySettings(tokens=False))

    @property
    def weighing(self) -> SensitivitySettings | None:
        return self.sensitivity if self.sensitivity.tokens else None


@dataclass(frozen=True)
class TrainedMethod(WeighedMethod):
    """A method that knows the whole model twice: its Hessians weigh tokens, and its decoders are trained in the end.

    Attributes:
        sensitivity: how tokens are weighed, see :mod:`vllm_matquant.quantize.sensitivity`.
        end_to_end: how decoders are trained in the end, see :mod:`vllm_matquant.quantize.end_to_end`.
    """

    sensitivity: SensitivitySettings = field(default_factory=SensitivitySettings)
    end_to_end: EndToEndSettings = field(default_factory=EndToEndSettings)

    @property
    def training(self) -> EndToEndSettings:
        return self.end_to_end


def growing_weights(widths: Sequence[int], growth: float, widest_factor: float) -> list[float]:
    """The weight of each width in the choice of codes.

    Args:
        widths: ascending.
        growth: what a width weighs for each bit that it has more than the narrowest.
        widest_factor: on top of that, for the widest width.
    """
    weights = [growth ** (width - widths[0]) for width in widths]
    weights[-1] *= widest_factor
    return weights
