"""Which part of the rows every expert should get for all ranks to be done at the same time, where experts stay as they are.

The planner moves experts to where the loads want them; a router that balances can also be told which loads the ranks want.
Both meet in the middle, and do not chase each other: targets are made of a plan and of the speeds that it was made for, and
change only with it; within a rank they are equal, so that they add no unevenness between experts of one rank. The planner
plans for the loads that result. While loads go from those that a plan was made for to its targets, the load of a rank is
in between the two, and each of them fills the ranks by speed: on the way there is nothing that a move could save.

E experts, W ranks.
"""

from __future__ import annotations

from typing import Sequence

import numpy as np

from moedist.errors import PlacementError
from moedist.placement.plan import LayerPlan

ROUNDS = 200  # of the iteration; where no expert has copies one is exact


def target_shares(layer: LayerPlan, speeds: Sequence[float], costs: Sequence[float] | None = None) -> tuple[float, ...]:
    """The part of the rows of every expert, [E], with which the work of each rank is in proportion to its speed.

    Rank r has the part S_r = s_r / sum(s) of all work to get, over the ranks that have experts, and an expert gives each of
    its placements its share a_er of the work w_e: wanted is w with sum_e w_e a_er = S_r. Without copies this is S_r over
    the number of experts of the rank. With copies there may be many w or none; the iteration of Richardson and Lucy
    (Lucy 1974, doi 10.1086/111605), from equal parts, w_e <- w_e sum_r a_er S_r / L_r where L is what w gives the ranks,
    goes to one with the least Kullback-Leibler divergence of L from S.

    Args:
        speeds: rows per second of every rank, [W].
        costs: work of a row of every expert, relative (compressed ones cost less); None: equal.

    Raises:
        PlacementError: a rank without speed has experts.

    >>> target_shares(LayerPlan.single([0, 0, 1, 2]), [2, 1, 1])
    (0.25, 0.25, 0.25, 0.25)
    >>> target_shares(LayerPlan.single([0, 0, 1, 1]), [3, 1])
    (0.375, 0.375, 0.125, 0.125)
    """
    shares_EW = np.zeros((layer.experts, len(speeds)))
    for e, (ranks, parts) in enumerate(zip(layer.owners, layer.shares)):
        shares_EW[e, list(ranks)] = parts
    holds_W = shares_EW.sum(0) > 0
    speeds_W = np.asarray(speeds, dtype=float)
    if (stuck := np.flatnonzero(holds_W & (speeds_W <= 0))).size:
        raise PlacementError(f"router.balance_to=speed: rank {stuck[0]} has experts "
                             f"{layer.experts_of_rank(int(stuck[0]))[:8]} but speed {speeds_W[stuck[0]]:g}, so they should "
                             "get no rows; give it no experts, or a speed above 0")
    wanted_W = np.where(holds_W, speeds_W, 0.0)
    wanted_W /= wanted_W.sum()
    work_E = np.full(layer.experts, 1 / layer.experts)
    for _ in range(ROUNDS if layer.copies else 1):
        given_W = work_E @ shares_EW
        work_E = work_E * (shares_EW @ np.where(holds_W, wanted_W / np.where(holds_W, given_W, 1.0), 0.0))
    rows_E = work_E / (1.0 if costs is None else np.asarray(costs, dtype=float))
    return tuple(max(float(q), 1e-6) for q in (rows_E / rows_E.sum()).round(9))


def furthest(old: Sequence[float], new: Sequence[float]) -> float:
    """The largest relative change of a target; infinite where there were none."""
    if len(old) != len(new):
        return float("inf")
    return max((abs(b / a - 1) for a, b in zip(old, new)), default=0.0)
