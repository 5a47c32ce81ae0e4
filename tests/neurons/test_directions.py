"""What neurons read and write, on weights made up so that the answer is known."""

import doctest

import pytest
import torch

from moedist.compress import Expert
from moedist.neurons import directions
from moedist.neurons.directions import basis, largest, mixture, reads, vocabulary, writes
from tests.compress.cases import make_expert, normal

ONES = torch.ones(4)


def test_reads_gate_and_up_through_the_norm():
    expert = Expert(gate=torch.tensor([[1.0, 0, 0, 0]]), up=torch.tensor([[0, 30.0, 40.0, 0]]), down=torch.ones(1, 4))
    assert reads(expert, ONES).tolist() == [pytest.approx([0.5, 0.18, 0.32, 0])]
    assert reads(Expert(None, expert.up, expert.down), ONES).tolist() == [pytest.approx([0, 0.36, 0.64, 0])]
    normed = reads(Expert(None, expert.up, expert.down), torch.tensor([1.0, 4.0, 3.0, 1.0]))
    assert normed.tolist() == [pytest.approx([0, 0.5, 0.5, 0])]


def test_writes_are_shares_and_a_neuron_of_zeros_has_none():
    expert = Expert(None, torch.ones(2, 4), torch.tensor([[0, -3.0, 0, 4.0], [0, 0, 0, 0]]))
    assert writes(expert).tolist() == [pytest.approx([0, 0.36, 0, 0.64]), [0.0] * 4]


def test_words_that_a_direction_raises_and_lowers():
    head = torch.tensor([[2.0, 0, 0, 0], [0, 1.0, 0, 0], [-2.0, 0, 0, 0], [0, -1.0, 0, 0]])  # four words, two opposite pairs
    z = vocabulary(torch.tensor([[5.0, 0, 0, 0], [0, -5.0, 0, 0], [1.0, 1.0, 0, 0], [0, 0, 1.0, 0]]), head, ONES)
    assert largest(z[0], 1)[0][0] == 0 and largest(-z[0], 1)[0][0] == 2
    assert largest(z[1], 1)[0][0] == 3 and largest(-z[1], 1)[0][0] == 1
    assert z[0].tolist() == pytest.approx([2**0.5, 0, -2**0.5, 0])  # in standard deviations: length does not count
    assert z[3].tolist() == [0.0] * 4  # writes what no word reads
    assert largest(z[2], 1)[0][0] == 0
    heavy = vocabulary(torch.tensor([[1.0, 1.0, 0, 0]]), head, torch.tensor([1.0, 9.0, 1.0, 1.0]))
    assert largest(heavy[0], 1)[0][0] == 1  # the last norm lets more of that dimension through


def test_what_all_words_share_is_not_seen():
    head, common = normal(9, 4), normal(4, seed=1)
    torch.testing.assert_close(vocabulary(normal(3, 4, seed=2), head + common, ONES.double()),
                               vocabulary(normal(3, 4, seed=2), head, ONES.double()))


def test_basis_holds_the_most_energy():
    rows = torch.tensor([[0, 0, 3.0, 0], [5.0, 0, 0, 0], [0, 1.0, 0, 0]])
    assert basis(rows, 2).abs().tolist() == [[1, 0], [0, 0], [0, 1], [0, 0]]
    many = normal(30, 8)
    vh = torch.linalg.svd(many).Vh
    torch.testing.assert_close(basis(many, 3) @ basis(many, 3).t(), vh[:3].t() @ vh[:3])
    assert basis(rows, 99).shape == (4, 3) and basis(many[:2], 5).shape == (8, 2)


def test_mixture_weighs_neurons():
    shares = torch.tensor([[1.0, 0], [0, 1.0]])
    assert mixture(shares, torch.tensor([3.0, 1.0])).tolist() == [0.75, 0.25]
    assert mixture(shares, torch.zeros(2)).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_any_dtype(dtype):
    expert, norm = make_expert(6, 8, dtype=dtype), torch.ones(8, dtype=dtype)
    for shares in (reads(expert, norm), writes(expert)):
        torch.testing.assert_close(shares.sum(1).double(), torch.ones(6, dtype=torch.float64), atol=1e-4, rtol=0)
    assert vocabulary(expert.down, normal(5, 8, dtype=dtype), norm).isfinite().all()


def test_doctests():
    assert doctest.testmod(directions).failed == 0
