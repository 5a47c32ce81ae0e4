"""Cut a whole number into whole parts in given proportions."""

from __future__ import annotations

from typing import Sequence

from moedist.errors import PlacementError


def equal_counts(total: int, parts: int) -> list[int]:
    """`total` things in `parts` piles as equal as possible, larger piles first.

    >>> equal_counts(8, 3)
    [3, 3, 2]
    """
    return [total // parts + (i < total % parts) for i in range(parts)]


def split_batch(total: int, shares: Sequence[float]) -> list[int]:
    """`total` sequences in proportion to `shares`, by largest remainder (Hamilton's method), ties to the lower rank.

    A rank may get none; the parts always sum to `total`.

    >>> split_batch(7, [2, 1, 1])
    [3, 2, 2]

    Raises:
        PlacementError: a share is negative or all are zero.
    """
    if not shares or min(shares) < 0 or sum(shares) <= 0:
        raise PlacementError(f"batch shares {list(shares)} must be 0 or more, and one of them above 0")
    exact = [total * share / sum(shares) for share in shares]
    parts = [int(e) for e in exact]
    by_remainder = sorted(range(len(parts)), key=lambda r: (parts[r] - exact[r], r))
    for r in by_remainder[: total - sum(parts)]:
        parts[r] += 1
    return parts
