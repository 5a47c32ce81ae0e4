"""SRP and SCH against their definitions, tried out in full on small routings."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moedist.traces.consistency import (
    best_segments, cache_hits, independent_histogram, segment_counts, segment_histogram,
)


def random_trace(draw, sequences, tokens, experts):
    bits = draw(st.lists(st.booleans(), min_size=sequences * tokens * experts, max_size=sequences * tokens * experts))
    return torch.tensor(bits).view(sequences, tokens, experts)


def best_of_all_routers(active, m):
    """(F1, size ratio) of the best segment router, by trying every one: token by token, as the definition is written."""
    sequences, tokens, experts = active.shape
    tasks = [(g, p, e) for g in range(sequences) for p in range(tokens - m + 1) for e in range(experts)]
    best = (0.0, 0.0)
    for choice in itertools.product([0, 1], repeat=len(tasks)):
        tp = fp = fn = 0
        for (g, p, e), called in zip(tasks, choice):
            for i in range(p, p + m):
                real = bool(active[g, i, e])
                tp, fp, fn = tp + (called and real), fp + (called and not real), fn + (not called and real)
        if tp and 2 * tp / (2 * tp + fp + fn) > best[0] + 1e-12:
            best = 2 * tp / (2 * tp + fp + fn), sum(choice) * m / (tp + fn)
    return best


@settings(max_examples=25)
@given(st.data(), st.sampled_from([(1, 4, 2, 2), (2, 3, 2, 2), (1, 5, 2, 3), (2, 2, 2, 1), (2, 3, 1, 1)]))
def test_no_segment_router_is_better(data, sizes):
    *shape, m = sizes
    active = random_trace(data.draw, *shape)
    found = best_segments(segment_histogram(active, m))
    f1, _ = best_of_all_routers(active, m)
    assert found.srp == pytest.approx(f1)
    assert (found.size_ratio > 0) == bool(f1)


def test_by_hand():
    """Expert 0 in all tokens, expert 1 in the first of four: two of three segments of two are without it."""
    active = torch.tensor([[[1, 1], [1, 0], [1, 0], [1, 0]]]).bool()
    assert segment_counts(active, 2).tolist() == [[[2, 1], [2, 0], [2, 0]]]
    histogram = segment_histogram(active, 2)
    assert histogram.tolist() == [[0, 0, 3], [2, 1, 0]]
    assert best_segments(histogram[:1]) == (1.0, 1.0)
    assert best_segments(histogram[1:]) == pytest.approx((2 * 1 / (2 + 1), 2.0))
    # with expert 1 in its segment: 2 * 7 / (8 + 7), without: 2 * 6 / (6 + 7)
    assert best_segments(histogram) == pytest.approx((14 / 15, 8 / 7))
    assert best_segments(segment_histogram(active, 5)) == (0.0, 0.0), "no sequence is so long"


def test_histograms_add_up_over_sequences():
    active = torch.rand(5, 9, 3, generator=torch.Generator().manual_seed(0)) < 0.4
    parts = sum(segment_histogram(part, 4) for part in active.split([2, 0, 3]))
    assert torch.equal(parts, segment_histogram(active, 4)) and parts.sum() == 5 * 6 * 3


def test_frequencies_alone():
    share = torch.tensor([0.0, 0.1, 0.5, 1.0])
    for m in (1, 7, 64):
        histogram = independent_histogram(share, m)
        torch.testing.assert_close(histogram.sum(1), torch.ones(4).double())
        torch.testing.assert_close(histogram @ torch.arange(m + 1.0).double(), m * share.double())
    drawn = torch.rand(40, 500, 4, generator=torch.Generator().manual_seed(1)) < share
    expected = best_segments(independent_histogram(share, 8))
    assert best_segments(segment_histogram(drawn, 8)).srp == pytest.approx(expected.srp, abs=0.005)
    still = drawn[:, :1].expand(-1, 500, -1)  # the same frequencies, but experts never change
    assert best_segments(segment_histogram(still, 8)).srp == 1 > expected.srp + 0.05


def simulated_hits(active, m, size):
    """The cache of section 2.3, sequence by sequence and token by token, with sets."""
    hits = 0
    for sequence in active.tolist():
        wanted = [[e for e, on in enumerate(token) if on] for token in sequence]
        seen = list(dict.fromkeys(e for token in wanted for e in token))
        cache, last = set(seen[:size]), {}
        for t, token in enumerate(wanted):
            hits += len(cache & set(token))
            ahead = [e for later in wanted[t:t + m] for e in later]

            def worth(e):
                return e in token, ahead.count(e), last.get(e, 0), -e
            cache = set(sorted(cache | set(token), key=worth, reverse=True)[:size])
            last.update({e: t + 1 for e in token})
    return hits


@settings(max_examples=150)
@given(st.data(), st.integers(1, 3), st.integers(1, 9), st.integers(2, 5), st.integers(1, 6), st.integers(1, 5))
def test_hits_are_those_of_the_simulation(data, sequences, tokens, experts, m, size):
    active = random_trace(data.draw, sequences, tokens, experts)
    assert cache_hits(active, m, size) == simulated_hits(active, m, min(size, experts))


def lru_hits(choices, size):
    order, hits = list(dict.fromkeys(choices))[:size][::-1], 0
    for e in choices:
        hits += e in order
        order = ([x for x in order if x != e] + [e])[-size:]
    return hits


def best_hits(choices, size):
    """Of any cache that begins full: all ways to evict."""
    caches = {frozenset(list(dict.fromkeys(choices))[:size]): 0}
    for e in choices:
        after: dict = {}
        for cache, hits in caches.items():
            for kept in [cache] if e in cache or len(cache) < size else [cache - {out} for out in cache]:
                key = kept | {e}
                after[key] = max(after.get(key, 0), hits + (e in cache))
        caches = after
    return max(caches.values())


@settings(max_examples=40)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=14), st.integers(1, 4))
def test_between_lru_and_the_best_cache(choices, size):
    active = torch.nn.functional.one_hot(torch.tensor([choices]), 5).bool()
    assert cache_hits(active, 1, size) == lru_hits(choices, size)
    assert all(cache_hits(active, m, size) <= best_hits(choices, size) for m in (1, 2, 5, 20))
    assert cache_hits(active, 3, 5) == len(choices), "room for all"
