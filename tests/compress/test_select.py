"""Column and row selections against their definitions and bounds."""

import pytest
import torch
from hypothesis import given

from moedist.compress.select import deim, leverage, pivoted_qr, sample_leverage, top_leverage, weighted_greedy
from tests.compress.cases import decaying, normal, quick, seeds, shapes_and_ranks


def right_vectors(a: torch.Tensor, r: int) -> torch.Tensor:
    return torch.linalg.svd(a, full_matrices=False).Vh[:r].t().contiguous()


def column_error(a: torch.Tensor, chosen: torch.Tensor, right: torch.Tensor | None = None) -> torch.Tensor:
    """(A - C X) right, X at its best, by definition."""
    target = a if right is None else a @ right
    c = a[:, chosen]
    return target - c @ torch.linalg.pinv(c, rtol=1e-10) @ target


def deim_by_the_book(v: torch.Tensor) -> list[int]:
    """Algorithm 1 of Chaturantabut & Sorensen 2010."""
    chosen = [int(v[:, 0].abs().argmax())]
    for k in range(1, v.shape[1]):
        coefficients = torch.linalg.solve(v[chosen, :k], v[chosen, k])
        chosen.append(int((v[:, k] - v[:, :k] @ coefficients).abs().argmax()))
    return chosen


@given(shapes_and_ranks(), seeds)
@quick
def test_deim_is_its_algorithm_and_keeps_its_bound(shape, seed):
    m, n, r = shape
    a = decaying(m, n, seed)
    v = right_vectors(a, r)
    chosen = deim(v)
    assert chosen.tolist() == deim_by_the_book(v)
    # Sorensen & Embree 2016, lemma 4.2 with theorem 4.1, for columns: |A - C C+ A| <= |V[q]^-1| sigma_(r+1)
    amplification = torch.linalg.matrix_norm(torch.linalg.inv(v[chosen]), 2)
    sigma = torch.linalg.svdvals(a)
    following = sigma[r] if r < len(sigma) else 0.0
    assert torch.linalg.matrix_norm(column_error(a, chosen), 2) <= amplification * following * (1 + 1e-9) + 1e-10


@given(shapes_and_ranks(), seeds)
@quick
def test_pivoted_qr_keeps_its_bound(shape, seed):
    m, n, r = shape
    a = decaying(m, n, seed)
    chosen = pivoted_qr(a, r)
    assert len(set(chosen.tolist())) == r
    sigma = torch.linalg.svdvals(a)
    following = float(sigma[r]) if r < len(sigma) else 0.0
    # Gu & Eisenstat 1996, theorem 7.2: |R22| <= 2^r sqrt(n - r) sigma_(r+1)
    bound = 2**r * max(1, n - r) ** 0.5 * following
    assert torch.linalg.matrix_norm(column_error(a, chosen), 2) <= bound * (1 + 1e-9) + 1e-10


@given(shapes_and_ranks(), seeds)
@quick
def test_leverage_sums_to_one_and_samples_are_distinct_and_seeded(shape, seed):
    m, n, r = shape
    v = right_vectors(decaying(m, n, seed), r)
    assert leverage(v).sum().item() == pytest.approx(1)
    drawn = sample_leverage(v, seed)
    assert len(set(drawn.tolist())) == r and drawn.max() < n
    assert torch.equal(drawn, sample_leverage(v, seed))
    top = top_leverage(v)
    scores = leverage(v)
    assert scores[top].sum() == pytest.approx(float(scores.sort(descending=True).values[:r].sum()))


def test_samples_follow_leverage():
    v = torch.zeros(6, 1, dtype=torch.float64)
    v[2], v[4] = 0.6, 0.8
    drawn = torch.cat([sample_leverage(v, seed) for seed in range(500)])
    assert set(drawn.tolist()) == {2, 4}
    assert float((drawn == 4).double().mean()) == pytest.approx(0.64, abs=0.07)


def test_samples_where_all_leverage_is_in_fewer_than_asked():
    v = torch.eye(5, 3, dtype=torch.float64) * torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    assert len(set(sample_leverage(v, 0).tolist())) == 3


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_greedy_takes_the_best_next_column(weighted, seed):
    m = normal(7, 6, seed=seed) @ torch.diag(torch.logspace(0, -1, 6, dtype=torch.float64))
    right = torch.linalg.cholesky(normal(6, 9, seed=seed + 1) @ normal(6, 9, seed=seed + 1).t()) if weighted else None
    chosen = weighted_greedy(m, right, 4).tolist()
    for k in range(4):
        errors = {j: float(column_error(m, torch.tensor([*chosen[:k], j]), right).norm())
                  for j in range(6) if j not in chosen[:k]}
        assert errors[chosen[k]] <= min(errors.values()) * (1 + 1e-9)


def test_greedy_of_degenerate_matrices():
    assert len(set(weighted_greedy(torch.zeros(4, 5, dtype=torch.float64), None, 3).tolist())) == 3
    rank_one = torch.outer(normal(4), normal(5, seed=1))
    assert len(set(weighted_greedy(rank_one, None, 4).tolist())) == 4
    twice = normal(6, 3).repeat(1, 2)
    chosen = weighted_greedy(twice, None, 3)
    assert column_error(twice, chosen).norm() < 1e-10  # never both of a pair
