"""Decompositions, also where the fast driver fails."""

import pytest
import torch
from hypothesis import given

from moedist.compress.decompose import pseudo_inverse, squared_singular_values, svd
from tests.compress.cases import normal, quick, seeds, shapes_and_ranks


def does_not_converge(*args, **options):
    raise torch.linalg.LinAlgError("the algorithm failed to converge")


def gives_nan(a, **options):
    k = min(a.shape)
    return torch.return_types.linalg_svd((a.new_full((a.shape[0], k), torch.nan), a.new_full((k,), torch.nan),
                                          a.new_full((k, a.shape[1]), torch.nan)))


@pytest.mark.parametrize("broken", [does_not_converge, gives_nan])
def test_svd_without_the_fast_driver(monkeypatch, broken):
    a = normal(7, 5)
    expected = torch.linalg.svdvals(a)
    monkeypatch.setattr(torch.linalg, "svd", broken)
    u, s, vh = svd(a)
    assert (u @ torch.diag(s) @ vh - a).norm() < 1e-12
    assert torch.allclose(s, expected) and u.shape == (7, 5) and vh.shape == (5, 5)


@given(shapes_and_ranks(), seeds)
@quick
def test_squares_of_singular_values(shape, seed):
    a = normal(*shape[:2], seed=seed)
    expected = torch.linalg.svdvals(a).square()
    assert (squared_singular_values(a) - expected).abs().max() <= 1e-13 * expected[0]


def test_squares_without_the_fast_driver(monkeypatch):
    a = normal(4, 6)
    expected = squared_singular_values(a)
    monkeypatch.setattr(torch.linalg, "eigvalsh", does_not_converge)
    assert torch.allclose(squared_singular_values(a), expected)


@given(shapes_and_ranks(), seeds)
@quick
def test_pseudo_inverse(shape, seed):
    m, n, r = shape
    a = normal(m, r, seed=seed) @ normal(r, n, seed=seed + 1)
    assert torch.allclose(pseudo_inverse(a, 1e-10), torch.linalg.pinv(a, rtol=1e-10), rtol=1e-6, atol=1e-8)


def test_pseudo_inverse_of_nothing():
    assert torch.equal(pseudo_inverse(torch.zeros(3, 2, dtype=torch.float64), 1e-12), torch.zeros(2, 3).double())
