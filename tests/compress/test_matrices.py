"""Stored forms: counts, dense equivalents, and Adam's moments against autograd and against exact expectations."""

from itertools import product

import pytest
import torch

from moedist.compress import ColumnsRows, Dense, Interpolated, TwoFactors
from moedist.compress.matrices import INDEX_BYTES, Matrix
from tests.compress.cases import normal

FORMS = {
    "dense": lambda m, n, r: Dense(normal(m, n)),
    "two factors": lambda m, n, r: TwoFactors(normal(m, r), normal(r, n, seed=1)),
    "interpolated": lambda m, n, r: Interpolated(torch.arange(m)[-r:].int(), normal(m - r, r), normal(r, n, seed=1)),
    "columns and rows": lambda m, n, r: ColumnsRows(torch.arange(r).int(), torch.arange(r).int(), normal(m, r),
                                                    normal(r, r, seed=1), normal(r, n, seed=2)),
}
NUMBERS = {"dense": lambda m, n, r: m * n, "two factors": lambda m, n, r: r * (m + n),
           "interpolated": lambda m, n, r: r * (m + n - r), "columns and rows": lambda m, n, r: r * (m + n + r)}
INDICES = {"dense": 0, "two factors": 0, "interpolated": 1, "columns and rows": 2}


def with_tensors(matrix: Matrix, tensors: dict[str, torch.Tensor]) -> Matrix:
    return type(matrix)(**{**matrix.indices(), **tensors})


@pytest.mark.parametrize("m, n, r", [(7, 5, 3), (4, 9, 1), (3, 3, 2)])
@pytest.mark.parametrize("form", FORMS)
def test_counts_and_moments(form, m, n, r):
    matrix = FORMS[form](m, n, r)
    assert matrix.numbers == NUMBERS[form](m, n, r)
    assert matrix.bytes == 8 * matrix.numbers + INDEX_BYTES * r * INDICES[form]
    assert matrix.dense().shape == (m, n)
    assert all(index.dtype == torch.int32 for index in matrix.indices().values())

    gradient = normal(m, n, seed=5)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in matrix.tensors().items()}
    with_tensors(matrix, leaves).dense().backward(gradient)
    first = matrix.map_moments(gradient, second=False)
    second = matrix.map_moments(gradient.square(), second=True)
    assert first.keys() == second.keys() == matrix.tensors().keys()
    for name, tensor in matrix.tensors().items():
        assert torch.allclose(first[name], leaves[name].grad, atol=1e-12)
        assert second[name].shape == tensor.shape and (second[name] >= 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_second_moments_are_those_of_independent_gradients(form):
    """Exactly: the mean, over all signs, of the squared gradients of the factors."""
    matrix = FORMS[form](3, 3, 2)
    size = normal(3, 3, seed=3).abs()
    mean = {name: torch.zeros_like(tensor) for name, tensor in matrix.tensors().items()}
    for signs in product((-1.0, 1.0), repeat=9):
        gradient = size * torch.tensor(signs, dtype=torch.float64).view(3, 3)
        for name, mapped in matrix.map_moments(gradient, second=False).items():
            mean[name] += mapped.square() / 2**9
    mapped = matrix.map_moments(size.square(), second=True)
    assert all(torch.allclose(mapped[name], mean[name]) for name in mean)


def test_moments_keep_their_dtype_where_weights_are_narrower():
    matrix = TwoFactors(normal(4, 2, dtype=torch.bfloat16), normal(2, 3, dtype=torch.bfloat16))
    assert all(moment.dtype == torch.float32 for moment in matrix.map_moments(torch.ones(4, 3), True).values())
    assert matrix.bytes == 2 * 14


def test_interpolated_as_two_thin_products():
    matrix = FORMS["interpolated"](7, 5, 3)
    x, h = normal(4, 5, seed=8), normal(4, 7, seed=9)
    kept, others = matrix.kept.long(), matrix.others
    z = x @ matrix.basis.t()
    out = torch.empty(4, 7, dtype=torch.float64)
    out[:, kept], out[:, others] = z, z @ matrix.rest.t()
    assert torch.allclose(out, x @ matrix.dense().t())
    assert torch.allclose((h[:, kept] + h[:, others] @ matrix.rest) @ matrix.basis, h @ matrix.dense())
