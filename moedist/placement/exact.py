"""Small problems, by branch and bound.

Copies join ranks: where the copied experts connect k ranks, these share their rows as one rank of their summed speeds would,
and k - 1 copies suffice for that (McNaughton's wrap-around, 1959). The best placement with c copies is thus the best placement
of whole experts over W - c groups of ranks, for the best grouping. That is exact where ranks can hold any number of experts;
where they cannot, a group may be unable to share as evenly.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Iterator, Sequence

from moedist.placement.cost import copy_price, cost
from moedist.placement.fill import fill_by_rank
from moedist.placement.plan import LayerPlan
from moedist.placement.problem import Problem
from moedist.placement.refine import better, owners_of, with_best_shares

NODES = 2000  # of the search tree of one grouping
GROUPINGS = 300  # that are looked at

Groups = list[list[int]]


def best_grouping(problem: Problem, best: LayerPlan, enough_s: float) -> LayerPlan:
    """`best`, or the cheapest plan that branch and bound finds, without hot copies; done at a makespan of `enough_s`."""
    ranks = [r for r, room in enumerate(problem.capacity) if room > 0]
    seen = set()
    for groups in itertools.islice(_groupings(ranks, problem.most_copies), GROUPINGS):
        alike = tuple(sorted(tuple(sorted((problem.speeds[r], problem.capacity[r]) for r in group)) for group in groups))
        if alike in seen:
            continue
        seen.add(alike)
        limit_s = cost(best, problem) - copy_price(problem) * (len(ranks) - len(groups))
        owners = branch_and_bound(problem.loads, [sum(problem.speeds[r] for r in group) for group in groups],
                                  [sum(problem.capacity[r] for r in group) - len(group) + 1 for group in groups],
                                  limit_s, enough_s)
        plan = _cut_in_groups(problem, groups, owners) if owners is not None else None
        best = better(best, plan, problem) if plan is not None else best
    return best


def _groupings(ranks: Sequence[int], joins: int) -> Iterator[Groups]:
    """Every way to group ranks that joins groups at most so many times, fewer joins first."""
    for n in range(min(joins, len(ranks) - 1) + 1):
        yield from _with_joins(list(ranks), n)


def _with_joins(ranks: list[int], joins: int) -> Iterator[Groups]:
    first, rest = ranks[0], ranks[1:]
    for n in range(min(joins, len(rest)) + 1):  # others in the group of the first
        for others in itertools.combinations(rest, n):
            left = [r for r in rest if r not in others]
            if left:
                yield from ([[first, *others], *groups] for groups in _with_joins(left, joins - n))
            elif n == joins:
                yield [[first, *others]]


def branch_and_bound(loads: Sequence[float], speeds: Sequence[float], room: Sequence[int], limit_s: float,
                     enough_s: float) -> list[int] | None:
    """[E] ranks of whole experts with the least makespan below `limit_s`, None where there are none.

    Depth first, the largest expert first, each to the rank first that would be done with it first. Ends at a makespan of
    `enough_s`, and after `NODES` nodes with the best so far.
    """
    order = sorted(range(len(loads)), key=lambda e: (-loads[e], e))
    rest = list(itertools.accumulate((loads[e] for e in reversed(order)), initial=0.0))[::-1]  # rows from the k-th on
    smallest = min((load for load in loads if load > 0), default=0.0)
    rows, free, owners = [0.0] * len(speeds), list(room), [0] * len(loads)
    best_s, best, nodes = limit_s, None, NODES

    def place(k: int) -> None:
        nonlocal best_s, best, nodes
        if k == len(order):
            best_s, best = max(held / speed for held, speed in zip(rows, speeds)), list(owners)
            return
        nodes -= 1
        gaps = (best_s * speed - held for held, speed, places in zip(rows, speeds, free) if places)
        if sum(gap for gap in gaps if gap >= smallest) < rest[k]:
            return
        load, tried = loads[order[k]], set()
        for done_s, r in sorted(((rows[r] + load) / speeds[r], r) for r in range(len(speeds)) if free[r] > 0):
            alike = rows[r], speeds[r], free[r]
            if alike in tried:
                continue
            if done_s >= best_s * (1 - 1e-9) or best_s <= enough_s or nodes <= 0:
                return
            tried.add(alike)
            before, owners[order[k]] = rows[r], r
            rows[r], free[r] = before + load, free[r] - 1
            place(k + 1)
            rows[r], free[r] = before, free[r] + 1

    place(0)
    return best


def _cut_in_groups(problem: Problem, groups: Groups, group_of_expert: Sequence[int]) -> LayerPlan | None:
    """Every group's experts over its ranks, with fewer copies than it has ranks; None where there are not enough places."""
    owners: list[tuple[int, ...]] = [()] * len(problem.loads)
    for g, ranks in enumerate(groups):
        experts = [e for e, group in enumerate(group_of_expert) if group == g]
        if not experts:
            continue
        part = replace(problem, loads=tuple(problem.loads[e] for e in experts), speeds=tuple(problem.speeds[r] for r in ranks),
                       slots=tuple(problem.capacity[r] for r in ranks), islands=None, max_copies=len(ranks) - 1, hot_copies=0)
        pieces = fill_by_rank(part, part.fluid_s)
        if pieces is None:
            return None
        for e, held in zip(experts, owners_of(pieces, len(experts))):
            owners[e] = tuple(ranks[i] for i in held)
    return with_best_shares(owners, problem)
