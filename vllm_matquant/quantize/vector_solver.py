"""One pass of GPTQ over vectors, which makes each group's codebooks when it comes to the group."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_matquant.checkpoint.vectors import VectorBooks, band_count, band_rows, entry_count
from vllm_matquant.quantize.columns import inverse_factor
from vllm_matquant.quantize.vector_entries import find_entries


@dataclass(frozen=True)
class VectorSolver:
    """GPTVQ's algorithm 1 (arXiv 2402.15319) for one width.

    Attributes:
        width: bits of a code.
        places: columns of a vector.
        group_size: columns that share codebooks, a multiple of ``places``.
        iterations: of k-means at the most.
    """

    width: int
    places: int
    group_size: int
    iterations: int

    @property
    def entries(self) -> int:
        """Entries of a codebook."""
        return entry_count(self.width, self.places)

    def solve(self, weight: torch.Tensor, hessian: torch.Tensor) -> tuple[torch.Tensor, VectorBooks]:
        """Codebooks and the entry of each vector, group after group from left to right.

        A group's codebooks are those of its weights as they are when all columns before it have left them their errors.

        Args:
            weight: float32 [out_features, in_features], in_features a multiple of the group size.
            hessian: float32 [in_features, in_features], positive definite.

        Returns:
            int64 [out_features, in_features / places] and the codebooks.
        """
        rows, columns = weight.shape
        each, bands = band_rows(rows, self.entries, self.places), band_count(rows, self.entries, self.places)
        factor = inverse_factor(hessian)
        left = torch.nn.functional.pad(weight, (0, 0, 0, bands * each - rows)).clone()  # what is still to be chosen
        counts = (torch.arange(bands * each) < rows).float().view(bands, each, 1, 1)
        indices, books = [], []
        for begin in range(0, columns, self.group_size):
            group, later = slice(begin, begin + self.group_size), slice(begin + self.group_size, columns)
            vectors = left[:, group].reshape(bands, each, -1, self.places)
            importance = self._importance(factor[group, group]) * counts
            entries = find_entries(vectors.flatten(1, 2), importance.flatten(1, 2), self.entries, self.iterations)
            if self.places == 1:
                entries = entries.sort(1).values  # as the compression of codebooks wants them
            index, errors = choose_entries(left[:, group], factor[group, group], entries)
            left[:, later] -= errors @ factor[group, later]
            indices.append(index[:rows])
            books.append(entries)
        return torch.cat(indices, 1), VectorBooks(torch.stack(books, 1))

    def _importance(self, factor: torch.Tensor) -> torch.Tensor:
        """What an error in each column costs when later columns have made up for it: float32 [vectors, places]."""
        importance = factor.diagonal().square().reciprocal()
        return (importance / importance.mean()).view(-1, self.places)


def choose_entries(
    left: torch.Tensor, factor: torch.Tensor, entries: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The entries of some columns' vectors, vector after vector: what one leaves of error, later ones make up for.

    Args:
        left: float32 [bands * rows, columns], what the entries shall come close to.
        factor: float32 [columns, columns], the columns' part of the inverse Hessian's upper factor.
        entries: float32 [bands, entries, places], the codebook of each band.

    Returns:
        int64 [bands * rows, vectors], and the errors in the coordinates in which the factor spreads them to later
        columns: float32 of the shape of ``left``.
    """
    left, places = left.clone(), entries.shape[2]
    index, errors = [], torch.empty_like(left)
    for begin in range(0, left.shape[1], places):
        own, later = slice(begin, begin + places), slice(begin + places, left.shape[1])
        # An error e costs |e T^-1|^2, T the block of the factor on its columns.
        inverse = torch.linalg.inv(factor[own, own].double()).float()
        wanted, offered = (left[:, own] @ inverse).view(len(entries), -1, places), entries @ inverse
        chosen = _nearest(wanted, offered)
        found = offered.gather(1, chosen.unsqueeze(2).expand(-1, -1, places))
        errors[:, own] = (wanted - found).view(-1, places)
        left[:, later] -= errors[:, own] @ factor[own, later]
        index.append(chosen.view(-1, 1))
    return torch.cat(index, 1), errors


def _nearest(wanted: torch.Tensor, offered: torch.Tensor) -> torch.Tensor:
    """Which of ``offered`` (float32 [bands, entries, places]) each of ``wanted`` ([bands, rows, places]) is next to:
    int64 [bands, rows]."""
    costs = torch.baddbmm(offered.square().sum(2).unsqueeze(1), wanted, offered.mT, alpha=-2)  # but |wanted|^2
    return costs.min(2).indices
