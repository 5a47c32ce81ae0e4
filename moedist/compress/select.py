"""Which rows and columns of a matrix stand for all of it. Every function is deterministic and returns int64 indices."""

from __future__ import annotations

from typing import Optional

import scipy.linalg
import torch


def pivoted_qr(a: torch.Tensor, r: int) -> torch.Tensor:
    """[r] columns of A [m, n]: the first pivots of its QR with column pivoting (Businger & Golub 1965)."""
    pivots = scipy.linalg.qr(a.detach().double().cpu().numpy(), mode="r", pivoting=True)[1]
    return torch.from_numpy(pivots[:r].astype("int64")).to(a.device)


def deim(v: torch.Tensor) -> torch.Tensor:
    """[r] rows of a basis V [n, r] by discrete empirical interpolation.

    Chaturantabut & Sorensen 2010, SIAM J. Sci. Comput. 32(5), algorithm 1. Each next row is where the next vector is
    worst interpolated in the rows so far: that is Gaussian elimination with partial pivoting (Sorensen & Embree 2016,
    arXiv 1407.5516, section 3), whose row exchanges are read off here.
    """
    swaps = torch.linalg.lu_factor(v)[1].tolist()
    order = list(range(len(v)))
    for i, j in enumerate(swaps):
        order[i], order[j - 1] = order[j - 1], order[i]
    return torch.tensor(order[:v.shape[1]], device=v.device)


def leverage(v: torch.Tensor) -> torch.Tensor:
    """[n] leverage scores of the rows of an orthonormal basis V [n, r], over r: they sum to 1."""
    return v.square().sum(1) / v.shape[1]


def sample_leverage(v: torch.Tensor, seed: int) -> torch.Tensor:
    """[r] rows drawn without replacement by leverage (Mahoney & Drineas 2009, PNAS 106(3))."""
    scores = leverage(v).cpu() + 1e-12  # so that r of them are above zero
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(scores, v.shape[1], generator=generator).to(v.device)


def top_leverage(v: torch.Tensor) -> torch.Tensor:
    """[r] rows of largest leverage."""
    return leverage(v).sort(descending=True, stable=True).indices[:v.shape[1]]


def weighted_greedy(m: torch.Tensor, right: Optional[torch.Tensor], r: int) -> torch.Tensor:
    """[r] columns of M [m, n], one after another, each the one that lowers |(M - M_J X) right|_F most, X at its best.

    Orthogonal matching pursuit for column subsets (Farahat, Ghodsi & Kamel 2011, ICDM, with a weighted target). With
    K the Gram matrix of what is left of M, column j lowers the squared error by |(K right)_j|^2 / K_jj; taking it is a
    rank-1 update of K and of K right: O(n^2) a step.
    """
    gram = m.t() @ m
    target = gram.clone() if right is None else gram @ right
    floor = 1e-12 * gram.diagonal().max()
    free = torch.ones(len(gram), dtype=torch.bool, device=m.device)
    chosen = []
    for _ in range(r):
        energy = gram.diagonal()
        gain = torch.where(energy > floor, target.square().sum(1) / energy, 0.0)
        j = int(gain.masked_fill(~free, -1.0).argmax())  # once nothing is left, any free one
        chosen.append(j)
        free[j] = False
        if energy[j] > floor:
            factor = gram[:, j] / energy[j]
            target = target - torch.outer(factor, target[j])
            gram = gram - torch.outer(factor, gram[j].clone())
    return torch.tensor(chosen, device=m.device)
