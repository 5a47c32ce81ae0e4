"""Which experts of a token are trusted most, against a plain sort."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moedist.routing import most_trusted


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.sampled_from([0.1, 0.2, 0.25, 0.7]), max_size=4), max_size=6), st.integers(0, 5))
def test_the_largest_weights_of_each_token(weights, n):
    tokens = [t for t, of_token in enumerate(weights) for _ in of_token]
    flat = [w for of_token in weights for w in of_token]
    wanted = []
    for of_token in weights:
        best = sorted(range(len(of_token)), key=lambda i: (-of_token[i], i))[:n]
        wanted += [i in best for i in range(len(of_token))]
    found = most_trusted(torch.tensor(tokens, dtype=torch.int64), torch.tensor(flat), n)
    assert found.tolist() == wanted
