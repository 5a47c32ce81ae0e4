"""How much experts of one layer have in common, and how much they would by chance. E experts, D dimensions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Sequence

import torch


@dataclass(frozen=True)
class Overlap:
    """Of every pair of experts, between 0 (nothing in common) and 1 (the same).

    Attributes:
        matrix: float64 [E, E], symmetric, ones on the diagonal.
        size, of: so many are chosen for each expert, out of so many.
        chance: mean for two choices that have nothing to do with each other; chance_sd: its standard deviation.
    """

    matrix: torch.Tensor
    size: int
    of: int
    chance: float
    chance_sd: float

    @property
    def mean(self) -> float | None:
        """Over all pairs of different experts; None where there is one expert."""
        experts = len(self.matrix)
        return None if experts < 2 else float(self.matrix.sum() - self.matrix.trace()) / (experts * (experts - 1))

    @property
    def most(self) -> tuple[int, int] | None:
        """The two different experts that have most in common; the first such pair."""
        experts = len(self.matrix)
        if experts < 2:
            return None
        above = self.matrix.masked_fill(torch.ones(experts, experts).tril().bool(), -1.0)
        return divmod(int(above.argmax()), experts)


def choice_overlap(chosen: Sequence[Sequence[int]], of: int) -> Overlap:
    """Overlap of chosen indices, |a and b| / k, for k indices out of `of` each.

    By chance |a and b| is hypergeometric: mean k^2 / of, variance k (k / of) (1 - k / of) (of - k) / (of - 1).
    """
    k = len(chosen[0])
    marks = torch.zeros(len(chosen), of, dtype=torch.float64)
    for mark, indices in zip(marks, chosen):
        mark[list(indices)] = 1
    variance = k / of * (1 - k / of) * (of - k) / max(of - 1, 1) / k
    return Overlap(marks @ marks.t() / k, k, of, k / of, math.sqrt(variance))


def space_overlap(bases: Sequence[torch.Tensor]) -> Overlap:
    """Overlap of subspaces: the mean squared cosine of their principal angles, |Q_a^T Q_b|_F^2 / r (Bjorck & Golub 1973).

    Whatever the axes are; for two random subspaces of r dimensions of D the mean is r / D. The variance of the squared norm
    is 2 r^2 (D - r)^2 / (D^2 (D - 1) (D + 2)), that of the trace of a product of two random projections.

    Args:
        bases: E orthonormal [D, r]; where r differs, the leading columns count, as many as the least has.
    """
    rank, width = min(basis.shape[1] for basis in bases), len(bases[0])
    stacked = torch.stack([basis[:, :rank].double() for basis in bases])
    flat = stacked.transpose(1, 2).reshape(-1, width)  # [E r, D]
    cosines = (flat @ flat.t()).square().view(len(bases), rank, len(bases), rank)
    variance = 2 * rank**2 * (width - rank) ** 2 / (width**2 * max(width - 1, 1) * (width + 2)) / rank**2
    return Overlap(cosines.sum((1, 3)) / rank, rank, width, rank / width, math.sqrt(variance))
