"""What a router's loads mean for ranks that are not alike: the expert phase on four of them, over its bound."""

from __future__ import annotations

from typing import Callable, Mapping

import torch

from moedist.placement import LayerPlan, Problem, makespan

SPEEDS = (4.0, 2.0, 1.0, 1.0)  # expert rows per second of each rank, relative


def makespan_over_bound(place: Callable[[Problem], LayerPlan], trained: Mapping[int, torch.Tensor],
                        held_out: Mapping[int, torch.Tensor]) -> float:
    """Sum over layers of max_r(load_r / s_r), over that of sum(loads) / sum(speeds), at `SPEEDS`.

    Experts are placed by the loads of training (`moedist.placement.plan_layer`: by the planner, without copies;
    `equal_layer`: as many on each), and take those of held-out text: a router whose loads drift pays for it.

    Args:
        trained, held_out: layer -> rows of every expert, [E].
    """
    spans = bounds = 0.0
    for layer, load_E in held_out.items():
        # an expert without a row counts for the planner as a hundredth of one, or all such would go to one rank
        expected = tuple(max(rows, 0.01) for rows in trained[layer].tolist())
        met = Problem(tuple(load_E.tolist()), SPEEDS)
        spans += makespan(place(Problem(expected, SPEEDS)), met)
        bounds += met.fluid_s
    return spans / bounds if bounds else 1.0
