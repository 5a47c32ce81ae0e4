"""Top tokens over batches, and what is shown of them."""

import doctest

import torch

from moedist.neurons import tokens
from moedist.neurons.tokens import SPARE, TopTokens, context, distinct
from tests.compress.cases import normal


def test_the_largest_of_either_sign_by_hand():
    top = TopTokens(2, 1)
    top.add(torch.tensor([[1.0, 0.0], [-3.0, 2.0]]), torch.tensor([7, 4]))
    top.add(torch.tensor([[2.0, 0.0]]), torch.tensor([9]))
    assert top.of(0) == [(4, -3.0), (9, 2.0), (7, 1.0)]
    assert top.of(1) == [(4, 2.0)]  # not where it did not fire


def test_batches_do_not_matter():
    h, keys = normal(500, 3, dtype=torch.float32), torch.randperm(500, generator=torch.Generator().manual_seed(0))
    whole, parts = TopTokens(3, 2), TopTokens(3, 2)
    whole.add(h, keys)
    for part, ids in zip(h.split(7), keys.split(7)):
        parts.add(part, ids)
    for j in range(3):
        best = h[:, j].abs().sort(descending=True).indices[:2 * SPARE]
        assert whole.of(j) == parts.of(j) == [(int(keys[i]), float(h[i, j])) for i in best]


def test_equal_ones_come_in_order_of_their_keys():
    top = TopTokens(1, 1)
    top.add(torch.tensor([[2.0], [-2.0], [2.0]]), torch.tensor([5, 3, 8]))
    assert [key for key, _ in top.of(0)] == [3, 5, 8]


def test_the_same_words_are_shown_once():
    ids = [1, 2, 3, 9, 9, 2, 3, 4]  # two sequences of four
    assert distinct([(2, 5.0), (6, 4.0), (1, 3.0)], ids, 4, 9) == [(2, 5.0), (6, 4.0), (1, 3.0)]
    assert distinct([(1, 5.0), (5, 4.0), (0, 3.0)], ids, 4, 9, same=1) == [(1, 5.0), (0, 3.0)]
    assert distinct([(0, 5.0), (4, 4.0)], ids, 4, 1) == [(0, 5.0)]
    assert distinct([(0, 2.0), (4, 1.0)], [6, 0, 0, 5, 6, 0, 0, 0], 4, 2) == [(0, 2.0)]  # what stands before was not seen


def test_context_stays_within_what_the_model_saw():
    def decode(ids):
        return "".join("abcdefgh"[i] for i in ids)
    ids = list(range(8))
    assert context(ids, 6, 4, decode) == ("ef", "h")
    assert context(ids, 4, 4, decode) == ("", "fgh")
    assert context(ids, 3, 8, decode, before=2, after=2) == ("bc", "ef")


def test_doctests():
    assert doctest.testmod(tokens).failed == 0
