"""The default method, and then each block trained as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from vllm_matquant.quantize import ranks
from vllm_matquant.quantize.block import BlockTask
from vllm_matquant.quantize.columns import ColumnSolver, column_order, damp
from vllm_matquant.quantize.decoders import DecoderFit
from vllm_matquant.quantize.end_to_end import EndToEndSettings
from vllm_matquant.quantize.layer import QuantizedLayer, relative_error
from vllm_matquant.quantize.nested import Nested
from vllm_matquant.quantize.tuning import TunedLayer, TuningSettings, tune_block


@dataclass(frozen=True)
class NestedTuned(Nested):
    """:class:`Nested`, then codes and decoders of the narrow widths trained on the block's outputs.

    The wide widths' bits are chosen anew below the narrow ones' that training has settled.

    Attributes:
        tuned_up_to: widest width to train; wider slices leave little to gain.
        tuning: how.
    """

    growth: float = 2.25
    tuned_up_to: int = 4
    tuning: TuningSettings = field(default_factory=TuningSettings)
    end_to_end: EndToEndSettings = field(default_factory=lambda: EndToEndSettings(up_to=4, epochs=1.0, rate=1e-3))

    name: ClassVar[str] = "nested-tuned"
    takes_layer_widths: ClassVar[bool] = False  # a block is trained at the widths of the model

    @property
    def tuned_widths(self) -> tuple[int, ...]:
        """The widths to train, at least one."""
        return tuple(width for width in self.widths if width <= self.tuned_up_to) or self.widths[:1]

    @property
    def followed_widths(self) -> tuple[int, ...]:
        teacher = self.widths[-1:] if self.tuning.distillation else ()
        return tuple(sorted({*super().followed_widths, *self.tuned_widths, *teacher}))

    def work_bytes(self, shapes: Sequence[tuple[int, int]]) -> int:
        # Of every layer at once: positions, codes, weights and gradients of each width, and a copy of the block.
        training = (16 + 20 * len(self.tuned_widths)) * sum(rows * columns for rows, columns in shapes)
        return max(super().work_bytes(shapes), training + sum(4 * columns**2 for _, columns in shapes))

    def quantize_block(self, task: BlockTask) -> Iterator[tuple[str, QuantizedLayer]]:
        hessians = self.collect(task)
        layers = dict(self.solve_stages(task, hessians))
        if not layers:  # every one of the block's is ignored
            return
        tuned = tune_block(task, layers, self.tuned_widths, self.tuning)
        for name, layer in layers.items():
            yield name, self._complete(task, name, hessians.hessian(name), layer, tuned[name])

    def _complete(
        self, task: BlockTask, name: str, hessian: torch.Tensor, layer: QuantizedLayer, tuned: TunedLayer
    ) -> QuantizedLayer:
        """The layer with what was trained, and the bits and decoders of the wider widths fitted to it."""
        weight = task.linears[name].weight
        rows = len(weight)
        own = ranks.own_rows(rows)
        codes, trained_decoders = tuned.finish()
        start = QuantizedLayer(codes, layer.decoders | trained_decoders)[own]
        weight, codes, decoders = weight[own], start.codes, start.decoders
        count, trained = len(self.widths), len(self.tuned_widths)
        damped = damp(hessian, self.damping)
        order = column_order(hessian, self.activation_order)
        solver = ColumnSolver(self.widths, self.lambdas())
        fit = DecoderFit(weight, hessian, task.group_sizes[name], task.decoder_kind)
        for sweep in range(self.sweeps + 1 if trained < count else 0):
            if sweep:
                values = [decoders[width].affine for width in self.widths]
                fixed = self.tuned_widths[-1]
                codes = solver.descend([weight] * count, [damped] * count, values, codes, order, fixed)
            for width, sliced in list(zip(self.widths, self.slices(codes), strict=True))[trained:]:
                decoders[width] = fit(sliced, decoders[width].affine, width)
        result = QuantizedLayer(codes, {width: decoders[width] for width in self.widths})
        errors = relative_error([weight] * count, result, self.slices(codes), [hessian] * count)
        return replace(result, errors=errors).gathered(rows)
