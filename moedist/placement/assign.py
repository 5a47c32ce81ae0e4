"""Whole experts on unequal ranks: longest processing time first, bin packing, and local search.

Placing experts of given loads on ranks of given speeds is scheduling on uniform machines (Q||Cmax, Graham et al. 1979).
Everything here works on pieces: a piece is the part of an expert's rows that one rank computes, the whole expert where it
has no copies. P pieces, W ranks. Ties go to the lower index, so equal input gives equal plans everywhere.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Sequence

import numpy as np


@dataclass
class Pieces:
    """Pieces and where they are. A piece with an island stays in it (those of `hot_copies`); -1: it may go anywhere."""

    expert_P: np.ndarray
    load_P: np.ndarray
    rank_P: np.ndarray
    island_P: np.ndarray

    @classmethod
    def whole(cls, loads: Sequence[float], ranks: Sequence[int]) -> "Pieces":
        n = len(loads)
        return cls(np.arange(n), np.asarray(loads, dtype=float), np.asarray(ranks, dtype=int), np.full(n, -1))

    def rows(self, ranks: int) -> np.ndarray:
        """[W] rows of every rank."""
        return np.bincount(self.rank_P, weights=self.load_P, minlength=ranks)

    def held(self, ranks: int) -> np.ndarray:
        """[W] pieces of every rank."""
        return np.bincount(self.rank_P, minlength=ranks)


def lpt(loads: Sequence[float], speeds: np.ndarray, room_W: np.ndarray, rows_W: np.ndarray) -> np.ndarray:
    """[E] ranks: the largest expert first, each to the rank that would be done with it first.

    Longest processing time first (Graham 1969) for uniform machines (Gonzalez, Ibarra and Sahni 1977: at most twice the
    least makespan, usually a few percent). Experts without rows go where the fewest are for the speed.

    Args:
        room_W: experts that each rank still takes, enough for all in sum.
        rows_W: rows that ranks have already.
    """
    loads_E, rows, room = np.asarray(loads, dtype=float), rows_W.astype(float).copy(), room_W.copy()
    held, owners = np.zeros(len(rows)), np.zeros(len(loads_E), dtype=int)
    safe = np.where(speeds > 0, speeds, 1.0)
    for e in np.argsort(-loads_E, kind="stable"):
        done = np.where((room > 0) & (speeds > 0), (rows + loads_E[e]) / safe, np.inf)
        near = np.flatnonzero(done <= done.min() * (1 + 1e-12))
        r = near[np.argmin((held[near] + 1) / safe[near])]
        owners[e] = r
        rows[r] += loads_E[e]
        room[r] -= 1
        held[r] += 1
    return owners


def best_fit(loads: Sequence[float], speeds: np.ndarray, room_W: np.ndarray, rows_W: np.ndarray, limit_s: float) -> np.ndarray:
    """[E] ranks, -1 where an expert fits nowhere: the largest first, each where it leaves the least time before `limit_s`."""
    loads_E, rows, room = np.asarray(loads, dtype=float), rows_W.astype(float).copy(), room_W.copy()
    owners = np.full(len(loads_E), -1)
    safe = np.where(speeds > 0, speeds, 1.0)
    for e in np.argsort(-loads_E, kind="stable"):
        left = np.where((room > 0) & (speeds > 0), limit_s - (rows + loads_E[e]) / safe, -np.inf)
        left[left < -1e-12 * limit_s] = np.inf  # does not fit
        r = int(np.argmin(left))
        if np.isfinite(left[r]):
            owners[e] = r
            rows[r] += loads_E[e]
            room[r] -= 1
    return owners


def improve(pieces: Pieces, speeds: np.ndarray, capacity_W: np.ndarray, island_W: np.ndarray | None = None,
            max_changes: int | None = None, max_rounds: int | None = None) -> int:
    """Shorten the makespan by moving a piece off the slowest rank, or swapping one with a piece elsewhere, while that helps.

    Changes `pieces` in place; stops where neither helps, or after `max_changes` pieces have changed rank, or after
    `max_rounds` moves and swaps.

    Returns:
        Pieces that changed rank.
    """
    ranks, changed = len(speeds), 0
    rows, held = pieces.rows(ranks), pieces.held(ranks)
    holders_EW = np.zeros((int(pieces.expert_P.max(initial=0)) + 1, ranks), dtype=bool)
    holders_EW[pieces.expert_P, pieces.rank_P] = True
    islands = np.zeros(ranks, dtype=int) if island_W is None else island_W
    away_PW = (pieces.island_P[:, None] >= 0) & (pieces.island_P[:, None] != islands) if (pieces.island_P >= 0).any() else None
    safe = np.where(speeds > 0, speeds, np.inf)
    for _ in itertools.count() if max_rounds is None else range(max_rounds):
        times = rows / safe
        b = int(np.argmax(times))
        here = np.flatnonzero((pieces.rank_P == b) & (pieces.load_P > 0))
        budget = 2 if max_changes is None else max_changes - changed
        if not len(here) or budget < 1:
            return changed
        best, i, target, j = _best_move(pieces, here, b, rows, safe, holders_EW, (held >= capacity_W) | (speeds <= 0), away_PW)
        if budget >= 2:
            swap = _best_swap(pieces, here, b, rows, safe, holders_EW, away_PW)
            if swap[0] < best * (1 - 1e-9):
                best, i, j = swap
                target = int(pieces.rank_P[j])
        if not best < times[b] * (1 - 1e-9):
            return changed
        load = pieces.load_P[i] - (pieces.load_P[j] if j is not None else 0.0)
        rows[b], rows[target] = rows[b] - load, rows[target] + load
        pieces.rank_P[i] = target
        holders_EW[pieces.expert_P[i], [b, target]] = False, True
        changed += 1
        if j is None:
            held[b], held[target] = held[b] - 1, held[target] + 1
        else:
            pieces.rank_P[j] = b
            holders_EW[pieces.expert_P[j], [target, b]] = False, True
            changed += 1
    return changed


def _best_move(pieces: Pieces, here: np.ndarray, b: int, rows: np.ndarray, safe: np.ndarray, holders_EW: np.ndarray,
               full_W: np.ndarray, away_PW: np.ndarray | None) -> tuple[float, int, int, None]:
    """(time of the later of the two ranks, piece, its new rank, None) of the best move of a piece of rank b."""
    load_I = pieces.load_P[here][:, None]
    after_IW = np.maximum((rows + load_I) / safe, (rows[b] - load_I) / safe[b])
    after_IW[:, full_W] = np.inf
    after_IW[holders_EW[pieces.expert_P[here]]] = np.inf  # there is a piece of this expert already
    if away_PW is not None:
        after_IW[away_PW[here]] = np.inf
    k = int(np.argmin(after_IW))
    i, target = divmod(k, len(rows))
    return float(after_IW[i, target]), int(here[i]), target, None


def _best_swap(pieces: Pieces, here: np.ndarray, b: int, rows: np.ndarray, safe: np.ndarray,
               holders_EW: np.ndarray, away_PW: np.ndarray | None) -> tuple[float, int, int]:
    """(time of the later of the two ranks, piece of rank b, piece elsewhere) of the best swap."""
    there = np.flatnonzero(pieces.rank_P != b)
    if not len(there):
        return np.inf, -1, -1
    other = pieces.rank_P[there]
    more_IJ = pieces.load_P[here][:, None] - pieces.load_P[there]
    after_IJ = np.maximum((rows[other] + more_IJ) / safe[other], (rows[b] - more_IJ) / safe[b])
    after_IJ[more_IJ <= 0] = np.inf
    after_IJ[holders_EW[pieces.expert_P[here]][:, other]] = np.inf  # the other rank has this expert already
    after_IJ[:, holders_EW[pieces.expert_P[there], b]] = np.inf
    if away_PW is not None:
        after_IJ[away_PW[here][:, other]] = np.inf
        after_IJ[:, away_PW[there, b]] = np.inf
    k = int(np.argmin(after_IJ))
    i, j = divmod(k, len(there))
    return float(after_IJ[i, j]), int(here[i]), int(there[j])

