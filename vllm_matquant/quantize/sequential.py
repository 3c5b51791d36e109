"""Calibration on the slices' own activations.

A slice's layer is not given what the source's is: the quantized layers before it have changed its inputs. With x the
source's input and x_r the slice's, the weight that makes up for it minimises ``|x W^T - x_r W_r^T|^2`` (asymmetric
calibration, GPTAQ, arXiv 2504.02692), which is solved by W_r = W + W C (H_r + damping)^-1 with H_r the mean of
x_r^T x_r and C that of (x - x_r)^T x_r.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.func import functional_call

from vllm_matquant.checkpoint.experts import Routed, routed_to
from vllm_matquant.quantize import ranks
from vllm_matquant.quantize.activations import BATCH_TOKENS
from vllm_matquant.quantize.block import BlockTask
from vllm_matquant.quantize.columns import damp
from vllm_matquant.quantize.device import fast_moments
from vllm_matquant.quantize.hessian import enough_tokens


@dataclass(frozen=True)
class Drift:
    """How a slice's inputs of a layer differ from the source's.

    Attributes:
        hessian: float32 [in_features, in_features], mean of x_r^T x_r over the calibration tokens, weighed or not; in
            an expert over those that are routed to it in the source and in the slice.
        cross: float32 [in_features, in_features], mean of (x - x_r)^T x_r over the same tokens.
    """

    hessian: torch.Tensor
    cross: torch.Tensor

    def correction(self, damping: float) -> torch.Tensor:
        """``C (H_r + damping)^-1``: float32 [in_features, in_features].

        With it, ``W + W @ correction`` is the weight that brings a layer's outputs closest to the source's.

        Args:
            damping: added to the Hessian's diagonal, relative to its mean.
        """
        factor = torch.linalg.cholesky(damp(self.hessian, damping))
        return torch.cholesky_solve(self.cross.T, factor).T


def measure_drift(
    task: BlockTask, layer: str, decoded: Mapping[int, Mapping[str, torch.Tensor]], tokens: int, share: float = 0.0
) -> dict[int, Drift]:
    """The drift of a layer's inputs for each followed width; in an expert for those with enough tokens.

    Args:
        layer: full name.
        decoded: for each width the weights of the block's layers before this one, by their names in the block.
        tokens: how many of the calibration's to measure on, rounded up to whole windows.
        share: of an expert's input features, how many tokens are enough.
    """
    if not decoded:
        return {}
    linear = task.linears[layer]
    token_weights = task.token_weights.get(layer)
    zeros = torch.zeros(linear.in_features, linear.in_features)
    sums = {width: (zeros.clone(), zeros.clone()) for width in decoded}
    counts = dict.fromkeys(decoded, 0)
    calibration = task.calibration
    length = calibration.reference.shape[1]
    windows, sequences = min(calibration.windows, -(-tokens // length)), max(1, BATCH_TOKENS // length)
    own = len(ranks.spread(range(windows)))
    for start in range(0, own, sequences):
        batch = slice(start, min(start + sequences, own))
        reference, routed = _inputs(task, linear, calibration.reference[batch], {})
        # Both factors have the root of the weight, so that the product stays positive when they are rounded.
        roots = torch.ones(1) if token_weights is None else token_weights[batch].reshape(-1, 1).sqrt()
        if routed is not None:
            roots = routed.scales.float()[:, None].abs() if token_weights is None else roots[routed.tokens]
        for width, weights in decoded.items():
            inputs, root = reference, roots
            drifted, kept = _inputs(task, linear, calibration.slices[width][batch], weights)
            if routed is not None and kept is not None:  # the tokens of both, which come in their order
                common = torch.isin(routed.tokens, kept.tokens)
                inputs, root = reference[common], roots[common]
                drifted = drifted[torch.isin(kept.tokens, routed.tokens)]
            counts[width] += len(drifted)
            hessian, cross = sums[width]
            drifted, off = drifted * root, (inputs - drifted) * root
            with fast_moments():
                hessian.addmm_(drifted.T, drifted)
                cross.addmm_(off.T, drifted)
    ranks.sum_(*(each for pair in sums.values() for each in pair))
    measured = dict(zip(decoded, map(int, ranks.totals(list(counts.values()))), strict=True))
    least = enough_tokens(linear, share)
    return {
        width: Drift(hessian / measured[width], cross / measured[width])
        for width, (hessian, cross) in sums.items()
        if measured[width] >= least
    }


class _ReachedError(Exception):
    """Ends a run of the block at the layer whose inputs are wanted."""


def _inputs(
    task: BlockTask, linear: torch.nn.Linear, hidden: torch.Tensor, replacing: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, Routed | None]:
    """What the block gives its layer ``linear``, float32 [tokens, in_features], and in an expert which tokens."""
    found: list[tuple[torch.Tensor, Routed | None]] = []

    def stop(layer: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        found.append((inputs[0].flatten(0, -2).float(), routed_to(layer)))
        raise _ReachedError

    hook = linear.register_forward_pre_hook(stop)
    try:
        with task.calibration.products():
            functional_call(task.block, dict(replacing), (hidden,), task.calibration.arguments)
    except _ReachedError:
        pass
    finally:
        hook.remove()
    return found[0]
