"""Whole sequences for ranks of unequal speed."""

from __future__ import annotations

import heapq
from typing import Sequence

from moedist.errors import PlacementError


def plan_batch(total: int, speeds: Sequence[float], caps: Sequence[int] | None = None) -> list[int]:
    """Sequences of every rank, [W], so that the slowest is done as early as can be.

    One sequence after the other goes to the rank that would be done with it first, ties to the lower rank; with equal
    sequences this is optimal (an exchange argument: no other rank could take the last one of the slowest earlier).

    Args:
        speeds: sequences per second of every rank, in any unit; 0: it gets none.
        caps: most sequences of every rank.

    Raises:
        PlacementError: the caps do not hold the batch.

    >>> plan_batch(30, [8, 4, 2, 1])
    [16, 8, 4, 2]
    """
    room = [total if s > 0 else 0 for s in speeds]
    if caps is not None:
        room = [min(r, max(0, c)) for r, c in zip(room, caps)]
    if sum(room) < total:
        raise PlacementError(f"a forward pass of {total} sequences does not fit: the ranks can take {room}, {sum(room)} in "
                             "all; raise train.accumulate, lower train.batch, or set placement.max_batch")
    counts = [0] * len(speeds)
    heap = [(1 / s, r) for r, s in enumerate(speeds) if room[r] > 0]
    heapq.heapify(heap)
    for _ in range(total):
        _, r = heapq.heappop(heap)
        counts[r] += 1
        if counts[r] < room[r]:
            heapq.heappush(heap, ((counts[r] + 1) / speeds[r], r))
    return counts
