"""The choice of codes for codebooks: passes over the columns of a layer, four at a time, for all widths at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_matquant.checkpoint.codebook import PLACES, Codebook, by_four, with_signs
from vllm_matquant.checkpoint.packing import slice_codes
from vllm_matquant.checkpoint.spec import PARENT_BITS
from vllm_matquant.kernels import ops
from vllm_matquant.quantize.codebook_fit import LinearCodebook
from vllm_matquant.quantize.columns import BLOCK, chunks_of_rows, inverse_factor, rows_last


def order_of_fours(hessian: torch.Tensor) -> torch.Tensor:
    """int64 [in_features]: fours of columns by the sum of the Hessian's diagonal over each, the largest first."""
    fours = by_four(hessian.diagonal()).sum(1).argsort(descending=True, stable=True)
    return by_four(torch.arange(len(hessian)))[fours].flatten()


def blocks_of(matrix: torch.Tensor) -> torch.Tensor:
    """The 4 x 4 blocks along the diagonal: [fours, 4, 4]."""
    fours = matrix.unflatten(0, (-1, PLACES)).unflatten(2, (-1, PLACES))
    return fours.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def upper_factor(blocks: torch.Tensor) -> torch.Tensor:
    """Upper triangles F with ``F F^T`` the given blocks, positive definite: [..., n, n]."""
    return torch.linalg.cholesky(blocks.double().flip(-1, -2)).flip(-1, -2).float().contiguous()


@dataclass(frozen=True)
class FourSolver:
    """Chooses parent codes four columns after four, for the codebooks of all widths at once.

    Attributes:
        widths: ascending.
        lambdas: weight of each width in the choice of a code.
    """

    widths: Sequence[int]
    lambdas: Sequence[float]

    def gptq(self, weight: torch.Tensor, hessian: torch.Tensor, books: Sequence[Codebook]) -> torch.Tensor:
        """One pass of GPTQ over vectors (GPTVQ, arXiv 2402.15319, algorithm 1): what a four leaves of error, later
        columns make up for.

        Args:
            weight: float32 [out_features, in_features], in_features and a group's columns multiples of 16.
            hessian: float32 [in_features, in_features], positive definite.
            books: one for each width.

        Returns:
            uint8 [out_features, in_features]: parent codes.
        """
        order = order_of_fours(hessian)
        factor = inverse_factor(hessian[order][:, order])
        identity = torch.eye(PLACES, dtype=torch.float64)
        inverses = torch.linalg.solve_triangular(blocks_of(factor).double(), identity, upper=True).float().contiguous()
        return self._run([weight] * len(self.widths), inverses, factor, books, order, None)

    def descend(
        self, weight: torch.Tensor, hessian: torch.Tensor, books: Sequence[Codebook], codes: torch.Tensor
    ) -> torch.Tensor:
        """One sweep of descent over fours on ``sum_r lambda_r tr(E_r H E_r^T)``, E_r the error of width r.

        With all other weights fixed, the objective in one four is quadratic around weights that follow from the
        gradient.

        Args:
            weight, hessian, books: as of :meth:`gptq`.
            codes: uint8 [out_features, in_features], where to start from.

        Returns:
            uint8 [out_features, in_features]: parent codes.
        """
        order = order_of_fours(hessian)
        ordered = hessian[order][:, order]
        blocks = blocks_of(ordered)
        inverses = torch.linalg.inv(blocks.double()).float()
        # Of errors in a row's columns what they ask of each four: H times the inverse of that four's block.
        solved = (ordered.unflatten(1, (-1, PLACES)).transpose(0, 1) @ inverses).transpose(0, 1).flatten(1)
        coupling = solved.clone()
        for start in range(0, len(order), PLACES):
            coupling[start : start + PLACES, start : start + PLACES] = 0

        def wanted(book: Codebook, width: int) -> torch.Tensor:
            decoded = LinearCodebook(slice_codes(codes, PARENT_BITS, width), book).decode()
            asked = torch.empty_like(decoded)
            asked[:, order] = (weight - decoded)[:, order] @ solved
            return decoded + asked

        targets = [wanted(book, width) for book, width in zip(books, self.widths, strict=True)]
        return self._run(targets, upper_factor(blocks), coupling, books, order, codes)

    def _run(
        self,
        targets: Sequence[torch.Tensor],
        factors: torch.Tensor,
        coupling: torch.Tensor,
        books: Sequence[Codebook],
        order: torch.Tensor,
        current: torch.Tensor | None,
    ) -> torch.Tensor:
        rows, columns = targets[0].shape
        group_of_column = (order // (columns // books[0].groups)).to(torch.int32)
        planes = with_signs(torch.cat([torch.cat([book.levels[None], book.increments]) for book in books]).float())
        lambdas = torch.tensor(self.lambdas, dtype=torch.float32)
        codes = torch.empty(rows, columns, dtype=torch.uint8)
        for part in chunks_of_rows(rows, columns, len(self.widths)):
            copies = torch.stack([rows_last(target[part][:, order]) for target in targets], dim=1)
            scales = rows_last(torch.stack([book.scale[part].float() for book in books]))
            old = None if current is None else rows_last(current[part][:, order])
            for begin in range(0, columns, BLOCK):
                block = slice(begin, min(begin + BLOCK, columns))
                fours = slice(block.start // PLACES, block.stop // PLACES)
                within = coupling[block, block].contiguous()
                chosen, errors = ops.solve_fours(
                    copies,
                    scales,
                    group_of_column,
                    factors[fours],
                    within,
                    old,
                    planes,
                    self.widths,
                    lambdas,
                    block.start,
                    block.stop,
                )
                codes[part, order[block]] = chosen[:, : part.stop - part.start].T
                later = slice(block.stop, columns)
                copies[later].flatten(1).addmm_(coupling[block, later].T, errors.flatten(1), alpha=-1)
        return codes
