"""The default method: nested codes with error feedback of its own for each width."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from vllm_matquant.checkpoint.decoder import DecoderKind
from vllm_matquant.quantize import ranks
from vllm_matquant.quantize.block import BlockTask
from vllm_matquant.quantize.columns import ColumnSolver, LayerInputs, shared
from vllm_matquant.quantize.decoders import DecoderFit, cell_centres, parent_grid
from vllm_matquant.quantize.hessian import HessianCollector
from vllm_matquant.quantize.layer import QuantizedLayer, relative_error
from vllm_matquant.quantize.method import TrainedMethod, growing_weights
from vllm_matquant.quantize.sequential import measure_drift


@dataclass(frozen=True)
class Nested(TrainedMethod):
    """Truncated slices, error feedback of its own for each width, decoders refitted to their codes.

    A pass of GPTQ over all widths at once gives the first codes; the decoders are refitted to them; then sweeps of
    coordinate descent on the true objective, each followed by a refit, mend what the greedy pass could not foresee.
    The narrowest slices, whose errors pile up from layer to layer, are fitted on their own activations.

    Attributes:
        growth: lambda_r, the weight of width r in the choice of codes, is ``growth ** (r - 2)``: errors shrink fourfold
            or more with each bit, so equal weights would leave the wide slices to chance.
        widest_factor: on top of that, for the widest width, which must stay next to lossless.
        activation_order: visit the columns in the order of the Hessian's diagonal, else from left to right.
        refit: fit the decoders to the codes, after the first pass and after every sweep.
        sweeps: of coordinate descent.
        sequential_up_to: widths up to this one make up for what the quantized layers before did to their inputs, see
            :mod:`vllm_matquant.quantize.sequential`; 0 for none.
        drift_tokens: calibration tokens to measure that on.
    """

    growth: float = 2.5
    widest_factor: float = 3.0
    activation_order: bool = True
    refit: bool = True
    sweeps: int = 2
    sequential_up_to: int = 0
    drift_tokens: int = 16384

    name: ClassVar[str] = "nested"

    @property
    def followed_widths(self) -> tuple[int, ...]:
        return tuple(width for width in self.widths if width <= self.sequential_up_to)

    def quantize_block(self, task: BlockTask) -> Iterator[tuple[str, QuantizedLayer]]:
        yield from self.solve_stages(task, self.collect(task))

    def solve_stages(self, task: BlockTask, hessians: HessianCollector) -> Iterator[tuple[str, QuantizedLayer]]:
        """Quantize the layers in the order of their calls, each with those before it quantized.

        A layer's rows do not depend on each other: each rank solves some of them.
        """
        linears = task.linears
        finished: dict[str, QuantizedLayer] = {}
        for stage in hessians.stages():
            hessian = hessians.hessian(stage[0])
            decoded = {width: task.decoded(finished, width, self.slicing) for width in self.followed_widths}
            # An expert that was shown all tokens has too few of its own for both.
            drifting = {} if stage[0] in hessians.shown else decoded
            drifts = measure_drift(task, stage[0], drifting, self.drift_tokens, self.least_tokens)
            corrections = {width: drift.correction(self.damping) for width, drift in drifts.items()}
            inputs: dict[tuple[int, ...], LayerInputs] = {}
            for name in stage:
                method = self.with_widths(task.widths.get(name, self.widths))
                of_width = [drifts[width].hessian if width in drifts else hessian for width in method.widths]
                if method.widths not in inputs:
                    inputs[method.widths] = LayerInputs.of(of_width, self.damping, self.activation_order)
                rows = len(linears[name].weight)
                weight = linears[name].weight[ranks.own_rows(rows)]
                corrected = {width: weight + weight @ correction for width, correction in corrections.items()}
                targets = [corrected.get(width, weight) for width in method.widths]
                layer = method.solve(targets, inputs[method.widths], task.group_sizes[name], task.decoder_kind)
                errors = relative_error(targets, layer, method.slices(layer.codes), of_width)
                finished[name] = replace(layer, errors=errors).gathered(rows)
                yield name, finished[name]

    def quantize(
        self, weight: torch.Tensor, hessian: torch.Tensor, group_size: int, kind: DecoderKind
    ) -> QuantizedLayer:
        count = len(self.widths)
        inputs = LayerInputs.of([hessian] * count, self.damping, self.activation_order)
        return self.solve([weight] * count, inputs, group_size, kind)

    def solve(
        self, weights: Sequence[torch.Tensor], inputs: LayerInputs, group_size: int, kind: DecoderKind
    ) -> QuantizedLayer:
        """Quantize a layer of which each width shall come close to a weight of its own.

        Args:
            weights: for each width float32 [out_features, in_features].
            inputs: of the layer.
            group_size: columns that share a decoder; divides in_features.
            kind: how decoders are stored.
        """
        solver = ColumnSolver(self.widths, self.lambdas())
        # One for each width, the same where weight and Hessian are.
        fits = shared(lambda weight, hessian: DecoderFit(weight, hessian, group_size, kind), weights, inputs.hessians)

        parents = parent_grid(weights[-1], group_size)
        values = [cell_centres(parents, width) for width in self.widths]
        decoders = [kind.encode(start, width) for start, width in zip(values, self.widths, strict=True)]
        codes = solver.gptq(weights, inputs.factors, values, inputs.order)
        for sweep in range(self.sweeps + 1):
            if sweep:
                codes = solver.descend(weights, inputs.damped, values, codes, inputs.order)
            if self.refit:
                slices = zip(fits, self.slices(codes), values, self.widths, strict=True)
                decoders = [fit(sliced, start, width) for fit, sliced, start, width in slices]
            values = [decoder.affine for decoder in decoders]
        return QuantizedLayer(codes, dict(zip(self.widths, decoders, strict=True)))

    def lambdas(self) -> list[float]:
        """The weight of each width."""
        return growing_weights(self.widths, self.growth, self.widest_factor)
