"""CUR of one matrix at a time, as the textbook has it: real columns, a core, real rows. For comparison."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moedist.compress.calibration import Calibration
from moedist.compress.decompose import pseudo_inverse, svd
from moedist.compress.expert import Expert
from moedist.compress.low_rank import cost_or_dense
from moedist.compress.matrices import ColumnsRows, Dense, Matrix
from moedist.compress.method import Compressed, Curve, Keep, Method, kept_units, one_of
from moedist.compress.select import deim, pivoted_qr, sample_leverage, top_leverage, weighted_greedy
from moedist.compress.weighting import Weighting, norm_needs, spectrum, weighting
from moedist.errors import CompressError

SELECTIONS = ("leverage", "top-leverage", "deim", "qr", "greedy")


def select_columns(weight: torch.Tensor, rank: int, selection: str, norm: Weighting, seed: int) -> torch.Tensor:
    """int64 [r] columns of W [F, D] (float64), ascending. All selections but "greedy" look at the plain matrix.

    Raises:
        CompressError: an unknown selection.
    """
    one_of("selection", selection, SELECTIONS)
    if selection == "qr":
        chosen = pivoted_qr(weight, rank)
    elif selection == "greedy":
        chosen = weighted_greedy(norm.apply_left(weight), norm.right, rank)
    else:
        v = svd(weight)[2][:rank].t().contiguous()
        if selection == "deim":
            chosen = deim(v)
        else:
            chosen = top_leverage(v) if selection == "top-leverage" else sample_leverage(v, seed)
    return chosen.sort().values


def best_core(columns: torch.Tensor, weight: torch.Tensor, rows: torch.Tensor, norm: Weighting,
              rtol: float = 1e-12) -> torch.Tensor:
    """U [c, r] that minimises |W - C U R| in the norm: pinv(left^T C) left^T W right pinv(R right).

    In the plain norm pinv(C) W pinv(R) (Stewart 1999, Numer. Math. 83; Mahoney & Drineas 2009). Never pinv(W[I, J]): it
    interpolates the crossing, and its inverse amplifies all that is not of low rank. Float64; `rtol` is that of the
    pseudo-inverses: the rounding of the weights.
    """
    left = pseudo_inverse(norm.apply_left(columns), rtol)
    right = pseudo_inverse(norm.apply_right(rows), rtol)
    return left @ norm.apply(weight) @ right


@dataclass(frozen=True)
class CurMatrix(Method):
    """Each matrix as C [F, r] U [r, r] R [r, D], C its columns and R its rows: r (F + D + r) numbers, 2 r indices.

    Attributes:
        selection: "leverage" (sampled; Mahoney & Drineas 2009), "top-leverage", "deim" (Sorensen & Embree 2016), "qr"
            (pivots of W and W^T), "greedy" (what lowers the error most in the norm).
        norm: of the core, of "greedy" and of the budget: "plain" is the textbook's, "both" weighs by activations and
            gradients (`moedist.compress.weighting`).
        ridge: relative, of the weights of that norm.
        seed: of "leverage"; columns and rows are drawn apart.

    Unit u is worth the u-th squared singular value in the norm, which no choice of columns and rows can exceed in sum.
    An expert without tokens is approximated in the plain norm, and worth nothing against others.
    """

    selection: str = "leverage"
    norm: str = "plain"
    ridge: float = 1e-6
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("selection", self.selection, SELECTIONS)
        one_of("norm", self.norm, ("plain", "inputs", "both"))
        if not self.ridge >= 1e-9:
            raise CompressError(f"ridge is {self.ridge:g}: at least 1e-9")

    @property
    def needs(self) -> frozenset[str]:
        return norm_needs(self.norm)

    def gains(self, expert: Expert, calibration: Calibration, decided: Keep) -> list[Curve]:
        self.check(expert, calibration)
        curves = []
        for part, weight in expert.parts.items():
            gain = spectrum(weight, weighting(part, calibration, self.norm, self.ridge))
            costs = [cost_or_dense(_cost(rank, weight), weight) for rank in range(len(gain))]
            costs.append((weight.numel(), 0))  # all of a matrix is the matrix
            curves.append(Curve(part, gain, *map(tuple, zip(*costs))))
        return curves

    def compress(self, expert: Expert, calibration: Calibration, keep: Keep) -> Compressed:
        self.check(expert, calibration)
        parts = {}
        for part, weight in expert.parts.items():
            rank = kept_units(keep, part, min(weight.shape))
            parts[part] = self._compress(weight, rank, weighting(part, calibration, self.norm, self.ridge))
        return Compressed(expert.hidden, None, parts)

    def _compress(self, weight: torch.Tensor, rank: int, norm: Weighting) -> Matrix:
        if rank == min(weight.shape) or _cost(rank, weight)[0] >= weight.numel():
            return Dense(weight)
        return cur(weight, rank, self.selection, norm, self.seed)


def cur(weight: torch.Tensor, rank: int, selection: str, norm: Weighting, seed: int = 0) -> ColumnsRows:
    """W [F, D] as C U R with `rank` columns and rows, in the dtype of W; C and R are W's, bitwise."""
    double = weight.double()
    column_ids = select_columns(double, rank, selection, norm, seed)
    row_ids = select_columns(double.t(), rank, selection, Weighting(norm.right, norm.left, norm.scale), seed + 1)
    rtol = max(1e-12, torch.finfo(weight.dtype).eps)
    core = best_core(double[:, column_ids], double, double[row_ids], norm, rtol)
    return ColumnsRows(column_ids.int(), row_ids.int(), weight[:, column_ids].clone(), core.to(weight.dtype),
                       weight[row_ids].clone())


def _cost(rank: int, weight: torch.Tensor) -> tuple[int, int]:
    return rank * (sum(weight.shape) + rank), 2 * rank
