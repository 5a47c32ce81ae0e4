"""Moments of factors as moments of the dense matrix: consistent with the way there, and never negative."""

import pytest
import torch

from moedist.engine.dense_moments import dense_moment, dense_moments
from tests.model.expert_forms import expert_of, matrix_of


@pytest.mark.parametrize("kind", ["two", "interp", "cur"])
def test_there_and_back_again(kind):
    """Mapped onto the factors, the dense first moment gives theirs; so it does once more from there."""
    matrix = matrix_of(kind, 9, 6, 3, torch.Generator().manual_seed(0))
    truth = torch.randn(9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    seen = matrix.map_moments(truth, second=False)
    dense = dense_moment(matrix, seen, second=False)
    for name, value in matrix.map_moments(dense, second=False).items():
        torch.testing.assert_close(value, seen[name], rtol=1e-9, atol=1e-9)
    assert dense.norm() <= truth.norm() and not torch.allclose(dense, truth)
    torch.testing.assert_close(dense_moment(matrix, matrix.map_moments(dense, False), False), dense, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", ["two", "interp", "cur"])
def test_second_moments_of_rank_one_come_back(kind):
    matrix = matrix_of(kind, 9, 6, 3, torch.Generator().manual_seed(0))
    a, b = torch.rand(9, dtype=torch.float64) + 0.1, torch.rand(6, dtype=torch.float64) + 0.1
    dense = dense_moment(matrix, matrix.map_moments(torch.outer(a, b), second=True), second=True)
    assert dense.shape == (9, 6) and (dense >= 0).all()
    # the share of a column is only seen through the rows of Y, so rows are exact in A, columns are not always
    exact = matrix.map_moments(torch.outer(a, b), second=True)
    name = {"two": "left", "interp": "rest", "cur": "columns"}[kind]
    torch.testing.assert_close(matrix.map_moments(dense, second=True)[name].sum(1), exact[name].sum(1), rtol=1e-9, atol=1e-9)


def test_dense_and_zero_moments():
    expert = expert_of("dense interp cur", 5, 4, 2)
    zeros = {part: {name: torch.zeros_like(t) for name, t in matrix.tensors().items()}
             for part, matrix in expert.parts.items()}
    for second in (False, True):
        found = dense_moments(expert, zeros, second)
        assert found.keys() == expert.parts.keys() and not any(moment.any() for moment in found.values())
    mine = torch.rand(5, 4)
    assert dense_moment(expert.parts["gate"], {"weight": mine}, True) is mine
