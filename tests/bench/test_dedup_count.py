"""Bytes that dedup saves between islands, counted by hand from the routing."""

import pytest

from moedist.bench.dedup_count import TRIPS, WIDTH, _routing, measure_saved
from moedist.bench.split_islands import islands_of, split_in_two
from tests.ranks import run_ranks

_transports = []  # of this rank: groups are made once


def saved(world, top_k):
    if not _transports:
        _transports.append(split_in_two(world))
    return measure_saved(world, _transports[0], top_k)


@pytest.mark.parametrize("transport, ranks", [("torchdist", 2), ("torchdist", 3), ("mpi", 3)])
@pytest.mark.parametrize("top_k", [1, 8])
def test_saved_bytes_are_those_of_the_routing(top_k, ranks, transport):
    islands, plain, once = islands_of(ranks), 0, 0
    for rank in range(ranks):
        to = [(int(token), islands[int(expert) % ranks]) for token, expert in zip(*_routing(rank, top_k))]
        away = [(token, island) for token, island in to if island != islands[rank]]
        plain, once = plain + len(away), once + len(set(away))
    for found in run_ranks(ranks, saved, top_k, transport=transport):
        assert (found.rows_plain, found.rows) == (plain, once)
        assert found.saved == (plain - once) * TRIPS * 4 * WIDTH and (found.saved > 0) == (top_k > 1)
