"""One choice for every item at least cost within a budget of bytes: the multiple-choice knapsack, solved exactly."""

from __future__ import annotations

import math
from typing import Sequence

import numpy as np
import scipy.optimize
import scipy.sparse

from moedist.errors import CompressError

SPAN = 1e4  # costs are scaled to this in all: HiGHS stops when it is within 1e-6 of the best


def choose(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int,
           what: str = "the choices") -> list[int]:
    """For every item the index of its choice: least sum of costs with sizes that sum to at most the budget.

    As a mixed-integer linear program, min sum c_ij x_ij with sum_j x_ij = 1 and sum s_ij x_ij <= budget, by branch and bound
    (HiGHS, Huangfu & Hall 2018): its relaxation leaves at most one item undecided, so few branches are needed. Choices that
    cost as much as a smaller one are left out first, so that of equal solutions the smaller is more likely.

    Args:
        costs, sizes: [item][choice], finite; sizes are integers, e.g. bytes.
        what: is chosen, for the error.

    Raises:
        CompressError: the smallest choices exceed the budget, with both numbers.
    """
    least = sum(min(of_item) for of_item in sizes)
    if least > budget:
        raise CompressError(f"{what} take at least {least} bytes, and may take {budget}: give more bytes or fewer bits")
    if not costs:
        return []
    kept = [_worth_it(c, s) for c, s in zip(costs, sizes)]
    base = [min(s[j] for j in js) for s, js in zip(sizes, kept)]
    extra = [[s[j] - b for j in js] for s, js, b in zip(sizes, kept, base)]
    room = budget - sum(base)
    unit = math.gcd(*(e for of_item in extra for e in of_item)) or 1
    lowest = [min(c[j] for j in js) for c, js in zip(costs, kept)]
    rise = [[c[j] - low for j in js] for c, js, low in zip(costs, kept, lowest)]
    scale = SPAN / (sum(max(of_item) for of_item in rise) or 1.0)
    items = np.repeat(np.arange(len(kept)), [len(js) for js in kept])
    c = scale * np.array([r for of_item in rise for r in of_item])
    s = np.array([e // unit for of_item in extra for e in of_item], dtype=float)
    one = scipy.sparse.csr_array((np.ones(len(c)), (items, np.arange(len(c)))))
    limits = [scipy.optimize.LinearConstraint(one, 1, 1), scipy.optimize.LinearConstraint(s[None], 0, room // unit)]
    found = scipy.optimize.milp(c, constraints=limits, integrality=np.ones(len(c)), bounds=scipy.optimize.Bounds(0, 1),
                                options={"mip_rel_gap": 0.0})
    assert found.success, found.message  # the smallest choices are a solution
    starts = np.cumsum([0, *map(len, kept)])
    return [js[int(found.x[a:b].argmax())] for js, a, b in zip(kept, starts, starts[1:])]


def _worth_it(costs: Sequence[float], sizes: Sequence[int]) -> list[int]:
    """Choices that cost less than all smaller ones, by size."""
    found: list[int] = []
    for j in sorted(range(len(costs)), key=lambda j: (sizes[j], costs[j], j)):
        if not found or costs[j] < costs[found[-1]]:
            found.append(j)
    return found
