"""Speeds: calls counted in, alike ranks made equal, corrected by what steps took."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moedist.coordinator.speeds import LITTLE, WINDOW, RankTimes, Speeds, SpeedTracker
from tests.coordinator.ranks_of import facts_of


def times(rows, expert_s, tokens=None, dense_s=None):
    ranks = len(rows)
    return RankTimes({0: list(rows)}, list(tokens or [0] * ranks), list(expert_s), list(dense_s or [0.0] * ranks))


SOME_RANKS = st.lists(st.tuples(st.floats(0, 0.1), st.floats(1, 1e4)), min_size=1, max_size=6)


@given(SOME_RANKS, st.floats(1e3, 1e6), st.integers(1, 3))
def test_effective_speeds_make_all_ranks_take_equally_long(ranks, total, calls):
    speeds = Speeds(tuple(c for c, _ in ranks), tuple(s for _, s in ranks))
    effective, least = speeds.effective(total, calls), speeds.least_s(total, calls)
    for r, (call, speed) in enumerate(ranks):
        part = speed * (least - calls * call)
        if part > LITTLE * total / len(ranks):
            assert part / effective[r] == pytest.approx(least)
            assert speeds.seconds(r, part, calls) == pytest.approx(least)
        else:  # a rank whose call alone takes about as long looks slow, but not impossible
            assert 0 < effective[r] <= speed * (1 + 1e-12)


@given(SOME_RANKS, st.floats(1e3, 1e6), st.lists(st.floats(0, 1), min_size=6, max_size=6))
def test_no_way_to_share_the_rows_takes_less_than_the_least_time(ranks, total, cuts):
    speeds = Speeds(tuple(c for c, _ in ranks), tuple(s for _, s in ranks))
    cuts = cuts[:len(ranks)] if sum(cuts[:len(ranks)]) else [1.0] * len(ranks)
    parts = [total * c / sum(cuts) for c in cuts]
    assert max(speeds.seconds(r, n, 1) for r, n in enumerate(parts)) >= speeds.least_s(total, 1) * (1 - 1e-9)
    assert speeds.seconds_of_all(parts, 1).tolist() == pytest.approx([speeds.seconds(r, n, 1) for r, n in enumerate(parts)])


def test_least_time_by_hand_leaves_out_a_rank_whose_call_is_longer():
    speeds = Speeds((0.0, 0.5, 9.0), (100.0, 100.0, 1000.0))
    assert speeds.least_s(150, 1) == 1.0  # 100 rows on the first, 50 on the second in the half second that its call leaves
    assert speeds.least_s(10, 1) == 0.1


def test_a_rank_without_speed_takes_nothing():
    speeds = Speeds((0.0, 0.0), (0.0, 10.0))
    assert speeds.effective(50, 1) == (0.0, 10.0) and speeds.least_s(50, 1) == 5.0
    assert speeds.seconds(0, 1, 1) == math.inf and speeds.seconds(0, 0, 1) == 0
    assert speeds.seconds_of_all([1, 20], 1).tolist() == [math.inf, 2.0]


def test_a_rank_with_nothing_to_do_takes_no_time():
    assert Speeds((0.5,), (10.0,)).seconds(0, 0, 3) == 0
    assert Speeds((0.5,), (10.0,)).seconds(0, 20, 3) == 3.5


def test_alike_ranks_get_the_same_speed():
    snapped = Speeds((0.0,) * 5, (100.0, 104.0, 55.0, 52.0, 10.0)).snapped()
    assert snapped.per_s == (102.0, 102.0, 53.5, 53.5, 10.0)


def test_a_slow_down_is_seen_after_half_a_window_and_an_odd_step_is_not():
    tracker = SpeedTracker(facts_of([100.0, 100.0]))
    for step in range(40):
        slow = 4.0 if step >= 30 else 1.0
        odd = 9.0 if step == 20 else 1.0
        tracker.observe(times([50, 50], [0.5 * odd, 0.5 * slow]), 1)
        if step == 25:
            assert tracker.speeds()[0].per_s == (100.0, 100.0)
    assert tracker.speeds()[0].per_s == pytest.approx((100.0, 25.0))
    assert WINDOW // 2 < 10


def test_a_rank_without_experts_is_judged_by_its_dense_part_and_the_other_way_round():
    tracker = SpeedTracker(facts_of([100.0] * 3))
    # rank 1 has no experts but is three times slower in the dense part; rank 2 has no batch but slow experts
    for _ in range(5):
        tracker.observe(times([50, 0, 50], [0.5, 0.0, 1.0], [100, 100, 0], [2.0, 6.0, 0.0]), 1)
    expert, dense = tracker.factors()
    assert expert == pytest.approx([1, 6 * 1.5 / 4, 2]) and dense[:2] == pytest.approx([2, 6])
    assert dense[2] > dense[0]


def test_given_speeds_are_not_corrected():
    tracker = SpeedTracker(facts_of([8.0, 1.0], measured=False))
    tracker.observe(times([50, 50], [9.0, 9.0]), 1)
    assert tracker.speeds()[0].per_s == (8.0, 1.0)


def test_expert_over_mean_by_hand():
    assert times([1, 1, 1, 1], [4.0, 2.0, 1.0, 1.0]).expert_over_mean == 2.0
    assert times([0, 0], [0.0, 0.0]).expert_over_mean == 1.0
