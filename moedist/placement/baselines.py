"""Placements to compare with: what other trainers do, and the textbook method."""

from __future__ import annotations

import numpy as np

from moedist.placement.assign import Pieces, improve, lpt
from moedist.placement.plan import LayerPlan
from moedist.placement.problem import Problem
from moedist.placement.shares import equal_counts, split_batch


def equal_layer(problem: Problem) -> LayerPlan:
    """As many experts on every rank as can be, by id: what trainers that know no other way do."""
    counts = equal_counts(len(problem.loads), len(problem.speeds))
    return LayerPlan.single([r for r, n in enumerate(counts) for _ in range(n)])


def proportional_layer(problem: Problem) -> LayerPlan:
    """Counts in proportion to speed, by largest remainder, experts by id."""
    counts = split_batch(len(problem.loads), problem.speeds)
    return LayerPlan.single([r for r, n in enumerate(counts) for _ in range(n)])


def lpt_layer(problem: Problem, local_search: bool) -> LayerPlan:
    """Longest processing time first, with or without local search; no copies."""
    speeds, capacity = np.asarray(problem.speeds), np.asarray(problem.capacity)
    pieces = Pieces.whole(problem.loads, lpt(problem.loads, speeds, capacity, np.zeros(len(speeds))))
    if local_search:
        improve(pieces, speeds, capacity)
    return LayerPlan.single(pieces.rank_P.tolist())
