"""Every island has all experts and keeps its rows: each is planned for itself, and the plans are put together.

Islands then meet once a step, for gradients and weights, instead of in every layer.
"""

from __future__ import annotations

from typing import Mapping, Sequence

from moedist.placement.plan import LayerPlan


def join_islands(islands: Sequence[int], layers: Mapping[int, LayerPlan], rows: Mapping[int, float]) -> LayerPlan:
    """A layer of the layers of all islands.

    Args:
        islands: of every rank.
        layers: of every island, for its ranks alone, numbered from 0.
        rows: part of all rows that comes from the ranks of each island; they sum to one.

    >>> join_islands([0, 1, 1], {0: LayerPlan.single([0, 0]), 1: LayerPlan.single([0, 1])}, {0: 0.25, 1: 0.75})
    LayerPlan(owners=((0, 1), (0, 2)), shares=((0.25, 0.75), (0.25, 0.75)), islands=(0, 1, 1), targets=())
    """
    members = members_of(islands)
    owners, shares = [], []
    for e in range(next(iter(layers.values())).experts):
        pairs = sorted((members[island][r], rows[island] * share) for island, layer in layers.items()
                       for r, share in zip(layer.owners[e], layer.shares[e]))
        parts = [round(share, 9) for _, share in pairs]  # as JSON keeps them
        largest = parts.index(max(parts))
        parts[largest] = round(parts[largest] + 1 - sum(parts), 9)
        owners.append(tuple(r for r, _ in pairs))
        shares.append(tuple(parts))
    return LayerPlan(tuple(owners), tuple(shares), tuple(islands))


def members_of(islands: Sequence[int]) -> dict[int, list[int]]:
    """Ranks of every island, both ascending."""
    return {island: [r for r, of_rank in enumerate(islands) if of_rank == island] for island in sorted(set(islands))}
