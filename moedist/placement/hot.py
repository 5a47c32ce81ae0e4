"""Copies of the hottest experts in every island (`Problem.hot_copies`): their tokens need not cross between islands."""

from __future__ import annotations

import numpy as np

from moedist.errors import PlacementError
from moedist.placement.assign import Pieces
from moedist.placement.plan import LayerPlan
from moedist.placement.problem import Problem
from moedist.placement.refine import FEW, unneeded_copies, with_best_shares, without_copy


def hot_pieces(problem: Problem) -> tuple[Pieces, np.ndarray, np.ndarray, list[int]]:
    """Pieces of the hottest experts, one in every island that can hold experts, cut by speed; the room and the rows that they
    leave on every rank, [W]; the other experts.

    They do not count against `max_copies`: they were asked for. Local search may move them in their island.

    Raises:
        PlacementError: the ranks cannot hold as many.
    """
    speeds, room = np.asarray(problem.speeds, dtype=float), np.array(problem.capacity)
    rows, pieces = np.zeros(len(speeds)), []
    islands = {i: [r for r, island in enumerate(problem.islands or ()) if island == i and room[r] > 0]
               for i in sorted(set(problem.islands or ()))}
    for e in problem.hottest:
        held = []
        for i, ranks in islands.items():
            open_ranks = [r for r in ranks if room[r] > 0]
            if ranks and not open_ranks:
                places = sum(problem.capacity[r] for r in ranks)
                raise PlacementError(f"placement.hot_copies={problem.hot_copies} needs as many places in island {i}, but its "
                                     f"ranks {ranks} hold {places} experts a layer; lower it, or raise placement.max_experts")
            if ranks:
                part = problem.loads[e] * speeds[ranks].sum() / sum(speeds[rs].sum() for rs in islands.values())
                held.append(min(open_ranks, key=lambda r: ((rows[r] + part) / speeds[r], r)))
        for r in held:
            part = problem.loads[e] * speeds[r] / speeds[held].sum()
            pieces.append((e, part, r, problem.islands[r]))
            rows[r] += part
            room[r] -= 1
    rest = [e for e in range(len(problem.loads)) if e not in problem.hottest]
    if room.sum() < len(rest):
        raise PlacementError(f"placement.hot_copies={problem.hot_copies} takes {len(pieces)} of {sum(problem.capacity)} "
                             f"places and leaves {room.sum()} for the other {len(rest)} experts; lower it, or raise "
                             "placement.max_experts")
    experts, loads, ranks, of_island = zip(*pieces) if pieces else ((),) * 4
    return Pieces(np.array(experts, dtype=int), np.array(loads, dtype=float), np.array(ranks, dtype=int),
                  np.array(of_island, dtype=int)), room, rows, rest


def covered(plan: LayerPlan, problem: Problem) -> list[LayerPlan]:
    """The plan with copies of the hottest experts in the islands that have none, and without others that are then too many;
    nothing where that does not fit."""
    owners = list(plan.owners)
    for e in problem.hottest:
        for island in sorted(set(problem.islands) - {problem.islands[r] for r in owners[e]}):
            held = np.bincount([r for ranks in owners for r in ranks], minlength=len(problem.speeds))
            able = [r for r, i in enumerate(problem.islands) if i == island and held[r] < problem.capacity[r]]
            if able:
                owners[e] = tuple(sorted((*owners[e], max(able, key=lambda r: (problem.speeds[r], -r)))))
            elif any(problem.capacity[r] for r, i in enumerate(problem.islands) if i == island):
                return []
    old = [dict(zip(ranks, shares)) for ranks, shares in zip(plan.owners, plan.shares)]
    found = LayerPlan(tuple(owners), tuple(tuple(share.get(r, 0.0) for r in ranks) for ranks, share in zip(owners, old)))
    if found.copies <= FEW:  # with more the hottest are on many ranks: the others gain nothing from one that is added
        found = with_best_shares(owners, problem)
    while found.copies > problem.most_copies:
        spare = unneeded_copies(found, problem)
        if not spare:
            return []
        _, e, r = spare[0]
        found = without_copy(found, problem, e, r)
    return [found]


def covers(plan: LayerPlan, problem: Problem, tolerance: float) -> bool:
    """Whether the experts that have copies in every island carry as many rows as the hottest, up to `tolerance`.

    Experts of nearly equal load change places in every step; that alone is no reason for another plan.
    """
    if not problem.hottest:
        return True
    islands = {i for i, room in zip(problem.islands, problem.capacity) if room > 0}
    loads = sorted((problem.loads[e] for e, ranks in enumerate(plan.owners) if islands <= {problem.islands[r] for r in ranks}),
                   reverse=True)
    return sum(loads[:len(problem.hottest)]) >= (1 - tolerance) * sum(problem.loads[e] for e in problem.hottest)
