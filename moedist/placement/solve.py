"""The planner: whole experts first, then as few copies as pay for themselves, then exact shares.

`plan_layer` compares placements without copies (LPT and bin packing, each with local search) with placements that fill
the ranks up to a time T and cut the experts that fit nowhere, for several T from the bound up: McNaughton's wrap-around
(1959) reaches the bound with at most W - 1 cuts, and a little slack needs far fewer.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np

from moedist.errors import PlacementError
from moedist.placement.assign import Pieces, best_fit, improve, lpt
from moedist.placement.cost import bound, cost, makespan
from moedist.placement.fill import add_pieces, fill_by_expert, fill_by_rank, makespan_of, search, start_pieces
from moedist.placement.plan import LayerPlan
from moedist.placement.problem import Problem
from moedist.placement.refine import FEW, add_copies, better, drop_copies, polish, shake, with_shares
from moedist.placement.shares import equal_counts

SLACKS = (0.0, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.3, 0.5)  # how far above the bound ranks are filled
GOOD = 1.003  # near enough to the bound: speeds are not known better than that
GOOD = 1.003  # near enough to the bound: speeds are not known better than that
COPIES_SAVE = 5e-3
TINY = 48  # experts times ranks, up to which every neighbour of a plan is tried
SMALL = 128  # experts, up to which bin packing is tried too


@functools.lru_cache(maxsize=64)  # layers often pose the same problem
def plan_layer(problem: Problem) -> LayerPlan:
    """The best placement found: least makespan plus what its copies cost. Deterministic.

    Raises:
        PlacementError: `hot_copies` asks for more than the ranks can hold.
    """
    hot = _hot_pieces(problem)
    best = polish(with_shares(_whole(problem, hot, "lpt"), problem), problem)
    if makespan(best, problem) > GOOD * bound(problem) and len(problem.loads) <= SMALL:
        best = better(best, polish(with_shares(_whole(problem, hot, "fit"), problem), problem), problem)
    lowest = bound(replace(problem, max_copies=max(1, problem.max_copies)))
    if problem.max_copies == 0 or makespan(best, problem) <= GOOD * lowest:
        return _last_touch([best], problem)
    whole = best
    for slack in SLACKS:
        if lowest * (1 + slack) + problem.copy_cost_s >= cost(best, problem):
            break  # one copy more, and still not better
        for fill in (fill_by_expert, fill_by_rank):
            filled = fill(problem, hot, lowest * (1 + slack))
            if filled is not None:
                best = better(best, with_shares(filled, problem), problem)
    if best.copies <= FEW:
        best = drop_copies(add_copies(best, problem, GOOD * lowest), problem)
    return _last_touch([best, whole], problem)


def _last_touch(plans: list[LayerPlan], problem: Problem) -> LayerPlan:
    """The first plan, or for a tiny problem the best that shaking the plans finds."""
    enough_s = GOOD * bound(problem)
    if len(problem.loads) * len(problem.speeds) > TINY or makespan(plans[0], problem) <= enough_s:
        return plans[0]
    fresh = LayerPlan.single(lpt(problem.loads, np.ones(len(problem.speeds)), np.asarray(problem.capacity),
                                 np.zeros(len(problem.speeds))).tolist())  # as if ranks were equal: far from the others
    starts = plans if problem.hot_copies else [*plans, fresh]
    return min((shake(plan, problem) for plan in starts), key=lambda plan: cost(plan, problem))


def equal_layer(problem: Problem) -> LayerPlan:
    """As many experts on every rank as can be, by id: what trainers that know no other way do."""
    counts = equal_counts(len(problem.loads), len(problem.speeds))
    return LayerPlan.single([r for r, n in enumerate(counts) for _ in range(n)])


def proportional_layer(problem: Problem) -> LayerPlan:
    """Counts in proportion to speed, by largest remainder, experts by id."""
    speeds, experts = np.asarray(problem.speeds), len(problem.loads)
    exact = experts * speeds / speeds.sum()
    counts = np.floor(exact).astype(int)
    for r in sorted(range(len(speeds)), key=lambda r: (counts[r] - exact[r], r))[: experts - counts.sum()]:
        counts[r] += 1
    return LayerPlan.single(np.repeat(np.arange(len(speeds)), counts).tolist())


def lpt_layer(problem: Problem, local_search: bool) -> LayerPlan:
    """Longest processing time first, with or without local search; no copies."""
    speeds, capacity = np.asarray(problem.speeds), np.asarray(problem.capacity)
    pieces = Pieces.whole(problem.loads, lpt(problem.loads, speeds, capacity, np.zeros(len(speeds))))
    if local_search:
        improve(pieces, speeds, capacity)
    return LayerPlan.single(pieces.rank_P.tolist())


def _hot_pieces(problem: Problem) -> list[tuple[int, int]]:
    """(expert, rank) that `hot_copies` asks for: each of the hottest experts once in every island that can hold experts.

    They count neither against `max_copies` nor as a cost: they were asked for. Local search may move them in their island.
    """
    hottest = problem.hottest
    if not hottest:
        return []
    room, speeds = list(problem.capacity), problem.speeds
    islands = {i: [r for r, island in enumerate(problem.islands) if island == i and room[r] > 0]
               for i in sorted(set(problem.islands))}
    rows, pieces = [0.0] * len(speeds), []
    for e in hottest:
        reached = {i: ranks for i, ranks in islands.items() if ranks}
        total = sum(speeds[r] for ranks in reached.values() for r in ranks)
        for i, ranks in reached.items():
            part = problem.loads[e] * sum(speeds[r] for r in ranks) / total
            open_ranks = [r for r in ranks if room[r] > 0]
            if not open_ranks:
                raise PlacementError(f"placement.hot_copies={problem.hot_copies} needs {problem.hot_copies} experts of a layer in "
                                     f"island {i}, whose ranks {ranks} hold {sum(problem.capacity[r] for r in ranks)}; lower it, "
                                     "or raise placement.max_experts")
            r = min(open_ranks, key=lambda r: ((rows[r] + part) / speeds[r], r))
            pieces.append((e, r))
            rows[r] += part
            room[r] -= 1
    if sum(room) < len(problem.loads) - len(hottest):
        raise PlacementError(f"placement.hot_copies={problem.hot_copies} takes {len(pieces)} of {sum(problem.capacity)} places and "
                             f"leaves {sum(room)} for the other {len(problem.loads) - len(hottest)} experts; lower it, or raise "
                             "placement.max_experts")
    return pieces


def _whole(problem: Problem, hot: list[tuple[int, int]], how: str) -> Pieces:
    """Every expert in one piece, the hot ones apart; then local search."""
    speeds = np.asarray(problem.speeds, dtype=float)
    pieces, room, rows, rest = start_pieces(problem, hot)
    loads = [problem.loads[e] for e in rest]
    owners = lpt(loads, speeds, room, rows)
    if how == "fit":  # bin packing (MULTIFIT, Coffman, Garey and Johnson 1978): the least time that all fit in, by bisection
        low, high = bound(replace(problem, max_copies=1)), makespan_of(owners, loads, rows, speeds)
        for _ in range(10):
            middle = (low + high) / 2
            packed = best_fit(loads, speeds, room, rows, middle)
            if (packed >= 0).all():
                owners, high = packed, middle
            else:
                low = middle
    pieces = add_pieces(pieces, rest, loads, owners.tolist())
    search(pieces, problem)
    return pieces
