"""The planner: whole experts first, then as few copies as pay for themselves, then exact shares.

`plan_layer` compares placements without copies (LPT and bin packing, each with local search) with placements that fill
the ranks up to a time T and cut the experts that fit nowhere, for several T from the bound up: McNaughton's wrap-around
(1959) reaches the bound with at most W - 1 cuts, and a little slack needs far fewer. Small problems, where one expert is
much, are searched more thoroughly.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import numpy as np

from moedist.placement.assign import Pieces, best_fit, lpt
from moedist.placement.cost import bound, copy_price, cost, makespan
from moedist.placement.exact import best_grouping
from moedist.placement.fill import fill_by_expert, fill_by_rank, search, seconds_of
from moedist.placement.hot import covered, hot_pieces
from moedist.placement.per_island import join_islands
from moedist.placement.plan import LayerPlan
from moedist.placement.problem import Problem
from moedist.placement.refine import FEW, add_copies, better, drop_copies, polish, shake, with_shares

SLACKS = (0.0, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.3, 0.5)  # how far above the bound ranks are filled
GOOD = 1.003  # near enough to the bound: speeds are not known better than that
FEW_PLACES = 64  # experts times ranks, up to which branch and bound is tried
TINY = 48  # and up to which every neighbour of a plan is tried, where branch and bound does not see all limits
NEAR = 1.02  # bisection ends when it knows the least time to this factor
SMALL = 128  # experts, up to which bin packing is tried too


@functools.lru_cache(maxsize=64)  # layers often pose the same problem
def plan_layer(problem: Problem) -> LayerPlan:
    """The best placement found: least makespan plus what its copies cost. Deterministic.

    Raises:
        PlacementError: `hot_copies` asks for more than the ranks can hold.
    """
    if problem.island_rows is not None:
        layers = {island: plan_layer(of_island) for island, of_island in problem.of_islands.items()}
        return join_islands(problem.islands, layers, problem.rows_of)
    best = polish(with_shares(_whole(problem, "lpt"), problem), problem)
    if makespan(best, problem) > GOOD * bound(problem) and len(problem.loads) <= SMALL:
        best = better(best, polish(with_shares(_whole(problem, "fit"), problem), problem), problem)
    found = [best]
    if makespan(best, problem) > GOOD * problem.fluid_s:
        if problem.hottest:
            for copies in (problem.max_copies, problem.most_copies):  # as if copies of the hottest were not asked for
                if min(makespan(plan, problem) for plan in found) > GOOD * problem.fluid_s:
                    found += covered(plan_layer(replace(problem, hot_copies=0, max_copies=copies)), problem)
        elif problem.most_copies:
            found.append(_fill_up(problem, best))
        found.sort(key=lambda plan: cost(plan, problem))
        if found[0].copies <= FEW:
            found[0] = drop_copies(add_copies(found[0], problem, GOOD * problem.fluid_s), problem)
    return _last_touch(found, problem)


def _fill_up(problem: Problem, best: LayerPlan) -> LayerPlan:
    """`best`, or the cheapest plan that fills the ranks up to some time: more time, fewer copies.

    Where the copies do not suffice near the bound, the least time for which they do is found by bisection.
    """
    lowest, copy_s, short, enough = problem.fluid_s, copy_price(problem), 0.0, makespan(best, problem)

    def fits(limit_s: float) -> bool:
        nonlocal best
        found = [pieces for fill in (fill_by_expert, fill_by_rank) if (pieces := fill(problem, limit_s)) is not None]
        for pieces in found:
            # no need for exact shares where the copies alone cost too much
            if lowest + copy_s * pieces.copies(len(problem.loads)) < cost(best, problem):
                best = better(best, with_shares(pieces, problem), problem)
        return bool(found)

    for slack in SLACKS:
        limit_s = lowest * (1 + slack)
        if limit_s + copy_s >= cost(best, problem):
            break  # one copy more, and still not better
        if fits(limit_s):
            enough = min(enough, limit_s)
        else:
            short = limit_s
    while short and enough > short * NEAR:
        limit_s = math.sqrt(short * enough)
        short, enough = (short, limit_s) if fits(limit_s) else (limit_s, enough)
    return best


def _last_touch(plans: list[LayerPlan], problem: Problem) -> LayerPlan:
    """The first plan, or what a more thorough search finds for a small problem that is not solved well."""
    enough_s, places = GOOD * bound(problem), len(problem.loads) * len(problem.speeds)
    if places > FEW_PLACES or makespan(plans[0], problem) <= enough_s:
        return plans[0]
    if not problem.hottest:
        plans = [best_grouping(problem, plans[0], enough_s), *plans[1:]]
        if not problem.most_copies or all(room in (0, len(problem.loads)) for room in problem.capacity):
            return plans[0]
    if places > TINY:
        return plans[0]
    return min((shake(plan, problem, enough_s) for plan in plans[:2]), key=lambda plan: cost(plan, problem))


def _whole(problem: Problem, how: str) -> Pieces:
    """Every expert in one piece, the hot ones apart; then local search."""
    speeds = np.asarray(problem.speeds, dtype=float)
    pieces, room, rows, rest = hot_pieces(problem)
    loads = [problem.loads[e] for e in rest]
    owners = lpt(loads, speeds, room, rows)
    if how == "fit":  # bin packing (MULTIFIT, Coffman, Garey and Johnson 1978): the least time that all fit in, by bisection
        low = problem.fluid_s
        high = seconds_of(pieces.joined(rest, loads, owners), speeds)
        for _ in range(7):
            middle = (low + high) / 2
            packed = best_fit(loads, speeds, room, rows, middle)
            if (packed >= 0).all():
                owners, high = packed, middle
            else:
                low = middle
    pieces = pieces.joined(rest, loads, owners)
    search(pieces, problem)
    return pieces
