"""What quantisation has lost, given back by two thin factors that are stored in few bits themselves."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moedist.compress.decompose import pseudo_inverse
from moedist.compress.quantise import Quantised, Scheme, round_to_nearest
from moedist.compress.weighting import Weighting, best_low_rank
from moedist.errors import CompressError

RTOL = 1e-10  # of a factor's singular values: below it a term is none


@dataclass(frozen=True)
class Compensator:
    """X Y [F, D] of rank r, added to a low-bit matrix.

    Attributes:
        left: X^T [r, F]; right: Y [r, D].
    """

    left: Quantised
    right: Quantised

    @property
    def rank(self) -> int:
        """r."""
        return len(self.left.codes)

    @property
    def bytes(self) -> int:
        """Bytes stored."""
        return self.left.bytes + self.right.bytes

    def dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """[F, D]."""
        return self.left.dense(dtype).t() @ self.right.dense(dtype)


def factor_scheme(bits: int, group: int) -> Scheme:
    """How factors are stored."""
    return Scheme(bits, group, symmetric=True, ragged=True)


def compensator_bytes(hidden: int, width: int, rank: int, scheme: Scheme) -> int:
    """Bytes of a compensator of a matrix [F, D]."""
    return scheme.bytes(rank, hidden) + scheme.bytes(rank, width)


def compensate(residual: torch.Tensor, rank: int, norm: Weighting, scheme: Scheme) -> Compensator:
    """The factors of W - Q(W) [F, D]: the best of their rank in the norm (`best_low_rank`), then rounded.

    Each of the r terms has its size shared evenly between both sides, so that rounding hurts them alike. The right factor is
    fitted again to the left one as it is stored: Y = (L^T X)^+ L^T (W - Q(W)), L the norm's left weight (the right weight
    drops out), which takes up what it can of that rounding.
    """
    if not 1 <= rank <= min(residual.shape):
        raise CompressError(f"rank {rank} of a matrix {tuple(residual.shape)}: between 1 and {min(residual.shape)}")
    residual = residual.double()
    x, y = best_low_rank(residual, rank, norm)
    of_x, of_y = x.norm(dim=0), y.norm(dim=1)
    x = x * torch.where((of_x > 0) & (of_y > 0), (of_y / of_x).sqrt(), 1.0)
    left = round_to_nearest(x.t(), scheme)
    weighted = norm.apply_left(left.dense(torch.float64).t())
    right = pseudo_inverse(weighted, RTOL) @ norm.apply_left(residual)
    return Compensator(left, round_to_nearest(right, scheme))
