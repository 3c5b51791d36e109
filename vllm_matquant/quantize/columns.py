"""The choice of codes: passes over the columns of a layer, for all widths at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from vllm_matquant.checkpoint.decoder import Affine
from vllm_matquant.checkpoint.packing import slice_codes
from vllm_matquant.checkpoint.spec import PARENT_BITS, Slicing
from vllm_matquant.kernels import ops
from vllm_matquant.quantize.decoders import slice_table

_Made = TypeVar("_Made")

BLOCK = 128  # columns between two updates of all later ones; 7 copies of 16 rows fit the second-level cache
_LANES = 16  # rows are padded to what the C++ op takes at a time
_SCRATCH_BYTES = 512 * 2**20


def damp(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """The Hessian with ``damping`` times the mean of its diagonal added to the diagonal (GPTQ, section 3.3).

    Raises:
        ValueError: the Hessian is not finite.
    """
    if not torch.isfinite(hessian).all():
        raise ValueError("the Hessian holds values that are not finite")
    damped = hessian.clone()
    diagonal = damped.diagonal()
    diagonal += damping * diagonal.mean() + torch.finfo(torch.float32).tiny
    return damped


def shared(make: Callable[..., _Made], *tensors: Sequence[torch.Tensor]) -> list[_Made]:
    """``make`` of the first entries of all ``tensors``, of the second and so on; made once where all are the same."""
    made: dict[tuple[int, ...], _Made] = {}
    entries = list(zip(*tensors, strict=True))
    for entry in entries:
        if (key := tuple(map(id, entry))) not in made:
            made[key] = make(*entry)
    return [made[tuple(map(id, entry))] for entry in entries]


def column_order(hessian: torch.Tensor, activation_order: bool) -> torch.Tensor:
    """int64 [in_features]: columns by the Hessian's diagonal, the largest first, or else from left to right."""
    if not activation_order:
        return torch.arange(len(hessian))
    return hessian.diagonal().argsort(descending=True, stable=True)


def inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """Upper Cholesky factor of the inverse (GPTQ, arXiv 2210.17323, section 3.3).

    Args:
        hessian: float32 [in_features, in_features], positive definite.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian.double()))
    return torch.linalg.cholesky(inverse, upper=True).float().contiguous()


@dataclass(frozen=True)
class LayerInputs:
    """What the solver needs of the inputs of a layer, or of several that are called with the same.

    Attributes:
        hessians: for each width float32 [in_features, in_features].
        damped: with :func:`damp`.
        order: int64 [in_features], in which columns are visited: those that carry most of the error first, while all
            others are still free to make up for it.
        factors: of ``damped`` in ``order``, see :func:`inverse_factor`.
    """

    hessians: Sequence[torch.Tensor]
    damped: Sequence[torch.Tensor]
    order: torch.Tensor
    factors: Sequence[torch.Tensor]

    @classmethod
    def of(cls, hessians: Sequence[torch.Tensor], damping: float, activation_order: bool = True) -> LayerInputs:
        """From ``hessians``, one for each width; where widths share one, as the same tensor, work is shared too.

        Args:
            damping: see :func:`damp`.
            activation_order: see :func:`column_order`.
        """
        order = column_order(hessians[-1], activation_order)
        damped = shared(lambda hessian: damp(hessian, damping), hessians)
        factors = shared(lambda hessian: inverse_factor(hessian[order][:, order]), damped)
        return cls(hessians, damped, order, factors)


@dataclass(frozen=True)
class ColumnSolver:
    """Chooses parent codes column after column, for the decoders of all widths at once.

    Weights and Hessians are given for each width; where widths share one, as the same tensor, work is shared too.

    Attributes:
        widths: ascending.
        lambdas: weight of each width in the choice of a code.
        slicing: what a width reads of a parent.
        mean_error: feed the mean of the widths' errors back into every width's copy of the weights, as MatGPTQ does
            (arXiv 2602.03537), instead of each width's own into its own.
    """

    widths: Sequence[int]
    lambdas: Sequence[float]
    slicing: Slicing = "truncate"
    mean_error: bool = False

    def gptq(
        self,
        weights: Sequence[torch.Tensor],
        factors: Sequence[torch.Tensor],
        decoders: Sequence[Affine],
        order: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One pass of GPTQ (arXiv 2210.17323, algorithm 1): what a column leaves of error, later columns make up for.

        Args:
            weights: for each width float32 [out_features, in_features], what the decoded weights shall come close to.
            factors: for each width float32 [in_features, in_features] from :func:`inverse_factor`, of the Hessian in
                ``order``.
            decoders: one for each width.
            order: int64 [in_features], the order in which columns are visited; left to right by default.

        Returns:
            uint8 [out_features, in_features]: parent codes.
        """
        if order is None:
            order = torch.arange(weights[0].shape[1])

        def wanted(index: int, rows: slice) -> torch.Tensor:
            return weights[index][rows]

        return self._run(wanted, factors, decoders, order, None)

    def descend(
        self,
        weights: Sequence[torch.Tensor],
        hessians: Sequence[torch.Tensor],
        decoders: Sequence[Affine],
        codes: torch.Tensor,
        order: torch.Tensor,
        fixed_bits: int = 0,
    ) -> torch.Tensor:
        """One sweep of coordinate descent on ``sum_r lambda_r tr(E_r H_r E_r^T)``, E_r the error of width r.

        With all other weights fixed, the objective in one column is quadratic around a value that follows from the
        gradient, so its minimum over the parents is the same choice that GPTQ makes; exactly so if the Hessians'
        diagonals are the same for all widths.

        Args:
            weights: as for :meth:`gptq`.
            hessians: for each width float32 [in_features, in_features] with a positive diagonal.
            codes: uint8 [out_features, in_features], where to start from.
            order: as for :meth:`gptq`.
            fixed_bits: leading bits of each code that stay as they are.

        Returns:
            uint8 [out_features, in_features]: parent codes; with one Hessian for all widths no worse than ``codes``.
        """
        couplings = shared(lambda hessian: (hessian / hessian.diagonal())[order][:, order].fill_diagonal_(0), hessians)

        def wanted(index: int, rows: slice) -> torch.Tensor:
            sliced = slice_codes(codes[rows], PARENT_BITS, self.widths[index], self.slicing)
            decoded, hessian = decoders[index][rows].decode(sliced), hessians[index]
            return decoded + (weights[index][rows] - decoded) @ hessian / hessian.diagonal()

        return self._run(wanted, couplings, decoders, order, codes, fixed_bits)

    def _run(
        self,
        wanted: Callable[[int, slice], torch.Tensor],
        couplings: Sequence[torch.Tensor],
        decoders: Sequence[Affine],
        order: torch.Tensor,
        current: torch.Tensor | None,
        fixed_bits: int = 0,
    ) -> torch.Tensor:
        rows, groups = decoders[0].scale.shape
        columns = len(order)
        group_of_column = (order // (columns // groups)).to(torch.int32)
        slices = slice_table(self.widths, self.slicing)
        lambdas = torch.tensor(self.lambdas, dtype=torch.float32)
        codes = torch.empty(rows, columns, dtype=torch.uint8)
        one_for_all = all(coupling is couplings[0] for coupling in couplings)
        for part in chunks_of_rows(rows, columns, len(self.widths)):
            # [columns, widths, rows]: where all widths share a coupling, one product updates them all.
            copies = torch.stack([rows_last(wanted(i, part)[:, order]) for i in range(len(self.widths))], dim=1)
            scales = rows_last(torch.stack([decoder.scale[part] for decoder in decoders]))
            offsets = rows_last(torch.stack([decoder.offset[part] for decoder in decoders]))
            old = None if current is None else rows_last(current[part][:, order])
            for begin in range(0, columns, BLOCK):
                block = slice(begin, min(begin + BLOCK, columns))
                coupling = torch.stack([each[block, block] for each in couplings[: 1 if one_for_all else None]])
                chosen, errors = ops.solve_columns(
                    copies,
                    scales,
                    offsets,
                    group_of_column,
                    coupling,
                    old,
                    fixed_bits,
                    slices,
                    lambdas,
                    self.mean_error,
                    block.start,
                    block.stop,
                )
                codes[part, order[block]] = chosen[:, : part.stop - part.start].T
                later = slice(block.stop, columns)
                if one_for_all:
                    copies[later].flatten(1).addmm_(couplings[0][block, later].T, errors.flatten(1), alpha=-1)
                else:
                    for index, each in enumerate(couplings):
                        copies[later, index].addmm_(each[block, later].T, errors[:, index], alpha=-1)
        return codes


def chunks_of_rows(rows: int, columns: int, widths: int) -> list[slice]:
    """The rows, some at a time: so many whole lanes that the copies of each width take no more than the scratch."""
    chunk = max(_LANES, _SCRATCH_BYTES // (widths * columns * 4) // _LANES * _LANES)
    return [slice(start, min(start + chunk, rows)) for start in range(0, rows, chunk)]


def rows_last(values: torch.Tensor) -> torch.Tensor:
    """[..., rows, columns] to [..., columns, rows], with rows padded to whole lanes."""
    return torch.nn.functional.pad(values.transpose(-1, -2), (0, -values.shape[-2] % _LANES)).contiguous()
