"""Batches for unequal ranks against every possible split."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moedist.errors import PlacementError
from moedist.placement import plan_batch


def slowest(counts, speeds) -> float:
    return max((n / s for n, s in zip(counts, speeds) if n), default=0.0)


def best_of_all(total, speeds, caps) -> float | None:
    """The slowest rank's time in the best of all splits; None where none keeps the caps."""
    rooms = [min(total, cap) if s > 0 else 0 for s, cap in zip(speeds, caps)]
    splits = (counts for counts in itertools.product(*(range(room + 1) for room in rooms)) if sum(counts) == total)
    return min((slowest(counts, speeds) for counts in splits), default=None)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 9), st.lists(st.sampled_from([0.0, 0.7, 1.0, 1.5, 2.0, 8.0]), min_size=1, max_size=4), st.data())
def test_optimal_and_within_caps(total, speeds, data):
    caps = data.draw(st.none() | st.lists(st.integers(0, 9), min_size=len(speeds), max_size=len(speeds)))
    least = best_of_all(total, speeds, caps if caps is not None else [total] * len(speeds))
    if least is None:
        with pytest.raises(PlacementError, match=f"{total} sequences does not fit"):
            plan_batch(total, speeds, caps)
        return
    counts = plan_batch(total, speeds, caps)
    assert sum(counts) == total and min(counts) >= 0
    assert slowest(counts, speeds) == pytest.approx(least)
    assert not any(n for n, s in zip(counts, speeds) if s == 0)
    assert caps is None or all(n <= cap for n, cap in zip(counts, caps))


def test_by_hand():
    assert plan_batch(32, [1, 1, 1, 1]) == [8, 8, 8, 8]
    assert plan_batch(3, [1, 1]) == [2, 1]
    assert plan_batch(15, [8, 4, 2, 1], caps=[5, 99, 99, 99]) == [5, 6, 3, 1]


def test_what_does_not_fit_is_refused_with_numbers():
    with pytest.raises(PlacementError, match=r"10 sequences.*\[3, 0, 4\], 7 in all.*train.accumulate"):
        plan_batch(10, [1.0, 0.0, 2.0], caps=[3, 9, 4])
