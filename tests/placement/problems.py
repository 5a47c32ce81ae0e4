"""Placement problems for the planner's tests."""

from __future__ import annotations

import random
from dataclasses import replace

from hypothesis import strategies as st

from moedist.bench import planner as bench
from moedist.errors import PlacementError
from moedist.placement import Problem
from moedist.placement.hot import hot_pieces


def random_problem(rng: random.Random, experts: tuple[int, int] = (2, 8), ranks: tuple[int, int] = (2, 4),
                   most_copies: int = 3) -> Problem:
    """Skewed loads, some without rows; speeds 1..8, sometimes one 0; any number of places, islands and hot copies."""
    e, w, skew = rng.randint(*experts), rng.randint(*ranks), rng.choice([0, 0.6, 1.2, 2.0])
    loads = [100 * (i + 1) ** -skew * rng.uniform(0.5, 1.5) for i in range(e)]
    for i in rng.sample(range(e), rng.randint(1, max(1, e // 2))) if rng.random() < 0.25 else ():
        loads[i] = 0.0
    rng.shuffle(loads)
    speeds = [rng.choice([1.0, 2.0, 4.0, 8.0]) * rng.choice([1.0, rng.uniform(0.9, 1.1)]) for _ in range(w)]
    if rng.random() < 0.15 and w > 1:
        speeds[rng.randrange(1, w)] = 0.0
    islands, hot = (tuple(2 * r // w for r in range(w)), rng.randint(0, 2)) if rng.random() < 0.3 else (None, 0)
    copies, slots = rng.choice([0, *range(most_copies + 1)]), None
    if rng.random() < 0.5:
        able = [r for r in range(w) if speeds[r] > 0]
        places = [rng.choice(able) for _ in range(e + 2 * hot + rng.randint(0, 3))]
        slots = tuple(places.count(r) for r in range(w))
    try:
        problem = Problem(tuple(loads), tuple(speeds), slots, islands, copies, 0.0, hot)
        hot_pieces(problem)
        return problem
    except PlacementError:  # too few places
        return Problem(tuple(loads), tuple(speeds), None, islands, copies, 0.0, hot)


def problems(**ranges: tuple[int, int] | int) -> st.SearchStrategy[Problem]:
    """The same for hypothesis."""
    return st.randoms(use_true_random=False).map(lambda rng: random_problem(rng, **ranges))


def zipf_problem(ranks: int, experts: int, ratio: int, skew: float, seed: int = 0, **limits) -> Problem:
    """Zipf loads and speeds from 1 to `ratio`, as `moedist bench planner` has them; no copies unless `limits` says so."""
    return replace(bench.zipf_problem(bench.Point(ranks, experts, ratio, skew), seed), **{"max_copies": 0, **limits})
