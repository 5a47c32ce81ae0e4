"""Quantisation that sees the inputs: each rounding error is made up for by the columns that are not rounded yet."""

from __future__ import annotations

import torch

from moedist.compress.quantise import Grid, Quantised, Scheme, checked, range_grid
from moedist.compress.weighting import square_root
from moedist.errors import CompressError

SHARES = tuple(1 - 0.05 * i for i in range(11))  # of a group's range, that a grid may span
DAMPING = 0.01  # added to the moment, relative to its mean diagonal


def clipped_grid(weight: torch.Tensor, importance_C: torch.Tensor, scheme: Scheme) -> Grid:
    """Group by group, of the grids that span SHARES of the range, the one of least squared error; columns are weighted."""
    best = range_grid(weight, scheme)
    least = _error(weight, best, importance_C)
    for share in SHARES[1:]:
        grid = range_grid(weight, scheme, share)
        error = _error(weight, grid, importance_C)
        better = error < least
        zeros = None if best.zeros is None else torch.where(better, grid.zeros, best.zeros)
        best, least = Grid(torch.where(better, grid.scales, best.scales), zeros, scheme), torch.minimum(error, least)
    return best


def _error(weight: torch.Tensor, grid: Grid, importance_C: torch.Tensor) -> torch.Tensor:
    """[R, groups]."""
    error = (weight - grid.values(grid.codes(weight))).square() * importance_C
    error = torch.nn.functional.pad(error, (0, -error.shape[1] % grid.scheme.group))
    return error.unflatten(1, (-1, grid.scheme.group)).sum(2)


def gptq(weight: torch.Tensor, moment: torch.Tensor, scheme: Scheme, damping: float = DAMPING) -> Quantised:
    """W [R, C] quantised for small errors of W x over the inputs x.

    Columns are rounded one after another; what is left of each error is taken off the columns behind it as well as those can
    make up for it: with H = sum x x^T and U^T U = H^-1, column i's error e goes to column j > i as e U_ij / U_ii (GPTQ:
    Frantar et al. 2022, arXiv 2210.17323, eqs. 2, 3 and algorithm 1). A group's grid is chosen when its first column's turn
    comes, by `clipped_grid` with the error that the later columns cannot undo, 1 / U_ii^2.

    Args:
        moment: [C, C] sum of x x^T; zero throughout (no tokens): the grids are those of equal columns, nothing is made up for.
        damping: added to H, relative to its mean diagonal.

    Raises:
        CompressError: a moment of another width; a group that does not divide C; values that are not finite.
    """
    weight, columns = checked(weight, scheme).clone(), weight.shape[1]
    if tuple(moment.shape) != (columns, columns):
        raise CompressError(f"a moment {tuple(moment.shape)} does not belong to {columns} inputs")
    factor = square_root(moment, damping)
    if factor is None:
        grid = clipped_grid(weight, weight.new_ones(columns), scheme)
        return grid.store(grid.codes(weight))
    upper = torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)
    importance = upper.diagonal().square().reciprocal()
    scales, zeros, codes = [], [], torch.empty_like(weight)
    for start in range(0, columns, scheme.group):
        stop = min(columns, start + scheme.group)
        grid = clipped_grid(weight[:, start:stop], importance[start:stop], Scheme(scheme.bits, stop - start, scheme.symmetric))
        scales.append(grid.scales)
        zeros.append(grid.zeros)
        single = Grid(grid.scales, grid.zeros, Scheme(scheme.bits, 1, scheme.symmetric))
        errors = weight.new_empty(len(weight), stop - start)
        for i in range(start, stop):
            column = weight[:, i:i + 1]
            codes[:, i:i + 1] = single.codes(column)
            errors[:, i - start] = ((column - single.values(codes[:, i:i + 1])) / upper[i, i]).squeeze(1)
            weight[:, i + 1:stop] -= torch.outer(errors[:, i - start], upper[i, i + 1:stop])
        weight[:, stop:] -= errors @ upper[start:stop, stop:]  # once a group: one GEMM
    whole = Grid(torch.cat(scales, 1), None if scheme.symmetric else torch.cat(zeros, 1), scheme)
    return whole.store(codes)
