"""Singular value decompositions that do not give up: the fast driver first, the slow and certain one where it fails."""

from __future__ import annotations

import scipy.linalg
import torch


def svd(a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U [m, k], S [k] descending, V^T [k, n] of a finite float64 A [m, n], k = min(m, n).

    LAPACK's divide and conquer (gesdd) now and then does not converge on ill-conditioned input that its QR iteration
    (gesvd) takes, at a few times the time.
    """
    try:
        factors = torch.linalg.svd(a, full_matrices=False)
        if factors.S.isfinite().all():
            return factors
    except torch.linalg.LinAlgError:
        pass
    numpy = a.detach().cpu().numpy()
    return tuple(torch.from_numpy(factor.copy()).to(a.device)
                 for factor in scipy.linalg.svd(numpy, full_matrices=False, lapack_driver="gesvd"))


def squared_singular_values(a: torch.Tensor) -> torch.Tensor:
    """[k] squares of S of `svd`, descending, right to about 1e-15 of the largest.

    As eigenvalues of the smaller Gram matrix: four times as fast as singular values.
    """
    gram = a.t() @ a if a.shape[0] > a.shape[1] else a @ a.t()
    try:
        values = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)
        if values.isfinite().all():
            return values
    except torch.linalg.LinAlgError:
        pass
    return svd(a)[1].square()


def pseudo_inverse(a: torch.Tensor, rtol: float) -> torch.Tensor:
    """[n, m] pseudo-inverse of A [m, n]; singular values up to `rtol` times the largest count as zero."""
    u, s, vh = svd(a)
    inverse = torch.where(s > rtol * s[0], 1 / s, 0.0)
    return (vh.t() * inverse) @ u.t()
