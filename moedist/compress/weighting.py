"""The norm in which a matrix is approximated, and the best low rank in it.

W [F, D] stands between its input and its loss: for gate and up, sum over tokens of (g^T dW x)^2, g the gradient at the
neurons, is tr(G dW A dW^T) / n when g and x are independent (K-FAC: Martens & Grosse 2015, arXiv 1503.05671), with sums
G = sum g g^T, A = sum x x^T over n tokens. For down, whose rows are neurons, it is tr(H dW O dW^T) / n with the moments
of the hidden neurons and of the output gradients. So each part has a left [F, F] and a right [D, D] weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch

from moedist.compress.calibration import Calibration
from moedist.compress.decompose import squared_singular_values, svd
from moedist.errors import CompressError

LEFT = {"gate": "gate_grad_moment", "up": "up_grad_moment", "down": "hidden_moment"}
RIGHT = {"gate": "input_moment", "up": "input_moment", "down": "output_grad_moment"}
MOST_RIDGE = 1e-2
NORMS = {  # which sides carry a weight
    "plain": {},
    "inputs": {"gate": ("right",), "up": ("right",), "down": ("left",)},  # E|dy|^2, no gradients
    "both": {"gate": ("left", "right"), "up": ("left", "right"), "down": ("left", "right")},
}


def norm_needs(norm: str) -> frozenset[str]:
    """The fields of a calibration that a norm reads."""
    sides = {"left": LEFT, "right": RIGHT}
    return frozenset(sides[side][part] for part, weighted in NORMS[norm].items() for side in weighted)


@dataclass(frozen=True)
class Weighting:
    """The norm |W| = |left^T W right|_F * sqrt(scale), with lower triangular (or no) factors, float64.

    Attributes:
        left: [F, F], left left^T = the left weight; None: the identity.
        right: [D, D] likewise.
        scale: makes squared norms comparable over experts; 0 where the expert has seen no tokens.
    """

    left: Optional[torch.Tensor]
    right: Optional[torch.Tensor]
    scale: float

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """left^T W right [F, D]."""
        return self.apply_right(self.apply_left(weight))

    def apply_left(self, columns: torch.Tensor) -> torch.Tensor:
        """left^T C, for C [F, any]."""
        return columns if self.left is None else self.left.t() @ columns

    def apply_right(self, rows: torch.Tensor) -> torch.Tensor:
        """R right, for R [any, D]."""
        return rows if self.right is None else rows @ self.right

    def undo_left(self, columns: torch.Tensor) -> torch.Tensor:
        """left^-T C."""
        return columns if self.left is None else torch.linalg.solve_triangular(self.left.t(), columns, upper=True)

    def undo_right(self, rows: torch.Tensor) -> torch.Tensor:
        """R right^-1."""
        return rows if self.right is None else torch.linalg.solve_triangular(self.right, rows, upper=False, left=False)


def weighting(part: str, calibration: Calibration, norm: str, ridge: float) -> Weighting:
    """The norm of one part of an expert.

    Args:
        norm: a key of NORMS.
        ridge: added to each weight, relative to its mean diagonal: directions that no token has shown still count a
            little. A weight that is zero throughout (no tokens, no gradient) is taken as the identity, and the scale is
            0.
    """
    factors: dict[str, Optional[torch.Tensor]] = {"left": None, "right": None}
    scale = 1.0
    if norm == "both":  # a product of two sums over the same tokens
        scale = 1 / max(1.0, float(calibration.rows))
    for side in NORMS[norm].get(part, ()):
        name = (LEFT if side == "left" else RIGHT)[part]
        factors[side] = square_root(getattr(calibration, name), ridge)
        if factors[side] is None:
            scale = 0.0
    return Weighting(factors["left"], factors["right"], scale)


def square_root(moment: torch.Tensor, ridge: float) -> Optional[torch.Tensor]:
    """Lower Cholesky factor, float64, of a second moment plus `ridge` times its mean diagonal; None for a zero one.

    Sums rounded to float32 can have eigenvalues below zero, by as much as 1e-7 of their trace: where the ridge does not
    lift them it is raised, tenfold at a time.

    Raises:
        CompressError: the moment is not positive with a ridge of MOST_RIDGE either, which no rounding explains.
    """
    moment = moment.double()
    mean = moment.diagonal().mean()
    if mean <= 0:
        return None
    moment = (moment + moment.t()) / 2
    while True:
        lifted = moment.clone()
        lifted.diagonal().add_(ridge * mean)
        factor, failed = torch.linalg.cholesky_ex(lifted)
        if not failed:
            return factor
        if ridge >= MOST_RIDGE:
            raise CompressError(f"a second moment [{len(moment)}, {len(moment)}] is not positive, even with {ridge:g} of "
                                f"its mean diagonal added: calibrate in a wider dtype")
        ridge = min(10 * ridge, MOST_RIDGE)


def best_low_rank(weight: torch.Tensor, rank: int, norm: Weighting) -> tuple[torch.Tensor, torch.Tensor]:
    """X [F, r] and Y [r, D], float64, X Y the matrix of rank r nearest to W in the norm; X has full column rank.

    By Eckart & Young in the weighted space: the SVD U S V^T of left^T W right, X = left^-T U, Y = S V^T right^-1. The
    squared error is scale times the sum of the squares of the singular values that were left out.
    """
    u, s, vh = svd(norm.apply(weight.double()))
    return norm.undo_left(u[:, :rank]), norm.undo_right(s[:rank].unsqueeze(1) * vh[:rank])


def spectrum(weight: torch.Tensor, norm: Weighting) -> torch.Tensor:
    """float64 [min(F, D)] on the CPU: by how much each further rank lowers the squared error, descending."""
    return norm.scale * squared_singular_values(norm.apply(weight.double())).cpu()
