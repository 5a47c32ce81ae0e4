"""C U R of one matrix against its definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moedist.compress import ColumnsRows, CurMatrix, Dense, Expert
from moedist.compress.cur_matrix import SELECTIONS, best_core, cur, select_columns
from moedist.compress.weighting import Weighting, square_root
from moedist.errors import CompressError
from tests.compress.cases import (PLAIN, calibrated, decaying, make_expert, normal, positive, quick, same, seeds,
                                  shapes_and_ranks)

selections = pytest.mark.parametrize("selection", SELECTIONS)


def norm_of(m: int, n: int, seed: int = 0) -> Weighting:
    return Weighting(square_root(positive(m, seed), 1e-6), square_root(positive(n, seed + 1), 1e-6), 1.0)


@given(shapes_and_ranks(), st.sampled_from(SELECTIONS), st.booleans(), seeds)
@quick
def test_columns_and_rows_are_exact_and_the_core_is_best(shape, selection, weighted, seed):
    m, n, r = shape
    w = decaying(m, n, seed)
    norm = norm_of(m, n, seed) if weighted else PLAIN
    c = cur(w, r, selection, norm, seed)
    assert torch.equal(c.columns, w[:, c.column_ids.long()]) and torch.equal(c.rows, w[c.row_ids.long()])
    assert len(set(c.column_ids.tolist())) == len(set(c.row_ids.tolist())) == r
    assert c.numbers == r * (m + n + r) and c.bytes == 8 * c.numbers + 8 * r

    error = norm.apply(w - c.dense()).norm()
    for k in range(4):
        step = 1e-3 * normal(r, r, seed=k) * (c.core.norm() + 1)
        assert norm.apply(w - c.columns @ (c.core + step) @ c.rows).norm() >= error - 1e-12
    again = cur(w, r, selection, norm, seed)
    assert all(torch.equal(a, b) for a, b in zip(c.tensors().values(), again.tensors().values()))


@pytest.mark.parametrize("weighted", [False, True])
def test_core_is_that_of_least_squares(weighted):
    w = normal(7, 6)
    norm = norm_of(7, 6) if weighted else PLAIN
    c = cur(w, 3, "qr", norm)
    system = torch.kron(norm.apply_left(c.columns).contiguous(), norm.apply_right(c.rows).t().contiguous())
    expected = torch.linalg.lstsq(system, norm.apply(w).reshape(-1, 1)).solution.view(3, 3)
    assert torch.allclose(c.core, expected, atol=1e-9)


def test_plain_core_is_the_textbook_one():
    w = normal(7, 6)
    c = cur(w, 3, "leverage", PLAIN)
    assert torch.allclose(c.core, torch.linalg.pinv(c.columns) @ w @ torch.linalg.pinv(c.rows))


@selections
@pytest.mark.parametrize("weighted", [False, True])
def test_exact_at_full_rank_and_for_a_matrix_of_that_rank(selection, weighted):
    for m, n in ((6, 6), (5, 9), (9, 5)):
        norm = norm_of(m, n) if weighted else PLAIN
        full = normal(m, n)
        assert (cur(full, min(m, n), selection, norm).dense() - full).abs().max() < 1e-9
        low = normal(m, 2) @ normal(2, n, seed=1)
        assert (cur(low, 2, selection, norm).dense() - low).abs().max() < 1e-8
        assert (cur(low, 4, selection, norm).dense() - low).abs().max() < 1e-8  # C and R have dependent columns


@given(shapes_and_ranks(), seeds)
@quick
def test_deim_bound(shape, seed):
    """Sorensen & Embree 2016, theorem 4.1: |W - C U R| <= (|(P^T U)^-1| + |(V^T Q)^-1|) sigma_(r+1), spectral norms."""
    m, n, r = shape
    w = decaying(m, n, seed)
    c = cur(w, r, "deim", PLAIN)
    u, sigma, vh = torch.linalg.svd(w, full_matrices=False)
    amplification = sum(float(torch.linalg.matrix_norm(torch.linalg.inv(basis), 2))
                        for basis in (u[c.row_ids.long(), :r], vh[:r, c.column_ids.long()]))
    following = float(sigma[r]) if r < len(sigma) else 0.0
    assert torch.linalg.matrix_norm(w - c.dense(), 2) <= amplification * following * (1 + 1e-9) + 1e-9


@selections
def test_error_stays_above_the_singular_values(selection):
    w = decaying(9, 7)
    sigma = torch.linalg.svdvals(w)
    for r in range(1, 7):
        assert (w - cur(w, r, selection, PLAIN).dense()).norm() >= sigma[r:].norm() * (1 - 1e-9)


def test_weighted_core_is_better_in_its_norm_than_the_plain_one():
    w, norm = normal(9, 7), norm_of(9, 7)
    ids = torch.tensor([0, 3, 5])
    plain, weighted = (best_core(w[:, ids], w, w[ids], kind) for kind in (PLAIN, norm))
    errors = [norm.apply(w - w[:, ids] @ core @ w[ids]).norm() for core in (plain, weighted)]
    assert errors[1] < errors[0] * 0.999


def test_columns_and_rows_are_drawn_apart():
    w = decaying(12, 12)
    symmetric = w + w.t()
    drawn = [cur(symmetric, 4, "leverage", PLAIN, seed) for seed in range(5)]
    assert any(not torch.equal(c.column_ids, c.row_ids) for c in drawn)


@selections
@pytest.mark.parametrize("norm", ["plain", "inputs", "both"])
def test_method(selection, norm):
    method = CurMatrix(selection=selection, norm=norm)
    for gated in (True, False):
        expert = make_expert(14, 10, gated)
        calibration = calibrated(expert, needs=method.needs)
        curves = method.gains(expert, calibration, {})
        for kept in range(1, 11):
            compressed = method.compress(expert, calibration, dict.fromkeys(expert.parts, kept))
            assert [curve.bytes(kept, 8) for curve in curves] == [m.bytes for m in compressed.parts.values()]
            form = ColumnsRows if kept * (24 + kept) < 140 else Dense
            assert all(isinstance(matrix, form) for matrix in compressed.parts.values())
        assert same(compressed.dense(), expert)


@selections
def test_degenerate_weights(selection):
    one = torch.outer(normal(9), normal(6, seed=1))
    zero = torch.zeros_like(one)
    twice = normal(9, 3).repeat(1, 2)
    for norm in ("plain", "both"):
        expert = Expert(zero, one, twice)
        parts = CurMatrix(selection, norm).compress(expert, calibrated(expert), {"gate": 2, "up": 2, "down": 3}).parts
        assert all(tensor.isfinite().all() for matrix in parts.values() for tensor in matrix.tensors().values())
        assert torch.equal(parts["gate"].dense(), zero) and torch.allclose(parts["up"].dense(), one)


def test_noise_of_the_weights_dtype_is_not_inverted():
    low = (normal(20, 2) @ normal(2, 16, seed=1)).float()  # of rank 2 but for rounding
    c = cur(low, 4, "deim", PLAIN)
    assert c.core.norm() < 1e3 and (c.dense() - low).norm() < 1e-5 * low.norm()


def test_options_are_checked():
    with pytest.raises(CompressError, match="selection is 'best'; it must be one of leverage, top-leverage, deim"):
        CurMatrix(selection="best")
    with pytest.raises(CompressError, match="norm is 'x'"):
        CurMatrix(norm="x")
    with pytest.raises(CompressError, match="at least 1e-9"):
        CurMatrix(ridge=0.0)
    with pytest.raises(CompressError, match="selection is 'best'"):
        select_columns(normal(3, 3), 1, "best", PLAIN, 0)
