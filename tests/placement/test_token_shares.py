"""Shares by maximum flow against linear programming."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from moedist.placement import best_shares
from moedist.placement.cost import seconds


def rows_of(owners, shares, loads, ranks):
    rows = np.zeros(ranks)
    for e, held in enumerate(owners):
        rows[list(held)] += loads[e] * np.asarray(shares[e])
    return rows


def by_linear_programming(owners, loads, speeds) -> float:
    """Least makespan: variables are the rows of every expert on each of its owners, and T."""
    pairs = [(e, r) for e, held in enumerate(owners) for r in held]
    scale = sum(loads) / sum(speeds)  # T near 1, rows near 1: the solver's tolerances are absolute
    equal = np.array([[float(e == other) for e, _ in pairs] + [0.0] for other in range(len(owners))])
    upper = np.array([[float(r == rank) for _, r in pairs] + [-speeds[rank] / sum(speeds)] for rank in range(len(speeds))])
    done = linprog([0.0] * len(pairs) + [1.0], A_ub=upper, b_ub=np.zeros(len(speeds)), A_eq=equal,
                   b_eq=np.asarray(loads) / sum(loads), method="highs")
    assert done.success, done.message
    return float(done.fun) * scale


def random_case(rng: random.Random):
    ranks, experts = rng.randint(1, 9), rng.randint(1, 14)
    speeds = [rng.choice([1.0, 2.0, 8.0, 1e5]) * rng.uniform(0.9, 1.1) for _ in range(ranks)]
    most = rng.randint(1, ranks)
    owners = [tuple(sorted(rng.sample(range(ranks), rng.randint(1, most)))) for _ in range(experts)]
    loads = [rng.choice([0.0, 1.0, 10.0, 1000.0]) * rng.uniform(0.1, 1) for _ in range(experts)]
    return owners, loads if sum(loads) else [1.0] * experts, speeds


@settings(max_examples=300, deadline=None)
@given(st.randoms(use_true_random=False).map(random_case))
def test_equal_to_linear_programming(case):
    owners, loads, speeds = case
    shares, found = best_shares(owners, loads, speeds)
    assert found == pytest.approx(by_linear_programming(owners, loads, speeds), rel=1e-4)
    assert [len(parts) for parts in shares] == [len(held) for held in owners]
    assert all(min(parts) >= 0 and sum(parts) == pytest.approx(1) for parts in shares)
    assert found == pytest.approx(seconds(rows_of(owners, shares, loads, len(speeds)), speeds).max())


def test_many_ranks_and_copies():
    rng = random.Random(0)
    speeds = [rng.choice([1.0, 2.0, 4.0, 8.0]) for _ in range(64)]
    loads = [(e + 1) ** -1.2 for e in range(64)]
    owners = [tuple(sorted(rng.sample(range(64), rng.choice([1, 1, 2, 3])))) for _ in range(64)]
    assert best_shares(owners, loads, speeds)[1] == pytest.approx(by_linear_programming(owners, loads, speeds), rel=1e-4)


def test_by_hand():
    """A set of experts that only slow ranks hold decides: the two on rank 1 and 2, 6 rows at speed 3."""
    owners, loads, speeds = [(0,), (1, 2), (1, 2), (0, 2)], [1.0, 3.0, 3.0, 0.0], [10.0, 1.0, 2.0]
    shares, found = best_shares(owners, loads, speeds)
    assert found == pytest.approx(2.0, rel=1e-6)
    assert rows_of(owners, shares, loads, 3) == pytest.approx([1.0, 2.0, 4.0], rel=1e-6)
    assert shares[3] == pytest.approx((10 / 12, 2 / 12))  # without rows: by speed


@pytest.mark.parametrize("owners, loads, speeds, expected", [
    ([(0, 1)], [6.0], [1.0, 2.0], 2.0),
    ([(0, 1), (0,)], [1.0, 9.0], [1.0, 1.0], 9.0),  # the other rank takes all
    ([(0, 1), (0, 1)], [1e-30, 1e-30], [1.0, 1.0], 1e-30),
    ([(0, 1), (1, 2)], [1.0, 1e-15], [1.0, 1.0, 1.0], 0.5),  # too few rows to be seen beside the others
    ([(0, 1), (0, 1)], [0.0, 0.0], [1.0, 1.0], 0.0),
    ([(0, 1), (0, 2)], [1.0, 1.0], [0.0, 1.0, 2.0], 1.0),  # nothing to a rank without speed
    ([(0,), (1,)], [1.0, 1.0], [0.0, 1.0], float("inf")),
    ([(0, 1), (2,)], [1.0, 1.0], [0.0, 0.0, 1.0], float("inf")),
])
def test_edges(owners, loads, speeds, expected):
    shares, found = best_shares(owners, loads, speeds)
    assert found == pytest.approx(expected, rel=1e-6, abs=0)
    assert all(sum(parts) == pytest.approx(1) and min(parts) >= 0 for parts in shares)
