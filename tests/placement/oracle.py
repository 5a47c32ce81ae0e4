"""The least makespan of small placement problems, by mixed-integer programming (HiGHS): slow, exact, for tests."""

from __future__ import annotations

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from moedist.placement import Problem


def least_makespan(problem: Problem) -> float:
    """Seconds of the best placement within slots, max_copies and hot_copies, whatever its copies cost.

    Binary x[e, r]: expert e is on rank r; y[e, r] <= x[e, r]: the part of its rows there; minimise T >= rows / speed.
    """
    loads, speeds, capacity = problem.loads, problem.speeds, problem.capacity
    experts, ranks = len(loads), len(speeds)
    n = experts * ranks
    x, y, t = (lambda e, r: e * ranks + r), (lambda e, r: n + e * ranks + r), 2 * n
    rows, lower, upper = [], [], []

    def constrain(terms: dict[int, float], low: float, high: float) -> None:
        row = np.zeros(2 * n + 1)
        for k, v in terms.items():
            row[k] += v
        rows.append(row)
        lower.append(low)
        upper.append(high)

    hottest = sorted(range(experts), key=lambda e: (-loads[e], e))[: problem.hot_copies]
    islands = {i for i, room in zip(problem.islands or (), capacity) if room > 0}  # an island that holds nothing needs none
    for e in range(experts):
        constrain({y(e, r): 1 for r in range(ranks)}, 1, 1)
        constrain({x(e, r): 1 for r in range(ranks)}, 1, np.inf)
        for r in range(ranks):
            constrain({y(e, r): 1, x(e, r): -1}, -np.inf, 0)
        for island in islands if e in hottest else ():
            constrain({x(e, r): 1 for r in range(ranks) if problem.islands[r] == island}, 1, np.inf)
    for r in range(ranks):
        constrain({x(e, r): 1 for e in range(experts)}, 0, capacity[r])
        if speeds[r] > 0:
            constrain({**{y(e, r): loads[e] / speeds[r] for e in range(experts)}, t: -1}, -np.inf, 0)
    constrain({x(e, r): 1 for e in range(experts) for r in range(ranks)}, 0,
              experts + problem.max_copies + len(hottest) * max(0, len(islands) - 1))
    result = milp(np.eye(1, 2 * n + 1, 2 * n)[0], constraints=LinearConstraint(np.array(rows), lower, upper),
                  integrality=np.array([1] * n + [0] * (n + 1)), bounds=Bounds(0, np.array([1] * (2 * n) + [np.inf])),
                  options={"time_limit": 20, "mip_rel_gap": 1e-4})
    assert result.success, result.message
    return float(result.fun)
