"""What a placement costs: rows of every rank, the makespan, and what no placement can beat. E experts, W ranks."""

from __future__ import annotations

from typing import Sequence

import numpy as np

from moedist.placement.plan import LayerPlan
from moedist.placement.problem import Problem

COPIES_SAVE = 5e-3


def rank_loads(layer: LayerPlan, loads: Sequence[float], ranks: int) -> np.ndarray:
    """Rows of every rank, [W]: each expert's rows cut by its shares."""
    owner_P = [r for owners in layer.owners for r in owners]
    rows_P = [load * share for load, shares in zip(loads, layer.shares) for share in shares]
    return np.bincount(owner_P, weights=rows_P, minlength=ranks)


def seconds(rows_W: np.ndarray, speeds: Sequence[float]) -> np.ndarray:
    """Time of every rank, [W]; infinite where a rank without speed has rows."""
    speeds_W = np.asarray(speeds, dtype=float)
    return np.where(rows_W > 0, rows_W / np.where(speeds_W > 0, speeds_W, 1.0), 0.0) \
        + np.where((rows_W > 0) & (speeds_W <= 0), np.inf, 0.0)


def makespan(layer: LayerPlan, problem: Problem) -> float:
    """Seconds that the slowest rank takes."""
    return float(seconds(rank_loads(layer, problem.loads, len(problem.speeds)), problem.speeds).max())


def cost(layer: LayerPlan, problem: Problem) -> float:
    """Seconds with the price of copies."""
    return makespan(layer, problem) + copy_price(problem) * layer.copies


def copy_price(problem: Problem) -> float:
    """Seconds that a copy must save; it is never free: W copies must save `COPIES_SAVE` of the bound."""
    return max(problem.copy_cost_s, COPIES_SAVE * problem.fluid_s / len(problem.speeds))


def bound(problem: Problem) -> float:
    """Seconds that no placement of this problem can beat.

    All ranks busy equally long: sum(f) / sum(s). Where no expert may have copies also, for every k, the k largest experts
    on the k fastest ranks (each is on one rank): sum of the k largest loads over the sum of the k largest speeds.

    >>> bound(Problem((6.0, 1.0, 1.0), (2.0, 2.0))), bound(Problem((6.0, 1.0, 1.0), (2.0, 2.0), max_copies=1))
    (3.0, 2.0)
    """
    if problem.island_rows is not None:
        return max(bound(of_island) for of_island in problem.of_islands.values())
    if problem.most_copies:
        return problem.fluid_s
    loads = np.sort(np.asarray(problem.loads, dtype=float))[::-1]
    speeds = np.sort([s for s, room in zip(problem.speeds, problem.capacity) if room > 0])[::-1]
    k = min(len(loads), len(speeds))
    return max(problem.fluid_s, float((loads.cumsum()[:k] / speeds.cumsum()[:k]).max()))
