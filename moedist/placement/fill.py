"""Cut experts so that all ranks are done at a given time: two ways to fill ranks, and the pieces that they start from.

Both place whole experts where they fit before `limit_s`. `fill_by_expert` goes through the experts and cuts one where it
fits nowhere: few cuts where there is some slack. `fill_by_rank` goes through the ranks and cuts where a rank would not be
full: at most one cut a rank at the bound itself, as McNaughton's wrap-around rule (1959).
"""

from __future__ import annotations

from typing import Sequence

import numpy as np

from moedist.placement.assign import Pieces, improve
from moedist.placement.problem import Problem

Hot = Sequence[tuple[int, int]]  # (expert, rank) that must be


def start_pieces(problem: Problem, hot: Hot) -> tuple[Pieces, np.ndarray, np.ndarray, list[int]]:
    """(hot pieces, room and rows they leave on every rank, the other experts)."""
    speeds = np.asarray(problem.speeds, dtype=float)
    total_E = {e: sum(speeds[r] for other, r in hot if other == e) for e, _ in hot}
    loads = [problem.loads[e] * speeds[r] / total_E[e] for e, r in hot]
    pieces = Pieces(np.array([e for e, _ in hot], dtype=int), np.array(loads, dtype=float),
                    np.array([r for _, r in hot], dtype=int), np.array([problem.islands[r] for _, r in hot], dtype=int))
    room = np.asarray(problem.capacity) - pieces.held(len(speeds))
    return pieces, room, pieces.rows(len(speeds)), [e for e in range(len(problem.loads)) if e not in total_E]


def add_pieces(pieces: Pieces, experts: list[int], loads: list[float], ranks: list[int]) -> Pieces:
    """More pieces, that may go anywhere."""
    return Pieces(np.concatenate([pieces.expert_P, np.array(experts, dtype=int)]),
                  np.concatenate([pieces.load_P, np.array(loads, dtype=float)]),
                  np.concatenate([pieces.rank_P, np.array(ranks, dtype=int)]),
                  np.concatenate([pieces.island_P, np.full(len(experts), -1)]))


def search(pieces: Pieces, problem: Problem, max_changes: int | None = None, max_rounds: int | None = None) -> int:
    """Local search within the problem's limits, in place; see `improve`."""
    islands = None if problem.islands is None else np.asarray(problem.islands)
    return improve(pieces, np.asarray(problem.speeds, dtype=float), np.asarray(problem.capacity), islands, max_changes,
                   max_rounds)


def makespan_of(owners: np.ndarray, loads: list[float], rows_W: np.ndarray, speeds: np.ndarray) -> float:
    """Seconds of the slowest rank with whole experts on top of the rows it has."""
    rows = rows_W + np.bincount(owners, weights=loads, minlength=len(speeds))
    return float((rows[rows > 0] / speeds[rows > 0]).max(initial=0.0))


def fill_by_rank(problem: Problem, hot: Hot, limit_s: float) -> Pieces | None:
    """Ranks filled up to a time one after the other, the fastest first; None if places or copies do not suffice.

    A rank takes the largest experts that fit whole. Where the ranks after it could not take the rest, it is filled to the
    brim with a part of one more, whose other part stays to be placed: one cut a rank at most, as in McNaughton's rule.
    """
    speeds = np.asarray(problem.speeds, dtype=float)
    pieces, room_W, rows_W, rest = start_pieces(problem, hot)
    order = sorted((r for r in range(len(speeds)) if room_W[r] > 0), key=lambda r: (-speeds[r], r))
    space_W = np.maximum(limit_s * speeds - rows_W, 0.0)
    left = dict(sorted(((e, problem.loads[e]) for e in rest), key=lambda item: (-item[1], item[0])))
    places, space, waiting, copies = int(room_W.sum()), float(space_W[order].sum()), sum(left.values()), 0
    experts, loads, ranks = [], [], []
    for r in order:
        room, free = int(room_W[r]), float(space_W[r])
        places, space = places - room, space - free
        for e in list(left):
            if room == 0:
                break
            if left[e] <= free * (1 + 1e-9):
                part = left.pop(e)
                experts.append(e), loads.append(part), ranks.append(r)
                free, room, waiting = max(0.0, free - part), room - 1, waiting - part
        if left and room and free > 1e-9 * limit_s * speeds[r] and waiting > space * (1 + 1e-9):
            e = next(iter(left))  # the largest: it needs a cut sooner or later
            experts.append(e), loads.append(free), ranks.append(r)
            left[e], waiting, copies = left[e] - free, waiting - free, copies + 1
            left = dict(sorted(left.items(), key=lambda item: (-item[1], item[0])))
        if len(left) > places or copies > problem.max_copies:
            return None
    if left and waiting > 1e-6 * sum(problem.loads):
        return None
    for e in left:  # a crumb, or an expert without rows: where the fewest are
        held = np.bincount(ranks, minlength=len(speeds)) + pieces.held(len(speeds))
        open_ranks = [r for r in order if held[r] < problem.capacity[r] and r not in
                      [ranks[k] for k, other in enumerate(experts) if other == e]]
        if e in experts:
            continue
        if not open_ranks:
            return None
        experts.append(e), loads.append(left[e]), ranks.append(min(open_ranks, key=lambda r: (held[r] / speeds[r], r)))
    pieces = add_pieces(pieces, experts, loads, ranks)
    if makespan_of(pieces.rank_P, pieces.load_P, np.zeros(len(speeds)), speeds) > limit_s * (1 + 1e-6):
        search(pieces, problem)
    return pieces


def fill_by_expert(problem: Problem, hot: Hot, limit_s: float) -> Pieces | None:
    """Experts placed one after the other, the largest first, whole where they fit best, else cut over the ranks with most
    room; None if places or copies do not suffice."""
    speeds = np.asarray(problem.speeds, dtype=float)
    pieces, room_W, rows_W, rest = start_pieces(problem, hot)
    safe = np.where(speeds > 0, speeds, 1.0)
    left_W = np.where(speeds > 0, limit_s * speeds - rows_W, -np.inf)
    left_W[room_W <= 0] = -np.inf
    spare, copies = int(room_W.sum()) - len(rest), 0
    experts, loads, ranks = [], [], []
    for e in sorted(rest, key=lambda e: (-problem.loads[e], e)):
        load, parts = problem.loads[e], []
        if left_W.max() >= load * (1 - 1e-9) and np.isfinite(left_W.max()):
            parts = [(int(np.argmin(np.where(left_W >= load * (1 - 1e-9), (left_W - load) / safe, np.inf))), load)]
        else:
            order, missing = np.argsort(-left_W, kind="stable"), load
            for r in order[: 1 + min(spare, problem.max_copies - copies)].tolist():
                if missing <= 1e-9 * load or left_W[r] <= 1e-9 * load:
                    break
                parts.append((r, min(missing, float(left_W[r]))))
                missing -= parts[-1][1]
            if missing > 1e-9 * load or not parts:
                return None
        for r, part in parts:
            experts.append(e), loads.append(part), ranks.append(r)
            room_W[r] -= 1
            left_W[r] = left_W[r] - part if room_W[r] > 0 else -np.inf
        spare, copies = spare - len(parts) + 1, copies + len(parts) - 1
    pieces = add_pieces(pieces, experts, loads, ranks)
    search(pieces, problem)
    return pieces
