"""Adam moments of a factored expert, as those of the dense matrices it stands for: so that it can be compressed again.

Factors of W = X Y only ever see A = M Y^T and B = X^T M of a gradient (or first moment) M of W (see
`moedist.compress.matrices`), so M is not unique. For the first moment it is taken as the least one that gives these two;
for the second, which must not become negative, as one of rank 1, v_W = a b^T, with the row sums that A shows and the
column shares that B shows (a factored second moment as in Shazeer & Stern 2018, arXiv 1804.04235).
"""

from __future__ import annotations

from typing import Mapping

import torch

from moedist.compress import ColumnsRows, Compressed, Dense, Interpolated, Matrix, TwoFactors


def dense_moments(expert: Compressed, moments: Mapping[str, Mapping[str, torch.Tensor]],
                  second: bool) -> dict[str, torch.Tensor]:
    """Part -> moment [J, D] of the matrix.

    Args:
        expert: as it is stored.
        moments: part -> name -> Adam's first (or second) moment of the stored tensor.
    """
    return {part: dense_moment(matrix, moments[part], second) for part, matrix in expert.parts.items()}


def dense_moment(matrix: Matrix, moments: Mapping[str, torch.Tensor], second: bool) -> torch.Tensor:
    """[J, D]; of a first moment in the span of what training has seen, exact: mapped onto the factors it gives `moments`."""
    if isinstance(matrix, Dense):
        return moments["weight"]
    x, y, a, b = _two_sided(matrix, moments, second)
    return _rank_one(y, a, b) if second else _least(x, y, a, b)


def _two_sided(matrix: Matrix, moments: Mapping[str, torch.Tensor],
               second: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(X [J, r], Y [r, D], A [J, r], B [r, D]); of second moments A belongs to squared Y, B to squared X."""
    if isinstance(matrix, TwoFactors):
        return matrix.left, matrix.right, moments["left"], moments["right"]
    if isinstance(matrix, ColumnsRows):
        b = moments["rows"] if second else torch.linalg.lstsq(matrix.core.t(), moments["rows"]).solution
        return matrix.columns, matrix.core @ matrix.rows, moments["columns"], b
    assert isinstance(matrix, Interpolated), type(matrix)
    kept, others = matrix.kept.long(), matrix.others
    x = matrix.rest.new_zeros(len(kept) + len(others), len(kept))
    x[kept], x[others] = torch.eye(len(kept), dtype=x.dtype, device=x.device), matrix.rest
    a, rest, basis = torch.empty_like(x), matrix.rest, matrix.basis
    a[others] = moments["rest"]
    # the kept rows' part of A is not trained, but B Y^T = X^T A gives it
    if second:
        a[kept] = (moments["basis"] @ basis.square().t() - rest.square().t() @ moments["rest"]).clamp(min=0)
    else:
        a[kept] = moments["basis"] @ basis.t() - rest.t() @ moments["rest"]
    return x, basis, a, moments["basis"]


def _least(x: torch.Tensor, y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The M of least Frobenius norm with M Y^T = A and X^T M = B, where X^T A = B Y^T."""
    rows = a @ torch.linalg.pinv(y).t()
    return rows + torch.linalg.pinv(x).t() @ (b - x.t() @ rows)


def _rank_one(y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """V = s a b^T, a the row sums of A and b the column sums of B, with the row sums of A for V (Y*Y)^T."""
    a, b = a.sum(1), b.sum(0)
    seen = b @ y.square().sum(0)
    return torch.outer(a, b / seen) if seen > 0 else a.new_zeros(len(a), len(b))
