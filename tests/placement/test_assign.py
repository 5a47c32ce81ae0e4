"""Whole experts: LPT, best fit, local search, and branch and bound against trying everything."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moedist.placement import Problem, equal_layer, lpt_layer, makespan, proportional_layer
from moedist.placement.assign import Pieces, best_fit, improve, lpt
from moedist.placement.exact import branch_and_bound
from tests.placement.problems import zipf_problem

loads_and_speeds = st.tuples(st.lists(st.sampled_from([0.0, 1.0, 2.5, 3.0, 7.0, 11.0]), min_size=1, max_size=6),
                             st.lists(st.sampled_from([1.0, 1.5, 2.0, 8.0]), min_size=1, max_size=3))


def times(owners, loads, speeds):
    return np.bincount(owners, weights=loads, minlength=len(speeds)) / np.asarray(speeds)


def test_lpt_by_hand():
    none = np.zeros(2)
    assert lpt([3, 3, 2, 2, 2], np.ones(2), np.array([5, 5]), none).tolist() == [0, 1, 0, 1, 0]
    assert lpt([4, 4, 4], np.array([2.0, 1.0]), np.array([1, 5]), none).tolist() == [0, 1, 1]  # one place on the fast one
    assert lpt([1, 1], np.array([1.0, 1.0]), np.array([2, 2]), np.array([5.0, 0.0])).tolist() == [1, 1]
    assert lpt([0.0] * 6, np.array([2.0, 1.0, 0.0]), np.full(3, 6), np.zeros(3)).tolist().count(0) == 4  # by speed


def test_best_fit_by_hand():
    assert best_fit([5, 4, 3], np.ones(2), np.array([3, 3]), np.zeros(2), 8.0).tolist() == [0, 1, 0]
    assert best_fit([5, 4, 4], np.ones(2), np.array([3, 3]), np.zeros(2), 8.0).tolist() == [0, 1, 1]
    assert best_fit([9, 1], np.ones(2), np.array([3, 3]), np.zeros(2), 8.0).tolist() == [-1, 0]
    assert best_fit([1, 1], np.ones(2), np.array([1, 0]), np.zeros(2), 8.0).tolist() == [0, -1]


@settings(max_examples=100, deadline=None)
@given(loads_and_speeds, st.data())
def test_branch_and_bound_finds_the_best(case, data):
    loads, speeds = case
    room = data.draw(st.lists(st.integers(0, len(loads)), min_size=len(speeds), max_size=len(speeds)))
    everything = (owners for owners in itertools.product(range(len(speeds)), repeat=len(loads))
                  if all(owners.count(r) <= places for r, places in enumerate(room)))
    least = min((times(owners, loads, speeds).max() for owners in everything), default=None)
    found = branch_and_bound(loads, speeds, room, 1e9, 0.0)
    if least is None:
        assert found is None
    else:
        assert times(found, loads, speeds).max() == pytest.approx(least)
        assert all(found.count(r) <= places for r, places in enumerate(room))
        assert branch_and_bound(loads, speeds, room, least, 0.0) is None  # nothing below it


@settings(max_examples=100, deadline=None)
@given(loads_and_speeds, st.integers(0, 3))
def test_local_search_never_harms_and_counts_its_changes(case, max_changes):
    loads, speeds = case
    capacity = np.full(len(speeds), len(loads))
    start = lpt(loads, np.ones(len(speeds)), capacity, np.zeros(len(speeds)))  # as if ranks were equal
    pieces = Pieces.whole(loads, start.copy())
    changed = improve(pieces, np.asarray(speeds), capacity, max_changes=max_changes)
    assert changed <= max_changes and changed >= (pieces.rank_P != start).sum()
    assert times(pieces.rank_P, loads, speeds).max() <= times(start, loads, speeds).max() * (1 + 1e-9)


def test_local_search_keeps_places_and_islands():
    pieces = Pieces(np.array([0, 0, 1]), np.array([5.0, 1.0, 4.0]), np.array([0, 2, 0]), np.array([0, 1, -1]))
    improve(pieces, np.array([1.0, 1.0, 4.0]), np.array([2, 2, 1]), np.array([0, 0, 1]))
    assert pieces.rank_P.tolist() in ([1, 2, 0], [0, 2, 1])  # expert 0 stays in island 0, and rank 2 is full


def test_local_search_empties_a_rank_without_speed():
    pieces = Pieces.whole([2.0, 1.0], [1, 1])
    improve(pieces, np.array([1.0, 0.0]), np.array([2, 0]))
    assert pieces.rank_P.tolist() == [0, 0]


def test_baselines_by_hand():
    problem = Problem((1.0,) * 6, (3.0, 2.0, 1.0))
    assert equal_layer(problem).primaries == [0, 0, 1, 1, 2, 2]
    assert proportional_layer(problem).primaries == [0, 0, 0, 1, 1, 2]
    assert makespan(lpt_layer(problem, local_search=False), problem) == 1.0


def test_measured_as_published():
    """Our own earlier measurement at speeds 8:1, 16 ranks, 64 experts, Zipf 0.6: LPT 1.063 of the bound, with search 1.006."""
    problem = zipf_problem(16, 64, 8, 0.6)
    even = sum(problem.loads) / sum(problem.speeds)
    plain, searched = (makespan(lpt_layer(problem, local_search=on), problem) / even for on in (False, True))
    assert searched <= 1.01 and searched <= plain <= 1.1
