"""Low rank in a weighted norm: the SVD baselines, and the interpolative form that keeps real names.

All give the best approximation of their rank in their norm. They differ in the norm and in what is stored: two factors,
r (F + D) numbers, or one gauge-fixed pair, r (F + D - r) numbers.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch

from moedist.compress.calibration import Calibration
from moedist.compress.expert import Expert
from moedist.compress.matrices import Dense, Interpolated, Matrix, TwoFactors
from moedist.compress.method import Compressed, Curve, Keep, Method, kept_units, one_of
from moedist.compress.select import pivoted_qr
from moedist.compress.weighting import NORMS, best_low_rank, norm_needs, spectrum, weighting
from moedist.errors import CompressError

LARGEST = 2.0  # entry of an interpolation


def interpolate(x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype) -> Interpolated:
    """X Y [F, D] of rank r, gauge-fixed: r rows of it as they are, and how all others follow from them.

    X Y = (X M)(M^-1 Y) for any invertible M, r^2 numbers without content. M = X[J]^-1 makes r rows of the left factor
    the identity, which is not stored, and the right factor rows J of X Y. J are the pivots of a QR of X^T with column
    pivoting (interpolative decomposition: Cheng, Gimbutas, Martinsson & Rokhlin 2005, SIAM J. Sci. Comput. 26(4),
    section 3), exchanged with others until no entry of X X[J]^-1 is above LARGEST (Gu & Eisenstat 1996, SIAM J. Sci.
    Comput. 17(4), algorithm 4): a few exchanges at most, each of which multiplies |det X[J]| by more than that.
    """
    rank = x.shape[1]
    kept = pivoted_qr(x.t(), rank)
    free = torch.ones(len(x), dtype=torch.bool, device=x.device)
    free[kept] = False
    others = free.nonzero().squeeze(1)
    rest = torch.linalg.solve(x[kept], x[others], left=False)
    for _ in range(len(others)):
        i, j = divmod(int(rest.abs().argmax()), rank)
        if rest[i, j].abs() <= LARGEST:
            break
        kept[j], others[i] = others[i].clone(), kept[j].clone()
        rest = torch.linalg.solve(x[kept], x[others], left=False)
    column, row = kept.argsort(), others.argsort()
    kept, rest = kept[column], rest[row][:, column]
    return Interpolated(kept.int(), rest.to(dtype), (x[kept] @ y).to(dtype))


@dataclass(frozen=True)
class LowRank(Method):
    """Each matrix on its own, rank r of it; a subclass says in which form.

    Attributes:
        norm: "plain", "inputs" or "both", see `moedist.compress.weighting`.
        ridge: relative, of the weights of that norm.
        multiple: ranks are multiples of it (or full).

    An expert without tokens is approximated in the plain norm, and worth nothing against others.
    """

    norm: str = "plain"
    ridge: float = 1e-6
    multiple: int = 1

    def __post_init__(self) -> None:
        one_of("norm", self.norm, list(NORMS))
        if self.multiple < 1 or not self.ridge >= 1e-9:
            raise CompressError(f"multiple is {self.multiple}, ridge {self.ridge:g}: at least 1 and 1e-9")

    @property
    def needs(self) -> frozenset[str]:
        return norm_needs(self.norm)

    @abstractmethod
    def cost(self, rank: int, rows: int, columns: int) -> tuple[int, int]:
        """Numbers and indices of a matrix [rows, columns] at this rank, were it not stored dense."""

    @abstractmethod
    def factorise(self, x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype) -> Matrix:
        """Store X [F, r] Y [r, D]."""

    def gains(self, expert: Expert, calibration: Calibration, decided: Keep) -> list[Curve]:
        self.check(expert, calibration)
        return [self._curve(part, weight, calibration) for part, weight in expert.parts.items()]

    def _curve(self, part: str, weight: torch.Tensor, calibration: Calibration) -> Curve:
        gain = spectrum(weight, weighting(part, calibration, self.norm, self.ridge))
        costs = [cost_or_dense(self.cost(rank, *weight.shape), weight) for rank in range(len(gain) + 1)]
        return Curve(part, gain, *map(tuple, zip(*costs)), step=min(self.multiple, len(gain)))

    def compress(self, expert: Expert, calibration: Calibration, keep: Keep) -> Compressed:
        self.check(expert, calibration)
        parts = {part: self._compress(part, weight, calibration, kept_units(keep, part, min(weight.shape)))
                 for part, weight in expert.parts.items()}
        return Compressed(expert.hidden, None, parts)

    def _compress(self, part: str, weight: torch.Tensor, calibration: Calibration, rank: int) -> Matrix:
        if self.cost(rank, *weight.shape)[0] >= weight.numel():
            return Dense(weight)
        x, y = best_low_rank(weight, rank, weighting(part, calibration, self.norm, self.ridge))
        return self.factorise(x, y, weight.dtype)


def cost_or_dense(cost: tuple[int, int], weight: torch.Tensor) -> tuple[int, int]:
    """A factorisation that takes as many numbers as the matrix is not used: numbers and indices of what is."""
    return cost if cost[0] < weight.numel() else (weight.numel(), 0)


@dataclass(frozen=True)
class Interp(LowRank):
    """Weighted SVD of both sides, gauge-fixed: the best rank r in the "both" norm in r (F + D - r) numbers, r indices.

    Its basis rows bear the names of real neurons. See `interpolate` and `moedist.compress.matrices.Interpolated`.
    """

    norm: str = "both"

    def cost(self, rank: int, rows: int, columns: int) -> tuple[int, int]:
        return rank * (rows + columns - rank), rank

    def factorise(self, x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype) -> Matrix:
        return interpolate(x, y, dtype)


@dataclass(frozen=True)
class Svd(LowRank):
    """Baseline: truncated SVD, two factors, r (F + D) numbers (Eckart & Young 1936).

    Each of the r terms has its norm shared evenly between its column and its row. What a norm leaves in the factors may
    differ by many orders of magnitude (gradients are small), and no one learning rate would train both.

    Weights alone say little about what a matrix is worth against others: give it a uniform budget.
    """

    def cost(self, rank: int, rows: int, columns: int) -> tuple[int, int]:
        return rank * (rows + columns), 0

    def factorise(self, x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype) -> Matrix:
        of_x, of_y = x.norm(dim=0), y.norm(dim=1)
        share = torch.where(of_y > 0, (of_y / of_x).sqrt(), 1.0)  # no column of X is zero
        return TwoFactors((x * share).to(dtype), (y / share.unsqueeze(1)).to(dtype))


@dataclass(frozen=True)
class SvdWhitened(Svd):
    """Baseline: SVD of the whitened matrix, the least output error for the tokens' inputs (SVD-LLM, Wang et al. 2024,
    arXiv 2403.07378, section 3.1); r (F + D) numbers.

    The outputs of gate and up are neurons, those of down the expert's: their errors do not compare, and a uniform budget
    (as in the paper) does it more justice than a global one.
    """

    norm: str = "inputs"


@dataclass(frozen=True)
class SvdFisher(Svd):
    """Baseline: activations and gradients weigh both sides (as FWSVD, Hsu et al. 2022, arXiv 2207.00112, with whole
    moments instead of row sums); r (F + D) numbers."""

    norm: str = "both"
