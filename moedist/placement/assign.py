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

    def joined(self, experts: Sequence[int], loads: Sequence[float], ranks: np.ndarray) -> "Pieces":
        """With more whole experts."""
        return Pieces(np.concatenate([self.expert_P, np.asarray(experts, dtype=int)]), np.concatenate([self.load_P, loads]),
                      np.concatenate([self.rank_P, ranks]), np.concatenate([self.island_P, np.full(len(experts), -1)]))

    def rows(self, ranks: int) -> np.ndarray:
        """[W] rows of every rank."""
        return np.bincount(self.rank_P, weights=self.load_P, minlength=ranks)

    def copies(self, experts: int) -> int:
        """Pieces over one per expert."""
        return len(self.expert_P) - experts

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
    per_row_W, busy_W, room = _start(speeds, room_W, rows_W)
    held, owners = np.zeros(len(speeds)), np.zeros(len(loads), dtype=int)
    for e in np.argsort(-np.asarray(loads, dtype=float), kind="stable").tolist():
        done_W = busy_W + loads[e] * per_row_W
        near = (done_W <= done_W.min() * (1 + 1e-12)).nonzero()[0]
        r = near[0] if len(near) == 1 else near[((held[near] + 1) * per_row_W[near]).argmin()]
        owners[e] = r
        held[r] += 1
        room[r] -= 1
        busy_W[r] = done_W[r] if room[r] > 0 else np.inf
    return owners


def best_fit(loads: Sequence[float], speeds: np.ndarray, room_W: np.ndarray, rows_W: np.ndarray, limit_s: float) -> np.ndarray:
    """[E] ranks, -1 where an expert fits nowhere: the largest first, each where it leaves the least time before `limit_s`."""
    per_row_W, busy_W, room = _start(speeds, room_W, rows_W)
    owners = np.full(len(loads), -1)
    for e in np.argsort(-np.asarray(loads, dtype=float), kind="stable").tolist():
        done_W = busy_W + loads[e] * per_row_W
        done_W[done_W > limit_s * (1 + 1e-12)] = -1.0  # does not fit
        r = done_W.argmax()
        if done_W[r] >= 0:
            owners[e] = r
            room[r] -= 1
            busy_W[r] = done_W[r] if room[r] > 0 else np.inf
    return owners


def _start(speeds: np.ndarray, room_W: np.ndarray, rows_W: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """(seconds per row, seconds that each rank is busy with its rows: forever where it takes no experts; its room), [W]."""
    per_row_W = 1 / np.where(speeds > 0, speeds, 1.0)
    return per_row_W, np.where((room_W > 0) & (speeds > 0), rows_W * per_row_W, np.inf), room_W.tolist()


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
    safe = np.where(speeds > 0, speeds, 1e-9 * speeds.max())  # rows on a rank without speed leave it first
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

