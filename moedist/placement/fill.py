"""Cut experts so that all ranks are done at a given time: two ways to fill ranks.

Both place whole experts where they fit before `limit_s`. `fill_by_expert` goes through the experts and cuts one where it
fits nowhere: few cuts where there is some slack. `fill_by_rank` goes through the ranks and cuts where a rank would not be
full: at most one cut a rank at the bound itself, as McNaughton's wrap-around rule (1959).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Sequence

import numpy as np

from moedist.placement.assign import Pieces, improve
from moedist.placement.cost import seconds
from moedist.placement.problem import Problem

OVER = 1.01  # how much later than asked for is still good, where places are scarce

Placed = tuple[int, float, int]  # expert, rows, rank


def as_pieces(placed: Sequence[Placed]) -> Pieces:
    """Pieces that may go anywhere."""
    experts, loads, ranks = zip(*placed)
    return Pieces(np.array(experts), np.array(loads, dtype=float), np.array(ranks), np.full(len(placed), -1))


def search(pieces: Pieces, problem: Problem, max_changes: int | None = None, max_rounds: int | None = None) -> int:
    """Local search within the problem's limits, in place; see `improve`."""
    islands = None if problem.islands is None else np.asarray(problem.islands)
    return improve(pieces, np.asarray(problem.speeds, dtype=float), np.asarray(problem.capacity), islands, max_changes,
                   max_rounds)


def seconds_of(pieces: Pieces, speeds: np.ndarray) -> float:
    """Makespan of pieces as they are cut."""
    return float(seconds(pieces.rows(len(speeds)), speeds).max())


def fill_by_rank(problem: Problem, limit_s: float) -> Pieces | None:
    """Ranks filled up to a time one after the other, the fastest first; None if places or copies do not suffice.

    A rank takes the largest experts that fit whole. Where the ranks after it could not take the rest, it is filled to the
    brim with a part of one more, whose other part stays to be placed: one cut a rank at most, as in McNaughton's rule.
    """
    speeds = np.asarray(problem.speeds, dtype=float)
    order = sorted((r for r, room in enumerate(problem.capacity) if room > 0), key=lambda r: (-speeds[r], r))
    left = sorted((-load, e) for e, load in enumerate(problem.loads))  # the largest first
    places, space, waiting, copies = sum(problem.capacity), limit_s * float(speeds[order].sum()), sum(problem.loads), 0
    placed: list[Placed] = []
    for r in order:
        room, free = problem.capacity[r], limit_s * float(speeds[r])
        places, space = places - room, space - free
        while room and (k := bisect_left(left, (-free * (1 + 1e-9), -1))) < len(left):  # the largest that fits
            minus_part, e = left.pop(k)
            placed.append((e, -minus_part, r))
            free, room, waiting = max(0.0, free + minus_part), room - 1, waiting + minus_part
        if left and room and free > 1e-9 * limit_s * speeds[r] and waiting > space * (1 + 1e-9):
            minus_load, e = left.pop(0)  # the largest: it needs a cut sooner or later
            placed.append((e, free, r))
            insort(left, (minus_load + free, e))
            waiting, copies = waiting - free, copies + 1
        if len(left) > places or copies > problem.max_copies:
            return None
    if left and waiting > 1e-6 * sum(problem.loads):
        return None
    done = {e for e, _, _ in placed}
    for minus_load, e in left:  # crumbs, and experts without rows
        if e in done:
            continue
        held = np.bincount([r for _, _, r in placed], minlength=len(speeds))
        open_ranks = [r for r in order if held[r] < problem.capacity[r]]
        if not open_ranks:
            return None
        placed.append((e, -minus_load, min(open_ranks, key=lambda r: (held[r] / speeds[r], r))))
    pieces = as_pieces(placed)
    if seconds_of(pieces, speeds) > limit_s * (1 + 1e-6):
        search(pieces, problem)
    return pieces


def fill_by_expert(problem: Problem, limit_s: float) -> Pieces | None:
    """Experts placed one after the other, the largest first, whole where they fit best, else cut over the ranks with most
    room; None if places or copies do not suffice.

    Where places are scarce, a small expert may find only places on ranks that are full: it goes where that does the least
    harm, and local search has to make up for it.
    """
    speeds = np.asarray(problem.speeds, dtype=float)
    room_W, safe = np.array(problem.capacity), np.where(speeds > 0, speeds, 1.0)
    left_W = np.where(room_W > 0, limit_s * speeds, -np.inf)
    spare, copies, over = int(room_W.sum()) - len(problem.loads), 0, False
    scarce = any(0 < room < len(problem.loads) for room in problem.capacity)
    placed: list[Placed] = []
    for e in sorted(range(len(problem.loads)), key=lambda e: (-problem.loads[e], e)):
        load, parts = problem.loads[e], []
        if left_W.max() >= load * (1 - 1e-9):
            parts = [(int(np.argmin(np.where(left_W >= load * (1 - 1e-9), (left_W - load) / safe, np.inf))), load)]
        else:
            order, missing = np.argsort(-left_W, kind="stable"), load
            for r in order[: 1 + min(spare, problem.max_copies - copies)].tolist():
                if missing <= 1e-9 * load or left_W[r] <= 1e-9 * load:
                    break
                parts.append((r, min(missing, float(left_W[r]))))
                missing -= parts[-1][1]
            if missing > 1e-9 * load or not parts:
                if load > (limit_s * speeds.max() if scarce else 0.0):
                    return None
                parts, over = [(int(np.argmax((left_W - load) / safe)), load)], True
        for r, part in parts:
            placed.append((e, part, r))
            room_W[r] -= 1
            left_W[r] = left_W[r] - part if room_W[r] > 0 else -np.inf
        spare, copies = spare - len(parts) + 1, copies + len(parts) - 1
    pieces = as_pieces(placed)
    search(pieces, problem)
    return None if over and seconds_of(pieces, speeds) > limit_s * OVER else pieces
