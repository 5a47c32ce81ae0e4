"""Pairs that stand for all links."""

import doctest

from hypothesis import given
from hypothesis import strategies as st

from moedist.links import pairs
from moedist.links.pairs import choose_pairs


def test_examples():
    assert doctest.testmod(pairs).attempted == 2 and not doctest.testmod(pairs).failed


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from("abcd")), min_size=2, max_size=12), st.integers(1, 70),
       st.booleans())
def test_all_where_they_are_few_and_all_kinds_where_there_is_room(places, most, between):
    islands, hosts = zip(*places)
    found = choose_pairs(islands, hosts, most, between)
    possible = [(a, b) for b in range(len(places)) for a in range(b) if not between or islands[a] != islands[b]]
    assert len(found) <= most and set(found) <= set(possible) and len(set(found)) == len(found)
    kinds = {frozenset((places[a], places[b])) for a, b in possible}
    if len(possible) <= most:
        assert len(found) == len(possible)
    else:
        assert len({frozenset((places[a], places[b])) for a, b in found}) == min(most, len(kinds))
