"""Make a plan better by small steps: exact shares, moves and swaps, copies added and left out one by one."""

from __future__ import annotations

import itertools
from typing import Iterator

import numpy as np

from moedist.placement.assign import Pieces
from moedist.placement.cost import copy_price, cost, makespan, rank_loads, seconds
from moedist.placement.fill import search
from moedist.placement.plan import LayerPlan
from moedist.placement.problem import Problem
from moedist.placement.token_shares import best_shares

FEW = 32  # copies, up to which each is looked at by itself
TRIED = 4  # experts, ranks or copies that are tried in each round
NEIGHBOURS = 150  # of a small problem's plan, that are looked at
POLISHED = 24  # of them, the best
ROUNDS = 6  # of local search and exact shares, in turn
NOTHING = 1e-6  # a share up to this is no reason for a copy

Owners = list[tuple[int, ...]]


def better(a: LayerPlan, b: LayerPlan, problem: Problem) -> LayerPlan:
    """The plan that costs less, the first where they cost the same."""
    return min((a, b), key=lambda plan: cost(plan, problem))


def polish(plan: LayerPlan, problem: Problem) -> LayerPlan:
    """Local search on the pieces of a plan and exact shares, in turn, while that helps."""
    for _ in range(ROUNDS):
        pieces = pieces_of(plan, problem)
        search(pieces, problem)
        found = with_shares(pieces, problem)
        if cost(found, problem) >= cost(plan, problem) * (1 - 1e-6):
            return plan
        plan = found
    return plan


def shake(plan: LayerPlan, problem: Problem, enough_s: float) -> LayerPlan:
    """For small problems, where one piece is much: try every move and swap, also those that are worse at first."""
    seen = {plan.owners}
    for _ in range(ROUNDS):
        fresh = {tuple(owners): None for owners in itertools.islice(_neighbours(plan, problem), NEIGHBOURS)}
        near = sorted((with_best_shares(list(owners), problem) for owners in fresh if owners not in seen),
                      key=lambda other: cost(other, problem))
        seen.update(fresh)
        found = plan
        for other in near[:POLISHED]:
            found = better(found, polish(other, problem), problem)
        if cost(found, problem) >= cost(plan, problem) * (1 - 1e-6) or makespan(found, problem) <= enough_s:
            return found
        plan = found
    return plan


def _neighbours(plan: LayerPlan, problem: Problem) -> Iterator[Owners]:
    """Owners with one piece moved or copied, where need be another one making room, or two swapped, within the limits."""
    ranks, owners = range(len(problem.speeds)), list(plan.owners)
    held = [len(plan.experts_of_rank(r)) for r in ranks]
    placed = [(e, r) for e, held_by in enumerate(owners) for r in held_by]

    def exchanged(changes: dict[int, tuple[int, int]]) -> Owners:
        return [tuple(sorted({*held_by, changes[e][1]} - {changes[e][0]})) if e in changes else held_by
                for e, held_by in enumerate(owners)]

    def may_move(e: int, r: int, to: int) -> bool:
        return to not in owners[e] and (not is_needed(problem, owners, e, r) or problem.islands[r] == problem.islands[to])

    for e, r in placed:
        for to in ranks:
            if to in owners[e] or not problem.capacity[to]:
                continue
            away = [r] * may_move(e, r, to) + [-1] * (plan.copies < problem.most_copies)
            if held[to] < problem.capacity[to]:
                yield from (exchanged({e: (a, to)}) for a in away)
                continue
            for other in plan.experts_of_rank(to):  # one of those there makes room
                for third in ranks:
                    if held[third] < problem.capacity[third] and may_move(other, to, third):
                        yield from (exchanged({e: (a, to), other: (to, third)}) for a in away)
        for other, to in placed:
            if r < to and other != e and may_move(e, r, to) and may_move(other, to, r):
                yield exchanged({e: (r, to), other: (to, r)})


def pieces_of(plan: LayerPlan, problem: Problem) -> Pieces:
    """The parts of every expert on every rank; those that an island must have stay in it."""
    placed = [(e, r, problem.loads[e] * share) for e, (ranks, shares) in enumerate(zip(plan.owners, plan.shares))
              for r, share in zip(ranks, shares)]
    experts, ranks, loads = zip(*placed)
    islands = [-1] * len(placed)
    if problem.hottest:
        pinned = {}  # of each hot expert in each island, the first piece
        for k, (e, r, _) in enumerate(placed):
            if e in problem.hottest:
                pinned.setdefault((e, problem.islands[r]), k)
        for (_, island), k in pinned.items():
            islands[k] = island
    return Pieces(np.array(experts), np.array(loads, dtype=float), np.array(ranks), np.array(islands))


def with_shares(pieces: Pieces, problem: Problem) -> LayerPlan:
    """Pieces as a plan, with exact shares."""
    owners = owners_of(pieces, len(problem.loads))
    if len(pieces.expert_P) - len(owners) > FEW and not problem.hottest:  # filled up to a time: shares are exact already
        found = [[0.0] * len(ranks) for ranks in owners]
        for e, r, load in zip(pieces.expert_P.tolist(), pieces.rank_P.tolist(), pieces.load_P.tolist()):
            found[e][owners[e].index(r)] += load / problem.loads[e] if problem.loads[e] else 1.0
        return tidy(owners, tuple(map(tuple, found)), problem)
    return with_best_shares(owners, problem)


def with_best_shares(owners: Owners, problem: Problem, keep: bool = False) -> LayerPlan:
    """Owners as a plan, with exact shares; copies that get no rows are left out unless `keep`."""
    return tidy(owners, best_shares(owners, problem.loads, problem.speeds)[0], problem, keep)


def owners_of(pieces: Pieces, experts: int) -> Owners:
    """Ranks that hold a piece of every expert, ascending."""
    found: list[list[int]] = [[] for _ in range(experts)]
    for e, r in zip(pieces.expert_P.tolist(), pieces.rank_P.tolist()):
        found[e].append(r)
    return [tuple(sorted(ranks)) for ranks in found]


def tidy(owners: Owners, shares: tuple[tuple[float, ...], ...], problem: Problem, keep: bool = False) -> LayerPlan:
    """Leave out copies without rows that no island needs; round shares so that JSON keeps them, summing to one."""
    kept_owners, kept_shares = list(owners), [(1.0,)] * len(owners)
    for e, (ranks, parts) in enumerate(zip(owners, shares)):
        if len(ranks) == 1:
            continue
        part_of = dict(zip(ranks, parts))
        for r, part in () if keep else sorted(part_of.items(), key=lambda item: item[1]):
            if part <= NOTHING and not is_needed(problem, kept_owners, e, r):
                kept_owners[e] = tuple(o for o in kept_owners[e] if o != r)
        kept = [part_of[r] for r in kept_owners[e]]
        rounded = [round(part / sum(kept), 9) for part in kept]
        largest = rounded.index(max(rounded))  # what rounding leaves goes there: it stays above 0
        rounded[largest] = round(1 - sum(rounded[:largest]) - sum(rounded[largest + 1:]), 9)
        kept_shares[e] = tuple(rounded)
    return LayerPlan(tuple(kept_owners), tuple(kept_shares))


def is_needed(problem: Problem, owners: Owners, expert: int, rank: int) -> bool:
    """Whether `hot_copies` asks for this copy: the only one of a hot expert in its island."""
    if problem.islands is None or expert not in problem.hottest:
        return False
    return not any(r != rank and problem.islands[r] == problem.islands[rank] for r in owners[expert])


def add_copies(plan: LayerPlan, problem: Problem, enough_s: float) -> LayerPlan:
    """One copy after the other of an expert on the slowest rank, on the rank that shortens the makespan most."""
    copy_s = copy_price(problem)
    while plan.copies < min(FEW, problem.most_copies) and makespan(plan, problem) > enough_s:
        times = seconds(rank_loads(plan, problem.loads, len(problem.speeds)), problem.speeds)
        slowest = int(np.argmax(times))
        shared = {r for ranks in plan.owners if len(ranks) > 1 for r in ranks} | {slowest}
        if max((times[r] for r in range(len(times)) if r not in shared), default=0.0) + copy_s >= times[slowest]:
            return plan  # a rank that this copy does not help is nearly as slow
        room = np.asarray(problem.capacity) - np.bincount([r for ranks in plan.owners for r in ranks], minlength=len(times))
        spare = (times[slowest] - times) * np.asarray(problem.speeds)  # rows that a rank could take
        targets = [int(r) for r in np.argsort(-spare, kind="stable") if room[r] > 0][:TRIED]
        heaviest = sorted(plan.experts_of_rank(slowest), key=lambda e: (-problem.loads[e], e))[:TRIED]
        found = plan
        for e in heaviest:
            for r in targets:
                if r not in plan.owners[e]:
                    owners = [tuple(sorted((*ranks, r))) if other == e else ranks for other, ranks in enumerate(plan.owners)]
                    found = better(found, with_best_shares(owners, problem), problem)
        found = polish(found, problem) if found is not plan else plan
        if cost(found, problem) >= cost(plan, problem) * (1 - 1e-6):
            return plan
        plan = found
    return plan


def drop_copies(plan: LayerPlan, problem: Problem) -> LayerPlan:
    """Do without copies that cost more than they save, the one with the fewest rows first."""
    while True:
        for _, e, r in unneeded_copies(plan, problem)[:TRIED]:
            fewer = without_copy(plan, problem, e, r)
            if cost(fewer, problem) <= cost(plan, problem) * (1 + 1e-9):
                plan = fewer
                break
        else:
            return plan


def without_copy(plan: LayerPlan, problem: Problem, expert: int, rank: int) -> LayerPlan:
    """The plan with one placement less, and exact shares."""
    owners = [tuple(r for r in ranks if (e, r) != (expert, rank)) for e, ranks in enumerate(plan.owners)]
    return with_best_shares(owners, problem)


def unneeded_copies(plan: LayerPlan, problem: Problem) -> list[tuple[float, int, int]]:
    """(rows, expert, rank) of every placement that its expert could do without, those with the fewest rows first."""
    owners = list(plan.owners)
    return sorted((share * problem.loads[e], e, r) for e, (ranks, shares) in enumerate(zip(plan.owners, plan.shares))
                  if len(ranks) > 1 for r, share in zip(ranks, shares) if not is_needed(problem, owners, e, r))
